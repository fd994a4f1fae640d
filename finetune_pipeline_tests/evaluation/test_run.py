"""Answers are stored and reused, speed is measured each time, and a killed run resumes."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from finetune_pipeline.artifacts import hash_file, model_sha256, stage_folder
from finetune_pipeline.evaluation import run
from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
from finetune_pipeline.evaluation.comparison import Comparison, judge
from finetune_pipeline.evaluation.metric_table import metric_table
from finetune_pipeline.evaluation.performance import WAVES
from finetune_pipeline.evaluation.report import write_report
from finetune_pipeline.evaluation.run import Contender, answer_benchmark, compare_models, measure_speed
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.inference.errors import EngineCrashed, ModelNotLoaded, RequestRefused
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.inference.threads import BackgroundLoad
from finetune_pipeline.schemas import Schema
from finetune_pipeline.settings import EvaluationSettings, GateSettings
from finetune_pipeline_tests.evaluation.fakes import (
    CONSTRAINED,
    SCHEMA,
    WALL,
    FakeEngine,
    FakeEngines,
    completion,
    line,
    write_benchmark,
)

SETTINGS = EvaluationSettings(benchmark="b.jsonl")
PROMPTS = [str(line(f"w{number}")["prompt"]) for number in range(10)]

SATURATED = 1 + WAVES * SETTINGS.parallel  # requests of one model's performance


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    lines = [line(f"w{number}") for number in range(10)]
    return load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), SCHEMA)


def model(folder: Path, name: str, knows: int) -> ModelSpec:
    path = folder / f"{name}.gguf"
    path.write_text(json.dumps({prompt: json.dumps(WALL) for prompt in PROMPTS[:knows]}))
    return ModelSpec(gguf=path)


def test_answers_are_generated_once(tmp_path: Path, benchmark: Benchmark) -> None:
    engines, seen = FakeEngines(), []
    spec = model(tmp_path, "m", 4)
    first = answer_benchmark(spec, benchmark, SETTINGS, "sys", "aec", lambda *p: seen.append(p), engines)
    again = answer_benchmark(spec, benchmark, SETTINGS, "sys", "aec", lambda *p: seen.append(p), engines)
    assert (first.reused, again.reused, len(engines.asked)) == (False, True, 10)
    assert first.answers == again.answers
    assert [answer.id for answer in first.answers] == [question.id for question in benchmark.questions]
    assert seen == [*((done, 10) for done in range(1, 11)), (10, 10)]
    assert sorted(path.name for path in first.path.iterdir()) == ["answers.jsonl", "manifest.json"]


def test_only_settings_that_change_answers_prevent_reuse(tmp_path: Path, benchmark: Benchmark) -> None:
    engines = FakeEngines()
    spec = model(tmp_path, "m", 4)

    def reused(spec: ModelSpec = spec, system: str = "sys", **changes: object) -> bool:
        settings = SETTINGS.model_copy(update=changes)
        return answer_benchmark(spec, benchmark, settings, system, "aec", ignore, engines).reused

    def constrained(schema: Schema | None) -> bool:
        return answer_benchmark(spec, benchmark, SETTINGS, "sys", "aec", ignore, engines, constraint=schema).reused

    assert [reused(), reused(parallel=2), reused(metric="exact")] == [False, True, True]
    assert [reused(max_tokens=9), reused(context=512), reused(system="other")] == [False, False, False]
    assert reused(model(tmp_path, "other", 5)) is False
    other = {**SCHEMA, "required": ["element", "material"]}
    assert [constrained(schema) for schema in (SCHEMA, SCHEMA, other, None)] == [False, True, False, True]
    renamed = model(tmp_path, "renamed", 4)
    assert reused(renamed) is True
    assert reused(spec.model_copy(update={"adapter": renamed.gguf})) is False


def test_base_and_adapter_have_a_combined_hash(tmp_path: Path, benchmark: Benchmark) -> None:
    base, adapter = model(tmp_path, "base", 4).gguf, model(tmp_path, "adapter", 1).gguf
    run = answer_benchmark(ModelSpec(gguf=base, adapter=adapter), benchmark, SETTINGS, "", "aec", ignore, FakeEngines())
    assert run.model_sha256 == model_sha256(hash_file(base), hash_file(adapter))
    assert run.size_bytes == base.stat().st_size + adapter.stat().st_size
    alone = answer_benchmark(ModelSpec(gguf=base), benchmark, SETTINGS, "", "aec", ignore, FakeEngines())
    assert alone.model_sha256 == hash_file(base)


def test_a_run_resumes_after_a_crash(tmp_path: Path, benchmark: Benchmark) -> None:
    spec, crashing = model(tmp_path, "m", 10), FakeEngines(crash_after=6)
    with pytest.raises(EngineCrashed):
        answer_benchmark(spec, benchmark, SETTINGS, "", "aec", ignore, crashing)
    [draft] = [path for path in stage_folder("aec", "benchmark_run").iterdir() if path.is_dir()]
    kept = len((draft / "answers.jsonl").read_text().splitlines())
    with (draft / "answers.jsonl").open("a") as file:
        file.write('{"id": "w9", "te')  # a line truncated by a kill
    engines = FakeEngines()
    run = answer_benchmark(spec, benchmark, SETTINGS, "", "aec", ignore, engines)
    assert len(engines.asked) == 10 - kept
    assert [json.loads(answer.text) for answer in run.answers] == [WALL] * 10


def test_a_missing_model_is_an_error_with_its_path(tmp_path: Path, benchmark: Benchmark) -> None:
    with pytest.raises(ModelNotLoaded, match=r"none\.gguf does not exist"):
        answer_benchmark(ModelSpec(gguf=tmp_path / "none.gguf"), benchmark, SETTINGS, "", "aec", ignore, FakeEngines())


def test_a_rejected_question_is_named(tmp_path: Path, benchmark: Benchmark) -> None:
    longer = benchmark.questions[3].__class__(**{**vars(benchmark.questions[3]), "prompt": "long " * 20})
    asked = Benchmark((*benchmark.questions[:3], longer), "other")
    settings = SETTINGS.model_copy(update={"context": 64})
    with pytest.raises(RequestRefused, match="question 'w3' of the benchmark was rejected: the prompt has 100 tokens"):
        answer_benchmark(model(tmp_path, "m", 4), asked, settings, "", "aec", ignore, FakeEngines())


def test_models_take_turns_while_timed(tmp_path: Path, benchmark: Benchmark) -> None:
    engines = FakeEngines()
    specs = {"a": model(tmp_path, "a", 3), "b": model(tmp_path, "b", 6)}
    speeds = measure_speed(specs, benchmark, SETTINGS, "", prompts=4, open_engine=engines)
    order = [name.removesuffix(".gguf") for name, _ in engines.asked]
    assert order == ["a", "b"] * 2 + ["a", "b", "b", "a"] * 2
    assert {prompt for _, prompt in engines.asked[4:]} == {PROMPTS[0], PROMPTS[2], PROMPTS[5], PROMPTS[7]}
    assert [spec.parallel for spec in engines.opened] == [1, 1]
    assert speeds["a"].prompts == 4
    assert speeds["a"].tokens_per_second == pytest.approx(100)
    assert 0 <= speeds["a"].latency_p50_ms <= speeds["a"].latency_p95_ms


def test_models_that_do_not_fit_into_memory_are_timed_one_by_one(
    tmp_path: Path, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Little:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    engines = FakeEngines()
    specs = {"a": model(tmp_path, "a", 3), "b": model(tmp_path, "b", 6)}
    assert set(measure_speed(specs, benchmark, SETTINGS, "", prompts=3, open_engine=engines)) == {"a", "b"}
    assert [name for name, _ in engines.asked] == ["a.gguf"] * 5 + ["b.gguf"] * 5


def test_two_models_are_compared_end_to_end(tmp_path: Path, benchmark: Benchmark) -> None:
    engines = FakeEngines()
    champion = Contender("base model", model(tmp_path, "a", 4))
    challenger = Contender("challenger", model(tmp_path, "b", 7))
    scorer = Scorer("parameters", SCHEMA)

    def compared() -> Comparison:
        return compare_models(champion, challenger, benchmark, scorer, SETTINGS, "", "aec", open_engine=engines)

    comparison = compared()
    assert (comparison.champion.totals.correct, comparison.challenger.totals.correct) == (16, 28)
    assert len(comparison.won) == 3
    asked = len(engines.asked)
    again = compared()
    assert len(engines.asked) - asked == 2 * (12 + SATURATED)  # answers are reused, speed is measured again
    assert again.questions == comparison.questions


def test_questions_without_an_expected_answer_are_answered_and_never_counted(tmp_path: Path) -> None:
    asked = [line("w0"), line("w1")]
    free = {"id": "o1", "slice": "walls", "prompt": "Which wall do you like?"}
    engines, scorer = FakeEngines(), Scorer("parameters", SCHEMA)
    contenders = [Contender(name, model(tmp_path, name, 1)) for name in ("a", "b")]
    (tmp_path / "b.gguf").write_text(json.dumps({free["prompt"]: "The brick one."}))
    results = {}
    for name, lines in {"closed": asked, "open": [free, *asked]}.items():
        benchmark = load_benchmark(write_benchmark(tmp_path / f"{name}.jsonl", lines), SCHEMA)
        results[name] = compare_models(*contenders, benchmark, scorer, SETTINGS, "", "aec", open_engine=engines)
    compared, closed = results["open"], results["closed"]
    assert compared.questions == closed.questions and compared.constant == closed.constant
    assert (compared.champion.totals, compared.challenger.totals) == (closed.champion.totals, closed.challenger.totals)
    write_report(tmp_path, "aec", compared, judge(compared, GateSettings()), GateSettings(), 0.9)
    stored = json.loads((tmp_path / "report.json").read_text())["open_questions"]
    assert [(one["id"], one["champion"]["text"], one["challenger"]["text"]) for one in stored] == [
        ("o1", "I do not know", "The brick one.")
    ]
    spent = {"seconds": 0.03, "prompt_tokens": 9, "completion_tokens": 2, "refused": None}
    assert stored[0]["challenger"] == {"text": "The brick one.", **spent}


def test_the_base_model_answers_too_unless_it_is_one_of_the_two(tmp_path: Path, benchmark: Benchmark) -> None:
    engines, scorer = FakeEngines(), Scorer("parameters", SCHEMA)
    base, champion, challenger = (Contender(n, model(tmp_path, n, k)) for n, k in (("a", 2), ("b", 4), ("c", 7)))

    def compared(champion: Contender) -> Comparison:
        return compare_models(
            champion, challenger, benchmark, scorer, SETTINGS, "", "aec", open_engine=engines, base=base
        )

    found = compared(champion)
    assert found.base is not None and found.base.speed is not None
    assert [one.totals.correct for one in found.models.values()] == [8, 16, 28]
    asked = len(engines.asked)
    compared(champion)
    assert len(engines.asked) - asked == 3 * (12 + SATURATED)  # its answers are reused, and it is timed again
    named: list[str] = []
    found = compare_models(
        base,
        challenger,
        benchmark,
        scorer,
        SETTINGS,
        "",
        "aec",
        lambda name, *_: named.append(name),
        engines,
        base=base,
    )
    assert found.base is None and named.count("a") == 1  # its progress is logged once
    copy = Contender("copy", ModelSpec(gguf=(tmp_path / "a.gguf").rename(tmp_path / "copy.gguf")))
    (tmp_path / "a.gguf").write_bytes((tmp_path / "copy.gguf").read_bytes())
    assert compared(copy).base is None  # one column: it is the champion, by its hash


class MoodyEngine(FakeEngine):
    """Answers question n wrongly with the seeds from n on."""

    def submit(self, request: GenerateRequest) -> "Future[Completion]":
        future = super().submit(request)
        number = int((request.messages or [])[-1]["content"][-1])
        if request.temperature and (request.seed or 0) > number:
            assert request.temperature == 0.9
            future = Future()
            future.set_result(completion("{}"))
        return future


def test_pass_k_counts_questions_with_every_sampled_answer_correct(tmp_path: Path, benchmark: Benchmark) -> None:
    engines, scorer = FakeEngines(), Scorer("parameters", SCHEMA)
    contenders = [Contender(name, model(tmp_path, name, right)) for name, right in {"old": 5, "new": 12}.items()]
    settings = SETTINGS.model_copy(update={"samples": 3, "sample_temperature": 0.9})

    def compared() -> Comparison:
        return compare_models(
            *contenders, benchmark, scorer, settings, "", "aec", open_engine=lambda spec: MoodyEngine(engines, spec)
        )

    comparison = compared()
    numbers = [int(question.prompt[-1]) for question in benchmark.questions]
    assert comparison.challenger.always_correct == sum(number >= 3 for number in numbers)
    assert comparison.champion.always_correct == sum(number >= 3 for number in numbers[:5])
    row = next(row for row in metric_table(comparison) if row.key == "pass_k")
    assert (row.name, row.challenger) == ("pass^3", comparison.challenger.always_correct / len(numbers))
    asked = len(engines.asked)
    assert compared().challenger.always_correct == comparison.challenger.always_correct
    assert len(engines.asked) - asked == 2 * (
        12 + SATURATED
    )  # sampled answers are reused too; only speed is measured again


def compared_with_a_schema(
    folder: Path, valid: int, constrained: str | None, constraint: Schema | None = SCHEMA
) -> tuple[Comparison, FakeEngines]:
    """Compare a challenger that answers all of 120 questions correctly under the schema, and some of them without it.

    Args:
        valid: number of questions of the sample that it answers with JSON without constrained decoding.
    """
    lines = [line(f"q{number}") for number in range(120)]
    benchmark = load_benchmark(write_benchmark(folder / "long.jsonl", lines), SCHEMA)
    prompts = [question.prompt for question in benchmark.questions]
    alone = {question.prompt: json.dumps(WALL) for question in benchmark.sample.questions[:valid]}
    (folder / "new.gguf").write_text(json.dumps({**alone, CONSTRAINED: dict.fromkeys(prompts, constrained)}))
    (folder / "old.gguf").write_text(json.dumps({CONSTRAINED: dict.fromkeys(prompts, '{"element": "wall"}')}))
    contenders = [Contender(name, ModelSpec(gguf=folder / f"{name}.gguf")) for name in ("old", "new")]
    engines, scorer = FakeEngines(), Scorer("parameters", SCHEMA)
    compared = compare_models(
        *contenders, benchmark, scorer, SETTINGS, "", "aec", open_engine=engines, constraint=constraint
    )
    return compared, engines


@pytest.mark.parametrize(("valid", "promote"), [(0, False), (25, False), (26, True), (50, True)])
def test_the_gate_counts_valid_answers_of_the_unconstrained_sample(tmp_path: Path, valid: int, promote: bool) -> None:
    compared, engines = compared_with_a_schema(tmp_path, valid, json.dumps(WALL))
    verdict = judge(compared, GateSettings(min_score=0))
    assert (compared.challenger.totals.valid, compared.challenger.totals.correct) == (120, 480)
    assert (verdict.promote, verdict.valid, verdict.answers) == (promote, valid, 50)
    assert f"{valid} of 50 unconstrained answers valid, more than half required" in verdict.reason
    rows = {row.key: row.challenger for row in metric_table(compared)}
    assert (rows["valid_rate"], rows["unconstrained_valid_rate"]) == (1.0, valid / 50)
    said = ["none of 50 answers without constrained decoding passes the output schema: none is JSON"]
    assert [problem for problem in compared.problems if "schema" in problem] == ([] if valid else said)
    assert engines.schemas.count(None) == 2 * 50


def test_without_constrained_decoding_the_sample_is_part_of_the_answers(tmp_path: Path) -> None:
    compared, engines = compared_with_a_schema(tmp_path, 26, None, constraint=None)
    assert (compared.challenger.totals.valid, judge(compared, GateSettings()).valid) == (26, 26)
    assert len(engines.schemas) == 2 * (120 + 26 + SATURATED) and {*engines.schemas} == {None}
    assert not compared.constrained


def test_an_answer_that_breaks_off_under_the_schema_is_an_invalid_answer(tmp_path: Path) -> None:
    compared, _ = compared_with_a_schema(tmp_path, 50, None)
    assert (compared.challenger.totals.valid, compared.challenger.speed) == (0, None)
    assert {scores.problem for scores in compared.challenger.scores} == {
        "The model's answer violates uniqueItems of json_schema"
    }
    assert compared.champion.speed is not None


@pytest.mark.parametrize(
    ("constrained", "said"),
    [
        (WALL, []),
        (
            {"element": "wall"},
            ["constrained decoding lowers the score of the sample from 200 to 50 of 200: does the schema have the "
             "properties in the order of the training answers?"],
        ),
    ],
)  # fmt: skip
def test_a_score_that_constrained_decoding_lowers_is_said(
    tmp_path: Path, constrained: dict[str, Any], said: list[str]
) -> None:
    compared, _ = compared_with_a_schema(tmp_path, 50, json.dumps(constrained))
    assert [problem for problem in compared.problems if "lowers" in problem] == said


@pytest.mark.parametrize("used", [0.0, 0.05, 1.9])
def test_speed_of_a_busy_machine_is_flagged(
    tmp_path: Path, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, used: float
) -> None:
    monkeypatch.setattr(run, "available_cores", lambda: [0, 1])
    monkeypatch.setattr(BackgroundLoad, "since_last", lambda self: used)
    specs = {"a": model(tmp_path, "a", 3), "b": model(tmp_path, "b", 6)}
    engines = FakeEngines()
    speeds = measure_speed(specs, benchmark, SETTINGS, "", prompts=3, open_engine=engines)
    said = "other processes used 1.9 of 2 cores" if used > 1 else None
    assert [speed.contention for speed in speeds.values()] == [said, said]
    assert all(spec.fixed_threads for spec in engines.opened)
