"""Plots of a comparison, drawn without pyplot, which would need global state and a display."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Literal

from finetune_pipeline.evaluation.comparison import Comparison, ModelResult, Role
from finetune_pipeline.evaluation.confidence import ConfidenceSeparation
from finetune_pipeline.evaluation.metric_table import MetricRow, format_metric, metric_table
from finetune_pipeline.evaluation.report_facts import TrainingCurve, Trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Plot = Callable[["Axes"], None]
# Colors that can be told apart on a white and on a dark page.
COLORS: dict[Role, str] = {"base": "#d6a04c", "champion": "#8594a8", "challenger": "#3b82f6"}
BETTER, WORSE = "#16a34a", "#dc2626"
_TITLE = 40  # characters of a line that fit over a plot
_BARS = 0.76
"""Height of the bars of one row together."""


def draw(plots: Sequence[Plot], size: tuple[float, float], form: Literal["svg", "png"], *, dark: bool = False) -> bytes:
    """Draw plots side by side and return the image.

    Args:
        size: width and height of the whole image in inches.
        form: file format of the image.
        dark: for a dark page; the background of an SVG is transparent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style(dark):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot(axes)
        target = io.BytesIO()
        svg = form == "svg"
        figure.savefig(target, format=form, dpi=110, transparent=svg, metadata={"Date": None} if svg else None)
        return target.getvalue()


def plot_png(comparison: Comparison) -> bytes:
    """Return a small PNG for Dagster's metadata: metrics, and the change in each slice."""
    bars = len(_percent_rows(comparison)) * len(comparison.models)
    height = max(3.0, 1.2 + 0.3 * len(comparison.slices), 1.2 + 0.2 * bars)
    return draw([metrics_plot(comparison), slices_plot(comparison)], (10, height), "png")


def metrics_plot(comparison: Comparison) -> Plot:
    """Plot the metrics in percent."""
    return _percent_plot(_percent_rows(comparison), comparison, "Metrics")


def _percent_rows(comparison: Comparison) -> list[MetricRow]:
    return [row for row in metric_table(comparison) if row.unit == "%" and row.challenger is not None]


def slices_plot(comparison: Comparison) -> Plot:
    """Plot the change in each slice, in points."""

    def plot(axes: "Axes") -> None:
        groups = comparison.slices[::-1]
        points = [group.points * 100 for group in groups]
        bars = axes.barh(
            [f"{group.name} ({group.champion.questions})" for group in groups],
            points,
            color=[BETTER if value > 0 else WORSE for value in points],
            height=0.62,
        )
        labels = [format_metric(group.points, "%", signed=True).removesuffix(" points") for group in groups]
        axes.bar_label(bars, labels, padding=3)
        axes.axvline(0, color=COLORS["champion"], linewidth=0.8)
        axes.margins(x=0.25)
        axes.set_title("Change in each slice (points)")

    return plot


def confidence_plot(model: ModelResult, threshold: float) -> Plot:
    """Plot a histogram of the confidence of correct and incorrect answers, with the threshold."""
    known = [
        (a.confidence, s.exact) for a, s in zip(model.answers, model.scores, strict=True) if a.confidence is not None
    ]

    def plot(axes: "Axes") -> None:
        correct, incorrect = ([value for value, exact in known if exact is wanted] for wanted in (True, False))
        edges = [step / 20 for step in range(21)]
        axes.hist([correct, incorrect], bins=edges, stacked=True, color=[BETTER, WORSE], label=["correct", "incorrect"])
        axes.axvline(threshold, color=COLORS["challenger"], linestyle="--", label=f"threshold {threshold:g}")
        axes.set(xlabel="confidence", ylabel="answers")
        _legend_below(axes)
        axes.set_title(f"Answers by confidence, {_short(model.name)}")

    return plot


def reliability_plot(comparison: Comparison, confidence: Mapping[Role, ConfidenceSeparation]) -> Plot:
    """Plot the fraction of correct answers by confidence, with 95% confidence intervals for the challenger."""

    def plot(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=COLORS["champion"], linestyle=":", linewidth=1)
        for role, model in comparison.models.items():
            bins = confidence[role].bins
            x, y = [one.confidence for one in bins], [one.accuracy for one in bins]
            axes.plot(x, y, "o-", color=COLORS[role], markersize=3.5, linewidth=1.3, label=_short(model.name))
            if role == "challenger":
                axes.vlines(x, [one.low for one in bins], [one.high for one in bins], color=COLORS[role], alpha=0.45)
        axes.set(xlabel="mean confidence (dotted: calibrated)", ylabel="fraction correct")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(axis="both")
        _legend_below(axes)
        axes.set_title("Reliability")

    return plot


def trend_plot(trend: Trend, comparison: Comparison) -> Plot:
    """Plot the score of each promoted version and of the challenger, and the base model's as a line."""
    totals = {role: model.totals.correct / model.totals.total for role, model in comparison.models.items()}
    names = [point.version for point in trend.points]
    starts = [index for index, point in enumerate(trend.points) if index == 0 or point.after_gap]

    def plot(axes: "Axes") -> None:
        base = totals.get("base", None if names else totals["champion"])
        if base is not None:
            axes.axhline(base, color=COLORS["base"], linestyle="--", linewidth=1.2, label="base model")
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True):  # no line leads over a gap
            scores = [point.score for point in trend.points[start:end]]
            label = "promoted versions" if start == 0 else None
            axes.plot(range(start, end), scores, "o-", color=COLORS["champion"], label=label)
        name = _short(comparison.challenger.name)
        axes.plot(len(names), totals["challenger"], "D", color=COLORS["challenger"], label=name)
        axes.set_xticks(range(len(names) + 1), [*names, name], rotation=30, ha="right")
        axes.set_xlim(-0.5, len(names) + 0.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y")
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        _legend_below(axes)
        axes.set_title("\n".join(wrap(f"Trend: {comparison.metric.name}", _TITLE)))

    return plot


def training_plot(curve: TrainingCurve) -> Plot:
    """Plot the training and validation loss by step."""

    def plot(axes: "Axes") -> None:
        if curve.training:
            axes.plot(*zip(*curve.training, strict=True), color=COLORS["challenger"], label="training")
        axes.plot(*zip(*curve.validation, strict=True), "o--", markersize=3.5, color=COLORS["base"], label="validation")
        axes.axvline(curve.kept_step, color=COLORS["champion"], linewidth=1, label=f"kept: step {curve.kept_step}")
        axes.set(xlabel="step", ylabel="loss per completion token", ylim=(0, None))
        axes.grid(axis="both")
        _legend_below(axes)
        axes.set_title(f"Training of {_short(curve.name)}")

    return plot


def _percent_plot(rows: Sequence[MetricRow], comparison: Comparison, title: str) -> Plot:
    def plot(axes: "Axes") -> None:
        _paired_bars(axes, rows, comparison)
        axes.set_xlim(0, 1.18)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
        axes.set_title(title)

    return plot


def _legend_below(axes: "Axes") -> None:
    """Show the legend under the plot, where it hides nothing."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )


def _short(name: str) -> str:
    """Return a model's name without its loop, so that it fits into a plot: "v1.2.0"."""
    return shorten(name.rpartition("@")[2], _TITLE, placeholder="...")


def _paired_bars(axes: "Axes", rows: Sequence[MetricRow], comparison: Comparison) -> None:
    """Draw a horizontal bar of each model for each row, the challenger's lowest."""
    positions, bar = range(len(rows), 0, -1), _BARS / len(comparison.models)
    for number, (role, model) in enumerate(comparison.models.items()):
        offset = (_BARS - bar) / 2 - number * bar
        values = [getattr(row, role) for row in rows]
        bars = axes.barh(
            [at + offset for at in positions], [v or 0 for v in values], bar, color=COLORS[role], label=model.name
        )
        axes.bar_label(bars, [format_metric(v, row.unit) for v, row in zip(values, rows, strict=True)], padding=3)
    axes.set_yticks(list(positions), [row.name for row in rows])
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=3)


@contextmanager
def _style(dark: bool) -> Iterator[None]:
    from matplotlib import rc_context

    ink, quiet, line = ("#e2e8f0", "#94a3b8", "#334155") if dark else ("#0f172a", "#64748b", "#e2e8f0")
    settings = {
        "text.parse_math": False,  # names of slices are data: a $ in one does not start a formula
        "svg.hashsalt": "finetune",  # the same metrics give the same bytes
        "font.size": 9.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": line,
        "axes.labelcolor": quiet,
        "text.color": ink,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "grid.color": line,
        "xtick.color": quiet,
        "ytick.color": quiet,
        "ytick.left": False,
    }
    with rc_context(settings):
        yield
