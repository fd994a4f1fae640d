"""What the assets of one loop read beside their inputs: the files that its YAML names."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation.acceptance import Policy, Validator, answer_validator
from finetune_pipeline.curation.dataset import read_replay
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.quotas import Quota
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.curation.token_count import TokenCounter, tokenizer_file
from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.records import Example, conversation_text
from finetune_pipeline.schemas import Rule, load_rules, load_schema
from finetune_pipeline.settings import LoopSettings, project_path

PACKAGES = ("finetune-pipeline", "torch", "transformers", "trl", "peft", "datasets", "llama_cpp_python", "pyarrow")


def output_schema(loop: LoopSettings) -> dict[str, Any] | None:
    """The JSON Schema of the loop's answers, or None for free text."""
    return load_schema(project_path(loop.output_schema)) if loop.output_schema else None


def benchmark(loop: LoopSettings) -> Benchmark:
    """The loop's benchmark, every line of it checked."""
    return load_benchmark(project_path(loop.evaluation.benchmark), output_schema(loop))


def rules(loop: LoopSettings) -> tuple[Rule, ...]:
    """The loop's compliance rules."""
    return load_rules(project_path(loop.evaluation.compliance)) if loop.evaluation.compliance else ()


def judging_files(loop: LoopSettings) -> dict[str, str]:
    """Hashes of the files that decide what a right answer is, by name."""
    named = {
        "benchmark": loop.evaluation.benchmark,
        "output_schema": loop.output_schema,
        "compliance": loop.evaluation.compliance,
    }
    return hashes(**{name: project_path(text) for name, text in named.items() if text})


def policy(loop: LoopSettings) -> Policy:
    """The rule of which examples may train, with all that it needs.

    Reading a benchmark and indexing it takes some 40 ms, and the sensor asks every few seconds: what was read is kept
    while the files are the same by time and size.
    """
    schema = project_path(loop.output_schema) if loop.output_schema else None
    path = project_path(loop.evaluation.benchmark)
    index, problem = _judges(path, schema, _stamp(path), _stamp(schema))
    quotas = {source.name: Quota(source.max_examples, source.max_fraction) for source in loop.sources}
    tokenizer = tokenizer_path(loop)
    tokens = _token_counter(tokenizer.parent, tokenizer, _stamp(tokenizer)) if tokenizer else None
    return Policy(loop.curation, index, problem, quotas, loop.review.required, tokens)


@lru_cache(maxsize=4)
def _token_counter(base: Path, *_stamps: object) -> TokenCounter:
    return TokenCounter(base)


def tokenizer_path(loop: LoopSettings) -> Path | None:
    """The base model's tokenizer, where curation counts tokens."""
    limited = loop.curation.max_prompt_tokens or loop.curation.max_answer_tokens
    return tokenizer_file(resolve_base_model(loop.base_model)) if limited else None


def identity(example: Example) -> str:
    """The content hash by which the store knows an example again after it was judged."""
    return content_hash(conversation_text(example.prompt, example.history), example.target)


@lru_cache(maxsize=16)
def _judges(path: Path, schema: Path | None, *_stamps: object) -> tuple[NearIndex, Validator]:
    read = load_schema(schema) if schema else None
    questions = {question.id: question.prompt for question in load_benchmark(path, read).questions}
    for id, prompt in list(questions.items()):
        clean = redact(prompt).text  # as examples are, before they are compared
        if clean != prompt:
            questions[f"{id}, redacted"] = clean
    return NearIndex(questions), answer_validator(read)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def replay_path(loop: LoopSettings) -> Path | None:
    """The file of examples that must not be erased."""
    return project_path(loop.curation.replay) if loop.curation.replay else None


def replay(loop: LoopSettings) -> list[Any]:
    """The examples that are mixed in against forgetting."""
    path = replay_path(loop)
    return read_replay(path) if path else []


def hashes(**paths: Path | None) -> dict[str, str]:
    """SHA-256 of each file that is given, by name."""
    return {name: hash_file(path) for name, path in paths.items() if path is not None}
