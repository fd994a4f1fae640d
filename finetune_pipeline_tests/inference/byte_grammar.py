"""Compile JSON Schemas for a vocabulary with one token for each byte."""

import json

import llguidance

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import compile_grammar

BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar, value, text=None):
    """Return whether a model could generate this value, token by token."""
    matcher = grammar.matcher()
    text = json.dumps(value, ensure_ascii=False) if text is None else text
    for byte in text.encode():
        if not matcher.allowed()[byte]:
            return False
        matcher.accept(byte)
    if not matcher.allowed()[BYTES.eos_token]:
        return False
    try:
        grammar.check(text)
    except RequestRefused:
        return False
    return True


def check(schema, valid=(), invalid=()):
    grammar = compile_grammar(BYTES, schema)
    assert [value for value in valid if not accepts(grammar, value)] == [], "a valid value is not accepted"
    assert [value for value in invalid if accepts(grammar, value)] == [], "an invalid value is accepted"


def written(value, order):
    """Return a value with its keys in the schema's order, and integers without a decimal point."""
    if isinstance(value, dict):
        positions = {name: position for position, name in enumerate(order)}
        names = sorted(value, key=lambda name: positions.get(name, len(order)))
        return {name: written(value[name], order) for name in names}
    if isinstance(value, list):
        return [written(part, order) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
