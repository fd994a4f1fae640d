"""An incremental training, warm-started from the champion's adapter, with the real store, registry and trainer."""

import json
from base64 import b64decode
from datetime import UTC, datetime

import dagster as dg
import datasets
import pytest

from finetune_pipeline.artifacts import get_latest, hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.orchestration.automation import automation
from finetune_pipeline.orchestration.resources import resources
from finetune_pipeline.pipeline import incremental
from finetune_pipeline.pipeline.incremental import training_start, write_subset
from finetune_pipeline.pipeline.train import train_adapter
from finetune_pipeline.registry.champion import promote
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.training.job import TrainingResult
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events
from finetune_pipeline_tests.pipeline.test_train import dataset as unpaired

KEY = dg.AssetKey(["notes", "lora_adapter"])
SMALL = {
    "num_train_epochs": 2,
    "max_length": 128,
    "lora_r": 4,
    "learning_rate": 0.002,
    "per_device_train_batch_size": 4,
}


def materialize(loop, instance, *stages):
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", one]) for one in stages])
    return get_latest(AdapterManifest, "notes")


def observed(instance):
    """Return the progress observations of the trainings, newest first."""
    records = instance.fetch_observations(KEY, limit=100).records
    return [{name: one.value for name, one in r.asset_observation.metadata.items()} for r in records]


def make_champion(adapter, folder):
    file = folder / "champion.gguf"
    file.write_bytes(b"GGUF")
    candidate = CandidateModel(
        loop="notes", gguf_path=file, gguf_sha256=hash_file(file), base_hash=adapter.manifest.base_hash, mode="full",
        lineage={"lora_adapter": adapter.manifest.version}, scores={}, report_path=file,
    )  # fmt: skip
    promote(connect(), candidate, None, "tests", "a test needs it", None, action="force")


@pytest.mark.slow
def test_an_incremental_training_starts_from_the_champion(make_loop, instance, tmp_path):
    replay = tmp_path / "replay.jsonl"
    rows = [{"prompt": f"an older matter of number {n}", "completion": f"older {n}"} for n in range(60)]
    replay.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curation = {"min_examples": 5, "validation_fraction": 0.2, "replay": str(replay)}
    full = make_loop(training=SMALL, curation=curation)
    more = make_loop(training={**SMALL, "mode": "incremental", "incremental_replay_ratio": 0.5}, curation=curation)
    events = more.drop_folder / "log.jsonl"
    write_events(events, *corrected(f"person{n}" for n in range(12)))
    stages = ("raw_logs", "curated_dataset", "lora_adapter")

    first = materialize(more, instance, *stages)
    assert (first.manifest.mode, first.manifest.mode_reason) == (
        "full",
        "there is no champion whose adapter it could start from",
    )
    last, *_ = observed(instance)
    result = TrainingResult.model_validate_json((first.path / "result.json").read_bytes())
    assert (last["step"], last["epoch"], last["time left (s)"]) == (result.steps, 2.0, 0)
    assert last["training loss"] == pytest.approx(result.curve[-1].loss, abs=1e-4)
    assert last["validation loss"] == pytest.approx(result.validation[-1].loss, abs=1e-4)
    assert last["learning rate"] == pytest.approx(result.curve[-1].learning_rate, rel=1e-2)
    assert last["throughput (tokens/s)"] > 0 and last["memory (GiB)"] > 0.01
    event = instance.get_latest_materialization_event(KEY)
    messages = [entry.user_message for entry in instance.all_logs(event.run_id)]
    last_step = f"training 100%, step {result.steps} of {result.steps}, epoch 2.0, loss "
    assert any(line.startswith(last_step) for line in messages)
    curve = event.asset_materialization.metadata["loss curve"].value
    before, _, encoded = curve.removesuffix(")").partition(",")
    assert before == "![loss curve](data:image/png;base64" and b64decode(encoded).startswith(b"\x89PNG")
    make_champion(first, tmp_path)
    again = materialize(more, instance, "lora_adapter")
    assert again.manifest.version == first.manifest.version  # nothing is new, so the same adapter is reused
    trained_on = {row["prompt"] for row in dataset_rows(get_latest(DatasetManifest, "notes").path, "train")}

    write_events(events, *corrected(f"guest{n}" for n in range(10)))
    second = materialize(more, instance, *stages)
    dataset = get_latest(DatasetManifest, "notes")
    rows = dataset_rows(dataset.path, "train")
    replayed = [row for row in rows if row["source"] == "replay"]
    assert {row["prompt"] for row in replayed} - trained_on  # others than before, which still do not count as new
    new = [row for row in rows if row["prompt"] not in trained_on and row not in replayed]
    manifest = second.manifest
    assert (manifest.mode, manifest.new_examples) == ("incremental", len(new))
    assert manifest.inputs["initial_adapter"] == first.manifest.version
    assert manifest.mode_reason == (
        f"warm-started from notes@v1.0.0: {len(new)} new examples, {round(len(new) / 2)} older ones as replay"
    )
    assert manifest.examples == len(new) + round(len(new) / 2) < len(rows)
    # It starts at the champion's loss, not at the base model's.
    assert manifest.loss_before < first.manifest.loss_before - 0.3
    job = json.loads((second.path / "job.json").read_text())
    assert job["initial_adapter"] == str(first.path / "adapter")

    texts = [path.name for path in second.path.rglob("*") if path.suffix == ".arrow"]
    assert texts == []  # the texts are only in the dataset
    other = more.training.model_copy(update={"method": "dpo"})
    assert training_start(more, other, dataset, "preference", manifest.base_hash).reason == (
        "it cannot start from the adapter of notes@v1.0.0: it was trained by sft, which learns from other examples "
        "than dpo"
    )

    third = materialize(full, instance, "lora_adapter")
    assert (third.manifest.mode, third.manifest.examples) == ("full", len(rows))


@pytest.mark.slow
def test_incremental_kto_adds_older_desirable_answers(make_loop, tmp_path, monkeypatch):
    training = {**SMALL, "num_train_epochs": 1, "method": "kto", "mode": "incremental", "incremental_replay_ratio": 0}
    loop = make_loop(training=training, curation={"min_examples": 5, "validation_fraction": 0.2})
    made = [train_adapter(loop, loop.training, unpaired(loop), "run", ignored, ignored)]
    make_champion(made[0], tmp_path)
    worse = unpaired(loop, good=[], bad=["worse 1", "worse 2", "worse 3"])
    made.append(train_adapter(loop, loop.training, worse, "run", ignored, ignored))
    manifest = made[1].manifest
    new = manifest.new_examples
    assert (manifest.mode, manifest.examples) == ("incremental", 2 * new)
    assert manifest.mode_reason == f"warm-started from notes@v1.0.0: {new} new examples, {new} older ones as replay"

    read = incremental._training_examples
    monkeypatch.setattr(incremental, "_training_examples", lambda *of: (x for x in read(*of) if not x[1]))
    begin = training_start(loop, loop.training, worse, "unpaired_preference", manifest.base_hash)
    assert (begin.mode, begin.reason) == ("full", "all new examples are undesirable, and kto needs both kinds")


def ignored(_):
    """Do nothing."""


def test_the_yearly_run_trains_from_the_base_model(make_loop, instance):
    [schedule] = [s for s in automation(make_loop(training={"mode": "incremental"})).schedules if "yearly" in s.name]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with dg.build_schedule_context(instance, scheduled_execution_time=now, resources=resources()) as context:
        request = schedule(context)
    assert request.run_config == {"ops": {"notes__lora_adapter": {"config": {"mode": "full"}}}}


def test_a_subset_has_these_rows_and_no_cached_tokens(tmp_path):
    dataset = tmp_path / "dataset"
    splits = {
        "train": datasets.Dataset.from_dict({"prompt": [f"p{n}" for n in range(9)]}),
        "validation": datasets.Dataset.from_dict({"prompt": ["validated"]}),
    }
    datasets.DatasetDict(splits).save_to_disk(dataset)
    (dataset / ".tokenized" / "train-0").mkdir(parents=True)
    for rows in ((1, 4), (2, 5, 8)):  # the second call replaces what a killed training left
        part = datasets.load_from_disk(str(write_subset(dataset, rows, tmp_path / "part")))
        assert part["train"]["prompt"][:] == [f"p{row}" for row in rows]
        assert part["validation"]["prompt"][:] == ["validated"]
    assert not (tmp_path / "part" / ".tokenized").exists()
