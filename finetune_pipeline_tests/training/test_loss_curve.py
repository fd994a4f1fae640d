"""The loss curve as a picture."""

import pytest

from finetune_pipeline.training.job import CurvePoint, TrainingResult, ValidationPoint
from finetune_pipeline.training.loss_curve import loss_curve, loss_curve_png


def result(*validated):
    return TrainingResult(
        job="j", device="cpu", method="sft", adapter="lora", bf16=False, steps=4, resumed_from=0, examples=8,
        too_long=0, loss_before=3.0, loss_after=1.0, train_loss=1.0, tokens_per_second=1.0, wall_seconds=1.0,
        peak_memory_bytes=1, best_step=4, stopped_early=False,
        curve=tuple(CurvePoint(step=step, loss=3.0 - step / 2, learning_rate=0.1) for step in range(1, 5)),
        validation=tuple(ValidationPoint(step=step, loss=loss) for step, loss in validated),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("validated", "label", "points"),
    [
        (((2, 2.0), (4, 1.0)), "validation", [(0, 3.0), (2, 2.0), (4, 1.0)]),
        ((), "training examples, before and after", [(0, 3.0), (4, 1.0)]),
    ],
)
def test_the_plot_says_which_examples_were_measured(validated, label, points):
    training, measured = loss_curve(result(*validated)).axes[0].get_lines()[:2]
    assert [tuple(point) for point in training.get_xydata()] == [(1, 2.5), (2, 2.0), (3, 1.5), (4, 1.0)]
    assert [tuple(point) for point in measured.get_xydata()] == points
    assert (training.get_label(), measured.get_label()) == ("training", label)
    assert loss_curve_png(result(*validated)).startswith(b"\x89PNG")
