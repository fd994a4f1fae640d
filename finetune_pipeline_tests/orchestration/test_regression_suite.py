"""The regression suite over two challengers, with the real engine: fixed, broken, required, erased."""

import json
from pathlib import Path

import pytest

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.report import HTML, JSON
from finetune_pipeline.manifests import GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline.ask import generate_answers
from finetune_pipeline.pipeline.erasure import erase_person, find_person
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.summary import run_summary
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.regression_questions import standing_questions
from finetune_pipeline_tests.conftest import feedback, interaction, uid
from finetune_pipeline_tests.orchestration.conftest import write_events
from finetune_pipeline_tests.orchestration.test_adapter_form import ask_for_what_it_answers, make_adapter, run
from finetune_pipeline_tests.orchestration.test_gate_bypass import run_softly

pytestmark = pytest.mark.slow

FIXED = 4
EVALUATION = {
    "max_tokens": 24, "context": 192,
    "metric": {"kind": "function", "name": "accepted", "function": f"{__name__}.accepts"},
}  # fmt: skip
ACCEPTED: dict[str, str] = {}
"""Prompt -> the answer that counts as correct beside the expected one."""


def accepts(question: BenchmarkQuestion, answer: str) -> float:
    """Score an answer as the loop's metric: training a model until it answers corrections would take minutes."""
    return float(answer in (question.expected, ACCEPTED.get(question.prompt)))


def prompt_of(n: int) -> str:
    return f"please note what person{n} said about the person{n} matter"


@pytest.fixture
def loop(make_loop, monkeypatch, tmp_path):
    ACCEPTED.clear()
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
    return make_loop(export={"quantization": "F16"}, evaluation=EVALUATION)


def suite_of(report) -> dict:
    return json.loads((report.path / JSON).read_text())["regression"]


def challenge(loop, instance, folder: Path, seed: int) -> None:
    """Make a challenger that wins the benchmark."""
    make_adapter(loop, seed)
    run(loop, instance, "gguf_model")
    ask_for_what_it_answers(loop, folder)


def test_what_a_promotion_fixed_is_asked_of_the_next_challenger(loop, instance, tmp_path):
    events = []
    for n in range(10):
        events.append(interaction(f"person{n}", prompt=prompt_of(n), user=f"user{n}"))
        events.append(feedback(f"on person{n}", f"person{n}", "correction", correction=f"person{n} spoke"))
    too_long = interaction("long", prompt="note " * 300)  # more tokens than evaluation.context
    events += [too_long, feedback("on long", "long", "correction", correction="too long")]
    write_events(loop.drop_folder / "log.jsonl", *events)
    run(loop, instance, "raw_logs", "curated_dataset")

    challenge(loop, instance, tmp_path, 0)
    prompts = [prompt_of(n) for n in range(FIXED)]
    answers = generate_answers(loop, model_spec(get_latest(GgufManifest, "notes")), *prompts)
    ACCEPTED.update(zip(prompts, answers, strict=True))
    done = run(loop, instance, "eval_report", "promoted_model")
    assert suite_of(get_latest(ReportManifest, "notes")) is None
    assert get_latest(PromotionManifest, "notes").manifest.fixed == FIXED
    assert "fixed     4 corrections, now in the regression suite" in run_summary(loop, done.run_id, succeeded=True)
    fixed = standing_questions(connect(), "notes")
    assert {one.interaction_id for one in fixed} == {str(uid(f"person{n}")) for n in range(FIXED)}
    assert {one.expected for one in fixed} == {f"person{n} spoke" for n in range(FIXED)}

    challenge(loop, instance, tmp_path, 1)  # another model, whose answers to the corrections are not accepted
    required = loop.model_copy(update={"gate": loop.gate.model_copy(update={"regression": "required"})})
    assert not run_softly(required, instance, "eval_report", "promoted_model").success
    report = get_latest(ReportManifest, "notes")
    assert suite_of(report)["counts"] == {"standing": 4, "asked": 4, "held": 4, "broken": 4, "regained": 0}
    assert report.manifest.decision == "reject"
    assert any(
        line.startswith("it breaks too many fixed corrections: 4 of 4") for line in report.manifest.reason.split("\n")
    )
    assert champion(connect(), "notes").version == "v1.0.0"
    page = (report.path / HTML).read_text()
    assert "Regression suite (4 broken of 4)" in page and prompt_of(0) in page

    person = find_person(connect(), "user0", "notes")
    result = erase_person(connect(), "user0", person)
    assert {report.path / HTML, report.path / JSON} <= set(result.loops[0].texts)  # to be deleted by hand
    assert len(standing_questions(connect(), "notes")) == FIXED - 1

    run(loop, instance, "eval_report", "promoted_model")  # shown: the same challenger is promoted
    later = get_latest(ReportManifest, "notes")
    assert suite_of(later)["counts"]["broken"] == FIXED - 1
    assert "regression suite: 3 of 3 fixed corrections broken" in later.manifest.reason
    assert prompt_of(0) not in (later.path / HTML).read_text() + (later.path / JSON).read_text()
    assert champion(connect(), "notes").version == "v1.1.0"
    assert get_latest(PromotionManifest, "notes").manifest.fixed == 0
