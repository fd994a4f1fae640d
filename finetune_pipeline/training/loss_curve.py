"""The loss curve of a finished run as a picture."""

import io
from typing import TYPE_CHECKING

from finetune_pipeline.training.job import TrainingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curve_png(result: TrainingResult) -> bytes:
    """Return `loss_curve` as a small PNG."""
    target = io.BytesIO()
    loss_curve(result).savefig(target, format="png", dpi=110)
    return target.getvalue()


def loss_curve(result: TrainingResult) -> "Figure":
    """Plot the training loss by step, and the validation loss (without a validation set, on training examples)."""
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
    label = "validation" if result.validation else "training examples, before and after"
    axes.plot(*zip(*sorted(measured.items()), strict=True), "o--", color="#64748b", label=label)
    axes.axvline(result.best_step, color="#94a3b8", linewidth=1)
    axes.annotate("kept", (result.best_step, 0.02), xycoords=("data", "axes fraction"), color="#64748b")
    axes.set(xlabel="step", ylabel="loss per completion token", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
