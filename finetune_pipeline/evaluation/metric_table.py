"""The table of metrics of a comparison, which the report, Dagster's metadata and the terminal show."""

from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.evaluation.comparison import Comparison, ModelResult
from finetune_pipeline.markdown_table import cell, markdown_table

Unit = Literal[
    "%",
    "ms",
    "tokens/s",
    "requests/s",
    "tokens",
    "MB",
    "per million tokens",
    "",
    "stars",
    "reward",
    "steps",
    "points per 100 examples",
]

MetricGroup = Literal["quality", "performance", "efficiency"]

_TIMED = ("latency_p50_ms", "latency_p95_ms", "first_token_p50_ms", "tokens_per_second")
_SATURATED = ("requests_per_second", "cost_per_million_tokens")
_SPEED = (*_TIMED, *_SATURATED)
_EFFICIENCY = ("cost_per_million_tokens", "response_tokens", "size_mb", "peak_memory_mb")

BUSY = " (machine busy)"
"""End of the name of a metric that was measured beside other programs."""


@dataclass(frozen=True)
class MetricRow:
    """One metric of the compared models.

    Attributes:
        key: name of the metric in JSON and metadata.
        champion: its value; fractions are 0 to 1 and shown in percent; None if not measured or not defined.
        challenger: as `champion`.
        base: as `champion`, of the base model; None if it is one of the two.
        flag: why the value does not describe the model, such as CPU contention; the name says so too.
    """

    key: str
    name: str
    champion: float | None
    challenger: float | None
    higher_is_better: bool | None
    unit: Unit
    base: float | None = None
    flag: str | None = None

    @property
    def group(self) -> MetricGroup:
        """What the metric is about: how good the answers are, how fast they come, or what they cost."""
        if self.key in _EFFICIENCY:
            return "efficiency"
        return "performance" if self.key in _SPEED else "quality"

    @property
    def better(self) -> bool | None:
        """Return whether the challenger is better; None if no value is, one is unknown, or the change is shown as 0."""
        if self.higher_is_better is None or self.change is None:
            return None
        if self.cells[-1] == format_metric(0.0, self.unit, signed=True):
            return None
        return (self.change > 0) == self.higher_is_better

    @property
    def change(self) -> float | None:
        """Challenger minus champion; None if one is unknown."""
        known = self.champion is not None and self.challenger is not None
        return self.challenger - self.champion if known else None  # type: ignore[operator]

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Base model, champion, challenger and change as displayed."""
        return (
            format_metric(self.base, self.unit),
            format_metric(self.champion, self.unit),
            format_metric(self.challenger, self.unit),
            format_metric(self.change, self.unit, signed=True),
        )


def metric_table(comparison: Comparison) -> list[MetricRow]:
    """Return the metrics of the models, the gate's metric first, without those that neither of the two has."""
    champion, challenger = _metrics(comparison.champion, comparison), _metrics(comparison.challenger, comparison)
    base = _metrics(comparison.base, comparison) if comparison.base else {}
    busy = BUSY if comparison.contention else ""
    columns: list[tuple[str, str, bool, Unit]] = [
        ("accuracy", comparison.metric.name, True, "%"),
        *((f"metric_{label.key}", label.name, True, "%") for label in comparison.metrics),
        ("pass_k", f"pass^{comparison.samples}", True, "%"),
        ("exact_match", "exact match", True, "%"),
        ("valid_rate", "valid output", True, "%"),
        ("unconstrained_valid_rate", "valid output, unconstrained", True, "%"),
        ("compliance_rate", "compliance rules passed", True, "%"),
        ("hallucination_rate", "hallucinated values", False, "%"),
        ("latency_p50_ms", f"latency, median{busy}", False, "ms"),
        ("latency_p95_ms", f"latency, 95th percentile{busy}", False, "ms"),
        ("first_token_p50_ms", f"first token, median{busy}", False, "ms"),
        ("tokens_per_second", f"generation{busy}", True, "tokens/s"),
        ("requests_per_second", f"requests/s{busy}", True, "requests/s"),
        ("cost_per_million_tokens", f"cost of 1M tokens{busy}", False, "per million tokens"),
        ("response_tokens", "response length, mean", False, "tokens"),
        ("size_mb", "model size", False, "MB"),
        ("peak_memory_mb", "peak memory of inference", False, "MB"),
    ]
    return [
        MetricRow(
            key,
            name,
            champion[key],
            challenger[key],
            higher,
            unit,
            base.get(key),
            comparison.contention if key in _SPEED else None,
        )
        for key, name, higher, unit in columns
        if champion[key] is not None or challenger[key] is not None
        if key != "unconstrained_valid_rate" or comparison.structured
    ]


def _metrics(model: ModelResult, comparison: Comparison) -> dict[str, float | None]:
    totals, sample = model.totals, model.sample.totals
    fractions = {
        "accuracy": (totals.correct, totals.total),
        **{
            f"metric_{label.key}": (count.correct, count.total)
            for label, count in zip(comparison.metrics, totals.metrics, strict=True)
        },
        "pass_k": (model.always_correct, totals.questions),
        "exact_match": (totals.exact, totals.questions),
        "valid_rate": (totals.valid, totals.questions),
        "unconstrained_valid_rate": (sample.valid, sample.questions),
        "compliance_rate": (totals.compliant, totals.questions),
        "hallucination_rate": (totals.hallucinated, totals.stated),
    }
    return {
        **{key: part / whole if part is not None and whole else None for key, (part, whole) in fractions.items()},
        **{key: getattr(model.speed, key) if model.speed else None for key in _TIMED},
        **{key: getattr(model.performance, key) if model.performance else None for key in _SATURATED},
        "response_tokens": model.response_tokens,
        "size_mb": model.size_bytes / 1e6 if model.size_bytes is not None else None,
        "peak_memory_mb": model.performance.peak_memory_bytes / 1e6
        if model.performance and model.performance.peak_memory_bytes
        else None,
    }


_SHORT: dict[Unit, str] = {
    "reward": "",
    "requests/s": "",
    "per million tokens": "",
    "points per 100 examples": "points",
}
_DECIMALS: dict[Unit, int] = {"": 0, "steps": 0, "stars": 2, "reward": 2, "points per 100 examples": 2}


def format_metric(value: float | None, unit: Unit, *, signed: bool = False) -> str:
    """Format a value for people: "81.3%", "+4.2 points", "1,240 tokens/s"; a dash for None.

    Args:
        value: a fraction if the unit is "%" or "points per 100 examples".
        unit: of the metric.
        signed: the value is a change: show its sign, and percent as points.
    """
    if value is None:
        return "—"
    fraction = unit in {"%", "points per 100 examples"}
    number, decimals = (value * 100, 1) if fraction else (value, 0 if abs(value) >= 100 else 1)
    decimals = _DECIMALS.get(unit, decimals)
    sign = "+" if signed else ""
    if round(number, decimals) == 0:
        number, sign = 0.0, ""  # neither "-0.0" nor "+0.0"
    shown = " points" if signed and unit == "%" else unit if unit == "%" else f" {_SHORT.get(unit, unit)}".rstrip()
    return f"{number:{sign},.{decimals}f}{shown}"


def comparison_markdown(comparison: Comparison) -> str:
    """Return the table in Markdown, for Dagster's metadata."""
    headings = ["metric", *(cell(model.name) for model in comparison.models.values()), "change"]
    shown = [row.cells if comparison.base else row.cells[1:] for row in metric_table(comparison)]
    names = [row.name for row in metric_table(comparison)]
    rows = [(name, *cells) for name, cells in zip(names, shown, strict=True)]
    table = markdown_table(headings, rows, "l" + "r" * (len(headings) - 1))
    return f"{table}\n\n{comparison.saturation}" if comparison.saturation else table
