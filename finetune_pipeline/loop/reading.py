"""What the assets of one loop read beside their inputs: the files that its YAML names."""

from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation.dataset import read_replay
from finetune_pipeline.curation.duplicates import NearIndex
from finetune_pipeline.curation.rules import Policy, answer_validator
from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
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
    """The rule of which examples may train, with all that it needs."""
    questions = {question.id: question.prompt for question in benchmark(loop).questions}
    return Policy(loop.curation, NearIndex(questions), answer_validator(output_schema(loop)))


def replay_path(loop: LoopSettings) -> Path | None:
    """The file of examples that must not be forgotten."""
    return project_path(loop.curation.replay) if loop.curation.replay else None


def replay(loop: LoopSettings) -> list[Any]:
    """The examples that are mixed in against forgetting."""
    path = replay_path(loop)
    return read_replay(path) if path else []


def hashes(**paths: Path | None) -> dict[str, str]:
    """SHA-256 of each file that is given, by name."""
    return {name: hash_file(path) for name, path in paths.items() if path is not None}
