"""The files that a loop's YAML names: benchmark, output schema, rules, replay examples, tokenizer."""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from finetune_pipeline.artifacts import hash_file, hash_of
from finetune_pipeline.curation.acceptance import (
    Policy,
    Quota,
    TokenCounter,
    tokenizer_file,
)
from finetune_pipeline.curation.dataset_files import DatasetExample
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.evaluation.benchmark import Benchmark, BenchmarkError, load_benchmark
from finetune_pipeline.evaluation.metrics import check_metric
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.json_schema import rewrite_schema
from finetune_pipeline.pipeline.source_events import without_own_system_prompt
from finetune_pipeline.records import Example, conversation_text
from finetune_pipeline.schemas import Rule, SchemaError, Validator, answer_validator, load_rules, load_schema
from finetune_pipeline.settings import REPLAY, LoopSettings, RedactionSettings, StyleMetric, project_path
from finetune_pipeline.sources.conversations import ExcludedRowError, to_record
from finetune_pipeline.sources.row_readers import read_rows
from finetune_pipeline.wording import count_reason, counted_reasons

_SHOWN_ROWS = 3  # broken rows of a replay file that its error names

PACKAGES = ("finetune-pipeline", "torch", "transformers", "trl", "peft", "datasets", "llama_cpp_python", "pyarrow")


def output_schema(loop: LoopSettings) -> dict[str, Any] | None:
    """Return the JSON Schema of the loop's answers, or None for free text."""
    return load_schema(project_path(loop.output_schema)) if loop.output_schema else None


def constraint(loop: LoopSettings) -> dict[str, Any] | None:
    """Return the JSON Schema to which the loop's answers are constrained while they are decoded, or None.

    Raises:
        SchemaError: constrained decoding cannot enforce the output schema with any model.
    """
    schema = output_schema(loop) if loop.constrain == "schema" else None
    if schema is not None:
        try:
            rewrite_schema(schema)
        except RequestRefused as refused:
            raise SchemaError(
                f"{loop.output_schema} cannot be enforced while decoding: {str(refused).rstrip('.')}. Change the "
                "schema, or set serving.constrain: none"
            ) from refused
    return schema


def benchmark(loop: LoopSettings) -> Benchmark:
    """Return the loop's benchmark; every line is validated."""
    return load_benchmark(project_path(loop.evaluation.benchmark), output_schema(loop))


def sealed_benchmark(loop: LoopSettings) -> Benchmark | None:
    """Return the loop's sealed benchmark; None without one.

    Raises:
        BenchmarkError: it cannot be used, or shares questions with the open benchmark.
        MetricError: the gate's metric cannot score its questions.
    """
    if loop.evaluation.sealed_benchmark is None:
        return None
    path = project_path(loop.evaluation.sealed_benchmark)
    sealed = load_benchmark(path, output_schema(loop))
    known = {question.asked_hash for question in benchmark(loop).all_questions}
    shared = [question.id for question in sealed.all_questions if question.asked_hash in known]
    if shared:
        raise BenchmarkError(
            f"{path}: {len(shared):,} of {len(sealed.all_questions):,} questions of the sealed benchmark are in the "
            f"benchmark too ({', '.join(shared[:3])}); only other questions tell whether that one is overfitted. "
            "Remove them from the sealed one"
        )
    check_metric(scorer(loop).metric, sealed.questions)
    return sealed


def question_files(loop: LoopSettings) -> dict[str, str]:
    """Return the hashes of the benchmarks, whose questions must not train, by name."""
    paths = {"benchmark": loop.evaluation.benchmark, "sealed_benchmark": loop.evaluation.sealed_benchmark}
    return hashes(**{name: project_path(text) for name, text in paths.items() if text})


def rules(loop: LoopSettings) -> tuple[Rule, ...]:
    """Return the loop's compliance rules."""
    return load_rules(project_path(loop.evaluation.compliance)) if loop.evaluation.compliance else ()


def scorer(loop: LoopSettings) -> Scorer:
    """Return what scores the loop's answers.

    Raises:
        MetricError: metrics cannot be used here; each problem is a line.
    """
    evaluation = loop.evaluation
    questions = benchmark(loop).questions
    return Scorer(evaluation.metric, output_schema(loop), rules(loop), evaluation.metrics, questions)


def judging_files(loop: LoopSettings) -> dict[str, str]:
    """Return the hashes of the files that decide which answers are correct, by name."""
    named = {
        "benchmark": loop.evaluation.benchmark,
        "output_schema": loop.output_schema,
        "compliance": loop.evaluation.compliance,
    }
    paths = {name: project_path(text) for name, text in named.items() if text}
    for metric in loop.evaluation.all_metrics:
        if isinstance(metric, StyleMetric):
            texts = project_path(metric.texts)
            files = sorted(texts.rglob("*")) if texts.is_dir() else [texts]
            paths |= {f"{metric.key} {file.name}": file for file in files if file.suffix in {".txt", ".md"}}
    return hashes(**paths)


def scored_by(loop: LoopSettings) -> str:
    """Return the hash of what decides a score: benchmark, schema, and the gate's metric with its options and texts."""
    metric = loop.evaluation.metric
    files = {
        name: sha256
        for name, sha256 in judging_files(loop).items()
        if name in {"benchmark", "output_schema"} or name.startswith(f"{metric.key} ")
    }
    return hash_of({"metric": metric.model_dump(mode="json"), "files": files})


def policy(loop: LoopSettings) -> Policy:
    """Return the policy that decides which examples may train.

    Reading and indexing a benchmark takes about 40 ms, and the sensor needs the policy every few seconds. So the index
    is cached until mtime or size of the files change.
    """
    schema = project_path(loop.output_schema) if loop.output_schema else None
    names = (loop.evaluation.benchmark, loop.evaluation.sealed_benchmark)
    paths = tuple(project_path(name) for name in names if name)
    stamps = [_stamp(path) for path in (*paths, schema)]
    index, validator = _index_and_validator(paths, schema, loop.curation.redaction, *stamps)
    quotas = {source.name: Quota(source.max_examples, source.max_fraction) for source in loop.sources}
    tokenizer = tokenizer_path(loop)
    tokens = _token_counter(tokenizer.parent, tokenizer, _stamp(tokenizer)) if tokenizer else None
    return Policy(loop.curation, index, validator, quotas, loop.review.required, tokens)


@lru_cache(maxsize=4)
def _token_counter(base: Path, *_stamps: object) -> TokenCounter:
    return TokenCounter(base)


def tokenizer_path(loop: LoopSettings) -> Path | None:
    """Return the base model's tokenizer file if curation limits the number of tokens."""
    limited = loop.curation.max_prompt_tokens or loop.curation.max_answer_tokens
    return tokenizer_file(resolve_base_model(loop.base_model)) if limited else None


def identity(example: Example) -> str:
    """Return the content hash by which the store recognizes an example that was judged before."""
    return content_hash(conversation_text(example.prompt, example.history), example.target)


@lru_cache(maxsize=16)
def _index_and_validator(
    benchmarks: tuple[Path, ...], schema: Path | None, redaction: RedactionSettings, *_stamps: object
) -> tuple[NearIndex, Validator]:
    output_schema = load_schema(schema) if schema else None
    questions = {
        (question.id if number == 0 else f"{question.id}, sealed"): question.prompt
        for number, path in enumerate(benchmarks)
        for question in load_benchmark(path, output_schema).all_questions
    }
    return question_index(questions, redaction), answer_validator(output_schema)


def question_index(questions: Mapping[str, str], redaction: RedactionSettings) -> NearIndex:
    """Return an index of the benchmark's questions, by id, as they are and redacted.

    Examples are redacted before they are compared with the questions.
    """
    redacted = {id: redact(prompt, redaction).text for id, prompt in questions.items()}
    return NearIndex(
        {**questions, **{f"{id}, redacted": redacted[id] for id in redacted if redacted[id] != questions[id]}}
    )


def _stamp(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def replay_path(loop: LoopSettings) -> Path | None:
    """Return the file of replay examples."""
    return project_path(loop.curation.replay) if loop.curation.replay else None


class ReplayFile(NamedTuple):
    """The content of a replay file: its examples, and why its other rows are left out -> number of rows."""

    examples: list[DatasetExample]
    left_out: Counter[str]


def replay(loop: LoopSettings) -> ReplayFile:
    """Return the replay examples, which are added to a dataset against catastrophic forgetting.

    The file may have any format of `finetune ingest` except events. Rows that are marked as not to be trained on are
    left out, and so are rows with tool calls, media or a refusal.

    Raises:
        CurationError: the file cannot be read, has no row to train on, or rows are no conversations; the message
            names the first of them and counts all.
    """
    path = replay_path(loop)
    examples: list[DatasetExample] = []
    left_out: Counter[str] = Counter()
    broken: list[str] = []
    if path is None:
        return ReplayFile(examples, left_out)
    try:
        for number, row, reason, _ in read_rows(path, loop.ingest.max_line_bytes):
            if reason:
                broken.append(f"{path}:{number}: {reason}")
                continue
            try:
                said = without_own_system_prompt(to_record(row, f"{path.name}:{number}"), loop)
            except ExcludedRowError as error:
                count_reason(left_out, f"replay row: {error}")
                continue
            except ValueError as error:
                broken.append(f"{path}:{number}: {error}")
                continue
            examples.append(
                DatasetExample(said.prompt, said.answer, 1.0, REPLAY, said.provenance, history=said.history)
            )
    except FileNotFoundError:
        raise CurationError(
            f"curation.replay: the file {path} does not exist; correct the path in the loop's YAML, or remove it"
        ) from None
    except OSError as error:
        raise CurationError(
            f"curation.replay: {path} cannot be read ({error.strerror}); correct the path in the loop's YAML"
        ) from error
    except ValueError as error:
        raise CurationError(f"curation.replay: {path}: {error}; correct the file") from error
    if broken:
        shown, more = broken[:_SHOWN_ROWS], len(broken) - _SHOWN_ROWS
        rows = "this row" if len(broken) == 1 else f"these {len(broken):,} rows"
        raise CurationError(
            f"curation.replay: {'; '.join(shown)}{f'; and {more:,} more' if more > 0 else ''}; correct or delete {rows}"
        )
    if not examples:
        found = f" (left out, {counted_reasons(left_out)})" if left_out else ""
        raise CurationError(
            f"curation.replay: {path} has no row to train on{found}; add rows, or remove curation.replay from the "
            "loop's YAML"
        )
    return ReplayFile(examples, left_out)


def hashes(**paths: Path | None) -> dict[str, str]:
    """Return the SHA-256 of each file that is not None, by name.

    Raises:
        CurationError: a file cannot be read.
    """
    found = {}
    for name, path in paths.items():
        if path is not None:
            try:
                found[name] = hash_file(path)
            except OSError as error:
                raise CurationError(
                    f"{name}: {path} cannot be read ({error.strerror}); restore it, or correct its path in the loop's "
                    "YAML"
                ) from error
    return found
