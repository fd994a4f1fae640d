"""Plots of a comparison, drawn without pyplot, which would need global state and a display."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from finetune_pipeline.evaluation.comparison import Comparison, ModelResult
from finetune_pipeline.evaluation.metric_table import MetricRow, format_metric, metric_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Plot = Callable[["Axes"], None]
CHAMPION, CHALLENGER = "#94a3b8", "#2563eb"
BETTER, WORSE, QUIET = "#15803d", "#b91c1c", "#64748b"
_BAR = 0.38


def draw(plots: Sequence[Plot], size: tuple[float, float], form: Literal["svg", "png"]) -> bytes:
    """Draw plots side by side and return the image.

    Args:
        size: width and height of the whole image in inches.
        form: file format of the image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot(axes)
        target = io.BytesIO()
        figure.savefig(target, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
        return target.getvalue()


def plot_png(comparison: Comparison) -> bytes:
    """Return a small PNG for Dagster's metadata: metrics, and the change in each slice."""
    height = max(3.0, 1.2 + 0.3 * len(comparison.slices))
    return draw([metrics_plot(comparison), slices_plot(comparison)], (10, height), "png")


def metrics_plot(comparison: Comparison) -> Plot:
    """Plot the metrics in percent, of both models."""
    rows = [row for row in metric_table(comparison) if row.unit == "%" and row.challenger is not None]
    return _percent_plot(rows, comparison, "Metrics")


def wordings_plot(comparison: Comparison) -> Plot:
    """Plot the accuracy of both models on each wording."""
    rows = [
        MetricRow(
            group.name,
            group.name,
            group.champion.correct / group.champion.total,
            group.challenger.correct / group.challenger.total,
            True,
            "%",
        )
        for group in comparison.wordings
    ]
    return _percent_plot(rows, comparison, "Accuracy by wording")


def speed_plot(comparison: Comparison) -> Plot:
    """Plot the latencies of both models."""
    rows = [row for row in metric_table(comparison) if row.unit == "ms" and row.challenger is not None]

    def plot(axes: "Axes") -> None:
        _paired_bars(axes, rows, comparison)
        axes.margins(x=0.22)
        axes.set_title("Latency, one prompt at a time (ms)")

    return plot


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
        axes.axvline(0, color=QUIET, linewidth=0.8)
        axes.margins(x=0.18)
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
        axes.axvline(threshold, color="#0f172a", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        axes.legend(frameon=False)
        axes.set_title(f"Confidence of answers, {model.name}")

    return plot


def _percent_plot(rows: Sequence[MetricRow], comparison: Comparison, title: str) -> Plot:
    def plot(axes: "Axes") -> None:
        _paired_bars(axes, rows, comparison)
        axes.set_xlim(0, 1.18)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
        axes.set_title(title)

    return plot


def _paired_bars(axes: "Axes", rows: Sequence[MetricRow], comparison: Comparison) -> None:
    """Draw two horizontal bars for each row, the champion's above the challenger's."""
    positions = range(len(rows), 0, -1)
    for offset, color, model, attribute in (
        (_BAR / 2, CHAMPION, comparison.champion, "champion"),
        (-_BAR / 2, CHALLENGER, comparison.challenger, "challenger"),
    ):
        values = [getattr(row, attribute) for row in rows]
        bars = axes.barh(
            [at + offset for at in positions], [v or 0 for v in values], _BAR, color=color, label=model.name
        )
        axes.bar_label(bars, [format_metric(v, row.unit) for v, row in zip(values, rows, strict=True)], padding=3)
    axes.set_yticks(list(positions), [row.name for row in rows])
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=2)


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

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
        "axes.edgecolor": "#cbd5e1",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "grid.color": "#e2e8f0",
        "xtick.color": QUIET,
        "ytick.left": False,
    }
    with rc_context(settings):
        yield
