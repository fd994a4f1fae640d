"""Scores of one answer. Pure; the counts are integers, so that a comparison of two models is exact.

`parameters` counts the values of the expected JSON that the answer has. `rouge1` is ROUGE-1 recall with the answer cut
to the expected length (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"). `exact` counts answers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import InvalidJsonError, Rule, Schema, children, compile_schema, parse_json

Metric = Literal["parameters", "rouge1", "exact"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of one answer against the expected one."""

    correct: int  # of `total`; the gate counts these
    total: int
    exact: bool
    valid: bool  # JSON that passes the output schema, or a non-empty text
    compliant: bool | None  # passes every rule; None if the loop has no rules
    stated: int  # values that the answer states; 0 for texts
    hallucinated: int  # stated values at paths that the expected answer does not have
    failed_rules: tuple[str, ...] = ()  # ids of the failed rules
    problem: str = ""  # why it is not valid


class Scorer:
    """Scores the answers of one loop; schema and rules are compiled once.

    Args:
        metric: what `Scores.correct` counts.
        schema: the output schema; with one, answers are JSON.
        rules: compliance rules on the answer's JSON, or on its text.
    """

    def __init__(self, metric: Metric, schema: Schema | None = None, rules: Sequence[Rule] = ()) -> None:
        self.metric = metric
        self.structured = schema is not None
        self._schema = compile_schema(schema) if schema is not None else None
        self._rules = {rule.id: compile_schema(rule.schema) for rule in rules}

    def score(self, expected: dict[str, Any] | str, answer: str) -> Scores:
        """Return the scores of an answer. An answer that should be JSON and is not scores 0."""
        if self._schema is None and isinstance(expected, str):
            exact = normalize(expected) == normalize(answer)
            problem = "" if answer.strip() else "the answer is empty"
            return self._scores(expected, answer, exact, problem)
        try:
            value = parse_json(answer)
        except InvalidJsonError as error:
            _, total = self._count(expected, None, False)
            return Scores(0, total, False, False, False if self._rules else None, 0, 0, problem=str(error))
        invalid = next(self._schema.iter_errors(value), None) if self._schema else None
        problem = f"at {invalid.json_path} {invalid.message}" if invalid else ""
        return self._scores(expected, value, json_equal(expected, value), problem, *count_hallucinated(expected, value))

    def _scores(
        self, expected: Any, value: Any, exact: bool, problem: str, stated: int = 0, hallucinated: int = 0
    ) -> Scores:
        correct, total = self._count(expected, value, exact)
        failed = tuple(id for id, validator in self._rules.items() if not validator.is_valid(value))
        compliant = not failed if self._rules else None
        return Scores(correct, total, exact, not problem, compliant, stated, hallucinated, failed, problem)

    def _count(self, expected: Any, value: Any, exact: bool) -> tuple[int, int]:
        if self.metric == "exact":
            return int(exact), 1
        if self.metric == "rouge1":
            return count_words(answer_text(expected), answer_text(value))
        return count_parameters(expected, value)


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
        return normalize(expected) == normalize(stated)
    return json_equal(expected, stated)


def json_equal(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal: numbers by value, true is not 1, texts character by character."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def count_parameters(expected: Any, stated: Any) -> tuple[int, int]:
    """Return (correct, total): the leaves of `expected` that `stated` has with the same value, and all of them."""
    wanted = dict(leaves(expected))
    found = dict(leaves(stated))
    return sum(path in found and same_value(value, found[path]) for path, value in wanted.items()), len(wanted)


def count_hallucinated(expected: Any, stated: Any) -> tuple[int, int]:
    """Return (stated, hallucinated): the leaves of an answer, and those at a path that `expected` does not have.

    A null states nothing, so a "not given" is no hallucination.
    """
    known = {path[:length] for path, _ in leaves(expected) for length in range(len(path) + 1)}
    found = [path for path, value in leaves(stated) if value is not None]
    return len(found), sum(path not in known for path in found)


def count_words(expected: str, answer: str) -> tuple[int, int]:
    """Return (correct, total) of ROUGE-1 recall: expected words in the answer, and all expected words.

    Only as many words of the answer count as are expected, so a longer answer gains nothing. A word counts as often as
    it is expected.

    >>> count_words("use a fire door", "A fire door, please, and a window")
    (3, 4)
    """
    wanted = words(expected)
    found = words(answer)[: len(wanted)]
    return (Counter(wanted) & Counter(found)).total(), len(wanted)


def words(text: str) -> list[str]:
    """Return the normalized words of a text; if it has none, its parts between spaces."""
    text = normalize(text)
    return re.findall(r"\w+", text) or text.split()


def answer_text(value: Any) -> str:
    """Return an answer as text: a text as it is, any other value as JSON with sorted keys."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
