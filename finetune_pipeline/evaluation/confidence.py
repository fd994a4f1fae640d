"""Confidence of a model's answers: does it separate correct from incorrect ones, and is it calibrated?"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

BINS = 10
_Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers whose confidence lies in one of ten equal intervals.

    Attributes:
        confidence: mean confidence of the answers.
        low: lower bound of the 95% confidence interval (Wilson) of the fraction of correct answers.
        high: upper bound.
    """

    confidence: float
    answers: int
    correct: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers; equal to `confidence` if the model is calibrated."""
        return self.correct / self.answers


@dataclass(frozen=True)
class ConfidenceSeparation:
    """Confidence of one model's correct and incorrect answers. Answers without a confidence are not counted.

    Attributes:
        auroc: probability that a correct answer has a higher confidence than an incorrect one, 0 to 1; 0.5 is chance;
            None if all answers are correct, or all incorrect.
        threshold: the confidence above which curation accepts an unconfirmed answer.
        correct: number of correct answers.
        correct_above: correct answers at or above the threshold.
        incorrect: number of incorrect answers.
        incorrect_above: incorrect answers at or above the threshold, which curation would accept.
        bins: the answers by confidence, lowest first, without empty bins.
        calibration_error: expected calibration error over the bins (Guo et al. 2017, "On Calibration of Modern Neural
            Networks"): mean distance between confidence and fraction correct, 0 to 1; None without answers.
    """

    auroc: float | None
    threshold: float
    correct: int
    correct_above: int
    incorrect: int
    incorrect_above: int
    bins: tuple[ReliabilityBin, ...] = ()
    calibration_error: float | None = None


def separate_by_confidence(
    confidences: Sequence[float | None], correct: Sequence[bool], threshold: float
) -> ConfidenceSeparation:
    """Compare the confidence of each answer with its correctness."""
    known = [(value, good) for value, good in zip(confidences, correct, strict=True) if value is not None]
    of_correct = [value for value, good in known if good]
    of_incorrect = sorted(value for value, good in known if not good)
    auroc = None
    if of_correct and of_incorrect:
        # Mann-Whitney U over all pairs; a tie counts half.
        twice_u = sum(bisect_left(of_incorrect, value) + bisect_right(of_incorrect, value) for value in of_correct)
        auroc = twice_u / (2 * len(of_correct) * len(of_incorrect))
    bins = _reliability(known)
    error = sum(one.answers * abs(one.accuracy - one.confidence) for one in bins) / len(known) if known else None
    return ConfidenceSeparation(
        auroc=auroc,
        threshold=threshold,
        correct=len(of_correct),
        correct_above=sum(value >= threshold for value in of_correct),
        incorrect=len(of_incorrect),
        incorrect_above=sum(value >= threshold for value in of_incorrect),
        bins=bins,
        calibration_error=error,
    )


def _reliability(known: Sequence[tuple[float, bool]]) -> tuple[ReliabilityBin, ...]:
    """Return the bins of a reliability diagram over (confidence, correct) of each answer."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for value, good in known:
        members[min(int(value * BINS), BINS - 1)].append((value, good))
    bins = []
    for one in filter(None, members):
        count, correct = len(one), sum(good for _, good in one)
        low, high = wilson_interval(correct, count)
        bins.append(ReliabilityBin(sum(value for value, _ in one) / count, count, correct, low, high))
    return tuple(bins)


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a fraction by Wilson's score method."""
    fraction, squared = correct / count, _Z**2 / count
    center = (fraction + squared / 2) / (1 + squared)
    half = _Z * sqrt(fraction * (1 - fraction) / count + squared / (4 * count)) / (1 + squared)
    return max(0.0, center - half), min(1.0, center + half)
