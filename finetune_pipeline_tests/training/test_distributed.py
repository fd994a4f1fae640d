"""Training in several processes of this machine, by Gloo on the CPU."""

import json
import os
import time
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import distributed, elastic_launch, model
from finetune_pipeline.training.checkpoints import mark_complete
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import CHECKPOINTS, LOG, JobConfig, TrainingError, TrainingFailed, finished

from .conftest import breaking_in_half, rows, save, with_settings


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "rank"),
    [
        (8, 1, 1, (8, 1)),
        (8, 4, 2, (8, 2)),  # fewer steps first: the batch size is what the device can hold
        (8, 1, 2, (4, 1)),
        (6, 2, 4, (3, 1)),
        (4, 6, 3, (4, 2)),
        (4, 5, 2, (2, 5)),  # ten examples each, at most four at once
    ],
)
def test_an_update_has_the_same_examples_for_any_number_of_processes(batch, accumulation, processes, rank):
    settings = TrainingSettings(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    split = distributed.split_batch(settings, processes)
    assert (split.per_device_train_batch_size, split.gradient_accumulation_steps) == rank
    assert rank[0] * rank[1] * processes == batch * accumulation


@pytest.mark.parametrize("processes", [3, 16])
def test_an_uneven_split_is_refused_with_the_even_ones(processes):
    with pytest.raises(TrainingError, match=r"= 8 examples .* set num_processes to one of 1, 2, 4, 8"):
        distributed.split_batch(TrainingSettings(per_device_train_batch_size=8), processes)


@pytest.fixture
def forked_ranks(monkeypatch):
    """Fork the ranks from a process that has imported their libraries, which is then their parent."""
    monkeypatch.setattr(elastic_launch, "_START_METHOD", "forkserver")
    monkeypatch.setattr(elastic_launch, "_rank", forked_rank)


def forked_rank(parent, text, started):
    return elastic_launch._rank(os.getppid(), text, started)


@pytest.mark.slow
@pytest.mark.real_processes
def test_two_processes_give_the_same_adapter_as_one(job, tmp_path):
    one = with_settings(job, lora_dropout=0.0)
    two = with_settings(job, num_processes=2).model_copy(update={"output": tmp_path / "two"})
    seen = []
    alone, together = train(one), train(two, seen.append)

    assert together.steps == alone.steps == 24
    assert together.loss_before == pytest.approx(alone.loss_before, rel=1e-5)
    assert together.loss_after == pytest.approx(alone.loss_after, rel=1e-3)
    assert together.loss_after < together.loss_before - 0.5
    assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-3)
    assert [line.step for line in seen] == sorted({line.step for line in seen}), "one process writes"
    assert (two.output / "adapter" / "adapter_model.safetensors").is_file()
    assert not (two.output / CHECKPOINTS).exists()
    log = (two.output / LOG).read_text()
    assert log.count("is the batch of the whole run, split across 2 processes; TRL would multiply it by 2") == 1


def sharded_rank(parent, text, started):
    """Run elastic_launch._rank as if there were two GPUs: Accelerate refuses FSDP on CPUs, PyTorch does not."""
    from accelerate.state import DistributedType, PartialState

    from finetune_pipeline.training import trainer

    prepare, gather = PartialState.__init__, model.gather_trained_weights
    job = JobConfig.model_validate_json(text)

    def with_cards(self, *arguments, **named):
        prepare(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def gather_and_tell(trained):
        weights = gather(trained)
        kinds = {type(weight).__name__ for weight in trained.parameters()}
        (job.output / f"{distributed.is_rank_zero()}.json").write_text(json.dumps(sorted(kinds)))
        return weights

    PartialState.__init__ = with_cards
    trainer.must_shard, trainer.gather_trained_weights = lambda *_: True, gather_and_tell
    return forked_rank(parent, text, started)


@pytest.mark.slow
def test_sharded_weights_give_the_same_adapter(job, tmp_path, forked_ranks, monkeypatch):
    sharded = with_settings(job, num_processes=2).model_copy(update={"output": tmp_path / "sharded"})
    with monkeypatch.context() as patch:
        patch.setattr(elastic_launch, "_rank", sharded_rank)
        folder = sharded.output / CHECKPOINTS
        folder.mkdir(parents=True)
        elastic_launch.train(sharded, time.monotonic())
    alone = train(job)

    for first in (True, False):
        assert json.loads((sharded.output / f"{first}.json").read_text()) == ["DTensor"]
    result = finished(sharded)
    assert result.loss_before == pytest.approx(alone.loss_before, rel=1e-5)
    assert result.loss_after == pytest.approx(alone.loss_after, rel=1e-3)
    theirs, ours = (load_file(one.output / "adapter" / "adapter_model.safetensors") for one in (job, sharded))
    assert {name: weight.shape for name, weight in ours.items()} == {name: w.shape for name, w in theirs.items()}
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 5e-3  # of about 0.5


def broken_sharded_rank(parent, text, started):
    """Run a sharded rank that exits in its 15th step."""
    from transformers import Trainer

    step, steps = Trainer.training_step, []

    def breaking(self, *arguments):
        steps.append(1)
        if len(steps) == 15:
            os._exit(9)
        return step(self, *arguments)

    Trainer.training_step = breaking
    return sharded_rank(parent, text, started)


@pytest.mark.slow
def test_a_sharded_run_resumes_and_keeps_the_best_weights(job, tmp_path, forked_ranks, monkeypatch):
    alone = with_settings(job, bf16=False)
    sharded = with_settings(alone, num_processes=2).model_copy(update={"output": tmp_path / "sharded"})
    checkpoints = sharded.output / CHECKPOINTS
    checkpoints.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(elastic_launch, "_rank", broken_sharded_rank)
        with pytest.raises(TrainingError, match="status 9"):
            elastic_launch.train(sharded, time.monotonic())
        state = checkpoints / "checkpoint-12" / "trainer_state.json"
        best = {"best_metric": 0.0, "best_global_step": 6}  # as if no later loss could be lower
        state.write_text(json.dumps(json.loads(state.read_text()) | best))
        mark_complete(checkpoints / "checkpoint-12", sharded.key)
        patch.setattr(elastic_launch, "_rank", sharded_rank)
        elastic_launch.train(sharded, time.monotonic())
    expected, result = train(alone), finished(sharded)
    losses = [point.loss for point in result.validation]
    assert (result.resumed_from, result.best_step) == (12, 6)
    assert losses == pytest.approx([point.loss for point in expected.validation], rel=1e-3)
    assert result.loss_after == pytest.approx(losses[0], rel=1e-5) != expected.loss_after


def broken_rank(parent, text, started):
    """Run a rank that exits one step after half of its steps."""
    from finetune_pipeline.training import trainer

    trainer.ProgressCallback = breaking_in_half(trainer.ProgressCallback)
    try:
        return forked_rank(parent, text, started)
    except KeyboardInterrupt:
        os._exit(9)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_interrupted_processes_resume_to_the_same_weights(
    job, padded_base, padded, tmp_path, forked_ranks, monkeypatch
):
    whole = with_settings(job, num_processes=2, save_steps=1 / 6)
    if padded:
        whole = whole.model_copy(update={"base_model": padded_base})
    broken = whole.model_copy(update={"output": tmp_path / "broken"})
    for one in (whole, broken):
        (one.output / CHECKPOINTS).mkdir(parents=True)
    elastic_launch.train(whole, time.monotonic())
    with monkeypatch.context() as patch:
        patch.setattr(elastic_launch, "_rank", broken_rank)
        with pytest.raises(TrainingError, match="status 9"):
            elastic_launch.train(broken, time.monotonic())
    elastic_launch.train(broken, time.monotonic())
    assert finished(broken).resumed_from == 12  # the middle of the second of three epochs
    ours, theirs = (load_file(one.output / "adapter" / "adapter_model.safetensors") for one in (whole, broken))
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5


@pytest.mark.parametrize(
    ("gigabytes", "bf16", "shards"),
    # 17 GB of weights leave 7 of 24, which is too little to train with; in float32 they take twice as much.
    [(24, True, True), (40, True, False), (24, False, True), (40, False, True)],
)
def test_weights_are_sharded_if_one_gpu_cannot_hold_them(job, tmp_path, monkeypatch, gigabytes, bf16, shards):
    import torch

    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(17_000_000_000)  # a sparse file, which takes no space
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 10**9))
    assert model.must_shard(job.model_copy(update={"base_model": tmp_path}), bf16) is shards


def rank_without_memory(parent, text, started):
    """Run elastic_launch._rank; rank 1 allocates too much memory in its third step."""
    import torch
    from transformers import Trainer

    step, steps = Trainer.training_step, []

    def greedy(self, *arguments):
        steps.append(1)
        if len(steps) == 3 and not distributed.is_rank_zero():
            torch.empty(2**50)
        return step(self, *arguments)

    Trainer.training_step = greedy
    return forked_rank(parent, text, started)


@pytest.mark.slow
def test_a_rank_without_memory_ends_all_with_advice(job, forked_ranks, monkeypatch):
    monkeypatch.setattr(elastic_launch, "_rank", rank_without_memory)
    (job.output / CHECKPOINTS).mkdir(parents=True)
    message = r"^memory ran out with a micro-batch of 4 \(.*allocate.*\); set per_device_train_batch_size: 2 and "
    message += "gradient_accumulation_steps: 4,"
    with pytest.raises(TrainingError, match=message):
        elastic_launch.train(with_settings(job, num_processes=2), time.monotonic())


def test_the_rank_whose_memory_ran_out_is_named_although_another_ended_first(tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    told = {"0": "RuntimeError: Connection closed by peer", "1": "RankOutOfMemory: memory ran out", "2": None, "3": "{"}
    for rank, message in told.items():
        text = (
            message
            if message in (None, "{")
            else json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "1"}}})
        )
        write_text(tmp_path / "run" / "attempt_0" / rank / "error.json", text or '{"message": "SIGTERM"}')
    first = ProcessFailure(0, 1, 1, str(tmp_path / "run/attempt_0/0/error.json"))
    assert elastic_launch._failure(ChildFailedError("train", {0: first}), tmp_path) == "memory ran out"
    assert elastic_launch._failure(ChildFailedError("train", {0: first}), tmp_path / "empty").startswith(
        "rank 0 ended with status 1"
    )


@pytest.mark.slow
@pytest.mark.timeout(120)  # the other rank would wait for half an hour
def test_non_finite_weights_end_every_rank(job, tmp_path):
    dataset = save(tmp_path / "d", rows(64, 100))  # without validation, which would fail first
    wild = with_settings(job, num_processes=2, learning_rate=1e30, save_steps=1 / 24).model_copy(
        update={"dataset": dataset}
    )
    with pytest.raises(TrainingFailed, match=r"^the loss became nan .* diverged"):
        train(wild)
    whole = list((wild.output / CHECKPOINTS).glob("checkpoint-*/complete.json"))
    assert len(whole) <= 2
    assert all(load_file(path.parent / "adapter_model.safetensors") for path in whole)


@pytest.mark.slow
def test_several_processes_give_the_same_error_as_one(job):
    impossible = with_settings(job, num_processes=2, max_length=16)
    with pytest.raises(TrainingFailed, match=r"^nothing is left to train on: 64 of 64 examples"):
        train(impossible)
