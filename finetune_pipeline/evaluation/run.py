"""A GGUF answers the benchmark, exactly as it would in service; and how fast two of them are, side by side.

Answers are kept as an artifact (stage `benchmark_run`) under the hash of model, benchmark, engine build and decoding
settings, and found again by it. Speed is never kept: it depends on what else the machine does at that moment.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import Field, ValidationError

from finetune_pipeline.artifacts import (
    Artifact,
    draft,
    find_unaltered,
    hash_file,
    model_sha256,
    package_versions,
    publish,
    version_of,
    write_text,
)
from finetune_pipeline.evaluation.answers import Answer, Speed
from finetune_pipeline.evaluation.benchmark import Benchmark, Question
from finetune_pipeline.evaluation.comparison import Comparison, Side, compare, score_side
from finetune_pipeline.evaluation.metrics import Scorer
from finetune_pipeline.inference.build import engine_build
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import ModelNotLoaded, RequestRefused
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.inference.threads import BackgroundLoad, available_cores
from finetune_pipeline.manifests import Manifest
from finetune_pipeline.records import chat_messages
from finetune_pipeline.settings import EvaluationSettings

ANSWERS = "answers.jsonl"
SPEED_PROMPTS = 24
WARM_UPS = 2
QUIET = 0.1
"""Fraction of all cores that other processes may use while models are timed; above it the speed is flagged."""

Progress = Callable[[int, int], None]
"""Called with the answers that are done, and all that there will be."""


class Answers(Protocol):
    """What is needed of an engine."""

    def submit(self, request: GenerateRequest) -> "Future[Completion]":
        """Start to answer."""
        ...


OpenEngine = Callable[[ModelSpec], AbstractContextManager[Answers]]


class BenchmarkRunManifest(Manifest):
    """One model's answers to one benchmark."""

    stage: ClassVar[str] = "benchmark_run"
    model_sha256: str = Field(description="Of the GGUF, or the identity of the pair.")
    benchmark_sha256: str
    questions: int
    completion_tokens: int


@dataclass(frozen=True)
class BenchmarkRun:
    """One model's answers, in the order of the questions.

    Attributes:
        model_sha256: hash of the file that answered, or the identity of base and adapter.
        size_bytes: size of that file (and its adapter).
        path: the artifact's folder.
        reused: the answers were found, not generated now.
    """

    answers: tuple[Answer, ...]
    model_sha256: str
    size_bytes: int
    path: Path
    reused: bool


@dataclass(frozen=True)
class Contender:
    """A model that is to be compared: what people call it, and what runs."""

    name: str
    spec: ModelSpec


def compare_models(
    champion: Contender,
    challenger: Contender,
    benchmark: Benchmark,
    scorer: Scorer,
    settings: EvaluationSettings,
    system_prompt: str,
    loop: str,
    on_progress: Callable[[str, int, int], None] | None = None,
    open_engine: OpenEngine = Engine,
) -> Comparison:
    """Let both models answer the benchmark, time both together, and compare them.

    Args:
        on_progress: called with the contender's name, the answers done and all that there will be.
        open_engine: what runs a model; tests put their own here.

    Raises:
        EngineError: a model cannot be loaded, crashed, or refused a question.
    """
    contenders = (champion, challenger)
    runs = [
        answer_benchmark(one.spec, benchmark, settings, system_prompt, loop, _named(on_progress, one), open_engine)
        for one in contenders
    ]
    specs = {str(number): one.spec for number, one in enumerate(contenders)}
    speeds = measure_speed(specs, benchmark, settings, system_prompt, open_engine=open_engine)
    sides: list[Side] = [
        score_side(one.name, run.model_sha256, run.size_bytes, run.answers, benchmark, scorer, speeds[str(number)])
        for number, (one, run) in enumerate(zip(contenders, runs, strict=True))
    ]
    return compare(benchmark, scorer, *sides)


def answer_benchmark(
    spec: ModelSpec,
    benchmark: Benchmark,
    settings: EvaluationSettings,
    system_prompt: str,
    loop: str,
    on_progress: Progress | None = None,
    open_engine: OpenEngine = Engine,
) -> BenchmarkRun:
    """The answers of one model to all questions: found again, or generated at temperature 0.

    A run that was killed goes on where it was: each answer is written as it comes.

    Raises:
        EngineError: the model is not there, cannot be loaded, crashed, or refused a question (the message names it).
        Busy: another run generates the same answers now.
    """
    files = [path for path in (spec.gguf, spec.adapter) if path is not None]
    for path in files:
        if not path.is_file():
            raise ModelNotLoaded(f"{path} is not there; materialize the stage that makes it again")
    inputs = _inputs(spec, benchmark)
    decoding = {"max_tokens": settings.max_tokens, "context": settings.context, "system_prompt": system_prompt}
    # How many are decoded together does not change an answer, so `parallel` is no part of the version.
    packages = package_versions("llama-cpp-python")
    version = version_of(inputs, {**decoding, "engine": engine_build()})
    artifact = find_unaltered(BenchmarkRunManifest, loop, version)
    reused = artifact is not None
    if artifact is None:
        spec = spec.model_copy(update={"context": settings.context, "parallel": settings.parallel})
        work = _Work(spec, benchmark, settings.max_tokens, system_prompt, on_progress or _silent, open_engine)
        fields = {"loop": loop, "version": version, "inputs": inputs, "settings": decoding, "packages": packages}
        artifact = _generate(work, fields, model_sha256(inputs["gguf"], inputs.get("adapter")))
    elif on_progress:
        on_progress(len(benchmark.questions), len(benchmark.questions))
    answers = _read_answers(artifact.path / ANSWERS)
    ordered = tuple(answers[question.id] for question in benchmark.questions)
    size = sum(path.stat().st_size for path in files)
    return BenchmarkRun(ordered, artifact.manifest.model_sha256, size, artifact.path, reused)


def measure_speed(
    specs: Mapping[str, ModelSpec],
    benchmark: Benchmark,
    settings: EvaluationSettings,
    system_prompt: str,
    *,
    prompts: int = SPEED_PROMPTS,
    open_engine: OpenEngine = Engine,
) -> dict[str, Speed]:
    """Time models on the same prompts, one prompt at a time, after two warm-ups that do not count.

    The models take turns, and the first one alternates, so that noise affects all of them equally; the number of
    threads is fixed. Models that do not fit into memory together are timed one after the other. If other processes
    use the cores meanwhile, the speed says so (`disturbed`).

    Args:
        specs: the models by name.
        prompts: how many questions to ask each, spread over the benchmark.

    Returns:
        The speed of each model, by its name in `specs`.
    """
    questions = _spread(benchmark.questions, prompts)
    requests = [_request(question, system_prompt, settings.max_tokens) for question in questions]
    conditions = {"context": settings.context, "parallel": 1, "fixed_threads": True}
    alone = {name: spec.model_copy(update=conditions) for name, spec in specs.items()}
    groups = [alone] if _fit_together(list(alone.values())) else [{name: spec} for name, spec in alone.items()]
    speeds: dict[str, Speed] = {}
    for group in groups:
        with ExitStack() as stack:
            engines = {name: stack.enter_context(open_engine(spec)) for name, spec in group.items()}
            speeds |= _time_in_turns(engines, requests)
    return speeds


@dataclass(frozen=True)
class _Work:
    spec: ModelSpec
    benchmark: Benchmark
    max_tokens: int
    system_prompt: str
    on_progress: Progress
    open_engine: OpenEngine


def _generate(work: _Work, fields: Mapping[str, Any], identity: str) -> Artifact[BenchmarkRunManifest]:
    loop, version = fields["loop"], fields["version"]
    with draft(loop, BenchmarkRunManifest.stage, version, keep=True) as folder:
        # Another process may have finished while this one waited for the lock.
        done = find_unaltered(BenchmarkRunManifest, loop, version)
        if done is not None:
            return done
        answers = _answer_rest(work, folder / ANSWERS)
        measured = {
            "model_sha256": identity,
            "benchmark_sha256": work.benchmark.sha256,
            "questions": len(answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers.values()),
        }
        return publish(folder, BenchmarkRunManifest, {**fields, **measured})


def _answer_rest(work: _Work, path: Path) -> dict[str, Answer]:
    """Answer what an earlier, killed run left open, and write each answer as it comes."""
    answers = _read_answers(path) if path.exists() else {}
    write_text(path, "".join(answer.model_dump_json() + "\n" for answer in answers.values()))
    rest = [question for question in work.benchmark.questions if question.id not in answers]
    if not rest:
        return answers
    with work.open_engine(work.spec) as engine, path.open("a", encoding="utf-8") as file:
        futures = {engine.submit(_request(q, work.system_prompt, work.max_tokens)): q for q in rest}
        try:
            for future in as_completed(futures):
                answer = _answer(futures[future], future)
                answers[answer.id] = answer
                file.write(answer.model_dump_json() + "\n")
                file.flush()
                work.on_progress(len(answers), len(work.benchmark.questions))
        finally:
            for future in futures:
                future.cancel()
    return answers


def _answer(question: Question, future: "Future[Completion]") -> Answer:
    try:
        completion = future.result()
    except RequestRefused as error:
        raise RequestRefused(f"question {question.id!r} of the benchmark was refused: {error}") from error
    return Answer(
        id=question.id,
        text=completion.text,
        confidence=completion.confidence,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
    )


def _read_answers(path: Path) -> dict[str, Answer]:
    """The answers in a file; a line that a kill cut off is passed over."""
    answers = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError:
            continue
        answers[answer.id] = answer
    return answers


def _request(question: Question, system_prompt: str, max_tokens: int) -> GenerateRequest:
    # Never with the output schema: constrained decoding would hide that a model has not learned to write valid JSON.
    return GenerateRequest(
        messages=chat_messages(system_prompt, question.prompt), max_tokens=max_tokens, temperature=0.0
    )


def _inputs(spec: ModelSpec, benchmark: Benchmark) -> dict[str, str]:
    adapter = {"adapter": hash_file(spec.adapter)} if spec.adapter else {}
    return {"gguf": hash_file(spec.gguf), **adapter, "benchmark": benchmark.sha256}


def _time_in_turns(engines: Mapping[str, Answers], requests: Sequence[GenerateRequest]) -> dict[str, Speed]:
    for request in requests[:WARM_UPS]:
        for engine in engines.values():
            engine.submit(request).result()
    timed: dict[str, list[tuple[float, Completion]]] = {name: [] for name in engines}
    others, cores = BackgroundLoad(children=True), len(available_cores())
    for turn, request in enumerate(requests):
        for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            completion = engines[name].submit(request).result()
            timed[name].append((time.perf_counter() - start, completion))
    used = others.since_last()
    disturbed = f"other processes used {used:.1f} of {cores} cores" if used > QUIET * cores else None
    threads = {name: engine.info.threads if isinstance(engine, Engine) else None for name, engine in engines.items()}
    return {name: _speed(measured, threads[name], disturbed) for name, measured in timed.items()}


def _speed(timed: Sequence[tuple[float, Completion]], threads: int | None, disturbed: str | None) -> Speed:
    latencies = sorted(seconds * 1000 for seconds, _ in timed)
    tokens = sum(completion.completion_tokens for _, completion in timed)
    generating = sum(completion.generation_seconds for _, completion in timed)
    return Speed(
        latency_p50_ms=_percentile(latencies, 0.5),
        latency_p95_ms=_percentile(latencies, 0.95),
        tokens_per_second=tokens / generating if generating else 0.0,
        prompts=len(latencies),
        threads=threads,
        disturbed=disturbed,
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank: the smallest value that at least `share` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at equal distances, so that every slice has its say."""
    count = min(count, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _fit_together(specs: Sequence[ModelSpec]) -> bool:
    import psutil

    needed = sum(path.stat().st_size for spec in specs for path in (spec.gguf, spec.adapter) if path)
    # A fifth more than the weights, for the caches and buffers of short prompts.
    return 1.2 * needed < psutil.virtual_memory().available


def _named(on_progress: Callable[[str, int, int], None] | None, contender: Contender) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(contender.name, done, total)


def _silent(_done: int, _total: int) -> None:
    return
