"""Wording of numbers and values in messages to people."""

from collections.abc import Mapping
from typing import Any


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 event", "2,000 events"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def kind_of(value: Any) -> str:
    """Return the kind of a value of JSON or YAML, with its article: "a list"."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int | float):
        return "a number"
    return "null" if value is None else "a text"


def sentence(text: str) -> str:
    """Return a message as a full sentence: with a capital letter and a full stop.

    A name at the start, such as that of a setting or a file, stays as it is; an option at the end gets no stop.
    """
    first = text.partition(" ")[0]
    if first.isalpha() and first.islower() and " " in text:
        text = text[0].upper() + text[1:]
    ends = text[-1:].isalnum() or text.endswith((")", "`", "'", '"'))
    return f"{text}." if ends and not text.rpartition(" ")[2].startswith("--") else text
