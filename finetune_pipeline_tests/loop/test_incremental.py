"""An incremental training on top of the champion's adapter, with the real store, registry and trainer."""

import json

import dagster as dg
import pytest

from finetune_pipeline.artifacts import hash_file, pointed
from finetune_pipeline.curation.dataset import read_rows
from finetune_pipeline.database import connect
from finetune_pipeline.loop.automation import automation
from finetune_pipeline.records import AdapterManifest, DatasetManifest
from finetune_pipeline.registry.champion import promote
from finetune_pipeline.registry.models import Candidate
from finetune_pipeline_tests.loop.conftest import corrected, definitions, write_events

SMALL = {"epochs": 2, "max_length": 128, "lora_r": 4, "learning_rate": 0.002, "batch_size": 4}


def materialize(loop, instance, *stages):
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", one]) for one in stages])
    return pointed(AdapterManifest, "notes")


def make_champion(adapter, folder):
    file = folder / "champion.gguf"
    file.write_bytes(b"GGUF")
    candidate = Candidate(
        loop="notes", gguf_path=file, gguf_sha256=hash_file(file), base_hash=adapter.manifest.base_hash, mode="full",
        lineage={"lora_adapter": adapter.manifest.version}, scores={}, report_path=file,
    )  # fmt: skip
    promote(connect(), candidate, None, "tests", "a test needs it", None, action="force")


@pytest.mark.slow
def test_what_is_new_is_learnt_on_top_of_the_champion(make_loop, instance, tmp_path):
    full, more = make_loop(training=SMALL), make_loop(training={**SMALL, "mode": "incremental", "replay_older": 0.5})
    events = more.drop_folder / "log.jsonl"
    write_events(events, *corrected(f"person{n}" for n in range(12)))
    stages = ("raw_logs", "curated_dataset", "lora_adapter")

    first = materialize(more, instance, *stages)
    assert (first.manifest.mode, first.manifest.mode_reason) == (
        "full",
        "no champion serves whose adapter could be gone on with",
    )
    make_champion(first, tmp_path)
    again = materialize(more, instance, "lora_adapter")
    assert again.manifest.version == first.manifest.version  # nothing is new: the same training, which is there
    learnt = {row["content_hash"] for row in read_rows(pointed(DatasetManifest, "notes").path, "train")}

    write_events(events, *corrected(f"guest{n}" for n in range(10)))
    second = materialize(more, instance, *stages)
    dataset = pointed(DatasetManifest, "notes")
    rows = read_rows(dataset.path, "train")
    new = [row for row in rows if row["content_hash"] not in learnt]
    manifest = second.manifest
    assert (manifest.mode, manifest.new_examples) == ("incremental", len(new))
    assert manifest.inputs["initial_adapter"] == first.manifest.version
    assert manifest.mode_reason == (
        f"on top of notes@v1.0.0: {len(new)} new examples, {round(len(new) / 2)} older ones replayed"
    )
    assert manifest.examples == len(new) + round(len(new) / 2) < len(rows)
    # It begins where the champion ended, not at the base.
    assert manifest.loss_before < first.manifest.loss_before - 0.3
    job = json.loads((second.path / "job.json").read_text())
    assert job["initial_adapter"] == str(first.path / "adapter")

    third = materialize(full, instance, "lora_adapter")
    assert (third.manifest.mode, third.manifest.examples) == ("full", len(rows))


def test_the_yearly_run_trains_from_the_base_whatever_the_loop_says(make_loop, instance):
    [schedule] = [s for s in automation(make_loop(training={"mode": "incremental"})).schedules if "yearly" in s.name]
    request = schedule(dg.build_schedule_context(instance))
    assert request.run_config == {"ops": {"notes__lora_adapter": {"config": {"mode": "full"}}}}
