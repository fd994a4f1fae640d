"""The memory check before training, and smaller micro-batches when memory runs out."""

import json
import re
import subprocess
import sys

import pytest

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import memory
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.estimate import GIB
from finetune_pipeline.training.job import TrainingError, TrainingResult
from finetune_pipeline.training.memory import (
    MemoryRanOut,
    catch_out_of_memory,
    check_memory,
    out_of_memory_advice,
    with_micro_batch,
)

from .conftest import save, with_settings

# Limit the address space to what the process has when training starts, and a little more.
LIMITED = """
import resource, sys
import torch, transformers, trl, peft, datasets
import finetune_pipeline.training.trainer as trainer
from finetune_pipeline.training.__main__ import main
made = trainer.make_trainer
def limited(*arguments):
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        torch.ones(64, 64) @ torch.ones(64, 64)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]) * 10**6, resource.RLIM_INFINITY))
    return made(*arguments)
trainer.make_trainer = limited
sys.exit(main([sys.argv[1]]))
"""


def long_rows(count):
    return [
        {"prompt": "7" * 200, "history": [], "completion": json.dumps({"n": n, "x": "8" * 200})} for n in range(count)
    ]


def train_with_little_memory(job, megabytes):
    write_text(job.output / "job.json", job.model_dump_json())
    command = [sys.executable, "-c", LIMITED, job.output / "job.json", str(megabytes)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_after_running_out_of_memory_it_resumes_to_the_same_weights(job, tmp_path):
    from safetensors.torch import load_file

    one = with_settings(job, per_device_train_batch_size=64, num_train_epochs=3, learning_rate=1e-3, max_length=1024)
    one = one.model_copy(update={"dataset": save(tmp_path / "long", long_rows(64))})
    few, many = (one.model_copy(update={"output": tmp_path / name}) for name in ("limited", "free"))
    ended = train_with_little_memory(few, 400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "memory ran out with a micro-batch of 64" in ended.stderr
    limited = TrainingResult.model_validate_json((few.output / "result.json").read_bytes())
    free = train(many)
    weights = [load_file(run.output / "adapter" / "adapter_model.safetensors") for run in (few, many)]
    assert limited.micro_batch < free.micro_batch == 64
    assert (limited.steps, limited.job) == (free.steps, free.job)  # the same updates of the same job
    assert limited.loss_after == pytest.approx(free.loss_after, rel=1e-3)
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() < 2e-3, name


@pytest.mark.parametrize(
    ("batch", "accumulation", "tried"),
    [(24, 1, [12, 6, 3, 1]), (5, 2, [2, 1]), (7, 1, [1])],
    ids=["24x1", "5x2", "7x1"],
)
def test_a_smaller_micro_batch_keeps_the_examples_per_update(batch, accumulation, tried):
    asked = TrainingSettings(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    running = asked
    for micro in tried:
        with pytest.raises(MemoryRanOut, match=f"same {batch * accumulation} examples per update") as ran_out:
            fail(running, MemoryError())
        assert ran_out.value.micro_batch == micro
        running = with_micro_batch(asked, micro, batch * accumulation)
        assert running.per_device_train_batch_size * running.gradient_accumulation_steps == batch * accumulation
    with pytest.raises(TrainingError, match=r"micro-batch of 1 .*checkpointing: true.*max_length below"):
        fail(running, RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_kto_keeps_a_micro_batch_of_two():
    asked = TrainingSettings(method="kto", per_device_train_batch_size=4)
    with pytest.raises(MemoryRanOut) as first:
        fail(asked, MemoryError())
    running = with_micro_batch(asked, first.value.micro_batch, 4)
    assert running.per_device_train_batch_size == 2
    with pytest.raises(
        TrainingError, match=r"micro-batch of 2, the least that kto needs .*set gradient_checkpointing: t"
    ):
        fail(running, MemoryError())
    assert "micro-batch of 2, the least that kto needs (no room); set grad" in out_of_memory_advice(
        running, 2, "no room"
    )


def fail(settings, error):
    with catch_out_of_memory(settings):
        raise error


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fail(TrainingSettings(), RuntimeError("shapes do not match"))


def test_a_run_that_does_not_fit_is_refused_with_what_fits(job, monkeypatch, capfd):
    large = with_settings(job, per_device_train_batch_size=512, max_length=1024)
    check_memory(large.base_model, large.settings, longest=16, bf16=False)  # short examples need little
    monkeypatch.setattr(memory, "available_memory", lambda: 500 * 10**6)
    with pytest.raises(
        TrainingError, match=r"estimated memory .* GiB more .*what fits: per_device_train_batch_size: \d+, gradient_acc"
    ):
        check_memory(large.base_model, large.settings, longest=1024, bf16=False)


LLAMA_70B = {
    "model_type": "llama", "dtype": "bfloat16", "num_attention_heads": 64, "num_key_value_heads": 8,
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
}  # fmt: skip


def test_a_model_for_eight_gpus_is_refused_on_one(tmp_path, monkeypatch, capfd):
    import torch

    write_text(tmp_path / "config.json", json.dumps(LLAMA_70B))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "available_memory", lambda: 79 * GIB)
    rank = TrainingSettings(num_processes=8, per_device_train_batch_size=1, gradient_checkpointing=True)
    with pytest.raises(TrainingError, match="what fits: adapter: qlora"):
        check_memory(tmp_path, rank, longest=512, bf16=True)
    check_memory(tmp_path, rank, longest=512, bf16=True, shards=8)
    logged = capfd.readouterr().err.splitlines()[-1]
    assert float(re.search(r"base weights ([\d.]+)", logged)[1]) == pytest.approx(131.42 / 8 + 7.1, abs=0.01)
    large = rank.model_copy(update={"per_device_train_batch_size": 64})
    with pytest.raises(
        TrainingError, match=r"what fits: per_device_train_batch_size: 16, gradient_accumulation_steps: 32$"
    ):
        check_memory(tmp_path, large, longest=1024, bf16=True, shards=8)


def test_several_processes_are_told_which_batch_size_to_set():
    two = TrainingSettings(num_processes=2, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    settings = "set per_device_train_batch_size: 4 and gradient_accumulation_steps: 4"
    assert f"ran out with a micro-batch of 8 (no room); {settings}" in out_of_memory_advice(two, 8, "no room")
    assert "micro-batch of 1 (no room); set gradient_checkpointing: true" in out_of_memory_advice(two, 1, "no room")


def test_a_need_within_the_error_of_the_estimate_is_tried(job, monkeypatch, capfd):
    from finetune_pipeline.training.architecture import read_architecture
    from finetune_pipeline.training.estimate import estimate_memory

    need = estimate_memory(
        read_architecture(job.base_model / "config.json", "x"), job.settings, "cpu", bf16=False, tokens=64
    )
    monkeypatch.setattr(memory, "available_memory", lambda: round(need.to_come * 0.9))
    check_memory(job.base_model, job.settings, longest=64, bf16=False)
    assert "off by 20%, so training starts" in capfd.readouterr().err
