"""Answers are stored and reused, speed is measured each time, and a killed run resumes."""

import json
from pathlib import Path

import pytest

from finetune_pipeline.artifacts import hash_file, model_sha256, stage_folder
from finetune_pipeline.evaluation import run
from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
from finetune_pipeline.evaluation.comparison import Comparison
from finetune_pipeline.evaluation.run import Contender, answer_benchmark, compare_models, measure_speed
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.inference.errors import EngineCrashed, ModelNotLoaded, RequestRefused
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.inference.threads import BackgroundLoad
from finetune_pipeline.settings import EvaluationSettings
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, FakeEngines, line, write_benchmark

SETTINGS = EvaluationSettings(benchmark="b.jsonl")
PROMPTS = [str(line(f"w{number}")["prompt"]) for number in range(10)]


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

    assert [reused(), reused(parallel=2), reused(metric="exact")] == [False, True, True]
    assert [reused(max_tokens=9), reused(context=512), reused(system="other")] == [False, False, False]
    assert reused(model(tmp_path, "other", 5)) is False
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
    assert len(engines.asked) - asked == 2 * 12  # answers are reused, speed is measured again
    assert again.questions == comparison.questions


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
