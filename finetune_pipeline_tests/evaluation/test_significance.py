"""Significance tests, verified by exact cases, by scipy and by simulation."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats as scipy_stats

from finetune_pipeline.evaluation.significance import (
    PairedScores,
    Significance,
    compare_slices,
    detectable_gain,
    fewest_wins,
    holm,
    mcnemar,
    paired_test,
    questions_needed,
)


def measure(champion: list[int], challenger: list[int], total: int, clusters: list[str | None] | None = None):
    return paired_test(PairedScores(champion, challenger, total, clusters))


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 1 / 32
    assert mcnemar(3, 1) == 5 / 16
    assert mcnemar(1, 3) == 15 / 16
    assert mcnemar(2000, 1800) == pytest.approx(0.5 * math.erfc((200 - 1) / math.sqrt(2 * 3800)), rel=0.01)


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (7, 3), (3, 7), (12, 12), (130, 90), (400, 370)])
def test_mcnemar_agrees_with_scipy(won: int, lost: int) -> None:
    expected = scipy_stats.binomtest(won, won + lost, alternative="greater").pvalue
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_bootstrap_agrees_with_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    old, new = random.binomial(6, 0.6, 200), random.binomial(6, 0.63, 200)
    found = measure(old.tolist(), new.tolist(), 1200)
    flips = scipy_stats.permutation_test(
        (new, old), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", alternative="greater",
        n_resamples=20_000, vectorized=True, rng=1,
    )  # fmt: skip
    interval = scipy_stats.bootstrap((new - old,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert found.p_value >= flips.pvalue - 0.015
    assert found.p_value == pytest.approx(flips.pvalue, abs=0.025)
    low, high = (bound / 6 for bound in interval.confidence_interval)
    assert (found.gain_low, found.gain_high) == pytest.approx((low, high), abs=0.004)


@pytest.mark.parametrize("seed", range(4))
def test_holm_agrees_with_scipy_free_definition(seed: int) -> None:
    p_values = np.sort(np.random.default_rng(seed).beta(0.3, 3, 8)).tolist()
    adjusted = np.maximum.accumulate([(8 - rank) * p for rank, p in enumerate(p_values)])
    assert holm(p_values, 0.05) == {index for index, p in enumerate(adjusted) if p <= 0.05}
    assert holm([0.04, 0.03, 0.02], 0.05) == set()
    assert holm([0.04, 0.001, 0.02], 0.05) == {0, 1, 2}


def test_questions_that_count_one_use_mcnemar() -> None:
    found = measure([0, 0, 1, 0, 1], [1, 1, 1, 1, 0], 5)
    assert (found.method, found.p_value) == ("exact McNemar", 5 / 16)
    assert (found.wins, found.losses, found.ties, found.questions, found.units) == (3, 1, 1, 5, 5)


@pytest.mark.parametrize("weight", [1, 5, 1000])
def test_questions_that_are_right_or_wrong_use_mcnemar_whatever_they_count(weight: int) -> None:
    old, new = [0, 0, weight, 0, weight], [weight, weight, weight, weight, 0]
    by_one = measure([0, 0, 1, 0, 1], [1, 1, 1, 1, 0], 5)
    assert asdict(measure(old, new, 5 * weight)) == pytest.approx(asdict(by_one))


def test_the_interval_of_mcnemar_is_that_of_bonett_and_price() -> None:
    found = measure([0] * 20 + [1] * 80, [1] * 20 + [0] * 8 + [1] * 72, 100)
    won, lost = 21 / 102, 9 / 102
    error = math.sqrt((won + lost - (won - lost) ** 2) / 102)
    assert (found.gain_low, found.gain_high) == pytest.approx((won - lost - 1.96 * error, won - lost + 1.96 * error))


def test_a_clear_gain_is_significant_and_no_gain_is_not() -> None:
    old = [2, 3, 4, 1] * 50
    better = measure(old, [count + 1 for count in old], 1000)
    assert (better.method, better.p_value < 0.001) == ("paired bootstrap over questions", True)
    assert better.gain_low == pytest.approx(0.2, abs=0.01)
    assert measure(old, old, 1000).p_value == 1.0
    assert measure([count + 1 for count in old], old, 1000).p_value == 1.0


def test_few_differing_questions_limit_the_p_value() -> None:
    assert measure([0] * 4 + [3] * 40, [3] * 4 + [3] * 40, 200).p_value == pytest.approx(1 / 16, abs=0.01)


def test_the_order_of_questions_does_not_matter() -> None:
    old, new = [1, 2, 3, 0, 4] * 8, [2, 2, 2, 1, 4] * 8
    assert measure(old, new, 200) == measure(old[::-1], new[::-1], 200)


def test_no_interval_is_empty_however_few_the_questions() -> None:
    found = measure([1, 0, 1], [1, 0, 1], 3)
    assert (found.p_value, found.gain_low < -0.3, found.gain_high > 0.3) == (1.0, True, True)
    found = measure([3, 0, 5], [3, 0, 5], 15)
    assert found.gain_low < -0.2 and found.gain_high > 0.2


def test_clusters_count_as_one_observation() -> None:
    old, new = [0] * 40 + [1] * 20, [1] * 40 + [1] * 20
    apart = measure(old, new, 60)
    few = [f"document {index // 20}" for index in range(60)]
    together = measure(old, new, 60, few)
    assert (apart.method, together.method) == ("exact McNemar", "paired bootstrap over clusters")
    assert (together.units, together.questions, together.wins) == (3, 60, 40)
    assert apart.p_value < 1e-6 and together.p_value > 0.2  # two documents won, one equal
    assert together.standard_error > 2 * apart.standard_error
    alone: list[str | None] = [None] * 60
    assert measure(old, new, 60, alone) == apart


def test_clusters_hold_the_level_where_questions_do_not() -> None:
    random = np.random.default_rng(5)
    rejected = {"questions": 0, "clusters": 0}
    for _ in range(150):
        shift = np.repeat(random.choice([-1, 1], 30), 8)  # whole documents become right or wrong
        change = np.where(random.random(240) < 0.4, shift, 0)
        old, new = (change < 0).astype(int).tolist(), (change > 0).astype(int).tolist()
        clusters: list[str | None] = [str(index // 8) for index in range(240)]
        rejected["questions"] += measure(old, new, 240).p_value <= 0.05
        rejected["clusters"] += measure(old, new, 240, clusters).p_value <= 0.05
    assert rejected["questions"] > 2 * rejected["clusters"]
    assert rejected["clusters"] / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def retrain_differences(random: np.random.Generator, questions: int) -> tuple[list[int], list[int], int]:
    """Return the scores of two trainings that differ by chance, and the highest possible score."""
    sizes = random.integers(2, 7, questions)
    ease = random.beta(3, 1.5, questions)
    shared = random.binomial(sizes, ease)
    old, new = (np.where(random.random(questions) < 0.25, random.binomial(sizes, ease), shared) for _ in ("old", "new"))
    return old.tolist(), new.tolist(), int(sizes.sum())


@pytest.mark.parametrize("questions", [30, 200])
def test_the_level_of_an_error_budget_holds_for_parameters(questions: int) -> None:
    random, level, trials = np.random.default_rng(7), 0.05 / 12, 400
    found = sum(measure(*retrain_differences(random, questions)).p_value <= level for _ in range(trials))
    # P(more than this) is below 0.1% if the level holds.
    assert found <= scipy_stats.binom.ppf(0.999, trials, level)


def rejections(gain: float, questions: int, trials: int = 300) -> float:
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
        rejected += measure(old.tolist(), new.tolist(), int(sizes.sum())).p_value <= 0.05
    return rejected / trials


@pytest.mark.parametrize("questions", [30, 200])
def test_without_a_gain_about_five_percent_are_rejected(questions: int) -> None:
    # 300 trials: the standard error is 1.3%.
    assert 0.012 <= rejections(0.0, questions) <= 0.088


def test_a_true_gain_is_mostly_detected() -> None:
    assert rejections(0.06, 200, trials=100) >= 0.6  # 100 trials: the standard error is 5%


def test_the_interval_covers_the_true_gain() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        old, new = random.binomial(4, 0.6, 150), random.binomial(4, 0.65, 150)
        found = measure(old.tolist(), new.tolist(), 600)
        covered += found.gain_low <= 0.05 <= found.gain_high
    assert 0.91 <= covered / 300 <= 0.995


@pytest.mark.parametrize("questions", [3, 10, 30, 240])
@pytest.mark.parametrize(("differing", "gain"), [(0.1, 0.02), (0.3, 0.1)])
def test_the_interval_of_mcnemar_covers_the_true_gain(questions: int, differing: float, gain: float) -> None:
    random = np.random.default_rng(4)
    covered = 0
    for _ in range(600):
        found = measure(*outcomes(random, questions, differing, gain), questions)
        covered += found.gain_low <= gain <= found.gain_high
    assert covered / 600 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 600)


def outcomes(random: np.random.Generator, questions: int, differing: float, gain: float) -> tuple[list[int], list[int]]:
    """Return the scores of two models whose answers differ in so many questions, with this true gain."""
    drawn = random.random(questions)
    won, lost = (differing + gain) / 2, (differing - gain) / 2
    both = (drawn >= won + lost) & (drawn < won + lost + (1 - differing) / 2)
    return (((drawn >= won) & (drawn < won + lost)) | both).astype(int).tolist(), ((drawn < won) | both).astype(
        int
    ).tolist()


@pytest.mark.parametrize("level", [0.05, 0.05 / 12])
@pytest.mark.parametrize(("differing", "gain"), [(0.15, 0.05), (0.4, 0.1)])
def test_the_questions_needed_find_the_gain_as_often_as_promised(level: float, differing: float, gain: float) -> None:
    random = np.random.default_rng(6)
    needed = questions_needed(measure(*outcomes(random, 4000, differing, gain), 4000), gain, level)
    found = sum(measure(*outcomes(random, needed, differing, gain), needed).p_value <= level for _ in range(400))
    # 80%, within three standard errors, and four points less because the exact test is conservative.
    assert 0.70 <= found / 400 <= 0.90


def test_a_small_benchmark_says_what_it_can_decide() -> None:
    assert (fewest_wins(0.05), fewest_wins(0.05 / 12)) == (5, 8)
    three = Significance("exact McNemar", 0.125, -0.2, 1.0, 0.3, 3, 0, 0, 3)
    assert questions_needed(three, 1.0, 0.05) == 5
    many = measure([0] * 30 + [1] * 210, [1] * 30 + [0] * 20 + [1] * 190, 240)
    assert detectable_gain(many, 0.05) == pytest.approx(2.486 * many.standard_error, rel=0.01)


# Eight slices of 30 questions: (fraction that differs, true change in points, highest fraction of challengers blocked)
SLICES = [
    (0.2, 0.05, 0.02),
    (0.4, 0.05, 0.03),
    (0.2, 0.0, 0.03),
    (0.2, -0.05, 0.05),  # the margin itself: the level of the tests
    (0.4, -0.05, 0.05),
]


@pytest.mark.parametrize(("differing", "change", "highest"), SLICES)
def test_slices_seldom_block_what_they_should_not(differing: float, change: float, highest: float) -> None:
    random, trials = np.random.default_rng(8), 300
    blocked = 0
    for _ in range(trials):
        slices = {str(one): PairedScores(*outcomes(random, 30, differing, change), 30) for one in range(8)}
        blocked += any(one.status == "regressed" for one in compare_slices(slices, 0.05, 0.05))
    assert blocked / trials <= highest + 3 * math.sqrt(highest * (1 - highest) / trials)


def test_a_slice_that_collapses_is_found_and_a_large_one_that_holds_too() -> None:
    random, trials = np.random.default_rng(9), 100
    found = held = 0
    for _ in range(trials):
        slices = {str(one): PairedScores(*outcomes(random, 30, 0.2, 0.05), 30) for one in range(6)}
        slices["fallen"] = PairedScores(*outcomes(random, 30, 0.6, -0.5), 30)
        slices["large"] = PairedScores(*outcomes(random, 1000, 0.1, 0.0), 1000)
        by_name = {one.name: one.status for one in compare_slices(slices, 0.05, 0.05)}
        found += by_name["fallen"] == "regressed"
        held += by_name["large"] == "held"
    assert found >= 90 and held >= 95
