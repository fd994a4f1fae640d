"""The sealed benchmark over three promotions, with the real engine: baseline, not asked, asked."""

import json

import pytest

from finetune_pipeline.artifacts import get_latest, stage_folder
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.report import HTML
from finetune_pipeline.manifests import GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline.ask import generate_answers
from finetune_pipeline.pipeline.challengers import list_challengers
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.promote import force_challenger
from finetune_pipeline.pipeline.summary import run_summary
from finetune_pipeline.registry.regression_questions import standing_questions
from finetune_pipeline.registry.sealed_looks import list_looks
from finetune_pipeline_tests.orchestration.conftest import BENCHMARK, corrected, write_events
from finetune_pipeline_tests.orchestration.test_adapter_form import make_adapter, run
from finetune_pipeline_tests.orchestration.test_gate_bypass import run_softly
from finetune_pipeline_tests.orchestration.test_regression_suite import ACCEPTED, EVALUATION

pytestmark = pytest.mark.slow

FIRST = "first look, so there is nothing to compare with yet"
OPEN = [row["prompt"] for row in BENCHMARK]
SEALED = ["sealed question elder", "sealed question fjord"]


@pytest.fixture
def loop(make_loop, tmp_path):
    ACCEPTED.clear()
    rows = [{"id": f"s{n}", "slice": "a", "prompt": text, "expected": "sealed answer"} for n, text in enumerate(SEALED)]
    path = tmp_path / "sealed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {**EVALUATION, "sealed_benchmark": str(path), "sealed_every": 2}
    made = make_loop(export={"quantization": "F16"}, evaluation=evaluation, gate={"min_score": 0})
    write_events(made.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(10)))
    return made


def test_the_first_promotion_is_the_baseline_and_the_second_after_it_asks(loop, instance):
    run(loop, instance, "raw_logs", "curated_dataset")

    def promoted(seed, accepted):
        """Promote a challenger whose answers to these prompts are correct, and no other's; return the run."""
        make_adapter(loop, seed)
        run(loop, instance, "gguf_model")
        ACCEPTED.clear()
        answers = generate_answers(loop, model_spec(get_latest(GgufManifest, "notes")), *accepted)
        ACCEPTED.update(zip(accepted, answers, strict=True))
        return run(loop, instance, "eval_report", "promoted_model")

    def shown(done):
        [event] = [one for one in done.get_asset_materialization_events() if one.asset_key.path[-1] == "promoted_model"]
        metadata = {name: value.value for name, value in event.materialization.metadata.items()}
        line = [one for one in run_summary(loop, done.run_id, succeeded=True) if one.startswith("sealed")]
        found = get_latest(PromotionManifest, "notes").manifest.sealed
        assert metadata.get("sealed benchmark", "") == found
        assert line == ([f"sealed    {found}"] if found else [])
        return found

    assert shown(promoted(0, OPEN[:1])) == FIRST
    assert shown(promoted(1, OPEN[:2])) == "" and len(list_looks(connect(), "notes")) == 1
    found = shown(promoted(2, OPEN + SEALED[:1]))
    assert found.startswith("since v1.0.0: +75.0 points on the benchmark, +50.0 on the sealed one: difference +25.0, ")
    assert "; no sign that the benchmark is overfitted (a difference above " in found
    first, second = list_looks(connect(), "notes")
    assert [sum(score for score, _, _ in one.open_scores.values()) for one in (first, second)] == [1000, 4000]
    assert second.sealed_scores == {"s0": (1000, 1000, None), "s1": (0, 1000, None)}

    page = (get_latest(ReportManifest, "notes").path / HTML).read_text()
    # A report is written before its promotion.
    assert f"Sealed benchmark: {FIRST}; promotions until it is asked again: 1." in page
    pages = [path for stage in ("eval_report", "promoted_model") for path in stage_folder("notes", stage).rglob("*")]
    texts = [path.read_text() for path in pages if path.suffix in {".html", ".json", ".md"}]
    assert len(texts) >= 9 and any(OPEN[0] in text for text in texts)
    assert not any(text in page for page in texts for text in [*SEALED, "sealed answer"])

    # A person forces a challenger that the gate rejected: what it fixes and its scores are recorded all the same.
    make_adapter(loop, 3)
    run(loop, instance, "gguf_model")
    ACCEPTED.clear()
    assert not run_softly(loop, instance, "eval_report").success
    [challenger] = list_challengers(connect(), "notes")
    correction = "please note what person0 said about the person0 matter"
    [answer] = generate_answers(loop, model_spec(challenger.gguf), correction)
    ACCEPTED[correction] = answer
    every = loop.model_copy(update={"evaluation": loop.evaluation.model_copy(update={"sealed_every": 1})})
    model = force_challenger(every, challenger, "ann", "the customer waits")
    forced = list_looks(connect(), "notes")[2]
    assert forced.model_id == model.id and sum(score for score, _, _ in forced.sealed_scores.values()) == 0
    [fixed] = standing_questions(connect(), "notes")
    assert fixed.prompt == correction
