"""The plan of a training."""

import json
import time

import pytest

from finetune_pipeline.pipeline.needs import FreeSpace, shortages, stage_needs
from finetune_pipeline.pipeline.plan import expected_data, plan_training
from finetune_pipeline.settings import ExportSettings, FilesSource, TrainingSettings, load_loop
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.estimate import estimate_time
from finetune_pipeline.training.hardware import this_machine
from finetune_pipeline.training.presets import Machine, rate_of, uses_bf16

MISTRAL = architecture_of("mistralai/Mistral-7B-v0.3")


def test_a_plan_chooses_what_fits_and_keeps_what_is_set():
    given = TrainingSettings(lora_r=4)
    plan = plan_training(MISTRAL, given, examples=1000, vram=12)
    assert plan.machine.bytes == 12 * 2**30 * 0.95
    assert plan.refusal == "" and plan.chosen.time.seconds > 0
    assert plan.chosen.memory.bytes <= plan.machine.bytes
    assert (plan.chosen.settings.adapter, plan.chosen.settings.lora_r) == ("qlora", 4)
    shown = [(one.settings.adapter, one.settings.gradient_checkpointing) for one in plan.options]
    assert shown == [("lora", False), ("lora", True), ("qlora", False), ("qlora", True)]
    assert all((one.time is None) == (one.memory.bytes > plan.machine.bytes) for one in plan.options)
    assert plan.options[0].time is None  # base weights of 16 bits need more than 12 GB


def test_a_plan_that_fits_nothing_says_why():
    plan = plan_training(MISTRAL, TrainingSettings(), examples=10, preset="8gb", length=65536)
    assert plan.chosen is None
    assert "does not fit preset 8gb" in plan.refusal and "65536 tokens" in plan.refusal


def test_the_settings_preset_counts_unless_a_size_is_named():
    given = TrainingSettings(preset="24gb")
    of = {vram: plan_training(MISTRAL, given, examples=10, vram=vram).machine.bytes for vram in (None, 8)}
    assert of == {None: 24 * 2**30 * 0.95, 8: 8 * 2**30 * 0.95}


@pytest.fixture
def no_logs(own_home, tmp_path):
    """Return the default loop without logs and replay."""
    loop = load_loop("aec_parser")
    curation = loop.curation.model_copy(update={"replay": None})
    return loop.model_copy(update={"ingest": loop.ingest.model_copy(update={"folders": ()}), "curation": curation})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (30, (30, "the rows of its sources")),  # as `finetune init --data` leaves them, before the first run
        (0, (1_000, "assumed, since it has no data yet")),
        (None, (1_000, "assumed, since it has no data yet")),  # no such file: `finetune check` says so
    ],
)
def test_a_plan_counts_the_rows_of_a_loop_that_has_no_dataset(no_logs, tmp_path, rows, expected):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(rows)))
    source = FilesSource(kind="files", name="rows", path=str(path))
    found = expected_data(no_logs.model_copy(update={"sources": [source]}))
    assert (found.examples, found.origin) == expected
    assert (found.mean_tokens is None) == (rows != 30)


@pytest.mark.usefixtures("own_home")
def test_a_plan_counts_rated_interactions_and_their_tokens_before_the_first_run():
    loop = load_loop("aec_parser")
    found = expected_data(loop)
    assert found.new == 291 and found.examples == 2 * 291  # 320 interactions, 29 of them without feedback
    assert found.origin == "the rated interactions of its logs, with replay"
    assert 40 < found.mean_tokens < 150  # 66 when trained
    auto = loop.model_copy(update={"training": TrainingSettings(auto=True)})
    assert expected_data(auto).examples == 2 * 291


def test_the_mean_length_decides_the_time_and_bfloat16_is_counted_where_it_is_used():
    machine = Machine("cpu", 2**40, True, 1e11, "measured")
    small = TrainingSettings(per_device_train_batch_size=4)
    assert uses_bf16(TrainingSettings(), machine) and not uses_bf16(small, machine)
    assert not uses_bf16(TrainingSettings(bf16=False), machine)
    assert rate_of(TrainingSettings(), machine)[0] > rate_of(small, machine)[0] == 1e11
    assert "for bfloat16" in rate_of(TrainingSettings(), machine)[1]
    times = [
        plan_training(MISTRAL, TrainingSettings(), examples=10_000, vram=24, mean_tokens=tokens).chosen.time.seconds
        for tokens in (100, 1_000, None)
    ]
    assert times[0] < times[1] / 5 and times[2] > times[0]


def test_a_demo_on_two_cores_takes_about_as_long_as_planned():
    """It took 37 s on quiet cores, and 5 minutes were planned with half of max_length as the mean."""
    loop = load_loop("aec_parser")
    architecture = architecture_of(loop.base_model)
    rate, source = rate_of(loop.training, Machine("cpu", 2**34, True, 1.1e11, "as on two quiet cores"))
    seconds = estimate_time(architecture, loop.training, examples=464, tokens=66, rate=rate, source=source).seconds
    assert 37 / 2 < seconds < 37 * 2


def test_each_stage_has_its_disk_and_memory(tmp_path):
    loop = load_loop("aec_parser")
    given = {"architecture": MISTRAL, "training": loop.training, "training_memory": 9 * 10**9, "device": "gpu"}
    merged = stage_needs(loop=loop, **given)
    assert [one.stage for one in merged] == ["training", "merge", "F16", "quantization", "serving"]
    weights = MISTRAL.parameters
    disk = {one.stage: one.disk for one in merged}
    assert disk["merge"] == disk["F16"] == 2 * weights and disk["quantization"] < weights
    serving = merged[-1]
    assert serving.memory > disk["quantization"] and serving.disk == 0
    assert [one.device for one in merged] == ["gpu", "cpu", "cpu", "cpu", "cpu"]

    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(bytes(1000))
    adapter = loop.model_copy(update={"export": ExportSettings(form="adapter")})
    alone = stage_needs(loop=adapter, gguf=gguf, **given)
    assert [one.stage for one in alone] == ["read the GGUF", "training", "adapter", "serving"]
    assert sum(one.disk for one in alone) < sum(disk.values())


def test_what_does_not_suffice_is_named_with_a_remedy():
    loop = load_loop("aec_parser")
    needs = stage_needs(MISTRAL, loop, loop.training, 60 * 10**9, "cpu")
    assert shortages(needs, FreeSpace(disk=10**13, memory=10**13)) == []
    disk, *memory = shortages(needs, FreeSpace(disk=10**9, memory=30 * 10**9))
    assert "a run writes up to" in disk and "set FINETUNE_HOME to another disk" in disk
    assert len(memory) == 1 and memory[0].startswith("training needs about 60.0 GB of memory, and 30.0 GB are free")
    on_a_gpu = stage_needs(MISTRAL, loop, loop.training, 60 * 10**9, "gpu")
    assert shortages(on_a_gpu, FreeSpace(disk=10**13, memory=30 * 10**9)) == []  # the plan compares it with the GPU's


def test_the_speed_of_a_cpu_does_not_depend_on_what_else_runs(monkeypatch):
    """Wall time does: on cores that others used, a plan named 4 to 14 times the time of the run."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("wall time is measured"))
    machine = this_machine()
    assert machine.device == "cpu" and machine.rate > 0 and "as on idle cores" in machine.source
