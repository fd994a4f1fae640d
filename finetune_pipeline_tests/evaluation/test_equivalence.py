"""Equivalence tests, compared with scipy and verified by simulation."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from finetune_pipeline.evaluation.equivalence import (
    Equivalence,
    ScoreDifferences,
    score_differences,
    t_quantile,
    t_tail,
)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 10, 23, 63, 264, 999])
def test_the_t_distribution_is_scipys(df):
    for t in (-5, -1, 0, 0.1, 0.5, 1, 1.7, 2.5, 4, 8):
        assert t_tail(t, df) == pytest.approx(stats.t.sf(t, df), abs=1e-12)
    for tail in (0.4, 0.05, 0.001):
        assert t_quantile(tail, df) == pytest.approx(stats.t.isf(tail, df), rel=1e-8)


@pytest.mark.parametrize("shift", [-0.1, -0.02, 0.0, 0.04, 0.05, 0.3])
@pytest.mark.parametrize("questions", [1, 5, 64, 266])
def test_both_tests_and_the_interval_are_scipys_with_one_more_question(questions, shift):
    reference, candidate = np.random.default_rng(questions).uniform(size=(2, questions))
    candidate = np.clip(candidate + shift, 0, 1)
    worse, better = (np.append(candidate - reference, worst) for worst in (-1, 1))
    low = stats.ttest_1samp(worse, -0.05, alternative="greater")
    high = stats.ttest_1samp(better, 0.05, alternative="less")
    found = Equivalence(score_differences(list(reference), list(candidate)), 0.05)
    assert found.p_value == pytest.approx(max(low.pvalue, high.pvalue), abs=1e-9)
    bounds = (low.confidence_interval(0.95).low, high.confidence_interval(0.95).high)
    assert found.interval == pytest.approx((max(-1, bounds[0]), min(1, bounds[1])), abs=1e-9)
    assert found.equivalent == (found.interval[0] >= -0.05 and found.interval[1] <= 0.05)


@pytest.mark.parametrize(
    ("reference", "candidate", "margin", "start"),
    [
        ([1] * 64, [1] * 64, 0.05, r"equivalent: \+0.0 points on 64 questions"),
        ([1] * 52, [1] * 52, 0.05, "too few questions to tell: .* about 53 questions"),  # even if all are equal
        ([1] * 3, [1] * 3, 0.05, "too few questions to tell: .* about 53 questions"),
        ([1], [1], 0.05, "too few questions to tell: "),
        ([1] * 64, [0] * 64, 0.05, "not equivalent: -100.0 points on 64 questions"),
        ([1, 0] * 40, [0, 0] * 40, 0.05, "not equivalent: -50.0 points"),
        ([1, 0] * 40, [0, 1] * 40, 0.05, r"undecided: \+0.0 points on 80 .* about 1\d{3} questions"),
        ([1] * 97 + [0] * 3, [0] * 3 + [1] * 97, 0.2, "equivalent"),
        ([1] * 100, [0] * 6 + [1] * 94, 0.05, "undecided: -6.0 .* margin 5$"),  # no number of questions would show it
    ],
)
def test_the_sentence_names_result_numbers_and_remedy(reference, candidate, margin, start):
    sentence = Equivalence(score_differences(reference, candidate), margin).sentence
    assert re.match(start, sentence), sentence


@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_the_number_of_questions_needed_is_the_smallest(deviation):
    needed = Equivalence(ScoreDifferences(20, 0.01, deviation), 0.05).questions_needed
    assert Equivalence(ScoreDifferences(needed, 0.01, deviation), 0.05).equivalent
    assert not Equivalence(ScoreDifferences(needed - 1, 0.01, deviation), 0.05).equivalent


@pytest.mark.parametrize(
    ("differences", "probabilities"),
    [([0, -1], [0.95, 0.05]), ([0, -0.5], [0.9, 0.1]), ([0, -1, 1], [0.85, 0.1, 0.05]), ([0, -0.2], [0.75, 0.25])],
)
@pytest.mark.parametrize("questions", [64, 128])
def test_models_that_differ_by_the_margin_are_rarely_called_equivalent(differences, probabilities, questions):
    draws = np.random.default_rng(0).choice(differences, size=(2000, questions), p=probabilities)
    called = sum(Equivalence(score_differences([0.0] * questions, list(draw)), 0.05).equivalent for draw in draws)
    assert called / 2000 <= 0.06 + 3 * math.sqrt(0.06 * 0.94 / 2000)


def test_the_default_sample_finds_most_equivalent_models():
    # 17% of the answers have one of three parameters more or less, as after quantization to Q4_K_M.
    draws = np.random.default_rng(0).choice([0, -1 / 3, 1 / 3], size=(500, 128), p=[0.83, 0.085, 0.085])
    called = sum(Equivalence(score_differences([0.0] * 128, list(draw)), 0.05).equivalent for draw in draws)
    assert called / 500 > 0.8


@pytest.mark.parametrize(("reference", "candidate"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_that_are_not_paired_are_refused(reference, candidate):
    with pytest.raises(ValueError, match="paired scores of at least one question are needed"):
        score_differences(reference, candidate)


@pytest.mark.parametrize(
    ("differences", "margin", "tolerable"),
    [
        ([0.0] * 400, 0.05, True),  # not inferior
        ([0.5] * 400, 0.05, True),  # whatever it gains
        ([-0.5] * 400, 0.05, False),
        ([-1.0] * 40 + [0.0] * 360, 0.05, False),  # 10 points lower
        ([-1.0] * 16 + [0.0] * 384, 0.05, False),  # 4 points lower, which may be 5
        ([0.0] * 20, 0.05, True),  # too few to test, so only the difference itself counts
        ([-1.0] + [0.0] * 19, 0.05, True),  # 5 points lower, the margin
        ([-1.0] * 2 + [0.0] * 18, 0.05, False),
    ],
)
def test_a_loss_is_tolerable_if_it_is_within_the_margin(differences, margin, tolerable):
    measured = score_differences([0.5] * len(differences), [0.5 + one for one in differences])
    assert Equivalence(measured, margin).tolerable_loss is tolerable
