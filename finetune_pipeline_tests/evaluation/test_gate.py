"""The rule of promotion and its boundaries."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.evaluation import gate
from finetune_pipeline.evaluation.gate import QualityFloor, Verdict
from finetune_pipeline.evaluation.significance import Significance
from finetune_pipeline.settings import GateSettings

LOW_FLOOR = QualityFloor(constant_correct=0, valid=100, answers=100, structured=True)


def decide(champion: int, challenger: int, total: int, *others: Any, floor: QualityFloor = LOW_FLOOR) -> Verdict:
    """Return the verdict on a challenger above the quality floor, unless another floor is given."""
    return gate.decide(champion, challenger, total, floor, *others)


RELATIVE = GateSettings()
POINTS = GateSettings(mode="points")
ERRORS = GateSettings(mode="error_reduction")
MIN_30 = GateSettings(min_score=0.3)
NOT_SIGNIFICANT = Significance("paired bootstrap over questions", 0.2, -0.01, 0.05, 200)
SIGNIFICANT = Significance("paired bootstrap over questions", 0.001, 0.02, 0.05, 200)


@pytest.mark.parametrize(
    ("champion", "challenger", "total", "settings", "promote", "words"),
    [
        (40, 42, 100, RELATIVE, True, "challenger 42 of 100 correct, champion 40: gain 5.0%, 5% needed"),
        (640, 812, 1040, RELATIVE, True, "challenger 812 of 1,040 correct, champion 640: gain 26.9%, 5% needed"),
        (1000, 1049, 2000, RELATIVE, False, "gain 4.9%, 5% needed"),
        (100_000, 104_999, 200_000, RELATIVE, False, "gain 4.999%, 5% needed"),
        (20, 21, 100, RELATIVE, True, "gain 5.0%"),
        (21, 22, 100, RELATIVE, False, "gain 4.8%"),
        (50, 40, 100, RELATIVE, False, "loss 20.0%"),
        (50, 50, 100, GateSettings(min_gain=0), False, "gain 0.0%, more than 0 needed"),
        (50, 51, 100, GateSettings(min_gain=0), True, "gain 2.0%"),
        (0, 1, 100, RELATIVE, True, "any gain is enough"),
        (0, 0, 100, RELATIVE, False, "there is none"),
        (40, 45, 100, POINTS, True, "gain 5.0 points, 5 points needed"),
        (40, 44, 100, POINTS, False, "gain 4.0 points"),
        (960, 962, 1000, ERRORS, True, "gain 5.0% of the errors"),
        (960, 961, 1000, ERRORS, False, "gain 2.5% of the errors"),
        (
            96,
            100,
            100,
            RELATIVE,
            False,
            "no score could pass: 101 correct would be needed of 100; set gate.mode: error_",
        ),
        (96, 100, 100, POINTS, False, "no score could pass"),
        (100, 100, 100, RELATIVE, False, "the champion has everything correct; add harder questions"),
        (100, 100, 100, ERRORS, False, "the champion has everything correct"),
        (95, 100, 100, RELATIVE, True, "gain 5.3%"),
    ],
)
def test_the_rule(
    champion: int, challenger: int, total: int, settings: GateSettings, promote: bool, words: str
) -> None:
    verdict = decide(champion, challenger, total, settings)
    assert (verdict.promote, words in verdict.reason) == (promote, True), verdict.reason


def test_significance_blocks_only_if_required() -> None:
    strict = GateSettings(require_significance=True)
    assert decide(40, 44, 100, RELATIVE, NOT_SIGNIFICANT).promote
    refused = decide(40, 44, 100, strict, NOT_SIGNIFICANT)
    assert not refused.promote
    assert "p = 0.200 by paired bootstrap over questions on 200 questions, at most 0.05 allowed" in refused.reason
    assert decide(40, 44, 100, strict, SIGNIFICANT).promote
    assert "was not measured" in decide(40, 44, 100, strict).reason
    assert not decide(40, 44, 100, strict).promote


def test_regressed_slices_block_only_if_forbidden() -> None:
    strict = GateSettings(forbid_slice_regressions=True)
    assert decide(40, 44, 100, RELATIVE, SIGNIFICANT, ["doors"]).promote
    refused = decide(40, 44, 100, strict, SIGNIFICANT, ["doors", "stairs"])
    assert (refused.promote, "these slices regressed: doors, stairs" in refused.reason) == (False, True)
    assert decide(40, 44, 100, strict, SIGNIFICANT).promote


@pytest.mark.parametrize(("champion", "challenger", "total"), [(-1, 0, 10), (0, 11, 10), (11, 0, 10), (0, 0, 0)])
def test_impossible_scores_are_rejected(champion: int, challenger: int, total: int) -> None:
    with pytest.raises(ValueError, match="evaluate again"):
        decide(champion, challenger, total, RELATIVE)


counts = st.integers(1, 5000).flatmap(
    lambda total: st.tuples(st.integers(0, total), st.integers(0, total), st.just(total))
)
gates = st.builds(
    GateSettings,
    min_gain=st.integers(0, 1000).map(lambda n: n / 1000),
    mode=st.sampled_from(["relative", "points", "error_reduction"]),
)


@given(counts)
def test_relative_is_the_integer_rule(numbers: tuple[int, int, int]) -> None:
    champion, challenger, total = numbers
    gain = challenger - champion
    assert decide(champion, challenger, total, RELATIVE).promote == (gain > 0 and 100 * gain >= 5 * champion)


@given(counts, gates)
def test_the_required_score_is_the_boundary(numbers: tuple[int, int, int], gate: GateSettings) -> None:
    champion, challenger, total = numbers
    verdict = decide(champion, challenger, total, gate)
    assert verdict.promote == (challenger >= verdict.required_correct)
    assert verdict.required_correct > champion
    assert ("no score could pass" in verdict.reason) == (verdict.required_correct > total)


@given(counts, gates)
def test_a_higher_score_never_turns_a_promotion_into_a_rejection(
    numbers: tuple[int, int, int], gate: GateSettings
) -> None:
    champion, challenger, total = numbers
    if challenger < total and decide(champion, challenger, total, gate).promote:
        assert decide(champion, challenger + 1, total, gate).promote


@pytest.mark.parametrize(
    ("champion", "challenger", "total", "floor", "settings", "promote", "words"),
    [
        # one word for nearly every question scores 10 of 170; the base model scores 0
        (
            0,
            10,
            170,
            QualityFloor(10, 170, 170, True),
            RELATIVE,
            False,
            "best constant answer scores 10 of 170; 170 of 170",
        ),
        (0, 10, 170, QualityFloor(12, 170, 170, False), RELATIVE, False, "but a challenger needs more than 12 correct"),
        (
            0,
            11,
            170,
            QualityFloor(10, 170, 170, False),
            RELATIVE,
            True,
            "the best constant answer scores 10 of 170",
        ),
        # 2 of 60 correct without a valid answer
        (
            0,
            2,
            60,
            QualityFloor(1, 0, 60, True),
            RELATIVE,
            False,
            "0 of 60 answers valid, more than half required; but most of its",
        ),
        (
            0,
            40,
            60,
            QualityFloor(1, 30, 60, True),
            RELATIVE,
            False,
            "but most of its answers do not pass the output schema",
        ),
        (0, 40, 60, QualityFloor(1, 31, 60, True), RELATIVE, True, "31 of 60 answers valid, more than half required"),
        (0, 40, 60, QualityFloor(1, 0, 60, False), RELATIVE, True, "0 of 60 answers valid"),  # free text
        # a champion below the quality floor, in each mode
        (5, 10, 170, QualityFloor(10, 170, 170, False), RELATIVE, False, "gain 100.0%, 5% needed; the best constant"),
        (1, 10, 100, QualityFloor(10, 100, 100, False), POINTS, False, "but a challenger needs more than 10"),
        (0, 10, 100, QualityFloor(10, 100, 100, False), ERRORS, False, "but a challenger needs more than 10"),
        # gate.min_score instead of the constant answer's score
        (
            0,
            30,
            100,
            QualityFloor(10, 100, 100, False),
            MIN_30,
            False,
            "more than 30 of 100 correct needed by gate.min_score 0.3",
        ),
        (
            0,
            31,
            100,
            QualityFloor(90, 100, 100, False),
            MIN_30,
            True,
            "more than 30 of 100 correct needed by gate.min_score 0.3",
        ),
        (0, 1, 100, QualityFloor(90, 100, 100, False), GateSettings(min_score=0), True, "more than 0 of 100"),
        (0, 29, 1000, QualityFloor(0, 100, 100, False), GateSettings(min_score=0.029), False, "more than 29 of 1,000"),
        # a rejection for the gain states the limits too
        (
            40,
            41,
            100,
            QualityFloor(7, 99, 100, True),
            RELATIVE,
            False,
            "constant answer scores 7 of 100; 99 of 100 answers",
        ),
        (
            0,
            0,
            100,
            QualityFloor(100, 100, 100, False),
            RELATIVE,
            False,
            "one constant answer has everything correct; add questions",
        ),
    ],
)
def test_a_challenger_below_the_quality_floor_is_rejected(
    champion: int, challenger: int, total: int, floor: QualityFloor, settings: GateSettings, promote: bool, words: str
) -> None:
    verdict = decide(champion, challenger, total, settings, floor=floor)
    assert (verdict.promote, words in verdict.reason) == (promote, True), verdict.reason
    assert verdict.promote == (challenger >= verdict.required_correct and "most of its" not in verdict.reason)
    assert f"{floor.valid} of {floor.answers} answers valid" in verdict.reason


@given(counts, gates)
def test_a_model_never_beats_itself(numbers: tuple[int, int, int], gate: GateSettings) -> None:
    champion, _, total = numbers
    assert not decide(champion, champion, total, gate).promote


@given(counts, gates, st.integers(2, 50))
def test_scaling_all_counts_keeps_the_verdict(numbers: tuple[int, int, int], gate: GateSettings, times: int) -> None:
    champion, challenger, total = numbers
    verdict = decide(champion, challenger, total, gate)
    scaled = decide(champion * times, challenger * times, total * times, gate)
    assert verdict.promote == scaled.promote


@given(counts, gates)
def test_the_shown_gain_agrees_with_the_verdict(numbers: tuple[int, int, int], gate: GateSettings) -> None:
    champion, challenger, total = numbers
    verdict = decide(champion, challenger, total, gate)
    words = verdict.reason.split(": ", 1)[1].split()
    if words[0] == "gain" and gate.min_gain and challenger > champion:
        shown = Fraction(words[1].rstrip("%,"))
        assert (shown >= Fraction(str(gate.min_gain)) * 100) == verdict.promote
