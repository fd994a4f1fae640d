"""The rule of promotion, in its one home: asked by the check on the report, and again by the promotion.

Scores are integers and the needed gain is a fraction: in floats 0.42 is not 5 % more than 0.40.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from finetune_pipeline.evaluation.significance import Significance
from finetune_pipeline.settings import GateSettings


@dataclass(frozen=True)
class Worth:
    """Evidence that a challenger is worth serving, however bad the champion is.

    Attributes:
        constant_right: score of the best constant answer.
        valid: valid answers of the challenger, decoded without a schema.
        answers: all of its answers.
        structured: the loop has an output schema, so most answers have to be valid.
    """

    constant_right: int
    valid: int
    answers: int
    structured: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger is promoted, and why, in a sentence with the numbers.

    The floats are for display only; None where they would divide by zero.

    Attributes:
        needed_right: the lowest score that passes the rules on gain and score; more than `total` if none can.
        minimum_right: the score that the challenger has to exceed, whatever the champion has.
        valid: the challenger's valid answers.
        answers: all of its answers.
        relative_gain: gain over what the champion has right, 0.05 is 5 %.
        points: gain over all that can be right, -1 to 1.
        error_reduction: gain over what the champion has wrong.
    """

    promote: bool
    reason: str
    champion_right: int
    challenger_right: int
    total: int
    needed_right: int
    minimum_right: int
    valid: int
    answers: int
    relative_gain: float | None
    points: float
    error_reduction: float | None


def decide(
    champion_right: int,
    challenger_right: int,
    total: int,
    worth: Worth,
    settings: GateSettings,
    significance: Significance | None = None,
    falling_slices: Sequence[str] = (),
) -> Verdict:
    """Apply the rule: promote a challenger that is worth something and gains enough on the same questions.

    Enough is `min_gain` of what the champion has right (relative), of all (points), or of what it has wrong
    (error_reduction), and always more than nothing. A challenger is worth something if it scores above `min_score`
    (default: the best constant answer's score) and, with an output schema, most of its answers are valid.

    Args:
        champion_right: what the champion has right, 0 to `total`.
        challenger_right: what the challenger has right, 0 to `total`.
        total: all that can be right, at least 1.
        worth: the best constant answer, and the challenger's valid answers.
        settings: the loop's gate.
        significance: of the gain; needed where `require_significance` is set.
        falling_slices: names of the slices in which the challenger has less right.

    Raises:
        ValueError: the counts contradict each other.
    """
    if not (0 <= champion_right <= total and 0 <= challenger_right <= total and total > 0):
        raise ValueError(
            f"{champion_right} and {challenger_right} right of {total} cannot be; expected 0 to {total}, and a total "
            "above 0; evaluate again"
        )
    base = _base(champion_right, total, settings)
    minimum = worth.constant_right if settings.min_score is None else floor(_exact(settings.min_score) * total)
    gain = challenger_right - champion_right
    enough = gain >= max(1, ceil(_exact(settings.min_gain) * base))
    needed = max(champion_right + max(1, ceil(_exact(settings.min_gain) * base)), minimum + 1)
    objections = [*_worthless(challenger_right, minimum, worth)]
    if enough:
        objections += _objections(settings, significance, falling_slices)
    if needed > total:
        objections.append(_out_of_reach(champion_right, total, needed, minimum, settings))
    figures = _figures(champion_right, challenger_right, total, base, settings)
    reason = f"{figures}; {_stated(minimum, total, worth, settings)}"
    return Verdict(
        promote=enough and not objections,
        reason="; but ".join([reason, *objections]),
        champion_right=champion_right,
        challenger_right=challenger_right,
        total=total,
        needed_right=needed,
        minimum_right=minimum,
        valid=worth.valid,
        answers=worth.answers,
        relative_gain=gain / champion_right if champion_right else None,
        points=gain / total,
        error_reduction=gain / (total - champion_right) if champion_right < total else None,
    )


def _exact(setting: float) -> Fraction:
    # By its decimal text: 0.05 is 1/20, where the float itself is a little more.
    return Fraction(str(setting))


def _stated(minimum: int, total: int, worth: Worth, settings: GateSettings) -> str:
    """Return the statement of both limits, score and valid answers, which every verdict has."""
    if settings.min_score is None:
        score = f"the best constant answer has {minimum:,} of {total:,} right"
    else:
        score = f"more than {minimum:,} of {total:,} right needed by gate.min_score {settings.min_score:g}"
    majority = ", a majority needed" if worth.structured else ""
    return f"{score}; {worth.valid:,} of {worth.answers:,} answers valid{majority}"


def _worthless(challenger_right: int, minimum: int, worth: Worth) -> Iterator[str]:
    if challenger_right <= minimum:
        yield f"a challenger needs more than {minimum:,} right, however little the champion has"
    if worth.structured and 2 * worth.valid <= worth.answers:
        yield "most of its answers do not pass the output schema"


def _base(champion_right: int, total: int, settings: GateSettings) -> int:
    """What the gain is measured against."""
    return {"relative": champion_right, "points": total, "error_reduction": total - champion_right}[settings.mode]


def _figures(champion: int, challenger: int, total: int, base: int, settings: GateSettings) -> str:
    counts = f"challenger {challenger:,} of {total:,} right against {champion:,}"
    gain = challenger - champion
    if champion == 0 and settings.mode == "relative":
        return (
            f"{counts}: the champion has nothing right, so any gain passes{'' if gain > 0 else ', and there is none'}"
        )
    unit = {"relative": "%", "points": "points", "error_reduction": "% of the errors"}[settings.mode]
    share = Fraction(gain, base) if base else Fraction(0)
    needed = _exact(settings.min_gain) * 100
    asked = f"{_decimal(needed, 6)} {unit} needed" if needed else "more than nothing needed"
    return f"{counts}: {_word(gain)} {_percent(abs(share) * 100, needed)} {unit}, {asked}"


def _word(gain: int) -> str:
    return "loss" if gain < 0 else "gain"


def _percent(value: Fraction, needed: Fraction) -> str:
    """One decimal, or as many as keep 4.98 from reading as the 5 that it does not reach."""
    decimals = next((d for d in range(1, 7) if (round(value, d) >= needed) == (value >= needed)), 6)
    return f"{float(value):.{decimals}f}"


def _decimal(value: Fraction, decimals: int) -> str:
    return f"{float(value):.{decimals}f}".rstrip("0").rstrip(".")


def _out_of_reach(champion: int, total: int, needed: int, minimum: int, settings: GateSettings) -> str:
    if minimum >= total:
        return (
            "no score could pass: one answer has everything right; add questions with other answers to the benchmark, "
            "or set gate.min_score"
        )
    if champion == total:
        return "no score could pass: the champion has everything right; add harder questions to the benchmark"
    return (
        f"no score could pass: {needed:,} right would be needed of {total:,}; set gate.mode: error_reduction, which "
        f"asks for {_decimal(_exact(settings.min_gain) * 100, 6)} % of the {total - champion:,} that are wrong"
    )


def _objections(settings: GateSettings, significance: Significance | None, falling_slices: Sequence[str]) -> list[str]:
    """What blocks a gain that is large enough."""
    objections = []
    if settings.require_significance and significance is None:
        objections.append("its significance was not measured, and the gate requires it; evaluate again")
    elif settings.require_significance and significance and significance.p_value > settings.significance_level:
        objections.append(
            f"it may be luck: p = {significance.p_value:.3f} by {significance.method} on {significance.questions:,} "
            f"questions, at most {settings.significance_level:g} allowed"
        )
    if settings.forbid_slice_regressions and falling_slices:
        objections.append(f"these slices fall: {', '.join(falling_slices)}")
    return objections
