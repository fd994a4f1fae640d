"""The table of metrics of a comparison, which the report, Dagster's metadata and the terminal show."""

from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.evaluation.comparison import Comparison, ModelResult
from finetune_pipeline.evaluation.scoring import Metric
from finetune_pipeline.markdown_table import cell, markdown_table

Unit = Literal["%", "ms", "tokens/s", "MB"]

METRIC_NAMES: dict[Metric, str] = {
    "parameters": "parameter accuracy",
    "rouge1": "ROUGE-1 recall",
    "exact": "accuracy",
}


@dataclass(frozen=True)
class MetricRow:
    """One metric of both models.

    Attributes:
        key: name of the metric in JSON and metadata.
        champion: its value; fractions are 0 to 1 and shown in percent; None if not measured or not defined.
        challenger: as `champion`.
        flag: why the value does not describe the model, such as CPU contention; the name says so too.
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
        """Return whether the challenger is better; None if both are equal or one is unknown."""
        if self.champion is None or self.challenger is None or self.champion == self.challenger:
            return None
        return (self.challenger > self.champion) == self.higher_is_better

    @property
    def change(self) -> float | None:
        """Challenger minus champion; None if one is unknown."""
        known = self.champion is not None and self.challenger is not None
        return self.challenger - self.champion if known else None  # type: ignore[operator]

    @property
    def cells(self) -> tuple[str, str, str]:
        """Champion, challenger and change as displayed."""
        return (
            format_metric(self.champion, self.unit),
            format_metric(self.challenger, self.unit),
            format_metric(self.change, self.unit, signed=True),
        )


def metric_table(comparison: Comparison) -> list[MetricRow]:
    """Return the metrics of both models, the gate's metric first."""
    champion, challenger = _metrics(comparison.champion), _metrics(comparison.challenger)
    busy = " (machine busy)" if comparison.contention else ""
    columns: list[tuple[str, str, bool, Unit]] = [
        ("accuracy", METRIC_NAMES[comparison.metric], True, "%"),
        ("exact_match", "exact match", True, "%"),
        ("valid_rate", "valid output", True, "%"),
        ("compliance_rate", "compliance rules passed", True, "%"),
        ("hallucination_rate", "hallucinated values", False, "%"),
        ("latency_p50_ms", f"latency, median{busy}", False, "ms"),
        ("latency_p95_ms", f"latency, 95th percentile{busy}", False, "ms"),
        ("tokens_per_second", f"generation{busy}", True, "tokens/s"),
        ("size_mb", "model size", False, "MB"),
    ]
    return [
        MetricRow(
            key, name, champion[key], challenger[key], higher, unit, comparison.contention if key in _SPEED else None
        )
        for key, name, higher, unit in columns
    ]


_SPEED = ("latency_p50_ms", "latency_p95_ms", "tokens_per_second")


def _metrics(model: ModelResult) -> dict[str, float | None]:
    totals = model.totals
    fractions = {
        "accuracy": (totals.correct, totals.total),
        "exact_match": (totals.exact, totals.questions),
        "valid_rate": (totals.valid, totals.questions),
        "compliance_rate": (totals.compliant, totals.questions),
        "hallucination_rate": (totals.hallucinated, totals.stated),
    }
    return {
        **{key: part / whole if part is not None and whole else None for key, (part, whole) in fractions.items()},
        **{key: getattr(model.speed, key) if model.speed else None for key in _SPEED},
        "size_mb": model.size_bytes / 1e6,
    }


def format_metric(value: float | None, unit: Unit, *, signed: bool = False) -> str:
    """Format a value for people: "81.3%", "+4.2 points", "1,240 tokens/s"; a dash for None.

    Args:
        value: a fraction if the unit is "%".
        unit: of the metric.
        signed: the value is a change: show its sign, and percent as points.
    """
    if value is None:
        return "—"
    number, decimals = (value * 100, 1) if unit == "%" else (value, 0 if abs(value) >= 100 else 1)
    sign = "+" if signed else ""
    if round(number, decimals) == 0:
        number, sign = 0.0, ""  # neither "-0.0" nor "+0.0"
    shown = " points" if signed and unit == "%" else unit if unit == "%" else f" {unit}"
    return f"{number:{sign},.{decimals}f}{shown}"


def comparison_markdown(comparison: Comparison) -> str:
    """Return the table in Markdown, for Dagster's metadata."""
    headings = ["metric", cell(comparison.champion.name), cell(comparison.challenger.name), "change"]
    return markdown_table(headings, [(row.name, *row.cells) for row in metric_table(comparison)], "lrrr")
