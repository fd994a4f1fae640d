"""A loop with `export.form: adapter`: base and adapter serve as two files, with the real engine and registry."""

import json

import dagster as dg
import pytest

from finetune_pipeline.artifacts import ArtifactError, get_latest, get_or_create, model_sha256, set_latest
from finetune_pipeline.database import connect
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest, ReportManifest
from finetune_pipeline.pipeline.ask import find_model, generate_answers
from finetune_pipeline.pipeline.export import CHECK_NAMES, CHECKS, model_spec
from finetune_pipeline.registry.champion import champion
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.orchestration.conftest import BENCHMARK, corrected, definitions, write_events
from finetune_pipeline_tests.training.conftest import STARTER

FIGURES = {
    "mode": "full", "device": "cpu", "steps": 0, "examples": 0, "too_long": 0, "loss_before": 1, "loss_after": 1,
    "train_loss": 1, "tokens_per_second": 1, "wall_seconds": 1, "peak_memory_bytes": 1, "watermark": 1,
}  # fmt: skip


def run(loop, instance, *stages):
    """Materialize these assets in this process."""
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", one]) for one in stages])


def make_adapter(loop, seed):
    """Create an adapter with random weights instead of a trained one."""
    base = resolve_base_model(loop.base_model)
    dataset = get_latest(DatasetManifest, "notes")
    inputs = {"curated_dataset": dataset.manifest.version, "base_model": base_hash(base)}

    def make(folder):
        write_adapter(base, folder / "adapter", seed)
        about = {"inputs": inputs, "settings": {}, "packages": {}, "base_model": str(base)}
        about["datasets"] = {dataset.manifest.version: dataset.sha256}
        return {**about, "base_hash": inputs["base_model"], **FIGURES}

    set_latest(get_or_create(AdapterManifest, "notes", f"{seed:016}", make).manifest, "by hand")


def ask_for_what_it_answers(loop, folder):
    """Make the newest export's answers the expected ones, so that it wins; return them."""
    spec = model_spec(get_latest(GgufManifest, "notes"))
    expected = generate_answers(loop, spec, *(row["prompt"] for row in BENCHMARK))
    rows = [{**row, "expected": answer} for row, answer in zip(BENCHMARK, expected, strict=True)]
    (folder / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return expected


def judge(loop, instance, folder):
    """Export, evaluate on its own answers, and promote; return the champion and the report's manifest."""
    run(loop, instance, "gguf_model")
    expected = ask_for_what_it_answers(loop, folder)
    run(loop, instance, "eval_report", "promoted_model")
    serving, report = champion(connect(), "notes"), get_latest(ReportManifest, "notes").manifest
    assert serving.sha256 == report.challenger_sha256
    assert generate_answers(loop, find_model(loop, "champion", print)[1], BENCHMARK[0]["prompt"]) == expected[:1]
    return serving, report


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
def test_adapter_and_merged_exports_are_compared_and_promoted(make_loop, instance, tmp_path):
    pair = make_loop(export={"form": "adapter", "quantization": "F16"})
    merged = pair.model_copy(update={"export": pair.export.model_copy(update={"form": "merged"})})
    write_events(pair.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(10)))
    run(pair, instance, "raw_logs", "curated_dataset")

    make_adapter(pair, 0)
    first, report = judge(pair, instance, tmp_path)
    made = get_latest(GgufManifest, "notes")
    assert {path.name for path in made.path.iterdir()} == {"adapter.gguf", CHECKS, "manifest.json"}
    assert made.manifest.form == "adapter" and made.manifest.inputs["base_gguf"] == first.gguf_path.parent.name
    outcomes = {outcome["name"]: outcome["passed"] for outcome in json.loads((made.path / CHECKS).read_text())}
    assert outcomes == dict.fromkeys(CHECK_NAMES, True)
    assert first.adapter_path == made.path / "adapter.gguf" and first.gguf_path.name == "model-F16.gguf"
    assert first.sha256 == model_sha256(first.gguf_sha256, first.adapter_sha256)
    assert report.champion_sha256 == first.gguf_sha256  # it was compared with the base, the same file
    for path in first.files:  # either file, changed after its evaluation
        flip_last_byte(path)
        with pytest.raises(ArtifactError, match=r"changed since: the GGUF|is damaged or was replaced"):
            run(pair, instance, "promoted_model")
        flip_last_byte(path)

    make_adapter(merged, 1)
    second, report = judge(merged, instance, tmp_path)
    assert (second.version, second.adapter_path, report.champion_sha256) == ("v1.1.0", None, first.sha256)

    make_adapter(pair, 0)
    third, report = judge(pair, instance, tmp_path)
    assert (third.version, third.id, report.champion_sha256) == ("v1.0.0", first.id, second.sha256)


@pytest.mark.slow
def test_a_gguf_serves_untouched_below_its_adapters(make_loop, instance, tmp_path):
    given = export(STARTER, None, tmp_path / "mine", "Q8_0", lambda step: None).gguf
    content = given.read_bytes()
    loop = make_loop(base_model=str(given), export={"form": "adapter"})
    write_events(loop.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(10)))
    run(loop, instance, "raw_logs", "curated_dataset")
    make_adapter(loop, 0)
    serving, report = judge(loop, instance, tmp_path)
    made = get_latest(GgufManifest, "notes")
    outcomes = {outcome["name"]: outcome["passed"] for outcome in json.loads((made.path / CHECKS).read_text())}
    assert outcomes == dict.fromkeys(CHECK_NAMES, True)
    assert serving.gguf_path.is_symlink() and serving.gguf_path.resolve() == given
    assert report.champion_sha256 == serving.gguf_sha256  # it was compared with the given file
    assert made.manifest.quantization == "as given" and given.read_bytes() == content

    flip_last_byte(given)
    with pytest.raises(ArtifactError, match=r"another base model|changed since: the GGUF|is damaged or was replaced"):
        run(loop, instance, "promoted_model")
