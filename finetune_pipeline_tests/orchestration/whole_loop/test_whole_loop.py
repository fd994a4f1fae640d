"""The whole loop through Dagster's command line, with nothing replaced: training, export, engine, gate, registry.

All tests share one home and run in order. Finished work is reused, so most tests take seconds. The loop is the
free-text example `examples/meeting_notes`.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import dagster as dg
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.orchestration.alerts import alert_of_run
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.comparisons import list_comparisons
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.trainings import find_training
from finetune_pipeline.settings import PROJECT_ROOT, read_loop
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.waiting import wait_until

IMPOSSIBLE = {"gate": {"min_gain": 1.0, "mode": "points"}}
KEEP = {"gate": {"min_gain": 1.0, "mode": "points", "on_reject": "keep_champion"}}


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def alive(marker):
    """Return the processes of this user whose command line contains a text."""
    found = subprocess.run(["pgrep", "-f", str(marker)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def newest_alert(loop):
    """Return what is told about the loop's newest run."""
    with dg.DagsterInstance.from_config(str(loop.dagster)) as instance:
        (run,) = instance.get_runs(limit=1)
        return alert_of_run(read_loop(loop.folder / "defs.yaml"), instance, run)


def test_a_killed_training_ends_its_processes_and_resumes_from_its_checkpoint(loop):
    loop.write()
    process = loop.start()
    drafts = loop.stage("lora_adapter")
    wait_until(lambda: list(drafts.glob(".draft-*/checkpoints/checkpoint-*/complete.json")))
    os.kill(process.pid, signal.SIGKILL)  # only the run's own process: the others have to end by themselves
    wait_until(lambda: not alive(drafts))
    process.communicate()
    assert loop.complete("lora_adapter") == []
    code, log = loop.run("*meeting_notes/lora_adapter")
    assert code == 0, log
    (version,) = loop.complete("lora_adapter")
    result = json.loads((loop.stage("lora_adapter") / version / "result.json").read_text())
    assert 0 < result["resumed_from"] < result["steps"]
    names = {path.name for path in (loop.stage("lora_adapter") / version).iterdir()}
    assert {"adapter", "manifest.json"} <= names and "checkpoints" not in names


@pytest.mark.parametrize("stage", ["gguf_model", "benchmark_run"])
def test_a_killed_stage_leaves_no_complete_artifact(loop, stage):
    loop.write(**IMPOSSIBLE)
    process = loop.start()
    wait_until(lambda: list(loop.stage(stage).glob(".draft-*/*")))
    kill(process)
    assert loop.complete(stage) == []


def test_a_rejected_challenger_fails_the_run_with_the_reason(loop):
    code, log = loop.run(**IMPOSSIBLE)
    assert code != 0
    assert "needed" in log and "correct, champion" in log
    assert "promoted_model" not in {p.parent.name for p in loop.home.glob("artifacts/meeting_notes/*/*/manifest.json")}
    assert champion(connect(), "meeting_notes") is None
    (judged,) = list_comparisons(connect(), "meeting_notes")
    assert not judged.promote and judged.watermark > 0
    alert = newest_alert(loop)
    assert (alert.kind, alert.title) == ("rejection", "meeting_notes: the challenger was evaluated and not promoted")
    assert alert.text.startswith(judged.reason) and Path(alert.link) == judged.report_path


def test_materializing_promoted_model_alone_does_not_bypass_the_gate(loop):
    code, log = loop.run("meeting_notes/promoted_model", **IMPOSSIBLE)
    assert code != 0 and "not promoted: challenger" in log
    assert newest_alert(loop).kind == "rejection"
    code, log = loop.run("meeting_notes/promoted_model")  # with a gate that would accept it
    assert code != 0 and "was not made for what would be promoted now" in log
    assert champion(connect(), "meeting_notes") is None


def test_keep_champion_succeeds_without_a_promotion(loop):
    code, log = loop.run("meeting_notes/eval_report*", **KEEP)
    assert code == 0, log
    assert "the champion stays" in log
    assert newest_alert(loop).kind == "rejection"
    assert champion(connect(), "meeting_notes") is None


def test_a_damaged_challenger_is_not_evaluated(loop):
    [version] = loop.complete("gguf_model")
    [file] = (loop.stage("gguf_model") / version).glob("*Q*.gguf")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, log = loop.run("meeting_notes/eval_report")
        assert code != 0 and f"{file} is damaged or was replaced" in log and "materialize gguf_model again" in log
        alert = newest_alert(loop)
        assert (alert.kind, alert.title) == ("failure", "meeting_notes: the run failed in eval_report")
        assert f"{file} is damaged or was replaced" in alert.text
    finally:
        file.write_bytes(content)


def test_a_gain_is_promoted(loop):
    code, log = loop.run()
    assert code == 0, log
    serving = champion(connect(), "meeting_notes")
    assert serving.version == "v1.0.0" and serving.gguf_path.is_file()
    assert [one.action for one in list_deployments(connect(), "meeting_notes")] == ["promote"]
    alert = newest_alert(loop)
    assert (alert.kind, alert.title) == ("promotion", "meeting_notes@v1.0.0 is the champion now")
    training = find_training(connect(), "meeting_notes", serving.lineage["lora_adapter"])
    assert training.steps > 0 and training.dataset in loop.complete("curated_dataset")
    (version,) = loop.complete("promoted_model")
    card = (loop.stage("promoted_model") / version / "MODEL_CARD.md").read_text()
    assert "# meeting_notes@v1.0.0" in card and training.run_id in card and "correct, champion" in card
    report = json.loads((serving.report_path.parent / "report.json").read_text())
    assert report["champion"]["name"] == "meeting_notes@base"
    assert serving.scores["accuracy"] > report["champion"]["totals"]["correct"] / report["champion"]["totals"]["total"]


KEY_METRICS = {
    "raw_logs": "interactions, feedback events, examples, new interactions, new feedback events, rejected lines",
    "curated_dataset": "training examples, validation examples, replay examples, preference pairs, left out, "
    "redacted values",
    "lora_adapter": "validation loss, validation loss before training, steps, duration (s), throughput (tokens/s), "
    "peak memory (GiB)",
    "gguf_model": "size (MB), quantization, form, mode, file, SHA-256",
    "eval_report": "verdict, gain (points), ROUGE-1 recall, challenger (%), ROUGE-1 recall, champion (%), p-value, "
    "regressed slices",
    "promoted_model": "model, correct, champion, correct, previous champion, correct, possible, gain (points), "
    "model card",
}


@pytest.mark.parametrize("stage", KEY_METRICS)
def test_the_key_metrics_come_first_and_fit_the_page(loop, stage):
    with dg.DagsterInstance.from_config(str(loop.dagster)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(["meeting_notes", stage]))
    metadata = event.asset_materialization.metadata
    keys = list(metadata)[:6]
    assert ", ".join(keys) == KEY_METRICS[stage]
    for key, value in metadata.items():
        if isinstance(value, dg.FloatMetadataValue):
            assert len(f"{value.value!r}") <= 8, f"{key}: {value.value}"  # rounded
        if isinstance(value, dg.TextMetadataValue | dg.PathMetadataValue):
            # About 44 characters fit the value column at 1440 px, and a value wraps only at its spaces.
            assert max(map(len, str(value.value).split()), default=0) <= 48, f"{key}: {value.value}"


def test_the_progress_of_training_is_rounded(loop):
    with dg.DagsterInstance.from_config(str(loop.dagster)) as instance:
        records = instance.fetch_observations(dg.AssetKey(["meeting_notes", "lora_adapter"]), limit=100).records
    shown = [record.asset_observation.metadata for record in records]
    assert shown and {"training loss", "learning rate", "throughput (tokens/s)"} <= set(shown[0])
    floats = [value.value for one in shown for value in one.values() if isinstance(value, dg.FloatMetadataValue)]
    assert floats and [value for value in floats if len(repr(value)) > 8] == []


def test_no_text_of_an_example_is_in_dagsters_metadata(loop):
    (version,) = loop.complete("curated_dataset")
    rows = [
        row for split in ("train", "validation") for row in dataset_rows(loop.stage("curated_dataset") / version, split)
    ]
    texts = {text for row in rows for text in (row["prompt"], row["completion"]) if len(text) > 20}
    with dg.DagsterInstance.from_config(str(loop.dagster)) as instance:
        events = [
            instance.get_latest_materialization_event(dg.AssetKey(["meeting_notes", stage])) for stage in KEY_METRICS
        ]
    shown = str([event.asset_materialization.metadata for event in events])
    assert len(texts) > 20 and not [text for text in texts if text in shown]


@pytest.mark.parametrize("select", ["*meeting_notes/promoted_model", "meeting_notes/eval_report"])
def test_a_run_without_new_data_succeeds_without_a_promotion(loop, select):
    before = list_comparisons(connect(), "meeting_notes")
    code, log = loop.run(select)
    assert code == 0, log
    assert "nothing new to evaluate: the challenger is the champion meeting_notes@v1.0.0" in log
    assert champion(connect(), "meeting_notes").version == "v1.0.0"
    assert list_comparisons(connect(), "meeting_notes") == before and len(loop.complete("promoted_model")) == 1


def test_a_gguf_that_changed_after_its_evaluation_is_refused(loop):
    serving = champion(connect(), "meeting_notes")
    content = serving.gguf_path.read_bytes()
    serving.gguf_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        for asset in ("promoted_model", "eval_report"):
            code, log = loop.run(f"meeting_notes/{asset}")
            assert code != 0 and "is damaged or was replaced" in log
    finally:
        serving.gguf_path.write_bytes(content)


def test_an_adapter_is_never_merged_into_another_base(loop, tmp_path):
    other = tmp_path / "other_base"
    shutil.copytree(PROJECT_ROOT / "data" / "starter_model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    code, log = loop.run("meeting_notes/gguf_model", base_model=str(other))
    assert code != 0 and "was trained on another base model" in log
    code, log = loop.run("meeting_notes/promoted_model", base_model=str(other))
    assert code != 0 and "changed since: base model" in log


def test_two_runs_at_once_deploy_at_most_once(loop):
    loop.write()
    before = len(list_deployments(connect(), "meeting_notes"))
    logs = [process.communicate()[0] for process in [loop.start(), loop.start()]]
    for log in logs:
        assert "nothing new to evaluate" in log or "another process is working on" in log
    assert len(list_deployments(connect(), "meeting_notes")) == before
    assert not list(loop.home.glob("artifacts/meeting_notes/*/.draft-*/manifest.json"))
