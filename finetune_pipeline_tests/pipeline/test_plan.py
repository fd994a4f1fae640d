"""The plan of a training."""

import json
import time

import pytest

from finetune_pipeline.pipeline.plan import expected_examples, plan_training
from finetune_pipeline.settings import FilesSource, TrainingSettings, load_loop
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.hardware import this_machine

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


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (30, (30, "the rows of its sources")),  # as `finetune init --data` leaves them, before the first run
        (0, (1_000, "assumed, since it has no data yet")),
        (None, (1_000, "assumed, since it has no data yet")),  # no such file: `finetune check` says so
    ],
)
def test_a_plan_counts_the_rows_of_a_loop_that_has_no_dataset(tmp_path, rows, expected):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(rows)))
    source = FilesSource(kind="files", name="rows", path=str(path))
    assert expected_examples(load_loop("aec_parser").model_copy(update={"sources": [source]})) == expected


def test_the_speed_of_a_cpu_does_not_depend_on_what_else_runs(monkeypatch):
    """Wall time does: on cores that others used, a plan named 4 to 14 times the time of the run."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("wall time is measured"))
    machine = this_machine()
    assert machine.device == "cpu" and machine.rate > 0 and "as on idle cores" in machine.source
