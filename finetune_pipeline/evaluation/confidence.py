"""How well a model's confidence separates its correct answers from its incorrect ones."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


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
    """

    auroc: float | None
    threshold: float
    correct: int
    correct_above: int
    incorrect: int
    incorrect_above: int


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
    return ConfidenceSeparation(
        auroc=auroc,
        threshold=threshold,
        correct=len(of_correct),
        correct_above=sum(value >= threshold for value in of_correct),
        incorrect=len(of_incorrect),
        incorrect_above=sum(value >= threshold for value in of_incorrect),
    )
