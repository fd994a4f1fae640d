"""Does the model's confidence tell right answers from wrong ones? Shown beside the threshold that curation uses."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Separation:
    """How well confidence separates one model's right answers from its wrong ones.

    Attributes:
        auroc: chance that a right answer is more confident than a wrong one, 0 to 1; 0.5 is a coin; None if all answers
            are right, or all wrong.
        threshold: the confidence from which curation takes an answer that no person confirmed.
        right: answers that are right and have a confidence.
        right_above: of them, those at or above the threshold.
        wrong: answers that are wrong and have a confidence.
        wrong_above: of them, those at or above the threshold; they would be taken for right.
    """

    auroc: float | None
    threshold: float
    right: int
    right_above: int
    wrong: int
    wrong_above: int


def separation(confidences: Sequence[float | None], right: Sequence[bool], threshold: float) -> Separation:
    """Compare confidence with what was right, answer by answer; answers without a confidence are left out."""
    pairs = [(value, good) for value, good in zip(confidences, right, strict=True) if value is not None]
    of_right = [value for value, good in pairs if good]
    of_wrong = [value for value, good in pairs if not good]
    return Separation(
        auroc=_auroc(of_right, of_wrong),
        threshold=threshold,
        right=len(of_right),
        right_above=sum(value >= threshold for value in of_right),
        wrong=len(of_wrong),
        wrong_above=sum(value >= threshold for value in of_wrong),
    )


def _auroc(of_right: Sequence[float], of_wrong: Sequence[float]) -> float | None:
    """Mann and Whitney's U over all pairs; a tie counts half."""
    if not of_right or not of_wrong:
        return None
    wrong = sorted(of_wrong)
    twice = sum(bisect_left(wrong, value) + bisect_right(wrong, value) for value in of_right)
    return twice / (2 * len(of_right) * len(wrong))
