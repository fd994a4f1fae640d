"""The rule of promotion and its boundaries."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.evaluation import gate
from finetune_pipeline.evaluation.gate import BudgetState, QualityFloor, Verdict, slices_text
from finetune_pipeline.evaluation.significance import PairedScores, SliceTest, compare_slices, paired_test
from finetune_pipeline.settings import GateSettings

LOW_FLOOR = QualityFloor(constant_correct=0, valid=100, answers=100, structured=True)


def decide(champion: int, challenger: int, total: int, *others: Any, floor: QualityFloor = LOW_FLOOR) -> Verdict:
    """Return the verdict on a challenger above the quality floor, unless another floor is given."""
    return gate.decide(champion, challenger, total, floor, *others)


RELATIVE = GateSettings()
POINTS = GateSettings(mode="points")
ERRORS = GateSettings(mode="error_reduction")
MIN_30 = GateSettings(min_score=0.3)


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


REQUIRED = GateSettings(significance="required")
FIRST = BudgetState(tested=True, left=11)
SPENT = BudgetState(tested=False, left=0)


def judge(won: int, lost: int, both: int, total: int, settings: GateSettings, budget: BudgetState | None) -> Verdict:
    """Return the verdict on questions that count 1: won, lost, right by both models, and wrong by both."""
    none = total - won - lost - both
    champion = [0] * won + [1] * (lost + both) + [0] * none
    challenger = [1] * won + [0] * lost + [1] * both + [0] * none
    found = paired_test(PairedScores(champion, challenger, total))
    return decide(sum(champion), sum(challenger), total, settings, found, (), budget)


@pytest.mark.parametrize(
    ("won", "lost", "both", "total", "shown", "required", "words"),
    [
        # a clear gain
        (40, 5, 100, 240, "promote", "promote", "40 questions won, 5 lost, 195 equal: p = 3.9e-08 by exact McNemar"),
        # enough by the rule, but not significant at 0.05 / 12
        (20, 8, 100, 240, "promote", "inconclusive", "more questions would decide"),
        # nor at 0.05: the rule still promotes, and the evidence says that the comparison decides nothing
        (20, 14, 100, 240, "promote", "inconclusive", "by itself the comparison is inconclusive: about "),
        # not enough by the rule, but the true gain may be enough
        (18, 16, 100, 240, "reject", "inconclusive", "its true gain may be enough; about "),
        # surely not enough
        (2, 30, 100, 240, "reject", "reject", "less than the 2.9 needed"),
        (3, 3, 1800, 2000, "reject", "reject", "less than the 4.5 needed"),
        # significant, but surely less than 5%
        (40, 10, 1800, 2000, "reject", "reject", "less than the 4.5 needed"),
        # three questions decide nothing
        (3, 0, 0, 3, "promote", "inconclusive", "even 3 won and none lost would give p = 0.12; at least 8 are needed"),
        (0, 0, 2, 3, "reject", "inconclusive", "3 questions can decide nothing"),
        (1, 0, 2, 3, "promote", "inconclusive", "1 question won, 0 lost, 2 equal"),
    ],
)
def test_a_verdict_is_inconclusive_only_if_significance_is_required(
    won: int, lost: int, both: int, total: int, shown: str, required: str, words: str
) -> None:
    assert judge(won, lost, both, total, RELATIVE, None).decision == shown
    verdict = judge(won, lost, both, total, REQUIRED, FIRST)
    assert (verdict.decision, words in verdict.reason) == (required, True), verdict.reason
    assert verdict.tests_left == 11
    assert verdict.evidence in verdict.reason
    assert (verdict.decision == "inconclusive") == (verdict.more_questions is not None)


def test_the_rule_decides_where_significance_is_only_shown() -> None:
    verdict = judge(20, 14, 100, 240, RELATIVE, None)
    assert (verdict.decision, verdict.tests_left) == ("promote", None)
    assert (
        f"by itself the comparison is inconclusive: about {verdict.more_questions:,} more questions" in verdict.reason
    )
    assert (
        "20 questions won, 14 lost, 206 equal: p = 0.2 by exact McNemar, at most 0.05 is significant" in verdict.reason
    )


@pytest.mark.parametrize(
    ("won", "lost", "decision", "words"),
    [
        (40, 5, "inconclusive", "budget spent; 12 comparisons"),
        (18, 16, "inconclusive", "budget spent; 12 comparisons"),
        (2, 30, "reject", "does not gain enough"),
    ],
)
def test_without_a_budget_nothing_is_promoted(won: int, lost: int, decision: str, words: str) -> None:
    verdict = judge(won, lost, 100, 240, REQUIRED, SPENT)
    assert (verdict.decision, words in verdict.reason, verdict.tests_left) == (decision, True, 0), verdict.reason


def test_a_challenger_below_the_floor_is_rejected_and_never_inconclusive() -> None:
    found = paired_test(PairedScores([0] * 10, [1] * 2 + [0] * 8, 10))
    floor = QualityFloor(constant_correct=2, valid=10, answers=10, structured=False)
    verdict = decide(0, 2, 10, REQUIRED, found, (), FIRST, floor=floor)
    assert (verdict.decision, "however low the champion's" in verdict.reason) == ("reject", True)
    assert "inconclusive: about" in verdict.reason


@pytest.mark.parametrize(("found", "budget"), [(None, FIRST), (True, None)])
def test_required_significance_has_to_be_measured(found: Any, budget: BudgetState | None) -> None:
    measured = paired_test(PairedScores([0, 1], [1, 1], 2)) if found else None
    with pytest.raises(ValueError, match="needs the paired test and the error budget; evaluate again"):
        decide(1, 2, 2, REQUIRED, measured, (), budget)


def test_the_named_number_of_questions_decides() -> None:
    verdict = judge(20, 8, 100, 240, REQUIRED, FIRST)
    assert verdict.more_questions
    times = (240 + verdict.more_questions) / 240  # more questions of the same kind
    won, lost, both = (round(count * times) for count in (20, 8, 100))
    assert judge(won, lost, both, 240 + verdict.more_questions, REQUIRED, FIRST).decision == "promote"


def regressing(lost: int, questions: int = 60) -> tuple[SliceTest, ...]:
    """Return the tests of a slice that loses questions, one that does not change, and a small one."""
    same = [1] * 200
    slices = {
        "doors": PairedScores([1] * questions, [0] * lost + [1] * (questions - lost), questions),
        "stairs": PairedScores([1] * 3, [1, 1, 0], 3),
        "walls": PairedScores(same, same, len(same)),
    }
    return compare_slices(slices, 0.05, 0.05)


@pytest.mark.parametrize(
    ("lost", "required", "text"),
    [
        (30, "reject", "slice doors regressed: -50.0 points on 60 questions, more than the 5 allowed (p = "),
        (8, "promote", "no slice lost significantly more than 5 points; too small to tell: doors, stairs"),
        (0, "promote", "no slice lost significantly more than 5 points; too small to tell: stairs"),
    ],
)
def test_a_slice_blocks_only_if_required_and_lower_for_sure(lost: int, required: str, text: str) -> None:
    strict, slices = GateSettings(slices="required"), regressing(lost)
    assert slices_text(slices, strict).startswith(text)
    assert decide(40, 44, 100, RELATIVE, None, slices).promote
    verdict = decide(40, 44, 100, strict, None, slices)
    assert (verdict.decision, "slice doors regressed" in verdict.reason) == (required, required == "reject")


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
        (0, 10, 170, QualityFloor(12, 170, 170, False), RELATIVE, False, "\nit needs more than 12 correct"),
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
            "0 of 60 unconstrained answers valid, more than half required\nmost of its",
        ),
        (
            0,
            40,
            60,
            QualityFloor(1, 30, 60, True),
            RELATIVE,
            False,
            "\nmost of its unconstrained answers do not pass the output schema",
        ),
        (0, 40, 60, QualityFloor(1, 31, 60, True), RELATIVE, True, "31 of 60 unconstrained answers valid, more than"),
        (0, 40, 60, QualityFloor(1, 0, 60, False), RELATIVE, True, "0 of 60 answers valid"),  # free text
        # a champion below the quality floor, in each mode
        (5, 10, 170, QualityFloor(10, 170, 170, False), RELATIVE, False, "gain 100.0%, 5% needed; the best constant"),
        (1, 10, 100, QualityFloor(10, 100, 100, False), POINTS, False, "\nit needs more than 10"),
        (0, 10, 100, QualityFloor(10, 100, 100, False), ERRORS, False, "\nit needs more than 10"),
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
            "constant answer scores 7 of 100; 99 of 100 unconstrained answers",
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
    unconstrained = "unconstrained " if floor.structured else ""
    assert f"{floor.valid} of {floor.answers} {unconstrained}answers valid" in verdict.reason


@given(counts, gates)
def test_a_rejection_has_a_line_for_each_reason_and_a_promotion_only_its_numbers(
    numbers: tuple[int, int, int], gate: GateSettings
) -> None:
    verdict = decide(*numbers, gate)
    assert ("\n" in verdict.reason) != verdict.promote


def test_every_reason_of_a_rejection_is_a_line_of_its_own() -> None:
    floor = QualityFloor(constant_correct=4, valid=1, answers=8, structured=True)
    assert decide(3, 3, 8, RELATIVE, floor=floor).reason.split("\n") == [
        "challenger 3 of 8 correct, champion 3: gain 0.0%, 5% needed; the best constant answer scores 4 of 8; 1 of 8 "
        "unconstrained answers valid, more than half required",
        "it needs more than 4 correct, however low the champion's score is",
        "most of its unconstrained answers do not pass the output schema",
        "it does not gain enough over the champion: at least 4 correct needed",
    ]


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
