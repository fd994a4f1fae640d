"""The loss curve of a finished training as a picture."""

import io
from typing import TYPE_CHECKING

from finetune_pipeline.training.job import TrainingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve_png(result: TrainingResult) -> bytes:
    """A small PNG of `curve_figure`."""
    target = io.BytesIO()
    curve_figure(result).savefig(target, format="png", dpi=110)
    return target.getvalue()


def curve_figure(result: TrainingResult) -> "Figure":
    """Training loss by step, and the loss that was measured on its way: on held-out examples, where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p.step for p in result.curve], [p.loss for p in result.curve], color="#2563eb", label="training")
    measured = {
        0: result.loss_before,
        **{p.step: p.loss for p in result.validation},
        result.best_step: result.loss_after,
    }
    label = "held out" if result.validation else "training examples, before and after"
    axes.plot(*zip(*sorted(measured.items()), strict=True), "o--", color="#64748b", label=label)
    axes.axvline(result.best_step, color="#94a3b8", linewidth=1)
    axes.annotate("kept", (result.best_step, 0.02), xycoords=("data", "axes fraction"), color="#64748b")
    axes.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
