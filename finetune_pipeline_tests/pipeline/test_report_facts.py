"""What a report says beside the answers: the trend over versions, training, and what was deleted since."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_pipeline.artifacts import hash_file, stage_folder, write_text
from finetune_pipeline.database import Database, connect
from finetune_pipeline.evaluation.report_facts import Trend
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.report_facts import Subject, collect_facts, trend
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, load_loop
from finetune_pipeline_tests.registry.conftest import promote_over

LOOP = "notes"


def compared(judge: str = "", **scores: int | None) -> Any:
    """Return what the facts need of a comparison: models by role, with a score of 10 or, if not judged, of 0."""
    models = {
        role: SimpleNamespace(name=role, totals=SimpleNamespace(correct=score or 0, total=0 if score is None else 10))
        for role, score in scores.items()
    }
    metric = SimpleNamespace(key="exact", name="exact match")
    judgements = [SimpleNamespace(key=judge)] if judge else []
    return SimpleNamespace(
        models=models, benchmark_sha256="b" * 64, metric=metric, base=models.get("base"), judgements=judgements
    )


def promoted(db: Database, home: Path, number: int, report: dict[str, Any] | None) -> None:
    folder = home / f"r{number}"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_text(str(number))
    if report is not None:
        write_text(folder / "report.json", json.dumps(report))
    candidate = CandidateModel(
        loop=LOOP, gguf_path=folder / "model.gguf", gguf_sha256=hash_file(folder / "model.gguf"), base_hash="b",
        mode="full", lineage={}, scores={}, report_path=folder / "report.html",
    )  # fmt: skip
    promote_over(db, candidate)


def test_scores_on_an_edited_benchmark_are_never_in_the_trend(own_home: Path) -> None:
    db = connect()
    score = {"challenger": {"totals": {"correct": 6, "total": 10}}}
    same = {"scored_by": "s1", **score}
    for number, report in enumerate((score, same, {**same, "scored_by": "s2"}, None, {"old": "form"}, same, same)):
        promoted(db, own_home, number, report)
    found = trend(LOOP, db, compared(champion=6, challenger=7), "s1")
    assert [(point.version, point.score, point.after_gap) for point in found.points] == [
        ("v1.1.0", 0.6, False),
        ("v1.5.0", 0.6, True),
        ("v1.6.0", 0.6, False),
    ]
    assert found.left_out == ("v1.0.0", "v1.2.0", "v1.3.0", "v1.4.0")
    # A judge scores a version against the champion of its time.
    assert trend(LOOP, db, compared("exact", champion=6, challenger=7), "s1") == Trend()
    assert trend(LOOP, db, compared("other", champion=6, challenger=7), "s1") == found


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"metric": "exact"}, False),
        ({"metric": {"kind": "parameters", "relative_tolerance": 0.1}}, False),  # the same name, other scores
        ({"benchmark": "edited"}, False),
        ({"metrics": ["exact"], "samples": 3, "parallel": 2}, True),
    ],
)
def test_a_score_depends_on_the_metric_s_options_and_the_benchmark(
    own_home: Path, change: dict[str, Any], same: bool
) -> None:
    loop = load_loop("aec_parser")
    if "benchmark" in change:
        path = own_home.parent / "edited.jsonl"
        path.write_text((PROJECT_ROOT / loop.evaluation.benchmark).read_text() + "\n")
        change = {"benchmark": str(path)}
    given = loop.model_dump(exclude_unset=True)
    other = LoopSettings.model_validate({**given, "evaluation": {**given["evaluation"], **change}})
    assert (loop_files.scored_by(other) == loop_files.scored_by(loop)) == same


@pytest.mark.parametrize(
    ("initial", "base", "served", "expected"),
    [
        (None, 3, {"base": f"{LOOP}@base"}, (8 - 3) / 10 / 50 * 100),  # full training starts from the base model
        (None, None, {"base": f"{LOOP}@base"}, None),  # which a judge does not compare
        (
            "a1",
            3,
            {"champion": f"{LOOP}@v1.0.0"},
            (8 - 6) / 10 / 20 * 100,
        ),  # incremental: from that adapter, by new examples
        ("other", 3, {"champion": f"{LOOP}@v1.0.0"}, None),  # it started from a model that was not compared
    ],
)
def test_sample_efficiency_is_the_gain_over_where_training_started(
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    initial: str | None,
    base: int | None,
    served: dict[str, str],
    expected: float | None,
) -> None:
    inputs = {} if initial is None else {"initial_adapter": initial}
    manifest = SimpleNamespace(examples=50, new_examples=20, steps=9, inputs=inputs)
    monkeypatch.setattr(
        "finetune_pipeline.pipeline.report_facts._manifest", lambda loop, adapter: manifest if adapter == "a2" else None
    )
    result = {
        "job": "j", "device": "cpu", "method": "sft", "adapter": "lora", "bf16": False, "steps": 9, "resumed_from": 0,
        "examples": 50, "too_long": 0, "loss_before": 2.0, "loss_after": 1.0, "train_loss": 1.0,
        "tokens_per_second": 1.0, "wall_seconds": 1.0, "peak_memory_bytes": 1, "curve": [], "best_step": 9,
        "validation": [{"step": 3, "loss": 1.2}, {"step": 6, "loss": 1.04}], "stopped_early": False,
    }  # fmt: skip
    folder = stage_folder(LOOP, AdapterManifest.stage) / "a2"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    subjects = {
        "base": Subject(served.get("base")),
        "champion": Subject(served.get("champion"), "a1"),
        "challenger": Subject(adapter="a2"),
    }
    facts = collect_facts(LOOP, connect(), compared(base=base, champion=6, challenger=8), subjects, {}, "s1")
    rows = {row.key: row.challenger for row in facts.training}
    assert rows["efficiency"] == (expected if expected is None else pytest.approx(expected))
    assert (rows["convergence"], rows["steps"]) == (6, 9)
    assert [curve.kept_step for curve in facts.curves] == [9]  # the champion's files were deleted
    assert (facts.use, facts.data) == ((), [])
