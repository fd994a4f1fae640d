"""JSON values of answers: their leaves, and when two of them are the same. Pure."""

import json
from collections.abc import Iterator
from typing import Any

from finetune_pipeline.schemas import children
from finetune_pipeline.words import as_displayed, visible_form

Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the (path, value) pairs of a JSON value; lists by index; an empty list or object is a leaf.

    >>> list(leaves({"wall": {"thickness_mm": 150}, "layers": ["brick"]}))
    [(('wall', 'thickness_mm'), 150), (('layers', 0), 'brick')]
    """
    parts = children(value)
    if not parts:
        yield path, value
    for key, child in parts:
        yield from leaves(child, (*path, key))


def same_value(expected: Any, stated: Any) -> bool:
    """Return whether two leaves are the same: 150 is 150.0, "Oregon " is "oregon", but true is not 1."""
    if isinstance(expected, str) and isinstance(stated, str):
        return visible_form(expected) == visible_form(stated)
    return json_equal(expected, stated)


def json_equal(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal: numbers by value, true is not 1, texts as they are displayed."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, str) and isinstance(right, str):
        return as_displayed(left) == as_displayed(right)
    return bool(left == right)


def count_hallucinated(expected: Any, stated: Any) -> tuple[int, int]:
    """Return (stated, hallucinated): the leaves of an answer, and those at a path that `expected` does not have.

    A null states nothing, so a "not given" is no hallucination. Neither does an answer without any path, such as {}.
    """
    known = {path[:length] for path, _ in leaves(expected) for length in range(len(path) + 1)}
    found = [path for path, value in leaves(stated) if path and value is not None]
    return len(found), sum(path not in known for path in found)


def answer_text(value: Any) -> str:
    """Return an answer as text: a text as it is, any other value as JSON with sorted keys."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
