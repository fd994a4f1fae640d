"""Significance of the gain: paired tests on the questions that both models answered. Pure and seeded."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
POWER = 0.8
"""Probability with which the named number of questions would decide; 80% is the usual choice."""

Method = Literal["exact McNemar", "paired bootstrap over questions", "paired bootstrap over clusters"]
SliceStatus = Literal["held", "regressed", "too small"]

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Significance:
    """Result of a paired test.

    Attributes:
        method: the test that gave `p_value`.
        p_value: one-sided p-value: probability of at least this gain if neither model is better.
        gain_low: lower bound of the 95% confidence interval of the gain, in points (fraction of the total, -1 to 1).
        gain_high: upper bound.
        standard_error: of the gain, in points.
        wins: questions in which the challenger's score is higher.
        losses: questions in which it is lower.
        ties: questions in which both scores are the same.
        units: what is independent of each other: the questions, or the clusters where the benchmark names them.
    """

    method: Method
    p_value: float
    gain_low: float
    gain_high: float
    standard_error: float
    wins: int
    losses: int
    ties: int
    units: int

    @property
    def questions(self) -> int:
        """Number of questions."""
        return self.wins + self.losses + self.ties


@dataclass(frozen=True)
class SliceTest:
    """Whether a challenger got worse in one slice of the benchmark by more than a margin.

    Attributes:
        points: the change as a fraction of the slice's highest possible score, -1 to 1.
        p_regressed: p-value of the test that the slice lost more than the margin.
        p_held: p-value of the test that it lost less than the margin (non-inferiority).
        status: the one that Holm's correction over all slices leaves significant; "too small" if neither is.
    """

    name: str
    questions: int
    points: float
    p_regressed: float
    p_held: float
    status: SliceStatus


@dataclass(frozen=True)
class PairedScores:
    """Scores of both models on the same questions, in the same order.

    Attributes:
        total: the highest possible score.
        clusters: the cluster of each question; a question without one (None) is a cluster of its own.
    """

    champion: Sequence[int]
    challenger: Sequence[int]
    total: int
    clusters: Sequence[str | None] | None = None

    def differences(self) -> list[int]:
        """Return the challenger's score minus the champion's, by question."""
        return [new - old for old, new in zip(self.champion, self.challenger, strict=True)]

    def unit_differences(self) -> list[int]:
        """Return the differences of what is independent of each other: questions, or sums over each cluster."""
        differences = self.differences()
        if not self.clusters or not any(self.clusters):
            return differences
        sums: Counter[str | int] = Counter()
        for index, (cluster, difference) in enumerate(zip(self.clusters, differences, strict=True)):
            sums[cluster if cluster is not None else index] += difference
        return list(sums.values())

    def gain(self) -> float:
        """Return the gain in points."""
        return sum(self.differences()) / self.total


def paired_test(scores: PairedScores, *, seed: int = 0) -> Significance:
    """Test whether the challenger's score is higher than the champion's.

    If each question is right or wrong, the p-value is that of the exact McNemar test, the binomial test on the
    questions in which the models differ, and the interval is that of Bonett and Price (2012), which holds for few
    questions too.

    The parameters of one answer are not independent, so otherwise questions are resampled, not parameters: a paired
    bootstrap over questions (Efron and Tibshirani 1993; 10,000 resamples), or over clusters if the benchmark names
    them. At the small levels of an error budget the bootstrap is overconfident. So its p-value is at least that of the
    sign-flip test (Fisher's randomization test), which holds at every level: if the models are interchangeable, each
    difference could as well have had the other sign. McNemar's is the same test where each question is right or wrong.

    Args:
        scores: of both models; at least one question.
        seed: of the resampling.
    """
    differences, units = scores.differences(), scores.unit_differences()
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    counts = (wins, losses, len(differences) - wins - losses, len(units))
    center, error = _adjusted(units, scores.total)
    weight = scores.total / len(units)
    if len(units) == len(differences) and all(abs(d) in (0, weight) for d in differences):
        low, high = center - 1.96 * error, center + 1.96 * error
        p_value = mcnemar(wins, losses)
        return Significance("exact McNemar", p_value, max(low, -1.0), min(high, 1.0), error, *counts)
    import numpy as np

    gains = _resampled_gains(_with_pseudo_units(units, scores.total), seed)
    whole = scores.total * (len(units) + 2) / len(units)
    low, high = (float(bound) / whole for bound in np.quantile(gains, [0.025, 0.975]))
    without_gain = int((_resampled_gains(units, seed) <= 0).sum())
    p_value = (max(without_gain, _sign_flips_reaching(units, seed)) + 1) / (RESAMPLES + 1)
    clustered = len(units) < len(differences)
    method: Method = "paired bootstrap over clusters" if clustered else "paired bootstrap over questions"
    return Significance(method, p_value, low, high, error, *counts)


def mcnemar(won: int, lost: int) -> float:
    """Return the one-sided exact McNemar p-value: P(X >= won) for X ~ Binomial(won + lost, 1/2)."""
    differing = won + lost
    at_least = sum(math.comb(differing, heads) for heads in range(won, differing + 1))
    return float(Fraction(at_least, 2**differing))


def compare_slices(slices: dict[str, PairedScores], margin: float, level: float) -> tuple[SliceTest, ...]:
    """Test each slice for a loss of more than the margin, and for non-inferiority within it.

    A slice with a lower score is not necessarily worse: with 8 slices of 30 questions, most real gains come with a
    slice that is lower by chance. Only a loss beyond the margin that is significant after Holm's correction counts.

    Args:
        slices: scores by the name of the slice; one in which nothing counts, such as without a judge's verdict, is left
            out.
        margin: loss in points that a slice may have.
        level: probability of naming any slice regressed that lost no more than the margin.
    """
    slices = {name: scores for name, scores in slices.items() if scores.total}
    names = list(slices)
    p_regressed, p_held = [], []
    for scores in slices.values():
        center, error = _adjusted(scores.unit_differences(), scores.total)
        z = (center + margin) / error
        p_regressed.append(_NORMAL.cdf(z))
        p_held.append(_NORMAL.cdf(-z))
    regressed, held = holm(p_regressed, level), holm(p_held, level)
    return tuple(
        SliceTest(
            name,
            len(slices[name].champion),
            slices[name].gain(),
            p_regressed[index],
            p_held[index],
            "regressed" if index in regressed else "held" if index in held else "too small",
        )
        for index, name in enumerate(names)
    )


def holm(p_values: Sequence[float], level: float) -> set[int]:
    """Return the positions of the p-values that are significant by Holm's step-down procedure."""
    significant: set[int] = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        significant.add(index)
    return significant


def questions_needed(found: Significance, gain: float, level: float) -> int:
    """Return how many questions would find a gain with probability `POWER`, if they differ as often as these.

    Args:
        found: the test on the questions at hand.
        gain: the gain in points; above 0.
        level: of the one-sided test.
    """
    factor = (_quantile(level) + _NORMAL.inv_cdf(POWER)) * found.standard_error / gain
    # Of the questions that differ, so many have to be won without a loss.
    least = fewest_wins(level) * found.questions / max(found.wins + found.losses, 1)
    return math.ceil(max(found.questions * factor**2, least))


def detectable_gain(found: Significance, level: float) -> float:
    """Return the gain in points that as many questions as these find with probability `POWER`."""
    return (_quantile(level) + _NORMAL.inv_cdf(POWER)) * found.standard_error


def gain_found_by(units: int, differing: float, level: float) -> float:
    """Return the gain in points that so many questions find with probability `POWER`, each of them right or wrong.

    Args:
        units: the questions, or their clusters.
        differing: fraction of them whose answer is right by one model only.
        level: of the one-sided test.
    """
    return min((_quantile(level) + _NORMAL.inv_cdf(POWER)) * math.sqrt(differing / units), 1.0)


def questions_for(gain: float, differing: float, level: float) -> int:
    """Return how many questions find a gain; the inverse of `gain_found_by`."""
    return math.ceil(((_quantile(level) + _NORMAL.inv_cdf(POWER)) / gain) ** 2 * differing)


def fewest_wins(level: float) -> int:
    """Return how many questions must differ at least, all of them won, for significance."""
    return math.ceil(-math.log2(level))


def _quantile(level: float) -> float:
    return -_NORMAL.inv_cdf(level)


def _with_pseudo_units(units: Sequence[int], total: int) -> list[float]:
    """Add a unit won and a unit lost, by the mean difference of those that differ.

    Without them, three questions that both models answer alike would show for certain that they are equal. Where each
    question is right or wrong this is the adjustment of Bonett and Price.
    """
    differing = [abs(d) for d in units if d]
    typical = sum(differing) / len(differing) if differing else total / len(units)
    return [*units, typical, -typical]


def _adjusted(units: Sequence[int], total: int) -> tuple[float, float]:
    """Return the gain in points and its standard error, both with the pseudo-units."""
    values = _with_pseudo_units(units, total)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    whole = total * len(values) / len(units)
    return sum(values) / whole, math.sqrt(variance * len(values)) / whole


def _resampled_gains(differences: Sequence[float], seed: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return the gains of all resamples.

    Drawing the count of each distinct difference (multinomial) is equivalent to drawing questions, and faster.
    """
    import numpy as np

    counts = Counter(differences)
    values = sorted(counts)
    fractions = np.array([counts[value] for value in values]) / len(differences)
    draws = np.random.default_rng(seed).multinomial(len(differences), fractions, size=RESAMPLES)
    gains: np.ndarray[tuple[int], np.dtype[np.float64]] = draws @ np.array(values, dtype=float)
    return gains


def _sign_flips_reaching(differences: Sequence[int], seed: int) -> int:
    """Return in how many of the resamples, with a random sign for each difference, the gain is as high as observed."""
    import numpy as np

    counts = Counter(abs(d) for d in differences if d)
    values = sorted(counts)
    repeats = np.array([counts[value] for value in values], dtype=int)
    positive = np.random.default_rng(seed).binomial(repeats, 0.5, size=(RESAMPLES, len(values)))
    gains = (2 * positive - repeats) @ np.array(values, dtype=int)
    return int((gains >= sum(differences)).sum())
