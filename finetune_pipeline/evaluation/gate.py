"""The gate: the rule of promotion. The check on the report asks it, and the promotion asks it again.

Scores are integers and the required gain is a fraction, because in floats 0.42 is not 5% more than 0.40.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from finetune_pipeline.evaluation.regression import RegressionTest
from finetune_pipeline.evaluation.significance import (
    Significance,
    SliceTest,
    detectable_gain,
    fewest_wins,
    gain_found_by,
    questions_for,
    questions_needed,
)
from finetune_pipeline.settings import BUDGET_TESTS, GateSettings
from finetune_pipeline.wording import counted

Decision = Literal["promote", "reject", "inconclusive"]
HEADLINES: dict[Decision, str] = {
    "promote": "Promote the challenger",
    "reject": "Reject: the champion stays",
    "inconclusive": "Inconclusive: the champion stays",
}
"""The decisions as people read them."""

USUALLY_DIFFERING = 0.15
"""Fraction of the questions whose score usually differs between two trainings, for what a benchmark can decide."""

_GAIN = 0.05  # the example for which a benchmark that is too small gets the number of questions it needs


@dataclass(frozen=True)
class QualityFloor:
    """Measurements of the challenger that count however bad the champion is.

    Attributes:
        constant_correct: score of the best constant answer.
        valid: valid answers of the challenger to a sample of the questions, without constrained decoding.
        answers: number of questions in that sample.
        structured: the loop has an output schema, so most answers have to be valid.
    """

    constant_correct: int
    valid: int
    answers: int
    structured: bool


@dataclass(frozen=True)
class BudgetState:
    """What the error budget of a loop and benchmark allows a comparison.

    Attributes:
        tested: the comparison is one of the tests of the budget; False if the budget was spent before.
        left: further tests that the budget allows.
    """

    tested: bool
    left: int


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on a challenger, with the reason and the numbers.

    The floats are for display only; None where they would divide by zero.

    Attributes:
        reason: the numbers in the first line, then a line for each reason against a promotion, then the evidence, the
            regression suite and the error budget if there are any.
        evidence: what the paired test by itself says; empty if it was not measured.
        required_correct: the lowest score that meets the rules on gain and score; more than `total` if none can.
        minimum_correct: the score that the challenger has to exceed, whatever the champion's score.
        valid: the challenger's valid answers in the sample without constrained decoding.
        answers: number of questions in that sample.
        relative_gain: gain divided by the champion's score; 0.05 is 5%.
        points: gain divided by `total`, -1 to 1.
        error_reduction: gain divided by the champion's errors.
        more_questions: about how many more questions would decide; None if the paired test decides.
        tests_left: further tests that the error budget allows; None unless `significance: required`.
    """

    decision: Decision
    reason: str
    evidence: str
    champion_correct: int
    challenger_correct: int
    total: int
    required_correct: int
    minimum_correct: int
    valid: int
    answers: int
    relative_gain: float | None
    points: float
    error_reduction: float | None
    more_questions: int | None = None
    tests_left: int | None = None

    @property
    def markdown(self) -> str:
        """The reason for Dagster's UI, which would join its lines: the numbers, and a list of the other lines."""
        statement, *others = self.reason.split("\n")
        return "\n".join([statement, *(["", *(f"- {line}" for line in others)] if others else [])])

    @property
    def promote(self) -> bool:
        """The challenger becomes champion."""
        return self.decision == "promote"


@dataclass(frozen=True)
class _Evidence:
    """What the paired test says about the gain.

    Attributes:
        gains: the gain is significant.
        falls_short: the confidence interval ends below the required gain.
        more: about how many more questions would decide, if neither holds.
        text: the numbers and the conclusion, for people.
    """

    gains: bool
    falls_short: bool
    more: int | None
    text: str


def decide(
    champion_correct: int,
    challenger_correct: int,
    total: int,
    floor: QualityFloor,
    settings: GateSettings,
    significance: Significance | None = None,
    slices: Sequence[SliceTest] = (),
    budget: BudgetState | None = None,
    regression: RegressionTest | None = None,
) -> Verdict:
    """Decide whether to promote: the challenger must be good enough by itself and gain enough on the same questions.

    The gain must be positive, and at least `min_gain` of the champion's score (relative), of the total (points) or of
    the champion's errors (error_reduction). The score must exceed `min_score` (default: the score of the best constant
    answer) and, with an output schema, most answers must be valid.

    With `significance: shown` these rules promote or reject, and the reason tells what the paired test says. With
    `significance: required` the gain must be significant too, at the level that the error budget gives this comparison.
    What the test cannot decide is then inconclusive: a sufficient gain that is not significant, and an insufficient one
    whose confidence interval reaches the required gain. A challenger below the quality floor is always rejected.

    Args:
        champion_correct: the champion's score, 0 to `total`.
        challenger_correct: the challenger's score, 0 to `total`.
        total: the highest possible score, at least 1.
        floor: the score of the best constant answer, and the challenger's valid answers.
        settings: the loop's gate.
        significance: of the gain; needed with `significance: required`.
        slices: the tests of the benchmark's slices.
        budget: state of the error budget; needed with `significance: required`.
        regression: the test of the regression suite; None if there is no suite.

    Raises:
        ValueError: the counts contradict each other, or what `significance: required` needs is missing.
    """
    if not (0 <= champion_correct <= total and 0 <= challenger_correct <= total and total > 0):
        raise ValueError(
            f"impossible scores: {champion_correct} and {challenger_correct} correct of {total}; "
            f"expected 0 to {total}, and a total above 0; evaluate again"
        )
    required_test = settings.significance == "required"
    if required_test and (significance is None or budget is None):
        raise ValueError("gate.significance: required needs the paired test and the error budget; evaluate again")
    gain = challenger_correct - champion_correct
    base = {"relative": champion_correct, "points": total, "error_reduction": total - champion_correct}[settings.mode]
    required_gain = max(1, math.ceil(_fraction(settings.min_gain) * base))
    minimum = _minimum(floor, total, settings)
    required = max(champion_correct + required_gain, minimum + 1)
    statement = (
        f"challenger {challenger_correct:,} of {total:,} correct, champion {champion_correct:,}: "
        f"{_gain_text(gain, base, settings)}; {_floor_text(floor, minimum, total, settings)}"
    )
    objections = []
    if challenger_correct <= minimum:
        objections.append(f"it needs more than {minimum:,} correct, however low the champion's score is")
    if floor.structured and 2 * floor.valid <= floor.answers:
        objections.append("most of its unconstrained answers do not pass the output schema")
    if required > total:
        objections.append(_out_of_reach(champion_correct, total, required, minimum, settings))
    if settings.slices == "required":
        objections += [_regression_text(one, settings) for one in slices if one.status == "regressed"]
    breaks_too_many = settings.regression == "required" and regression is not None and regression.exceeded
    if regression and breaks_too_many:
        objections.append(f"it breaks too many fixed corrections: {regression.text}")

    evidence = _weigh(significance, gain, required_gain, total, settings) if significance else None
    undecided = []
    if gain >= required_gain:
        if required_test and budget and not budget.tested:
            undecided.append(_spent_text(settings))
        elif required_test and evidence and not evidence.gains:
            undecided.append(f"inconclusive: {_more(evidence.more)}")
    elif required <= total:
        needed = champion_correct + required_gain
        short = f"it does not gain enough over the champion: at least {needed:,} correct needed"
        if required_test and evidence and not evidence.falls_short:
            if budget and not budget.tested:
                undecided.append(_spent_text(settings))
            undecided.append(f"inconclusive: {short}, but its true gain may be enough; {_more(evidence.more)}")
        else:
            objections.append(short)

    shown = [evidence.text] if evidence else []
    if regression and not breaks_too_many:
        shown.append(f"regression suite: {regression.text}")
    if required_test and budget:
        shown.append(f"error budget: {counted(budget.left, 'further comparison')} until it is renewed")
    return Verdict(
        decision="reject" if objections else "inconclusive" if undecided else "promote",
        reason="\n".join([statement, *objections, *undecided, *shown]),
        evidence=evidence.text if evidence else "",
        champion_correct=champion_correct,
        challenger_correct=challenger_correct,
        total=total,
        required_correct=required,
        minimum_correct=minimum,
        valid=floor.valid,
        answers=floor.answers,
        relative_gain=gain / champion_correct if champion_correct else None,
        points=gain / total,
        error_reduction=gain / (total - champion_correct) if champion_correct < total else None,
        more_questions=evidence.more if evidence else None,
        tests_left=budget.left if required_test and budget else None,
    )


def slices_text(slices: Sequence[SliceTest], settings: GateSettings) -> str:
    """Return what the tests of the slices found, with the names of those that regressed or are too small to tell."""
    if not slices:
        return "the benchmark has no slices"
    regressed = [_regression_text(one, settings) for one in slices if one.status == "regressed"]
    small = [one.name for one in slices if one.status == "too small"]
    parts = regressed or [f"no slice lost significantly more than {_points(settings.slice_margin)} points"]
    if small:
        parts.append(f"too small to tell: {', '.join(small)}")
    return "; ".join(parts)


def _minimum(floor: QualityFloor, total: int, settings: GateSettings) -> int:
    """Return the score that a challenger has to exceed, whatever the champion's score."""
    return floor.constant_correct if settings.min_score is None else math.floor(_fraction(settings.min_score) * total)


def _floor_text(floor: QualityFloor, minimum: int, total: int, settings: GateSettings) -> str:
    valid = f"{floor.valid:,} of {floor.answers:,} answers valid"
    if floor.structured:
        valid = f"{floor.valid:,} of {floor.answers:,} unconstrained answers valid, more than half required"
    if settings.min_score is None:
        return f"the best constant answer scores {minimum:,} of {total:,}; {valid}"
    return f"more than {minimum:,} of {total:,} correct needed by gate.min_score {settings.min_score:g}; {valid}"


def _regression_text(one: SliceTest, settings: GateSettings) -> str:
    return (
        f"slice {one.name} regressed: {100 * one.points:+.1f} points on {one.questions:,} questions, more than the "
        f"{_points(settings.slice_margin)} allowed (p = {one.p_regressed:.2g})"
    )


def _points(fraction: float) -> str:
    return _decimal(_fraction(fraction) * 100)


def _weigh(found: Significance, gain: int, required_gain: int, total: int, settings: GateSettings) -> _Evidence:
    """Return what the paired test says about the gain, at the level of one comparison."""
    level = settings.test_level
    needed = required_gain / total
    gains = gain > 0 and found.p_value <= level
    falls_short = gain < required_gain and found.gain_high < needed
    numbers = (
        f"{counted(found.wins, 'question')} won, {found.losses:,} lost, {found.ties:,} equal: "
        f"p = {found.p_value:.2g} by {found.method}, at most {level:.2g} is significant; "
        f"the gain is {100 * found.gain_low:+.1f} to {100 * found.gain_high:+.1f} points (95% confidence interval)"
    )
    if gain >= required_gain and gains:
        return _Evidence(gains, falls_short, None, numbers)
    if falls_short:
        return _Evidence(gains, falls_short, None, f"{numbers}, less than the {100 * needed:.1f} needed")
    # The questions that would find a gain of the observed size, or the required one if that is larger. If there are
    # enough for that already, the observed gain is close below the required one: those that would tell them apart.
    wanted = questions_needed(found, max(gain, required_gain) / total, level)
    if wanted <= found.questions and gain < required_gain:
        wanted = questions_needed(found, (required_gain - gain) / total, level)
    more = _rounded_up(max(wanted - found.questions, 1))
    what = "whether the gain is enough is open" if gains else "by itself the comparison is inconclusive"
    text = f"{numbers}; {what}: {_more(more)} ({capacity(found, level)})"
    return _Evidence(gains, falls_short, more, text)


def too_few(questions: int, units: int, level: float) -> str:
    """Return why a benchmark can decide nothing and how many questions are needed; empty if it can decide.

    Args:
        questions: of the benchmark, which have an expected answer.
        units: what is independent of each other: the questions, or their clusters.
        level: of one comparison, `GateSettings.test_level`.
    """
    least, unit = fewest_wins(level), "cluster" if units < questions else "question"
    if units >= least:
        return ""
    return (
        f"{counted(units, unit)} can decide nothing: even {units:,} won and none lost would give p = "
        f"{0.5**units:.2g}; at least {least:,} are needed"
    )


def benchmark_capacity(questions: int, units: int, settings: GateSettings) -> str:
    """Return what a benchmark can decide before anything was compared; the arguments are those of `too_few`.

    How often two models differ is unknown, so the text assumes what is common between two trainings.
    """
    level, assumed = settings.test_level, f"if {USUALLY_DIFFERING:.0%} of the answers differ"
    if few := too_few(questions, units, level):
        wanted = _rounded_up(questions_for(_GAIN, USUALLY_DIFFERING, level))
        return f"{few}, and about {wanted:,} to find a gain of {100 * _GAIN:g} points {assumed}"
    smallest = gain_found_by(units, USUALLY_DIFFERING, level)
    return f"{counted(questions, 'question')} find gains from about {100 * smallest:.1f} points {assumed}"


def capacity(found: Significance, level: float) -> str:
    """Return what as many questions as these can decide."""
    return too_few(found.questions, found.units, level) or (
        f"{found.questions:,} questions find gains from about {100 * detectable_gain(found, level):.1f} points"
    )


def _more(count: int | None) -> str:
    return f"about {count:,} more questions would decide"


def _rounded_up(count: int) -> int:
    """Round up to two significant digits, since the count is an estimate."""
    step = int(10 ** max(len(str(count)) - 2, 0))
    return math.ceil(count / step) * step


def _spent_text(settings: GateSettings) -> str:
    return (
        f"inconclusive: budget spent; {BUDGET_TESTS} comparisons were tested on this benchmark. A promotion that "
        f"serves {settings.confirm_days:g} days without a rollback renews the budget; a benchmark with mostly new "
        "questions has its own"
    )


def _fraction(setting: float) -> Fraction:
    # By its decimal text: 0.05 is 1/20, while the float itself is slightly more.
    return Fraction(str(setting))


def _gain_text(gain: int, base: int, settings: GateSettings) -> str:
    if base == 0 and settings.mode == "relative":
        return f"the champion scored 0; any gain is enough{'' if gain > 0 else ', and there is none'}"
    unit = {"relative": "%", "points": " points", "error_reduction": "% of the errors"}[settings.mode]
    needed = _fraction(settings.min_gain) * 100
    percent = Fraction(abs(gain), base) * 100 if base else Fraction(0)
    # One decimal, or as many as keep 4.98 from being shown as the 5.0 that it does not reach.
    decimals = next((d for d in range(1, 7) if (round(percent, d) >= needed) == (percent >= needed)), 6)
    needed_text = f"{_decimal(needed)}{unit} needed" if needed else "more than 0 needed"
    return f"{'loss' if gain < 0 else 'gain'} {float(percent):.{decimals}f}{unit}, {needed_text}"


def _decimal(value: Fraction) -> str:
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def _out_of_reach(champion: int, total: int, required: int, minimum: int, settings: GateSettings) -> str:
    if minimum >= total:
        return (
            "no score could pass: one constant answer has everything correct; add questions with other answers to the "
            "benchmark, or set gate.min_score"
        )
    if champion == total:
        return "no score could pass: the champion has everything correct; add harder questions to the benchmark"
    return (
        f"no score could pass: {required:,} correct would be needed of {total:,}; set gate.mode: error_reduction, "
        f"which asks for {_decimal(_fraction(settings.min_gain) * 100)}% of the {total - champion:,} errors"
    )
