"""Lineage of a model, and what was made from an interaction."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_pipeline.artifacts import ArtifactError, draft, hash_file, publish, stage_folder, write_text
from finetune_pipeline.curation.dataset_files import COLUMNS
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest, RawLogsManifest, ReportManifest
from finetune_pipeline.pipeline.lineage import MadeWith, card, lineage, made_with
from finetune_pipeline.pipeline.train import training_of
from finetune_pipeline.registry.champion import champion, current_deployment, promote
from finetune_pipeline.registry.comparisons import ComparisonRecord
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.registry.trainings import record_training
from finetune_pipeline.settings import PROJECT_ROOT, home
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.registry.conftest import record_comparison

COMMON = {"loop": "notes", "settings": {"method": "sft", "adapter": "lora"}, "packages": {}}
METRIC = {
    "name": "ROUGE-1 recall",
    "key": "accuracy",
    "champion": 0.5,
    "challenger": 0.75,
    "unit": "%",
    "higher_is_better": True,
}
METRICS = {"champion": {"name": "a"}, "challenger": {"name": "b"}, "metrics": [METRIC]}


def logs(version, *shards):
    """Write a snapshot of several shards, each with these interactions."""
    names = [f"shard-{number}.parquet" for number in range(len(shards))]
    fields = {**COMMON, "version": version, "inputs": {"events": "1..9"}, "interactions": 1, "feedback": 1}
    fields["shards"] = names
    with draft("notes", "raw_logs", version) as folder:
        for name, ids in zip(names, shards, strict=True):
            pq.write_table(pa.table({"interaction_id": pa.array(ids, pa.string())}), folder / name)
        publish(folder, RawLogsManifest, {**fields, "examples": 1, "watermark": 9, "new": 1})


def dataset(version, of, train, validation):
    fields = {
        **COMMON, "version": version, "inputs": {"raw_logs": of}, "train": len(train), "validation": len(validation),
        "replayed": 1, "left_out": {"duplicate": 2, "other": 1}, "redacted": {"e-mail": 4}, "near_benchmark": [],
        "preference_pairs": 0, "desirable": 0, "undesirable": 0,
        "watermark": 9,
    }  # fmt: skip
    with draft("notes", "curated_dataset", version) as folder:
        splits = {
            name: datasets.Dataset.from_dict({"prompt": ["p"] * len(ids), "interaction_id": ids})
            for name, ids in (("train", train), ("validation", validation))
        }
        for name in COLUMNS:
            datasets.DatasetDict(splits).save_to_disk(folder / name, num_shards=dict.fromkeys(splits, 1))
        publish(folder, DatasetManifest, fields)


def adapter(db, version, of, run="run-1", on_top_of=None):
    inputs = {"curated_dataset": of} | ({"initial_adapter": on_top_of} if on_top_of else {})
    fields = {
        **COMMON, "version": version, "inputs": inputs, "base_model": "base", "base_hash": "b" * 64,
        "mode": "full", "mode_reason": "from the base model on all examples", "device": "cpu", "steps": 40,
        "examples": 12, "too_long": 0, "loss_before": 1.5,
        "loss_after": 0.25, "train_loss": 0.3, "tokens_per_second": 4000.0, "wall_seconds": 12.0,
        "peak_memory_bytes": 10**9, "watermark": 9,
    }  # fmt: skip
    with draft("notes", "lora_adapter", version) as folder:
        manifest = publish(folder, AdapterManifest, fields).manifest
    record_training(db, training_of(manifest, run))


def report(db, version, path):
    fields = {
        "comparison_id": version, "challenger_sha256": hash_file(path), "champion_id": None,
        "champion_sha256": "d" * 64, "benchmark_sha256": "e" * 64, "decision": "promote",
        "reason": "gain 50.0%, 5% needed", "watermark": 9,
    }  # fmt: skip
    with draft("notes", "eval_report", version) as folder:
        write_text(
            folder / "report.json",
            json.dumps(METRICS),
        )
        publish(folder, ReportManifest, {**COMMON, "version": version, "inputs": {}, **fields})
    row = {**fields, "id": version, "loop": "notes", "report_path": home() / "r", "created_at": datetime.now(UTC)}
    del row["comparison_id"]
    row["after_deployment"] = current_deployment(db, "notes").deployment_id
    record_comparison(db, ComparisonRecord(**row))


def gguf(name, of):
    fields = {
        **COMMON, "version": name, "inputs": {"lora_adapter": of}, "gguf": "model.gguf", "quantization": "F16",
        "base_model": "base", "base_hash": "b" * 64, "adapter_version": of, "mode": "full", "watermark": 9,
    }  # fmt: skip
    with draft("notes", "gguf_model", name) as folder:
        write_text(folder / "model.gguf", name)
        return publish(folder, GgufManifest, fields).path / "model.gguf"


def promoted(db, name, of, action="promote", on_top_of=None):
    """Promote a version whose adapter and report have its name."""
    adapter(db, f"a-{name}", of, on_top_of=on_top_of)
    path = gguf(name, f"a-{name}")
    report(db, f"r-{name}", path)
    before = champion(db, "notes")
    candidate = CandidateModel(
        loop="notes", gguf_path=path, gguf_sha256=hash_file(path), base_hash="b" * 64, mode="full",
        lineage={"base_model": "base", "lora_adapter": f"a-{name}", "eval_report": f"r-{name}", "watermark": 9},
        scores={"accuracy": 0.75, "exact_match": None}, report_path=path,
    )  # fmt: skip
    return promote(db, candidate, before.id if before else None, "ann", "it is Friday", f"r-{name}", action)


@pytest.fixture
def chain(db):
    """Return two models of two datasets of two snapshots; the second snapshot has all interactions."""
    logs("l1", ["i1", "i2"], ["i3"])
    logs("l2", ["i1", "i2", "i3"], ["i4", "i5"])
    dataset("d1", "l1", ["i1", None], ["i3"])
    dataset("d2", "l2", ["i1", "i4"], [])
    return promoted(db, "one", "d1"), promoted(db, "two", "d2")


def folders(stage, *names):
    return tuple(stage_folder("notes", stage) / name for name in names)


def weights(*names):
    return (*folders("lora_adapter", *(f"a-{name}" for name in names)), *folders("gguf_model", *names))


def test_lineage_names_base_dataset_events_report_and_training(db, chain):
    found = lineage(db, chain[0])
    assert (found.base_model, found.base_hash, found.adapter, found.dataset) == ("base", "b" * 64, "a-one", "d1")
    assert (found.events, found.watermark) == ("1..9", 9)
    assert (found.dataset_manifest.train, found.dataset_manifest.validation) == (2, 1)
    assert found.report_manifest.reason == "gain 50.0%, 5% needed"
    assert (found.training.run_id, found.training.dataset, found.training.method) == ("run-1", "d1", "sft, lora")


def test_deleted_artifacts_are_none_and_the_training_job_names_the_dataset(db, chain):
    for stage, name in [("lora_adapter", "a-one"), ("eval_report", "r-one"), ("raw_logs", "l1")]:
        folder = stage_folder("notes", stage) / name
        (folder / "manifest.json").unlink()
    found = lineage(db, chain[0])
    assert (found.adapter_manifest, found.report_manifest, found.events) == (None, None, None)
    assert (found.dataset, found.dataset_manifest.train) == ("d1", 2)
    (stage_folder("notes", "curated_dataset") / "d1" / "manifest.json").write_text("{")
    found = lineage(db, chain[0])
    assert (found.dataset, found.dataset_manifest) == ("d1", None)


def test_an_interaction_is_traced_to_snapshots_datasets_and_models(db, loop, chain):
    assert made_with(db, loop, {"i4"}) == MadeWith(
        folders("raw_logs", "l2"), folders("curated_dataset", "d2"), ("notes@v1.1.0",), weights("two")
    )
    both = MadeWith(
        folders("raw_logs", "l1", "l2"), folders("curated_dataset", "d1", "d2"), ("notes@v1.1.0", "notes@v1.0.0"),
        weights("one", "two"),
    )  # fmt: skip
    assert made_with(db, loop, {"i1", "unknown"}) == both
    assert made_with(db, loop, ["i3"]).models == ("notes@v1.0.0",)  # in the validation split
    assert made_with(db, loop, {"i2"}) == MadeWith(folders("raw_logs", "l1", "l2"))
    assert [made_with(db, loop, nothing) for nothing in (set(), {"unknown"})] == [MadeWith(), MadeWith()]


def test_weights_that_were_not_promoted_are_found_by_their_dataset(db, loop, chain):
    adapter(db, "a-challenger", "d2")
    gguf("challenger", "a-challenger")
    adapter(db, "a-only", "d2")
    adapter(db, "a-other", "d1")
    found = made_with(db, loop, {"i4"})
    assert found.models == ("notes@v1.1.0",)
    assert found.weights == (
        *folders("lora_adapter", "a-challenger", "a-only", "a-two"),
        *folders("gguf_model", "challenger", "two"),
    )
    for name in ("a-challenger", "a-two"):  # without its adapter, the training job links a GGUF to its dataset
        shutil.rmtree(stage_folder("notes", "lora_adapter") / name)
    found = made_with(db, loop, {"i4"}).weights
    assert found == (*folders("lora_adapter", "a-only"), *folders("gguf_model", "challenger", "two"))


def test_a_warm_started_adapter_inherits_the_datasets(db, loop, chain):
    promoted(db, "three", "d2", on_top_of="a-one")
    promoted(db, "four", "d2", on_top_of="a-three")
    found = made_with(db, loop, {"i3"})  # only in the first dataset, as if it was erased since
    assert found.datasets == folders("curated_dataset", "d1")
    assert found.models == ("notes@v1.3.0", "notes@v1.2.0", "notes@v1.0.0")
    assert found.weights == (
        *folders("lora_adapter", "a-four", "a-one", "a-three"),
        *folders("gguf_model", "four", "one", "three"),
    )
    for name in ("a-three", "a-four"):  # the training jobs still link them
        shutil.rmtree(stage_folder("notes", "lora_adapter") / name)
    assert made_with(db, loop, {"i3"}).models == found.models


def test_artifacts_of_older_versions_are_searched(db, loop, chain):
    for stage, name in (("raw_logs", "l2"), ("curated_dataset", "d2")):
        (stage_folder("notes", stage) / name / "manifest.json").write_text("{}")
    found = made_with(db, loop, {"i4"})
    assert (found.snapshots, found.datasets) == (folders("raw_logs", "l2"), folders("curated_dataset", "d2"))
    assert found.models == ("notes@v1.1.0",)


def test_a_model_is_found_without_its_adapter(db, loop, chain):
    (stage_folder("notes", "lora_adapter") / "a-two" / "manifest.json").unlink()
    assert made_with(db, loop, {"i4"}).models == ("notes@v1.1.0",)


def test_an_unreadable_snapshot_is_named(db, loop, chain):
    path = stage_folder("notes", "raw_logs") / "l1" / "shard-0.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"shard-0\.parquet"):
        made_with(db, loop, {"i4"})
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"shard-0\.parquet"):
        made_with(db, loop, {"i4"})


def test_an_unreadable_dataset_is_named(db, loop, chain):
    (path,) = (stage_folder("notes", "curated_dataset") / "d1" / "prompt_completion" / "train").glob("*.arrow")
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"curated_dataset/d1 cannot be read"):
        made_with(db, loop, {"i4"})


def test_the_card_has_lineage_metrics_and_verdict(db, loop, chain):
    text = card(db, loop, chain[0])
    expected = [
        "# notes@v1.0.0", "base (bbbbbbbbbbbbbbbb)", "| dataset | d1 |", "| events | 1..9 |", "| train | 2 |",
        "| left out | 3 |", "| redacted | 4 |", "| ROUGE-1 recall | 50.0% | 75.0% |", "gain 50.0%, 5% needed",
        "1.500 before, 0.250 after", "| Dagster run | run-1 |", "type: accuracy",
        "| training | full, from the base model on all examples |",
    ]  # fmt: skip
    assert [text_part for text_part in expected if text_part not in text] == []
    assert "exact_match" not in text
    forced = card(db, loop, promoted(db, "three", "d2", "force"))
    assert "gain 50.0%, 5% needed; force by ann: it is Friday" in forced


def test_the_card_has_what_users_said(db, loop, chain):
    model = chain[0]
    assert "## From use" not in card(db, loop, model)
    with db.write() as connection:
        events = [interaction("a", model=model.name), feedback("1", "a", "thumbs_up")]
        store.record(connection, "notes", events, default_reward)
    text = card(db, loop, model)
    assert "| win rate | 100.0% |" in text and "| average rating | not measured |" in text
    assert "| convergence | not measured |" in text  # its training has no result.json


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (str(PROJECT_ROOT / "data" / "starter_model"), "data/starter_model"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de", "Qwen/Qwen3-0.6B"),
        ("/models/mine", "/models/mine"),
    ],
)
def test_the_card_names_the_base_model_by_its_public_id(db, loop, chain, folder, name):
    model = chain[0].model_copy(update={"lineage": {**chain[0].lineage, "base_model": folder}})
    assert f"base_model: {name}\n" in card(db, loop, model)


def test_the_card_leaves_out_deleted_artifacts(db, loop, chain):
    for stage in ("lora_adapter", "eval_report", "curated_dataset", "raw_logs"):
        for path in stage_folder("notes", stage).glob("*/manifest.json"):
            Path(path).unlink()
    text = card(db, loop, chain[0])
    assert "| dataset | d1 |" in text and "gain 50.0%, 5% needed" in text and "up to ingest offset 9" in text
    assert "None" not in text and "| train |" not in text
