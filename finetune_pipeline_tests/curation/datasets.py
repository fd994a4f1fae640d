"""Examples, policies, and datasets that are built, written and read back."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.dataset import curate
from finetune_pipeline.curation.dataset_files import (
    PREFERENCE,
    SPLITS,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    DatasetSummary,
    read_examples,
    read_split,
)
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.filter import Identity
from finetune_pipeline.curation.snapshot import row_of, schema
from finetune_pipeline.records import Example, Turn
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import REPLAY, CurationSettings
from finetune_pipeline_tests.conftest import START, uid

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # writing to disk would take most of the time

POLICY = Policy(CurationSettings(), NearIndex({"q": "the golden question of all"}), answer_validator(None))
ALL_TRAIN = Policy(CurationSettings(validation_fraction=0), POLICY.benchmark, answer_validator(None))


def example(number: int, **fields: Any) -> Example:
    given = {"prompt": f"prompt number {number}", "target": f"answer {number}", "reward": 0.9, "confidence": 0.9}
    flags = {"confirmed": False, "corrected": False, "ingest_offset": number}
    values: dict[str, Any] = {**given, **flags, **fields}
    values.setdefault("created_at", START + timedelta(minutes=values["ingest_offset"]))
    return Example(interaction_id=uid(str(number)), **{"output": values["target"], **values})


def corrected(number: int, **fields: Any) -> Example:
    return example(number, **{"output": f"wrong {number}", "reward": 0.4, "corrected": True, **fields})


def disliked(number: int, **fields: Any) -> Example:
    return example(number, **{"reward": -0.9, "confidence": None, **fields})


def turns(*texts: str) -> tuple[Turn, ...]:
    """Return a conversation in which user and assistant take turns."""
    return tuple(Turn(role="assistant" if n % 2 else "user", content=text) for n, text in enumerate(texts))


def replay_example(prompt: str, completion: str = "old answer", provenance: str | None = None) -> DatasetExample:
    return DatasetExample(prompt, completion, 1.0, REPLAY, provenance)


def identity(example: Example) -> str:
    return f"content of {example.prompt}"


def table_of(examples: Iterable[Example]) -> pa.Table:
    """Return examples as rows of a snapshot."""
    return pa.Table.from_pylist([row_of(example) for example in examples], schema())


def write_shards(folder: Path, *shards: Iterable[Example], row_group_size: int = 100) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"shard-{number}.parquet" for number in range(len(shards))]
    for path, examples in zip(paths, shards, strict=True):
        pq.write_table(table_of(examples), path, row_group_size=row_group_size)
    return paths


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Built:
    """A dataset as it was read back. Two are equal if their files and summaries are."""

    summary: DatasetSummary
    files: dict[str, str]
    train: list[DatasetExample] = field(compare=False)
    validation: list[DatasetExample] = field(compare=False)
    pairs: list[tuple[str, str, str]] = field(compare=False)
    undesirable: dict[str, str] = field(compare=False)

    @property
    def examples(self) -> list[DatasetExample]:
        return [*self.train, *self.validation]

    @property
    def replay(self) -> list[DatasetExample]:
        return [example for example in self.examples if example.source == REPLAY]


def read_built(folder: Path, summary: DatasetSummary) -> Built:
    train, validation = (list(read_examples(folder, split)) for split in SPLITS)
    pairs = read_split(folder, PREFERENCE, "train")
    unpaired = read_split(folder, UNPAIRED_PREFERENCE, "train")
    return Built(
        summary,
        hashes_of(folder),
        train,
        validation,
        [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs],
        {row["prompt"]: row["completion"] for row in unpaired if not row["label"]},
    )


def build(
    examples: Iterable[Example],
    policy: Policy = ALL_TRAIN,
    replay: Sequence[DatasetExample] = (),
    folder: Path | None = None,
    system_prompt: str = "",
    identity: Identity = identity,
) -> Built:
    """Build the dataset of these examples.

    Args:
        folder: where it is written; without one, it is deleted again.
    """
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        shards = write_shards(Path(name), examples)
        folder = folder or Path(name) / "dataset"
        summary = curate(folder, shards, replay, policy, identity, system_prompt=system_prompt)
        return read_built(folder, summary)
