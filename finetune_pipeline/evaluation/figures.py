"""The table of metrics that the report, Dagster's metadata and the terminal all show: its one home."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from finetune_pipeline.evaluation.comparison import Comparison, Side, Totals
from finetune_pipeline.evaluation.metrics import Metric

Unit = Literal["%", "ms", "tokens/s", "MB"]

METRIC_NAMES: dict[Metric, str] = {
    "parameters": "parameter accuracy",
    "words": "words right (ROUGE-1 recall)",
    "exact": "answers right",
}


@dataclass(frozen=True)
class Figure:
    """One row: a metric of both models.

    Attributes:
        key: its name in JSON and metadata.
        champion: shares are 0 to 1 and shown in percent; None where it was not measured or cannot be.
        challenger: as `champion`.
        flag: why it does not describe the models, such as other work on the cores; the name says so too.
    """

    key: str
    name: str
    champion: float | None
    challenger: float | None
    higher_is_better: bool
    unit: Unit
    flag: str | None = None

    @property
    def better(self) -> bool | None:
        """Whether the challenger is better; None if both are the same, or one is not known."""
        if self.champion is None or self.challenger is None or self.champion == self.challenger:
            return None
        return (self.challenger > self.champion) == self.higher_is_better

    @property
    def change(self) -> float | None:
        """Challenger less champion."""
        known = self.champion is not None and self.challenger is not None
        return self.challenger - self.champion if known else None  # type: ignore[operator]


def metric_table(comparison: Comparison) -> list[Figure]:
    """The metrics of both models, the gate's first."""
    both = (comparison.champion, comparison.challenger)

    def row(key: str, name: str, value: Callable[[Side], float | None], higher: bool, unit: Unit) -> Figure:
        return Figure(key, name, value(both[0]), value(both[1]), higher, unit)

    def share(key: str, name: str, value: Callable[[Totals], tuple[int | None, int]], higher: bool = True) -> Figure:
        return row(key, name, lambda side: _share(*value(side.totals)), higher, "%")

    def speed(key: str, name: str, higher: bool, unit: Unit) -> Figure:
        said = f"{name} (machine busy)" if comparison.disturbed else name
        return replace(row(key, said, _speed(key), higher, unit), flag=comparison.disturbed)

    return [
        share("accuracy", METRIC_NAMES[comparison.metric], lambda t: (t.right, t.total)),
        share("exact_match", "exact match", lambda t: (t.exact, t.questions)),
        share("valid_rate", "valid output", lambda t: (t.valid, t.questions)),
        share("compliance_rate", "compliance rules passed", lambda t: (t.compliant, t.questions)),
        share("hallucination_rate", "hallucinated values", lambda t: (t.hallucinated, t.stated), False),
        speed("latency_p50_ms", "latency, median", False, "ms"),
        speed("latency_p95_ms", "latency, 95th percentile", False, "ms"),
        speed("tokens_per_second", "generation", True, "tokens/s"),
        row("size_mb", "model size", lambda s: s.size_bytes / 1e6, False, "MB"),
    ]


def show(value: float | None, unit: Unit, *, signed: bool = False) -> str:
    """A figure as people read it: "81.3 %", "+4.2 points", "1,240 tokens/s"; a dash for None.

    Args:
        value: a share for "%".
        unit: of the figure.
        signed: it is a change: with its sign, and percent as points.
    """
    if value is None:
        return "—"
    number, decimals = (value * 100, 1) if unit == "%" else (value, 0 if abs(value) >= 100 else 1)
    if round(number, decimals) == 0:
        number, signed_text = 0.0, ""  # neither "-0.0" nor "+0.0"
    else:
        signed_text = "+" if signed else ""
    text = f"{number:{signed_text},.{decimals}f}"
    return f"{text} {'points' if signed and unit == '%' else unit}"


def markdown_table(comparison: Comparison) -> str:
    """The table in Markdown, for Dagster's metadata."""
    lines = [
        f"| metric | {_cell(comparison.champion.name)} | {_cell(comparison.challenger.name)} | change |",
        "|---|---:|---:|---:|",
    ]
    for figure in metric_table(comparison):
        values = (show(figure.champion, figure.unit), show(figure.challenger, figure.unit))
        lines.append(f"| {figure.name} | {values[0]} | {values[1]} | {show(figure.change, figure.unit, signed=True)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _speed(name: str) -> Callable[[Side], float | None]:
    return lambda side: getattr(side.speed, name) if side.speed else None


def _share(part: int | None, whole: int) -> float | None:
    return part / whole if part is not None and whole else None
