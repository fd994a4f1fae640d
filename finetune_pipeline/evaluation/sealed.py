"""Whether the open benchmark has been overfitted: its gain against that on a sealed benchmark. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_pipeline.evaluation.significance import PairedScores, paired_test

QuestionScores = Mapping[str, tuple[int, int, str | None]]
"""Id of a question -> correct, total and cluster."""


@dataclass(frozen=True)
class GainDifference:
    """The gains of a later model over an earlier one on both benchmarks, in points (-1 to 1).

    Attributes:
        low: lower bound of the 95% confidence interval of open_gain - sealed_gain.
        high: upper bound.
    """

    open_gain: float
    sealed_gain: float
    low: float
    high: float

    @property
    def overfitted(self) -> bool:
        """Whether the gain on the open benchmark is significantly larger."""
        return self.low > 0

    @property
    def text(self) -> str:
        """The numbers and the conclusion, for people."""
        numbers = (
            f"{100 * self.open_gain:+.1f} points on the benchmark, {100 * self.sealed_gain:+.1f} on the sealed one: "
            f"difference {100 * (self.open_gain - self.sealed_gain):+.1f}, 95% confidence interval "
            f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"
        )
        if self.overfitted:
            return f"{numbers}; the benchmark is overfitted, so its gains overstate: write a new one"
        would_be = f"a difference above {50 * (self.high - self.low):.1f} would be one"
        return f"{numbers}; no sign that the benchmark is overfitted ({would_be})"


def compare_gains(
    open_before: QuestionScores, open_after: QuestionScores, sealed_before: QuestionScores, sealed_after: QuestionScores
) -> GainDifference:
    """Compare the gains on two benchmarks, which have no question in common, so that their errors are independent."""
    opened, sealed = _paired(open_before, open_after), _paired(sealed_before, sealed_after)
    difference = opened.gain() - sealed.gain()
    error = 1.96 * math.hypot(paired_test(opened).standard_error, paired_test(sealed).standard_error)
    return GainDifference(opened.gain(), sealed.gain(), difference - error, difference + error)


def _paired(before: QuestionScores, after: QuestionScores) -> PairedScores:
    return PairedScores(
        champion=[correct for correct, _, _ in before.values()],
        challenger=[after[id][0] for id in before],
        total=sum(total for _, total, _ in before.values()),
        clusters=[cluster for _, _, cluster in before.values()],
    )
