"""The summary at the end of `finetune run` and `finetune demo`."""

import json

import pytest

from finetune_pipeline.artifacts import draft, publish, set_latest, write_text
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline.summary import run_summary

METRIC = {"name": "ROUGE-1 recall", "key": "accuracy", "champion": 0.5, "challenger": 0.75}
METRICS = {
    "champion": {"name": "notes@base"},
    "challenger": {"name": "challenger"},
    "problems": ["none is JSON"],
    "metrics": [{**METRIC, "unit": "%", "higher_is_better": True}],
}
FIELDS = {
    DatasetManifest: {
        "train": 1500, "validation": 33, "replayed": 232, "left_out": {"reward below 0.3": 7, "too long": 2},
        "redacted": {}, "near_benchmark": [], "preference_pairs": 0, "desirable": 1, "undesirable": 0, "watermark": 9,
    },
    AdapterManifest: {
        "base_model": "base", "base_hash": "b", "mode": "full", "method": "sft", "device": "cpu", "steps": 80,
        "examples": 232, "too_long": 0, "loss_before": 0.257, "loss_after": 0.092, "train_loss": 0.03,
        "tokens_per_second": 3510.2, "wall_seconds": 64, "peak_memory_bytes": 2**30, "watermark": 9,
    },
    ReportManifest: {
        "comparison_id": "c", "challenger_sha256": "a", "champion_id": None, "champion_sha256": "d",
        "benchmark_sha256": "e", "reason": "gain 50.0%, 5% needed", "watermark": 9,
    },
    PromotionManifest: {"model_id": "m", "model": "notes@v1.0.0", "gguf_path": "/m.gguf", "previous_id": None},
}  # fmt: skip


def made(run, kind, **changes):
    """Write an artifact of a stage, as the asset of this run does; return its folder."""
    fields = {"loop": "notes", "version": run, "inputs": {}, "settings": {}, "packages": {}, **FIELDS[kind], **changes}
    with draft(fields["loop"], kind.stage, run) as folder:
        if kind is ReportManifest:
            write_text(folder / "report.json", json.dumps(METRICS))
        artifact = publish(folder, kind, fields)
    set_latest(artifact.manifest, run)
    return artifact.path


def summary(loop, run="r1", succeeded=True):
    return list(run_summary(loop, run, succeeded=succeeded))


def test_a_promotion_shows_the_numbers_and_what_to_do_next(own_home, loop):
    for kind in (DatasetManifest, AdapterManifest, PromotionManifest):
        made("r1", kind)
    report = made("r1", ReportManifest, decision="promote")
    assert summary(loop) == [
        f"home      {own_home}",
        "examples  1,268 training + 232 replay, 33 validation, 9 left out",
        "training  validation loss 0.257 -> 0.092 in 80 steps, 64 s, 3,510 tokens/s, peak 1.00 GiB on cpu",
        "metric          notes@base  challenger        change",
        "ROUGE-1 recall       50.0%       75.0%  +25.0 points",
        "verdict   promote: gain 50.0%, 5% needed",
        f"report    {report / 'report.html'}",
        "promoted  notes@v1.0.0",
        "GGUF      /m.gguf",
        'next      try it:   finetune ask --loop notes "..."',
        "          serve it: finetune serve",
        "          undo it:  finetune model rollback --loop notes",
    ]


@pytest.mark.parametrize("succeeded", [True, False])  # gate.on_reject
def test_a_rejected_challenger_leaves_the_champion(own_home, loop, succeeded):
    made("r1", ReportManifest, decision="reject", reason="gain 1.0%, 5% needed\nit does not gain enough\nit is worse")
    lines = summary(loop, succeeded=succeeded)
    start = lines.index("verdict   reject: gain 1.0%, 5% needed")
    reasons = ["it does not gain enough", "it is worse", "none is JSON"]
    assert lines[start + 1 : start + 4] == [f"          {reason}" for reason in reasons]
    assert lines[-1].startswith("next      the champion stays; see the answers in the report")


def test_a_failed_run_does_not_show_the_artifacts_of_an_earlier_run(own_home, loop):
    for kind in (DatasetManifest, AdapterManifest, PromotionManifest):
        made("r1", kind)
    made("r2", DatasetManifest, validation=0)
    _, shown, next_step = summary(loop, "r2", succeeded=False)
    assert shown.startswith("examples  1,268 training + 232 replay, 0 validation")
    assert next_step.startswith("next      fix the cause, then `finetune run --loop notes`")


def test_without_a_validation_set_the_loss_is_that_of_training(own_home, loop):
    made("r1", DatasetManifest, validation=0)
    made("r1", AdapterManifest)
    lines = summary(loop)
    assert lines[2].startswith("training  training loss 0.257 -> 0.092")
    assert lines[3] == "next      nothing new to promote; log more feedback, then run again"
