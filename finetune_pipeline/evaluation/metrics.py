"""What one answer scores. Pure; the counts are integers, so that a comparison of two models is exact.

`parameters` counts the values of the expected JSON that the answer states; `words` is ROUGE-1 recall at limited length
(Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"); `exact` counts whole answers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import InvalidJsonError, Rule, Schema, children, compile_schema, parse_json

Metric = Literal["parameters", "words", "exact"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Scores:
    """What one answer scores against the expected one."""

    right: int  # of `total`, what the gate counts
    total: int
    exact: bool
    valid: bool  # JSON that passes the output schema; a text that is not empty
    compliant: bool | None  # every rule passes; None where the loop has no rules
    stated: int  # values that the answer states, 0 for texts
    hallucinated: int  # of them, values that the expected answer does not have
    failed_rules: tuple[str, ...] = ()  # ids of the rules that failed
    problem: str = ""  # why it is not valid


class Scorer:
    """Scores the answers of one loop; schema and rules are compiled once.

    Args:
        metric: what `Scores.right` counts.
        schema: the output schema; with one, answers are JSON.
        rules: compliance rules, on the answer's JSON or on its text.
    """

    def __init__(self, metric: Metric, schema: Schema | None = None, rules: Sequence[Rule] = ()) -> None:
        self.metric = metric
        self.structured = schema is not None
        self._schema = compile_schema(schema) if schema is not None else None
        self._rules = {rule.id: compile_schema(rule.schema) for rule in rules}

    def score(self, expected: dict[str, Any] | str, answer: str) -> Scores:
        """The scores of an answer. An answer that should be JSON and is not has nothing right."""
        if self._schema is None and isinstance(expected, str):
            return self._score_text(expected, answer)
        try:
            value = parse_json(answer)
        except InvalidJsonError as error:
            return self._unreadable(expected, str(error))
        return self._score_json(expected, value)

    def _score_json(self, expected: Any, value: Any) -> Scores:
        exact = json_equal(expected, value)
        right, total = self._count(expected, value, exact)
        stated, hallucinated = count_hallucinated(expected, value)
        error = next(self._schema.iter_errors(value), None) if self._schema else None
        problem = f"at {error.json_path} {error.message}" if error else ""
        failed = self._failed(value)
        return Scores(
            right, total, exact, not problem, self._compliant(not failed), stated, hallucinated, failed, problem
        )

    def _score_text(self, expected: str, answer: str) -> Scores:
        exact = normalize(expected) == normalize(answer)
        right, total = self._count(expected, answer, exact)
        valid = bool(answer.strip())
        failed = self._failed(answer)
        problem = "" if valid else "the answer is empty"
        return Scores(right, total, exact, valid, self._compliant(not failed), 0, 0, failed, problem)

    def _unreadable(self, expected: Any, problem: str) -> Scores:
        _, total = self._count(expected, None, False)
        return Scores(0, total, False, False, self._compliant(False), 0, 0, problem=problem)

    def _count(self, expected: Any, value: Any, exact: bool) -> tuple[int, int]:
        if self.metric == "exact":
            return int(exact), 1
        if self.metric == "words":
            return count_words(answer_text(expected), answer_text(value))
        return count_parameters(expected, value)

    def _failed(self, value: Any) -> tuple[str, ...]:
        return tuple(id for id, validator in self._rules.items() if not validator.is_valid(value))

    def _compliant(self, passed: bool) -> bool | None:
        return passed if self._rules else None


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The (path, value) pairs of a JSON value; lists by index; an empty list or object is a leaf.

    >>> list(leaves({"wall": {"thickness_mm": 150}, "layers": ["brick"]}))
    [(('wall', 'thickness_mm'), 150), (('layers', 0), 'brick')]
    """
    parts = children(value)
    if not parts:
        yield path, value
    for key, child in parts:
        yield from leaves(child, (*path, key))


def same_value(expected: Any, stated: Any) -> bool:
    """Whether two leaves say the same: 150 is 150.0, "Oregon " is "oregon", but true is not 1."""
    if isinstance(expected, str) and isinstance(stated, str):
        return normalize(expected) == normalize(stated)
    return json_equal(expected, stated)


def json_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: numbers by value, true is not 1, texts to the letter."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def count_parameters(expected: Any, stated: Any) -> tuple[int, int]:
    """(right, total): the leaves of `expected`, and how many of them `stated` has with the same value."""
    wanted = dict(leaves(expected))
    found = dict(leaves(stated))
    return sum(path in found and same_value(value, found[path]) for path, value in wanted.items()), len(wanted)


def count_hallucinated(expected: Any, stated: Any) -> tuple[int, int]:
    """(stated, hallucinated): the leaves that an answer states, and those at a path that `expected` does not have.

    A null states nothing, so that "not given" is no invention.
    """
    known = {path[:length] for path, _ in leaves(expected) for length in range(len(path) + 1)}
    found = [path for path, value in leaves(stated) if value is not None]
    return len(found), sum(path not in known for path in found)


def count_words(expected: str, answer: str) -> tuple[int, int]:
    """(right, total): the expected answer's words, and how many of them are among as many first words of the answer.

    The limit is what keeps a model from gaining by talking more. Each word counts as often as it is expected.

    >>> count_words("use a fire door", "A fire door, please, and a window")
    (3, 4)
    """
    wanted = words(expected)
    found = words(answer)[: len(wanted)]
    return (Counter(wanted) & Counter(found)).total(), len(wanted)


def words(text: str) -> list[str]:
    """Return the words of a text, normalized; of one without any, its parts between spaces."""
    text = normalize(text)
    return re.findall(r"\w+", text) or text.split()


def answer_text(value: Any) -> str:
    """Return an answer as text: JSON with sorted keys where it is a value."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
