"""Significance tests, verified by exact cases and by simulation."""

import math

import numpy as np
import pytest

from finetune_pipeline.evaluation.significance import mcnemar, paired_test


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 1 / 32
    assert mcnemar(3, 1) == 5 / 16
    assert mcnemar(1, 3) == 15 / 16
    assert mcnemar(2000, 1800) == pytest.approx(0.5 * math.erfc((200 - 1) / math.sqrt(2 * 3800)), rel=0.01)


def test_questions_that_count_one_use_mcnemar() -> None:
    found = paired_test([0, 0, 1, 0, 1], [1, 1, 1, 1, 0], 5)
    assert (found.method, found.p_value, found.questions) == ("exact McNemar", 5 / 16, 5)


def test_a_clear_gain_is_significant_and_no_gain_is_not() -> None:
    old = [2, 3, 4, 1] * 50
    better = paired_test(old, [count + 1 for count in old], 1000)
    assert (better.method, better.p_value < 0.001) == ("paired bootstrap over questions", True)
    assert (better.gain_low, better.gain_high) == (0.2, 0.2)
    assert paired_test(old, old, 1000).p_value == 1.0
    assert paired_test([count + 1 for count in old], old, 1000).p_value == 1.0


def test_few_differing_questions_limit_the_p_value() -> None:
    assert paired_test([0] * 4 + [3] * 40, [3] * 4 + [3] * 40, 200).p_value == 1 / 16


def test_the_order_of_questions_does_not_matter() -> None:
    old, new = [1, 2, 3, 0, 4] * 8, [2, 2, 2, 1, 4] * 8
    assert paired_test(old, new, 200) == paired_test(old[::-1], new[::-1], 200)


def rejections(gain: float, questions: int, trials: int = 400) -> float:
    """Return the fraction of trials rejected at 5%; the parameters of one question are correlated."""
    random = np.random.default_rng(7)
    rejected = 0
    for _ in range(trials):
        sizes = random.integers(2, 7, questions)
        ease = random.beta(3, 1.5, questions)
        old, new = (
            random.binomial(sizes, np.clip(random.beta(8 * ease + 0.1, 8 * (1 - ease) + 0.1) + shift, 0, 1))
            for shift in (0.0, gain)
        )
        rejected += paired_test(old.tolist(), new.tolist(), int(sizes.sum())).p_value <= 0.05
    return rejected / trials


@pytest.mark.parametrize("questions", [30, 200])
def test_without_a_gain_about_five_percent_are_rejected(questions: int) -> None:
    # 400 trials: the standard error is 1.1%.
    assert 0.02 <= rejections(0.0, questions) <= 0.085


def test_a_true_gain_is_mostly_detected() -> None:
    assert rejections(0.06, 200, trials=100) >= 0.7


def test_the_interval_covers_the_true_gain() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        old, new = random.binomial(4, 0.6, 150), random.binomial(4, 0.65, 150)
        found = paired_test(old.tolist(), new.tolist(), 600)
        covered += found.gain_low <= 0.05 <= found.gain_high
    assert 0.91 <= covered / 300 <= 0.985
