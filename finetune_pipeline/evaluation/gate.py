"""The gate: the rule of promotion. The check on the report asks it, and the promotion asks it again.

Scores are integers and the required gain is a fraction, because in floats 0.42 is not 5% more than 0.40.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from finetune_pipeline.evaluation.significance import Significance
from finetune_pipeline.settings import GateSettings


@dataclass(frozen=True)
class QualityFloor:
    """Measurements of the challenger that count however bad the champion is.

    Attributes:
        constant_correct: score of the best constant answer.
        valid: valid answers of the challenger, decoded without a schema.
        answers: all answers of the challenger.
        structured: the loop has an output schema, so most answers have to be valid.
    """

    constant_correct: int
    valid: int
    answers: int
    structured: bool


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on a challenger, with the reason and the numbers.

    The floats are for display only; None where they would divide by zero.

    Attributes:
        required_correct: the lowest score that meets the rules on gain and score; more than `total` if none can.
        minimum_correct: the score that the challenger has to exceed, whatever the champion's score.
        valid: the challenger's valid answers.
        answers: all answers of the challenger.
        relative_gain: gain divided by the champion's score; 0.05 is 5%.
        points: gain divided by `total`, -1 to 1.
        error_reduction: gain divided by the champion's errors.
    """

    promote: bool
    reason: str
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


def decide(
    champion_correct: int,
    challenger_correct: int,
    total: int,
    floor: QualityFloor,
    settings: GateSettings,
    significance: Significance | None = None,
    regressed_slices: Sequence[str] = (),
) -> Verdict:
    """Decide whether to promote: the challenger must be good enough by itself and gain enough on the same questions.

    The gain must be positive, and at least `min_gain` of the champion's score (relative), of the total (points) or of
    the champion's errors (error_reduction). The score must exceed `min_score` (default: the score of the best constant
    answer) and, with an output schema, most answers must be valid.

    Args:
        champion_correct: the champion's score, 0 to `total`.
        challenger_correct: the challenger's score, 0 to `total`.
        total: the highest possible score, at least 1.
        floor: the score of the best constant answer, and the challenger's valid answers.
        settings: the loop's gate.
        significance: of the gain; required if `require_significance` is set.
        regressed_slices: names of the slices in which the challenger's score is lower.

    Raises:
        ValueError: the counts contradict each other.
    """
    if not (0 <= champion_correct <= total and 0 <= challenger_correct <= total and total > 0):
        raise ValueError(
            f"impossible scores: {champion_correct} and {challenger_correct} correct of {total}; "
            f"expected 0 to {total}, and a total above 0; evaluate again"
        )
    gain = challenger_correct - champion_correct
    base = {"relative": champion_correct, "points": total, "error_reduction": total - champion_correct}[settings.mode]
    required_gain = max(1, math.ceil(_fraction(settings.min_gain) * base))
    if settings.min_score is None:
        minimum = floor.constant_correct
        minimum_text = f"the best constant answer scores {minimum:,} of {total:,}"
    else:
        minimum = math.floor(_fraction(settings.min_score) * total)
        minimum_text = f"more than {minimum:,} of {total:,} correct needed by gate.min_score {settings.min_score:g}"
    required_valid = ", more than half required" if floor.structured else ""
    statement = (
        f"challenger {challenger_correct:,} of {total:,} correct, champion {champion_correct:,}: "
        f"{_gain_text(gain, base, settings)}; {minimum_text}; "
        f"{floor.valid:,} of {floor.answers:,} answers valid{required_valid}"
    )
    objections = []
    if challenger_correct <= minimum:
        objections.append(f"a challenger needs more than {minimum:,} correct, however low the champion's score is")
    if floor.structured and 2 * floor.valid <= floor.answers:
        objections.append("most of its answers do not pass the output schema")
    if gain >= required_gain:
        objections += _objections_to_gain(settings, significance, regressed_slices)
    required = max(champion_correct + required_gain, minimum + 1)
    if required > total:
        objections.append(_out_of_reach(champion_correct, total, required, minimum, settings))
    return Verdict(
        promote=gain >= required_gain and not objections,
        reason="; but ".join([statement, *objections]),
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


def _objections_to_gain(
    settings: GateSettings, significance: Significance | None, regressed_slices: Sequence[str]
) -> list[str]:
    """Return what blocks a promotion although the gain is large enough."""
    objections = []
    if settings.require_significance and significance is None:
        objections.append("its significance was not measured, and the gate requires it; evaluate again")
    elif settings.require_significance and significance and significance.p_value > settings.significance_level:
        objections.append(
            f"the gain is not significant: p = {significance.p_value:.3f} by {significance.method} on "
            f"{significance.questions:,} questions, at most {settings.significance_level:g} allowed"
        )
    if settings.forbid_slice_regressions and regressed_slices:
        objections.append(f"these slices regressed: {', '.join(regressed_slices)}")
    return objections


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
