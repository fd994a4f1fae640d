"""The plots of a comparison. Drawn without pyplot, so that no global state and no display is touched."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from finetune_pipeline.evaluation.comparison import Comparison, GroupChange, Side, Totals
from finetune_pipeline.evaluation.figures import Figure, metric_table, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHAMPION, CHALLENGER = "#94a3b8", "#2563eb"
BETTER, WORSE, QUIET = "#15803d", "#b91c1c", "#64748b"
_BAR = 0.38


def draw(plots: Sequence[Callable[["Axes"], None]], size: tuple[float, float], form: Literal["svg", "png"]) -> bytes:
    """Draw plots side by side.

    Args:
        size: width and height of the whole, in inches.
        form: of the bytes that come back.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with _style():
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        for axes, plot in zip(canvas.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot(axes)
        target = io.BytesIO()
        canvas.savefig(target, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
        return target.getvalue()


def plot_png(comparison: Comparison) -> bytes:
    """A small picture of the comparison for Dagster's metadata: metrics, and the change of each slice."""
    height = max(3.0, 1.2 + 0.3 * len(comparison.slices))
    return draw([metrics_plot(comparison), slices_plot(comparison)], (10, height), "png")


def metrics_plot(comparison: Comparison) -> Callable[["Axes"], None]:
    """The metrics that are shares, of both models."""
    figures = [figure for figure in metric_table(comparison) if figure.unit == "%" and figure.challenger is not None]

    def plot(axes: "Axes") -> None:
        _paired_bars(axes, figures, comparison)
        axes.set_xlim(0, 1.18)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
        axes.set_title("Metrics")

    return plot


def speed_plot(comparison: Comparison) -> Callable[["Axes"], None]:
    """The latencies of both models."""
    figures = [figure for figure in metric_table(comparison) if figure.unit == "ms" and figure.challenger is not None]

    def plot(axes: "Axes") -> None:
        _paired_bars(axes, figures, comparison)
        axes.margins(x=0.22)
        axes.set_title("Latency, one prompt at a time (ms)")

    return plot


def slices_plot(comparison: Comparison) -> Callable[["Axes"], None]:
    """The change of each slice, in points."""
    return _changes_plot(comparison.slices, "Change in each slice (points)")


def wordings_plot(comparison: Comparison) -> Callable[["Axes"], None]:
    """What both models have right in each wording."""
    groups = comparison.wordings
    figures = [
        Figure(group.name, group.name, _accuracy(group.champion), _accuracy(group.challenger), True, "%")
        for group in groups
    ]

    def plot(axes: "Axes") -> None:
        _paired_bars(axes, figures, comparison)
        axes.set_xlim(0, 1.18)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
        axes.set_title("Right, by wording")

    return plot


def confidence_plot(side: Side, threshold: float) -> Callable[["Axes"], None]:
    """How confident right and wrong answers are, with the threshold."""
    known = [
        (a.confidence, s.exact) for a, s in zip(side.answers, side.scores, strict=True) if a.confidence is not None
    ]

    def plot(axes: "Axes") -> None:
        right, wrong = ([value for value, exact in known if exact is wanted] for wanted in (True, False))
        edges = [step / 20 for step in range(21)]
        axes.hist([right, wrong], bins=edges, stacked=True, color=[BETTER, WORSE], label=["right", "wrong"])
        axes.axvline(threshold, color="#0f172a", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        axes.legend(frameon=False)
        axes.set_title(f"Confidence of the answers of {side.name}")

    return plot


def _changes_plot(groups: Sequence[GroupChange], title: str) -> Callable[["Axes"], None]:
    def plot(axes: "Axes") -> None:
        shown = groups[::-1]
        points = [group.points * 100 for group in shown]
        bars = axes.barh(
            [f"{group.name} ({group.champion.questions})" for group in shown],
            points,
            color=[BETTER if value > 0 else WORSE for value in points],
            height=0.62,
        )
        labels = [show(group.points, "%", signed=True).removesuffix(" points") for group in shown]
        axes.bar_label(bars, labels, padding=3)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        axes.margins(x=0.18)
        axes.set_title(title)

    return plot


def _paired_bars(axes: "Axes", figures: Sequence[Figure], comparison: Comparison) -> None:
    """Two horizontal bars for each figure, the champion's above the challenger's."""
    rows = range(len(figures), 0, -1)
    for offset, color, side, attribute in (
        (_BAR / 2, CHAMPION, comparison.champion, "champion"),
        (-_BAR / 2, CHALLENGER, comparison.challenger, "challenger"),
    ):
        values = [getattr(figure, attribute) for figure in figures]
        bars = axes.barh([row + offset for row in rows], [v or 0 for v in values], _BAR, color=color, label=side.name)
        axes.bar_label(bars, [show(v, f.unit) for v, f in zip(values, figures, strict=True)], padding=3)
    axes.set_yticks(list(rows), [figure.name for figure in figures])
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=2)


def _accuracy(totals: Totals) -> float | None:
    return totals.right / totals.total if totals.total else None


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    settings = {
        "text.parse_math": False,  # names of slices are data: a $ in one is no formula
        "svg.hashsalt": "finetune",  # same figures, same bytes
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
