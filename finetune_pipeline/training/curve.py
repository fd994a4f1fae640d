"""The loss curve of a finished training as a picture."""

import io

from finetune_pipeline.training.job import TrainingResult


def curve_png(result: TrainingResult) -> bytes:
    """A small PNG: training loss by step, and the loss on held-out examples before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p.step for p in result.curve], [p.loss for p in result.curve], color="#2563eb", label="training")
    before_and_after = [(0, result.loss_before), (result.steps, result.loss_after)]
    axes.plot(*zip(*before_and_after, strict=True), "o--", color="#64748b", label="held out, before and after")
    axes.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
