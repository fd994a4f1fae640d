"""Several processes of this machine train together, for real: by Gloo, on the processor."""

import pytest

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import team
from finetune_pipeline.training.job import CHECKPOINTS, TrainingError, TrainingFailed
from finetune_pipeline.training.launch import train
from finetune_pipeline.training.team import Share

from .conftest import with_settings


@pytest.mark.parametrize(
    ("batch", "accumulation", "workers", "share"),
    [
        (8, 1, 1, Share(8, 1)),
        (8, 4, 2, Share(8, 2)),  # fewer steps before the batch gets smaller: that size is what the device holds
        (8, 1, 2, Share(4, 1)),
        (6, 2, 4, Share(3, 1)),
        (4, 6, 3, Share(4, 2)),
        (4, 5, 2, Share(2, 5)),  # ten examples each, at most four at once
    ],
)
def test_an_update_has_as_many_examples_however_many_deal_with_it(batch, accumulation, workers, share):
    settings = TrainingSettings(batch_size=batch, gradient_accumulation=accumulation)
    assert team.share(settings, workers) == share
    assert share.batch_size * share.gradient_accumulation * workers == batch * accumulation


@pytest.mark.parametrize("workers", [3, 16])
def test_what_cannot_be_dealt_out_evenly_is_refused_with_what_can(workers):
    with pytest.raises(TrainingError, match=r"= 8 examples .* set workers to one of 1, 2, 4, 8"):
        team.share(TrainingSettings(batch_size=8), workers)


def test_two_processes_of_this_machine_give_the_adapter_that_one_gives(job, tmp_path):
    one = with_settings(job, lora_dropout=0.0)
    two = with_settings(job, workers=2).model_copy(update={"output": tmp_path / "two"})
    seen = []
    alone, together = train(one), train(two, seen.append)

    assert together.steps == alone.steps == 24
    assert together.loss_before == pytest.approx(alone.loss_before, rel=1e-5)
    assert together.loss_after == pytest.approx(alone.loss_after, rel=0.01)
    assert together.loss_after < together.loss_before - 0.5
    assert together.train_loss == pytest.approx(alone.train_loss, rel=0.01)
    assert [line.step for line in seen] == sorted({line.step for line in seen}), "one process writes"
    assert (two.output / "adapter" / "adapter_model.safetensors").is_file()
    assert not (two.output / CHECKPOINTS).exists()


def test_what_is_wrong_with_the_job_is_said_as_it_is_by_one_process(job):
    impossible = with_settings(job, workers=2, max_length=16)
    with pytest.raises(TrainingFailed, match=r"^nothing is left to train on: 64 of 64 examples"):
        train(impossible)
