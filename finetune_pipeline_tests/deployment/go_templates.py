"""Render the part of Go's text/template that chat templates use: if, else, range, eq, variables, fields, trimming."""

import json
import re
from collections.abc import Mapping
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,]+')

Node = str | tuple[str, str, list[Any], list[Any]]


class TemplateError(ValueError):
    """The template is invalid, or uses something that this module does not know."""


def render(template: str, data: Mapping[str, Any]) -> str:
    """Return the text of a template, executed on `data`."""
    nodes, rest = _parse(_tokens(template), 0, set())
    if rest is not None:
        raise TemplateError(f"unexpected {rest!r}")
    return _execute(nodes, data, {"$": data})


def _tokens(template: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        tokens.append(("text", text.rstrip() if match[1] else text))
        tokens.append(("action", match[2]))
        position, trim = match.end(), bool(match[3])
    text = template[position:]
    tokens.append(("text", text.lstrip() if trim else text))
    if "{{" in text:
        raise TemplateError(f"an action without its end in {text!r}")
    return tokens


def _parse(tokens: list[tuple[str, str]], depth: int, ends: set[str]) -> tuple[list[Node], str | None]:
    """Parse up to one of `ends`; `tokens` is consumed from its front."""
    nodes: list[Node] = []
    while tokens:
        kind, text = tokens.pop(0)
        if kind == "text":
            nodes.append(text)
            continue
        word = text.split(None, 1)[0] if text else ""
        if word in {"end", "else"}:
            if word not in ends:
                raise TemplateError(f"unexpected {text!r}")
            return nodes, text
        if word in {"if", "range"}:
            nodes.append(_branch(word, text.split(None, 1)[1], tokens, depth))
        else:
            nodes.append(("write", text, [], []))
    if ends:
        raise TemplateError("an if or range without its end")
    return nodes, None


def _branch(word: str, pipeline: str, tokens: list[tuple[str, str]], depth: int) -> Node:
    body, end = _parse(tokens, depth + 1, {"end", "else"})
    otherwise: list[Node] = []
    if end != "end":
        rest = (end or "").removeprefix("else").strip()
        if rest.startswith("if "):
            otherwise = [_branch("if", rest.removeprefix("if "), tokens, depth)]
        else:
            otherwise, _ = _parse(tokens, depth + 1, {"end"})
    return word, pipeline, body, otherwise


def _execute(nodes: list[Node], dot: Any, variables: dict[str, Any]) -> str:
    written = []
    for node in nodes:
        if isinstance(node, str):
            written.append(node)
            continue
        kind, pipeline, body, otherwise = node
        if kind == "write":
            written.append(str(_value(pipeline, dot, variables)))
        elif kind == "if":
            chosen = body if _value(pipeline, dot, variables) else otherwise
            written.append(_execute(chosen, dot, variables))
        else:
            names, _, source = pipeline.rpartition(":=")
            declared = [name.strip() for name in names.split(",") if name.strip()]
            items = _value(source.strip(), dot, variables) or []
            for index, item in enumerate(items):
                values = dict(zip(reversed(declared), [item, index], strict=False))  # $item, or $index and $item
                written.append(_execute(body, item, {**variables, **values}))
            if not items:
                written.append(_execute(otherwise, dot, variables))
    return "".join(written)


def _value(pipeline: str, dot: Any, variables: dict[str, Any]) -> Any:
    words = _WORD.findall(pipeline)
    if words and words[0] == "eq":
        left, right = (_operand(word, dot, variables) for word in words[1:])
        return left == right
    if len(words) != 1:
        raise TemplateError(f"unknown pipeline {pipeline!r}")
    return _operand(words[0], dot, variables)


def _operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    head, *fields = word.split(".")
    if head and head not in variables:
        raise TemplateError(f"undefined {word!r}")
    value = variables[head] if head else dot
    for field in filter(None, fields):
        if field.lower() in {"role", "content"}:
            field = field.lower()
        value = value.get(field, "") if isinstance(value, Mapping) else ""
    return value
