"""The dataset versions of a loop: list and find them, and export those of their examples that pass a filter."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import Field

from finetune_pipeline.artifacts import Artifact, ArtifactError, get_latest, read, stage_folder
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.records import Record, ShortText, UtcDatetime
from finetune_pipeline.settings import LoopSettings, with_loop

if TYPE_CHECKING:
    from finetune_pipeline.curation.dataset_files import DatasetExample


class UnknownDatasetError(ArtifactError):
    """A loop has no such dataset."""


class ExampleFilter(Record):
    """Which examples of a dataset to export: those that pass every filter that is given."""

    author: tuple[ShortText, ...] = Field(
        default=(), description="Who wrote the prompt: one of these users.", fail_fast=True
    )
    domain: tuple[ShortText, ...] = Field(
        default=(), description="Domain of the interaction: one of these.", fail_fast=True
    )
    kind: tuple[ShortText, ...] = Field(
        default=(), description="Kind of the interaction: one of these.", fail_fast=True
    )
    source: tuple[ShortText, ...] = Field(
        default=(), description="Declared source, or logs, ingested, upload or replay: one of these.", fail_fast=True
    )
    since: UtcDatetime | None = Field(default=None, description="Logged at this time or later.")
    until: UtcDatetime | None = Field(default=None, description="Logged before this time.")
    min_reward: float | None = Field(default=None, ge=-1, le=1, description="Lowest reward.")

    @property
    def of_interactions(self) -> bool:
        """Whether it needs the columns author, domain, kind or created_at, which older datasets do not have."""
        return bool(self.author or self.domain or self.kind or self.since or self.until)

    @cached_property
    def _authors(self) -> frozenset[str]:
        from finetune_pipeline.curation.dataset_files import author_hash

        return frozenset(map(author_hash, self.author))

    def passes(self, example: "DatasetExample") -> bool:
        """Return whether an example passes; one without a value does not pass a filter on it."""
        given = ((self._authors, example.author), (self.domain, example.domain), (self.kind, example.kind))
        if any(wanted and found not in wanted for wanted, found in (*given, (self.source, example.source))):
            return False
        if self.min_reward is not None and example.reward < self.min_reward:
            return False
        if self.since is None and self.until is None:
            return True
        time = example.created_at
        return (
            time is not None
            and (self.since is None or time >= self.since)
            and (self.until is None or time < self.until)
        )


def list_datasets(loop: LoopSettings) -> list[Artifact[DatasetManifest]]:
    """Return the loop's datasets, newest first; damaged ones are left out."""
    found = []
    for version in _versions(loop):
        try:
            found.append(read(DatasetManifest, stage_folder(loop.name, DatasetManifest.stage) / version))
        except ArtifactError:
            continue
    return sorted(found, key=lambda one: (one.manifest.created_at, one.manifest.version), reverse=True)


def find_dataset(loop: LoopSettings, version: str | None) -> Artifact[DatasetManifest]:
    """Return the dataset of this version, or the newest that a run built.

    Raises:
        UnknownDatasetError: it does not exist.
        ArtifactError: it is damaged.
    """
    if version is None:
        newest = get_latest(DatasetManifest, loop.name)
        if newest is None:
            raise UnknownDatasetError(
                f"loop {loop.name} has no dataset yet; `{with_loop('finetune run', loop)}` builds one"
            )
        return newest
    known = _versions(loop)
    if version not in known:  # so it is never a path
        raise UnknownDatasetError(
            f"loop {loop.name} has no dataset {version[:100]!r}; its datasets are: {', '.join(known) or 'none'}"
        )
    return read(DatasetManifest, stage_folder(loop.name, DatasetManifest.stage) / version)


def examples_of(dataset: Artifact[DatasetManifest], split: str, wanted: ExampleFilter) -> Iterator["DatasetExample"]:
    """Yield the examples of a split that pass a filter, one record batch in memory at a time.

    Raises:
        CurationError: an earlier version of the project wrote the dataset, without what the filter needs.
    """
    from finetune_pipeline.curation.dataset_files import check_columns, read_examples

    if wanted.of_interactions:
        check_columns(dataset.path)
    return (example for example in read_examples(dataset.path, split) if wanted.passes(example))


@dataclass(frozen=True)
class ExampleSummary:
    """What a split of a dataset holds, and which of it passes a filter.

    Attributes:
        count: examples that pass.
        sample: the first ones that pass.
        values: column (source, domain, kind, author) -> value -> examples of the whole split, most frequent first.
            An author is the hash of a name.
    """

    count: int
    sample: Sequence["DatasetExample"]
    values: Mapping[str, Mapping[str, int]]


def summarize_examples(
    dataset: Artifact[DatasetManifest], split: str, wanted: ExampleFilter, sample: int
) -> ExampleSummary:
    """Count the examples of a split by their columns, and those that pass a filter; return the first of them.

    Raises:
        CurationError: an earlier version of the project wrote the dataset, without what the filter needs.
    """
    passing = examples_of(dataset, split, wanted)  # raises if the dataset lacks a column
    values: dict[str, Counter[str]] = {name: Counter() for name in ("source", "domain", "kind", "author")}
    for example in examples_of(dataset, split, ExampleFilter()):
        for name, counts in values.items():
            if (value := getattr(example, name)) is not None:
                counts[value] += 1
    first = list(islice(passing, sample))
    count = len(first) + sum(1 for _ in passing)
    return ExampleSummary(count, first, {name: dict(counts.most_common()) for name, counts in values.items()})


def _versions(loop: LoopSettings) -> list[str]:
    folder = stage_folder(loop.name, DatasetManifest.stage)
    found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(name for name in found if not name.startswith("."))
