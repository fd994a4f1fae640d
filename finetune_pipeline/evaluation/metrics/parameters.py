"""Parameter accuracy: values of the expected JSON that the answer has, with weights, tolerances and unordered lists."""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric
from finetune_pipeline.evaluation.metrics.values import Path, leaves, same_value
from finetune_pipeline.schemas import children
from finetune_pipeline.settings import ParametersMetric

Keys = tuple[str, ...]
"""A path without the indices of lists."""

T = TypeVar("T")

_ABSENT = object()


class Parameters(Metric):
    """Counts the values of the expected JSON that the answer has at the same path."""

    def __init__(self, settings: ParametersMetric) -> None:
        self._key = settings.key
        self._weights = {_keys(path): weight for path, weight in settings.weights.items()}
        self._tolerances = {_keys(path): Decimal(str(limit)) for path, limit in settings.tolerances.items()}
        self._relative = Decimal(str(settings.relative_tolerance))
        self._unordered = {_keys(path) for path in settings.unordered}

    @property
    def is_plain(self) -> bool:
        """Return whether every value counts once and has to be the same at the same path."""
        return not (self._weights or self._tolerances or self._relative or self._unordered)

    def problems(self, questions: Sequence[BenchmarkQuestion]) -> Iterator[str]:
        """Yield a problem for expected answers that are texts, paths that none has, and weights that are all 0."""
        if all(isinstance(question.expected, str) for question in questions):
            yield (
                f"evaluation: the metric {self._key} counts the values of JSON answers, and every expected answer is a "
                "text; choose a metric of texts, such as exact or rouge1"
            )
            return
        known = {
            keys[:length]
            for question in questions
            for keys in (_without_indices(path) for path, _ in leaves(question.expected))
            for length in range(1, len(keys) + 1)
        }
        unknown = [keys for keys in (*self._weights, *self._tolerances, *self._unordered) if keys not in known]
        for keys in dict.fromkeys(unknown):
            yield (
                f"evaluation: the metric {self._key} names the path {'.'.join(keys)}, which no expected answer has; "
                "correct it (written with dots, without the indices of lists)"
            )
        if not any(self.count(question, Answer("", None, exact=False)).total for question in questions):
            yield (
                f"evaluation: the metric {self._key} gives every value of the benchmark the weight 0; give one a weight"
            )

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return the weight of the values that the answer has, and of all expected values."""
        total = sum(
            self._weight(tuple(part for part in path if isinstance(part, str))) for path, _ in leaves(question.expected)
        )
        return Count(self._correct(question.expected, answer.value, ()), total)

    def _correct(self, expected: Any, stated: Any, keys: Keys) -> int:
        """Return the weight of the leaves under `expected` that `stated` has."""
        wanted, found = children(expected), children(stated)
        if not wanted:
            return self._weight(keys) if not found and self._same(expected, stated, keys) else 0
        if isinstance(expected, list) and isinstance(stated, list) and keys in self._unordered:
            return best_pairing([[self._correct(one, other, keys) for other in stated] for one in expected])
        by_key = dict(found)
        return sum(
            self._correct(child, by_key.get(key, _ABSENT), (*keys, key) if isinstance(key, str) else keys)
            for key, child in wanted
        )

    def _weight(self, keys: Keys) -> int:
        return _longest(self._weights, keys, 1)

    def _same(self, expected: Any, stated: Any, keys: Keys) -> bool:
        if same_value(expected, stated):
            return True
        if not (_is_number(expected) and _is_number(stated)):
            return False
        wanted = Decimal(str(expected))  # 1.1 is 0.1 more than 1, which it is not in floats
        allowed = _longest(self._tolerances, keys, self._relative * abs(wanted))
        return abs(wanted - Decimal(str(stated))) <= allowed


def _keys(path: str) -> Keys:
    return tuple(path.split("."))


def _without_indices(path: Path) -> Keys:
    return tuple(part for part in path if isinstance(part, str))


def _longest(settings: Mapping[Keys, T], keys: Keys, default: T) -> T:
    """Return the setting of the longest path that leads to this one."""
    lengths = range(len(keys), 0, -1) if settings else ()
    return next((settings[keys[:length]] for length in lengths if keys[:length] in settings), default)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def best_pairing(gains: Sequence[Sequence[int]]) -> int:
    """Return the largest sum of gains if each row is paired with at most one column, and each column with one row.

    The Hungarian algorithm, by shortest augmenting paths with potentials (Jonker and Volgenant 1987).

    >>> best_pairing([[3, 2], [2, 0]])
    4
    """
    rows = len(gains)
    columns = max(rows, max(map(len, gains), default=0))
    costs = [[-gain for gain in row] + [0] * (columns - len(row)) for row in gains]
    row_potential, column_potential = [0] * rows, [0] * (columns + 1)
    row_of: list[int | None] = [None] * (columns + 1)  # the last column is where each search starts
    for row in range(rows):
        row_of[columns], column = row, columns
        shortest: list[float] = [float("inf")] * columns
        previous, visited = [columns] * columns, [False] * (columns + 1)
        while (current := row_of[column]) is not None:
            visited[column] = True
            for other in range(columns):
                if not visited[other]:
                    cost = costs[current][other] - row_potential[current] - column_potential[other]
                    if cost < shortest[other]:
                        shortest[other], previous[other] = cost, column
            following = min((other for other in range(columns) if not visited[other]), key=shortest.__getitem__)
            step = int(shortest[following])
            for other in range(columns + 1):
                if visited[other]:
                    row_potential[row_of[other]] += step  # type: ignore[index]
                    column_potential[other] -= step
                elif other < columns:
                    shortest[other] -= step
            column = following
        while column != columns:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return sum(-costs[row][column] for column, row in enumerate(row_of[:columns]) if row is not None)
