"""Could the gain be luck? Paired tests on the questions that both models answered. Pure and seeded."""

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
    """How sure the gain is.

    Attributes:
        method: the test that gave `p_value`.
        p_value: chance of such a gain with no true one (one-sided), 0 to 1.
        gain_low: lower end of the 95 % interval of the gain, in points (share of all that can be right, -1 to 1).
        gain_high: its upper end.
        questions: how many questions were compared.
    """

    method: Method
    p_value: float
    gain_low: float
    gain_high: float
    questions: int


def paired_test(champion: Sequence[int], challenger: Sequence[int], total: int, *, seed: int = 0) -> Significance:
    """Test whether the challenger has more right than the champion.

    Parameters of one answer are right or wrong together, so the question, not the parameter, is what is drawn again:
    a paired bootstrap over questions (Efron and Tibshirani 1993; 10,000 resamples). Where a question is worth one, it
    is the exact McNemar test (the binomial test of the questions on which the two differ). The interval is always the
    bootstrap's.

    Args:
        champion: what the champion has right in each question.
        challenger: what the challenger has right in the same questions, in the same order.
        total: all that can be right; equal to the number of questions where each is worth one.
        seed: of the resampling.
    """
    differences = [new - old for old, new in zip(champion, challenger, strict=True)]
    gains = _resampled_gains(differences, seed)
    low, high = gains[round(0.025 * (RESAMPLES - 1))] / total, gains[round(0.975 * (RESAMPLES - 1))] / total
    if total == len(differences):
        p_value = mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
        return Significance("exact McNemar", p_value, low, high, len(differences))
    # With few differing questions the bootstrap is too sure of itself: no paired test can go below 1 in 2^differing.
    floor = 0.5 ** sum(d != 0 for d in differences)
    p_value = max((sum(gain <= 0 for gain in gains) + 1) / (RESAMPLES + 1), floor)
    return Significance("paired bootstrap over questions", min(p_value, 1.0), low, high, len(differences))


def mcnemar(won: int, lost: int) -> float:
    """One-sided exact McNemar test: the chance of at least `won` heads in `won + lost` throws of a fair coin."""
    differing = won + lost
    at_least = sum(math.comb(differing, heads) for heads in range(won, differing + 1))
    return float(Fraction(at_least, 2**differing))


def _resampled_gains(differences: Sequence[int], seed: int) -> list[int]:
    """The sorted gains of all resamples. Drawing how often each *value* comes is the same as drawing questions."""
    import numpy as np

    counts = Counter(differences)
    values = sorted(counts)
    shares = np.array([counts[value] for value in values]) / len(differences)
    draws = np.random.default_rng(seed).multinomial(len(differences), shares, size=RESAMPLES)
    gains: list[int] = np.sort(draws @ np.array(values)).tolist()
    return gains
