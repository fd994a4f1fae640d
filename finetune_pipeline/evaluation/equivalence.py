"""Equivalence of two models' scores on the same questions: two one-sided paired t-tests (TOST). Pure.

Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach". A small difference is not
enough: with few questions it says nothing. Equivalent means that both a loss and a gain of the margin are rejected.

Most answers of an exported model have the same score as before, so their standard deviation depends on a few. If these
few happen to be missing, a t-test calls models equivalent that are not: 16% instead of 5% in a simulation with 64
questions of which 5% are answered worse. So each test gets one more question, with the worst difference that its
hypothesis allows: -1 for a loss, +1 for a gain. With it, the error is at most 6% in the same simulations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ALPHA = 0.05
"""Level of each one-sided test; the interval of the difference is that of 1 - 2 ALPHA, 90%."""

MAX_QUESTIONS = 100_000


@dataclass(frozen=True)
class ScoreDifferences:
    """Paired differences between two models' scores of single questions, each -1 to 1.

    Attributes:
        questions: number of questions.
        mean: mean difference, candidate minus reference.
        deviation: sample standard deviation of the differences; 0 for one question.
    """

    questions: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class Equivalence:
    """Result of the tests for one margin.

    Attributes:
        differences: what was measured.
        margin: largest difference that does not matter.
    """

    differences: ScoreDifferences
    margin: float

    @property
    def equivalent(self) -> bool:
        """Return whether the difference is smaller than the margin, at the level ALPHA."""
        return self.p_value <= ALPHA

    @property
    def tolerable(self) -> bool:
        """Return whether they are equivalent, or cannot be shown to be by so few questions and differ by no more."""
        return self.equivalent or not (self._testable or abs(self.differences.mean) > self.margin)

    @property
    def tolerable_loss(self) -> bool:
        """Return whether the candidate is not inferior by the margin, whatever it gains.

        As with `tolerable`, so few questions that even equal scores would not show it are accepted if the difference
        itself is within the margin.
        """
        not_inferior = _p_values(self.differences, self.margin)[0] <= ALPHA
        return not_inferior or not (self._testable or self.differences.mean < -self.margin)

    @cached_property
    def _testable(self) -> bool:
        """Equal scores of this number of questions would show equivalence."""
        return _p_value(ScoreDifferences(self.differences.questions, 0.0, 0.0), self.margin) <= ALPHA

    @cached_property
    def p_value(self) -> float:
        """The larger p-value of the two tests."""
        return _p_value(self.differences, self.margin)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 90% confidence interval of the mean difference; within the margin if and only if they are equivalent."""
        t = t_quantile(ALPHA, self.differences.questions)
        low_mean, low_error = _with_one_more(self.differences, -1)
        high_mean, high_error = _with_one_more(self.differences, 1)
        return max(-1.0, low_mean - t * low_error), min(1.0, high_mean + t * high_error)

    @cached_property
    def questions_needed(self) -> int | None:
        """Number of questions at which the same differences would be equivalent; None if no number is enough."""
        measured = self.differences

        def enough(questions: int) -> bool:
            found = ScoreDifferences(questions, measured.mean, measured.deviation)
            return _p_value(found, self.margin) <= ALPHA

        if abs(measured.mean) >= self.margin:
            return None
        most = 1
        while not enough(most):
            most *= 2
            if most > MAX_QUESTIONS:
                return None
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (least, middle) if enough(middle) else (middle, most)
        return most

    @property
    def sentence(self) -> str:
        """The result with its numbers, and what to do if it is open."""
        low, high = self.interval
        measured = self.differences
        numbers = (
            f"{100 * measured.mean:+.1f} points on {measured.questions} questions, 90% interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}, margin {100 * self.margin:g}"
        )
        if self.equivalent:
            return f"equivalent: {numbers}"
        if low > self.margin or high < -self.margin:
            return f"not equivalent: {numbers}"
        needed = self.questions_needed
        more = "" if needed is None else f"; about {needed} questions would show equivalence"
        return f"{'undecided' if self._testable else 'too few questions to tell'}: {numbers}{more}"


def score_differences(reference: Sequence[float], candidate: Sequence[float]) -> ScoreDifferences:
    """Return the paired differences of two models' scores, each 0 to 1, in the order of the questions.

    Raises:
        ValueError: the models have different numbers of scores, or none.
    """
    if len(reference) != len(candidate) or not reference:
        raise ValueError(
            f"paired scores of at least one question are needed, found {len(reference)} and {len(candidate)}; score "
            "both models on the same questions"
        )
    differences = [new - old for old, new in zip(reference, candidate, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    squares = math.fsum((difference - mean) ** 2 for difference in differences)
    return ScoreDifferences(count, mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0)


def _p_value(measured: ScoreDifferences, margin: float) -> float:
    return max(_p_values(measured, margin))


def _p_values(measured: ScoreDifferences, margin: float) -> list[float]:
    """Return the p-value of the test that rejects a loss of the margin, and of the one that rejects a gain."""
    p_values = []
    for worst in (-1, 1):
        mean, error = _with_one_more(measured, worst)
        distance = margin + mean if worst < 0 else margin - mean
        p_values.append(t_tail(distance / error, measured.questions) if error else float(distance <= 0))
    return p_values


def _with_one_more(measured: ScoreDifferences, worst: int) -> tuple[float, float]:
    """Return mean and standard error of the differences with one more of this value."""
    count = measured.questions
    mean = (count * measured.mean + worst) / (count + 1)
    squares = measured.deviation**2 * (count - 1) + (worst - measured.mean) ** 2 * count / (count + 1)
    return mean, math.sqrt(squares / count / (count + 1))


def t_tail(t: float, df: int) -> float:
    """Return P(T > t) of Student's t distribution with `df` degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    square = math.cos(angle) ** 2
    odd = df % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= square * (k - 1) / k
        total += term
    inside = math.sin(angle) * (total if df > 1 or not odd else 0.0)
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return min(1.0, max(0.0, (1 - inside) / 2))


def t_quantile(tail: float, df: int) -> float:
    """Return t with P(T > t) = tail, for a tail below one half."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high
