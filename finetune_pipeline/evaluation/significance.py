"""Significance of the gain: paired tests on the questions that both models answered. Pure and seeded."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

RESAMPLES = 10_000
Method = Literal["paired bootstrap over questions", "exact McNemar"]


@dataclass(frozen=True)
class Significance:
    """Result of a paired test.

    Attributes:
        method: the test that gave `p_value`.
        p_value: one-sided p-value: probability of at least this gain if neither model is better.
        gain_low: lower bound of the 95% confidence interval of the gain, in points (fraction of the total, -1 to 1).
        gain_high: upper bound.
        questions: number of questions.
    """

    method: Method
    p_value: float
    gain_low: float
    gain_high: float
    questions: int


def paired_test(champion: Sequence[int], challenger: Sequence[int], total: int, *, seed: int = 0) -> Significance:
    """Test whether the challenger's score is higher than the champion's.

    The parameters of one answer are not independent, so questions are resampled, not parameters: a paired bootstrap
    over questions (Efron and Tibshirani 1993; 10,000 resamples). If each question counts 1, the exact McNemar test is
    used instead (the binomial test on the questions in which the models differ). The interval is the bootstrap's in
    both cases.

    Args:
        champion: the champion's score on each question.
        challenger: the challenger's scores on the same questions, in the same order.
        total: the highest possible score; equal to the number of questions if each counts 1.
        seed: of the resampling.
    """
    differences = [new - old for old, new in zip(champion, challenger, strict=True)]
    gains = _resampled_gains(differences, seed)
    low, high = gains[round(0.025 * (RESAMPLES - 1))] / total, gains[round(0.975 * (RESAMPLES - 1))] / total
    if total == len(differences):
        p_value = mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
        return Significance("exact McNemar", p_value, low, high, len(differences))
    # With few differing questions the bootstrap is overconfident: no paired test can go below 1 in 2^differing.
    lowest = 0.5 ** sum(d != 0 for d in differences)
    p_value = max((sum(gain <= 0 for gain in gains) + 1) / (RESAMPLES + 1), lowest)
    return Significance("paired bootstrap over questions", min(p_value, 1.0), low, high, len(differences))


def mcnemar(won: int, lost: int) -> float:
    """Return the one-sided exact McNemar p-value: P(X >= won) for X ~ Binomial(won + lost, 1/2)."""
    differing = won + lost
    at_least = sum(math.comb(differing, heads) for heads in range(won, differing + 1))
    return float(Fraction(at_least, 2**differing))


def _resampled_gains(differences: Sequence[int], seed: int) -> list[int]:
    """Return the sorted gains of all resamples.

    Drawing the count of each distinct difference (multinomial) is equivalent to drawing questions, and faster.
    """
    import numpy as np

    counts = Counter(differences)
    values = sorted(counts)
    fractions = np.array([counts[value] for value in values]) / len(differences)
    draws = np.random.default_rng(seed).multinomial(len(differences), fractions, size=RESAMPLES)
    gains: list[int] = np.sort(draws @ np.array(values)).tolist()
    return gains
