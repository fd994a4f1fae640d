"""The gate over many simulated histories: how often it promotes without a gain, and how often it finds one.

Questions count 1, so that the paired test is McNemar's. Each bound leaves three standard errors of the simulation.
"""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from finetune_pipeline.evaluation.gate import BudgetState, QualityFloor, Verdict, decide
from finetune_pipeline.evaluation.significance import PairedScores, paired_test
from finetune_pipeline.settings import BUDGET_TESTS, GateSettings

QUESTIONS = 240
REQUIRED = GateSettings(significance="required")
SHOWN = GateSettings()


@cache
def verdict_on(won: int, lost: int, both: int, settings: GateSettings, left: int) -> Verdict:
    """Return the gate's verdict on so many questions won, lost, and right by both models."""
    none = QUESTIONS - won - lost - both
    champion = [0] * won + [1] * (lost + both) + [0] * none
    challenger = [1] * won + [0] * lost + [1] * both + [0] * none
    found = paired_test(PairedScores(champion, challenger, QUESTIONS))
    floor = QualityFloor(constant_correct=0, valid=50, answers=50, structured=True)
    budget = BudgetState(tested=left >= 0, left=max(left, 0))
    return decide(lost + both, won + both, QUESTIONS, floor, settings, found, (), budget)


def draw(random: np.random.Generator, size: tuple[int, ...], differing: float, gain: float) -> np.ndarray:
    """Draw numbers of questions won, lost, right by both and wrong by both."""
    won, lost, both = (differing + gain) / 2, (differing - gain) / 2, (1 - differing) / 2
    return random.multinomial(QUESTIONS, [won, lost, both, 1 - won - lost - both], size=size)


def upper(fraction: float, trials: int) -> float:
    """Return the highest frequency to expect in so many trials."""
    return fraction + 3 * math.sqrt(fraction * (1 - fraction) / trials)


@pytest.mark.parametrize("differing", [0.05, 0.15, 0.4])
def test_twelve_retrains_without_a_gain_seldom_promote(differing: float) -> None:
    histories = 1500
    drawn = draw(np.random.default_rng(1), (histories, BUDGET_TESTS), differing, 0.0)

    def promotes(settings: GateSettings) -> float:
        return np.mean(
            [
                any(
                    verdict_on(won, lost, both, settings, BUDGET_TESTS - 1 - cycle).promote
                    for cycle, (won, lost, both, _) in enumerate(history)
                )
                for history in drawn.tolist()
            ]
        ).item()

    assert promotes(REQUIRED) <= upper(0.05, histories)
    if differing >= 0.15:
        assert promotes(SHOWN) > 0.2  # the 5% rule alone does not protect a long history


def test_after_twelve_tests_nothing_promotes() -> None:
    assert verdict_on(60, 2, 100, REQUIRED, 0).decision == "promote"
    spent = verdict_on(60, 2, 100, REQUIRED, -1)
    assert (spent.decision, "budget spent" in spent.reason) == ("inconclusive", True)


@pytest.mark.parametrize("differing", [0.1, 0.12, 0.15, 0.25, 0.4, 0.6])
def test_a_gain_of_ten_points_is_found_or_called_inconclusive(differing: float) -> None:
    trials = 2000
    drawn = draw(np.random.default_rng(2), (trials,), differing, 0.1)
    verdicts = [verdict_on(won, lost, both, REQUIRED, 11) for won, lost, both, _ in drawn.tolist()]
    count = Counter(one.decision for one in verdicts)
    if differing <= 0.15:
        assert count["promote"] / trials >= 0.9
    assert count["reject"] / trials <= 0.01
    for one in verdicts:
        if one.decision == "inconclusive":
            assert one.more_questions and f"about {one.more_questions:,} more questions would decide" in one.reason


def test_the_named_number_of_questions_is_about_right() -> None:
    """Where 30% of the outcomes differ, a gain of 10 points needs about 350 questions; the median verdict says so."""
    drawn = draw(np.random.default_rng(3), (1000,), 0.3, 0.1)
    verdicts = [verdict_on(won, lost, both, REQUIRED, 11) for won, lost, both, _ in drawn.tolist()]
    more = [one.more_questions for one in verdicts if one.decision == "inconclusive" and one.more_questions]
    assert 80 <= np.median(more) <= 500
