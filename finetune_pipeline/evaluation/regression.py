"""The regression suite: how many of the corrections that earlier promotions fixed a challenger breaks. Pure.

The questions are training examples, so the suite tells nothing about the gain and is never part of it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.wording import counted


@dataclass(frozen=True)
class RegressionCounts:
    """Numbers of a suite.

    Attributes:
        standing: the questions of the suite.
        asked: those that both models were asked: all of them, or a fixed sample.
        held: asked questions that the champion answers correctly.
        broken: those of them that the challenger answers incorrectly.
        regained: asked questions that the champion answers incorrectly, and the challenger correctly.
    """

    standing: int
    asked: int
    held: int
    broken: int
    regained: int


@dataclass(frozen=True)
class RegressionTest:
    """Whether a challenger breaks more fixed corrections than tolerated.

    Attributes:
        p_value: of the exact binomial test, one-sided: probability of at least so many broken questions if the
            tolerated fraction breaks.
        exceeded: it is significant.
        text: the numbers, for people.
    """

    counts: RegressionCounts
    p_value: float
    exceeded: bool
    text: str


@dataclass(frozen=True)
class SuiteAnswer:
    """One question of the suite with both answers."""

    question: BenchmarkQuestion
    champion: str
    champion_correct: bool
    challenger: str
    challenger_correct: bool

    @property
    def broken(self) -> bool:
        """The champion's answer is correct, and the challenger's is not."""
        return self.champion_correct and not self.challenger_correct


@dataclass(frozen=True)
class RegressionSuite:
    """The answers of champion and challenger to the suite, of which `standing` questions exist."""

    standing: int
    answers: tuple[SuiteAnswer, ...]

    @property
    def broken(self) -> tuple[SuiteAnswer, ...]:
        """The broken questions."""
        return tuple(one for one in self.answers if one.broken)

    @property
    def counts(self) -> RegressionCounts:
        """The numbers that the test needs."""
        return RegressionCounts(
            standing=self.standing,
            asked=len(self.answers),
            held=sum(one.champion_correct for one in self.answers),
            broken=len(self.broken),
            regained=sum(one.challenger_correct and not one.champion_correct for one in self.answers),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counts and all answers."""
        return {
            "counts": asdict(self.counts),
            "questions": [
                {
                    **one.question.as_json(),
                    "broken": one.broken,
                    "champion": {"answer": one.champion, "correct": one.champion_correct},
                    "challenger": {"answer": one.challenger, "correct": one.challenger_correct},
                }
                for one in self.answers
            ],
        }


def counts_of_json(suite: Mapping[str, Any] | None) -> RegressionCounts | None:
    """Return the counts in `RegressionSuite.as_json`; None without a suite."""
    return RegressionCounts(**suite["counts"]) if suite else None


def regression_test(counts: RegressionCounts, tolerance: float, level: float) -> RegressionTest:
    """Test whether more of the held questions are broken than the tolerated fraction.

    Args:
        counts: of the suite.
        tolerance: fraction of the held questions that may be broken, 0 to 1.
        level: significance level.
    """
    p_value = binomial_tail(counts.broken, counts.held, tolerance)
    return RegressionTest(counts, p_value, p_value <= level, "; ".join(_statements(counts, tolerance, level, p_value)))


def binomial_tail(least: int, count: int, probability: float) -> float:
    """Return P(X >= least) for X ~ Binomial(count, probability).

    >>> binomial_tail(2, 2, 0.1)
    0.010000000000000002
    """
    if least <= 0:
        return 1.0
    terms = (math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(least, count + 1))
    return min(math.fsum(terms), 1.0)


def fewest_broken(count: int, tolerance: float, level: float) -> int | None:
    """Return how many of so many questions must be broken for significance; None if even all are too few."""
    return next((k for k in range(1, count + 1) if binomial_tail(k, count, tolerance) <= level), None)


def _statements(counts: RegressionCounts, tolerance: float, level: float, p_value: float) -> Iterator[str]:
    sample = "" if counts.asked == counts.standing else f" (a sample of {counts.standing:,})"
    if not counts.held:
        yield (
            f"the champion answers none of {counted(counts.asked, 'fixed correction')}{sample} "
            "correctly, so none can be broken"
        )
        return
    yield (
        f"{counts.broken:,} of {counted(counts.held, 'fixed correction')} broken{sample}, "
        f"{100 * tolerance:g}% tolerated: p = {p_value:.2g}"
    )
    needed = fewest_broken(counts.held, tolerance, level)
    if needed is None:
        all_broken = binomial_tail(counts.held, counts.held, tolerance)
        yield (
            f"{counted(counts.held, 'question')} can decide nothing: even {counts.held:,} broken would give "
            f"p = {all_broken:.2g}, at most {level:g} is significant"
        )
    else:
        yield f"{needed:,} broken would be significant" if p_value > level else f"at most {level:g} is significant"
    if missed := counts.asked - counts.held:
        yield f"of {missed:,} that the champion answers incorrectly, {counts.regained:,} are correct again"
