"""The files that a loop's YAML names: benchmark, output schema, rules, replay examples, tokenizer."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation.acceptance import (
    Policy,
    Quota,
    TokenCounter,
    tokenizer_file,
)
from finetune_pipeline.curation.dataset_files import read_replay
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.records import Example, conversation_text
from finetune_pipeline.schemas import Rule, Validator, answer_validator, load_rules, load_schema
from finetune_pipeline.settings import LoopSettings, project_path

PACKAGES = ("finetune-pipeline", "torch", "transformers", "trl", "peft", "datasets", "llama_cpp_python", "pyarrow")


def output_schema(loop: LoopSettings) -> dict[str, Any] | None:
    """Return the JSON Schema of the loop's answers, or None for free text."""
    return load_schema(project_path(loop.output_schema)) if loop.output_schema else None


def benchmark(loop: LoopSettings) -> Benchmark:
    """Return the loop's benchmark; every line is validated."""
    return load_benchmark(project_path(loop.evaluation.benchmark), output_schema(loop))


def rules(loop: LoopSettings) -> tuple[Rule, ...]:
    """Return the loop's compliance rules."""
    return load_rules(project_path(loop.evaluation.compliance)) if loop.evaluation.compliance else ()


def judging_files(loop: LoopSettings) -> dict[str, str]:
    """Return the hashes of the files that decide which answers are correct, by name."""
    named = {
        "benchmark": loop.evaluation.benchmark,
        "output_schema": loop.output_schema,
        "compliance": loop.evaluation.compliance,
    }
    return hashes(**{name: project_path(text) for name, text in named.items() if text})


def policy(loop: LoopSettings) -> Policy:
    """Return the policy that decides which examples may train.

    Reading and indexing a benchmark takes about 40 ms, and the sensor needs the policy every few seconds. So the index
    is cached until mtime or size of the files change.
    """
    schema = project_path(loop.output_schema) if loop.output_schema else None
    path = project_path(loop.evaluation.benchmark)
    index, validator = _index_and_validator(path, schema, _stamp(path), _stamp(schema))
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
def _index_and_validator(path: Path, schema: Path | None, *_stamps: object) -> tuple[NearIndex, Validator]:
    output_schema = load_schema(schema) if schema else None
    questions = {question.id: question.prompt for question in load_benchmark(path, output_schema).questions}
    for id, prompt in list(questions.items()):
        redacted = redact(prompt).text  # examples are redacted before they are compared with the questions
        if redacted != prompt:
            questions[f"{id}, redacted"] = redacted
    return NearIndex(questions), answer_validator(output_schema)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def replay_path(loop: LoopSettings) -> Path | None:
    """Return the file of replay examples."""
    return project_path(loop.curation.replay) if loop.curation.replay else None


def replay(loop: LoopSettings) -> list[Any]:
    """Return the replay examples, which are added to a dataset against catastrophic forgetting."""
    path = replay_path(loop)
    return read_replay(path) if path else []


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
