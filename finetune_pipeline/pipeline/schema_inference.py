"""Infer the JSON Schema of answers from examples: types, enumerations, required properties. Pure.

The schema accepts every answer that it was inferred from. It is as strict as the examples allow, so that a wrong name
or a missing property is found; a person widens it where the task allows more than its examples show.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune_pipeline.schemas import Schema

MAX_ENUM = 50
"""Most values of an enumeration."""

_MAX_ENUM_CHARS = 100  # a longer text is prose
_REPEATS = 4  # mean occurrences of each value
_UNSEEN = 0.02
_MAX_PROPERTIES = 200  # an object with more names is a map whose names are data
_MAX_DEPTH = 20  # deeper values are not described
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


def infer_schema(answers: Sequence[dict[str, Any]]) -> Schema:
    """Return the JSON Schema (draft 2020-12) of these answers."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_infer(answers, 0)}


def is_closed_set(texts: Sequence[str]) -> bool:
    """Return whether texts look like all values of a closed set, such as labels, so that a new value is unlikely.

    There are few values, they repeat, and at most 2% of the texts are of a value that occurs once: that fraction
    estimates the probability that the next text has a value not seen yet (Good 1953, "The Population Frequencies of
    Species and the Estimation of Population Parameters"). Values that differ only in case are copied from prompts.
    """
    counts = Counter(texts)
    once = sum(count == 1 for count in counts.values())
    has_one_spelling = len({text.casefold() for text in counts}) == len(counts)
    return repeats(texts) and once <= _UNSEEN * len(texts) and has_one_spelling


def repeats(texts: Sequence[str]) -> bool:
    """Return whether texts are short, of at most 50 values, and occur at least 4 times each on average."""
    values = {*texts}
    short = all(len(text) <= _MAX_ENUM_CHARS for text in values)
    return 0 < len(values) <= MAX_ENUM and len(texts) >= _REPEATS * len(values) and short


def _infer(values: Sequence[Any], depth: int) -> Schema:
    types = {_type_of(value) for value in values}
    if "number" in types:
        types.discard("integer")
    named = [name for name in _TYPES if name in types]
    if not named or depth > _MAX_DEPTH:
        return {}
    schema: Schema = {"type": named[0] if len(named) == 1 else named}
    texts = [value for value in values if isinstance(value, str)]
    if types <= {"string", "null"} and is_closed_set(texts):
        schema["enum"] = [*sorted({*texts}), *([None] if "null" in types else [])]
    if objects := [value for value in values if isinstance(value, dict)]:
        schema |= _infer_object(objects, depth)
    if elements := [element for value in values if isinstance(value, list) for element in value]:
        schema["items"] = _infer(elements, depth + 1)
    return schema


def _infer_object(objects: Sequence[dict[str, Any]], depth: int) -> Schema:
    properties: dict[str, list[Any]] = {}  # in the order in which they first occur
    for value in objects:
        for name, child in value.items():
            properties.setdefault(name, []).append(child)
    if len(properties) > _MAX_PROPERTIES:
        return {"additionalProperties": _infer([child for found in properties.values() for child in found], depth + 1)}
    schema: Schema = {"properties": {name: _infer(found, depth + 1) for name, found in properties.items()}}
    if required := [name for name, found in properties.items() if len(found) == len(objects)]:
        schema["required"] = required
    return {**schema, "additionalProperties": False}


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    if value is None:
        return "null"
    return "object" if isinstance(value, dict) else "array"
