"""The gains on the open and the sealed benchmark, compared."""

import numpy as np
import pytest

from finetune_pipeline.evaluation.sealed import QuestionScores, compare_gains


def scores(*correct: int) -> QuestionScores:
    return {f"q{n}": (value, 1, None) for n, value in enumerate(correct)}


def test_a_gain_that_only_the_open_benchmark_shows_is_overfitting() -> None:
    before, after = scores(*[0] * 50, *[1] * 50), scores(*[1] * 80, *[0] * 10, *[1] * 10)
    found = compare_gains(before, after, before, before)
    assert found.overfitted and found.open_gain == pytest.approx(0.4) and found.sealed_gain == 0
    assert found.text.endswith("the benchmark is overfitted, so its gains overstate: write a new one")
    same = compare_gains(before, after, before, after)
    assert not same.overfitted and same.low == pytest.approx(-same.high)
    assert "difference +0.0" in same.text
    assert same.text.endswith("no sign that the benchmark is overfitted (a difference above 18.5 would be one)")


def test_a_sealed_benchmark_of_three_questions_says_that_it_decides_nothing() -> None:
    before, after, few = scores(*[0] * 36, *[1] * 204), scores(*[1] * 240), scores(0, 1, 1)
    found = compare_gains(before, after, few, few)
    assert found.open_gain == pytest.approx(0.15) and not found.overfitted
    assert found.text.endswith("(a difference above 55.6 would be one)")


def test_without_overfitting_it_is_seldom_reported() -> None:
    random = np.random.default_rng(0)

    def gained(count: int) -> tuple[QuestionScores, QuestionScores]:
        before, flips = random.random(count) < 0.6, random.random(count) < 0.15
        after = np.where(flips, random.random(count) < 0.8, before)
        return scores(*before.astype(int)), scores(*after.astype(int))

    reported = sum(compare_gains(*gained(120), *gained(60)).overfitted for _ in range(1000))
    assert reported <= 45  # one-sided 2.5 %, and chance
