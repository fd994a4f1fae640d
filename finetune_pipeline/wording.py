"""Wording of numbers and values in messages to people."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

_SHOWN_REASONS = 3
_MAX_REASONS = 1_000


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 event", "2,000 events"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def count_reason(reasons: Counter[str], reason: str) -> None:
    """Count a reason why something is left out. After 1,000 different ones, others are not counted."""
    if reason in reasons or len(reasons) < _MAX_REASONS:
        reasons[reason] += 1


def counted_reasons(reasons: Counter[str]) -> str:
    """Return the most frequent reasons, each with its count: "2: is empty; 1: not JSON; 4: others"."""
    shown = reasons.most_common(_SHOWN_REASONS)
    others = reasons.total() - sum(count for _, count in shown)
    return "; ".join([f"{count:,}: {reason}" for reason, count in shown] + ([f"{others:,}: others"] if others else []))


def first_line(text: str) -> str:
    """Return the first line of a message of a library, cut to 300 characters."""
    return text.strip().partition("\n")[0][:300]


def error_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has no message."""
    return first_line(str(error)) or type(error).__name__


def duration(seconds: float) -> str:
    """Return a duration in a unit that suits its length: "45 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
