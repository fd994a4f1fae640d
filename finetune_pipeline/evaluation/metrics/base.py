"""What every metric has: it counts how much of an answer is correct."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.values import answer_text

THOUSANDTHS = 1000
"""Total of an answer whose score is a fraction. Scores are integers, so that a comparison of two models is exact."""


class MetricError(ValueError):
    """A metric cannot be used; each line of the message names it, what was found, and what to do."""


@dataclass(frozen=True)
class Count:
    """How much of one answer, or of many, is correct."""

    correct: int
    total: int


@dataclass(frozen=True)
class Answer:
    """One answer as a metric sees it.

    Attributes:
        raw: what the model wrote.
        value: the JSON value, or the text; None if it should be JSON and is not.
        exact: it is the expected answer.
        problem: why it is not JSON, if it should be.
    """

    raw: str
    value: Any
    exact: bool
    problem: str = ""

    @property
    def text(self) -> str:
        """The answer as a text; JSON in one notation, and empty if it should be JSON and is not."""
        return answer_text(self.value)


class Metric(ABC):
    """One metric with its options."""

    constant_scorings: ClassVar[int] = 100_000
    """How many answers may be scored in the search for the best constant answer; 0: there is no such search."""

    def problems(self, questions: Sequence[BenchmarkQuestion]) -> Iterator[str]:
        """Yield why the metric cannot be used for these questions."""
        yield from ()

    @abstractmethod
    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return how much of the answer is correct. The total does not depend on the answer.

        Raises:
            MetricError: the metric failed on this question.
        """


def thousandths(numerator: int, denominator: int = 1) -> Count:
    """Return a fraction from 0 to 1, rounded to thousandths."""
    return Count((2 * THOUSANDTHS * numerator + denominator) // (2 * denominator), THOUSANDTHS)


def rounded(fraction: float) -> Count:
    """Return a fraction, rounded to thousandths and kept within 0 to 1."""
    return Count(min(max(round(fraction * THOUSANDTHS), 0), THOUSANDTHS), THOUSANDTHS)
