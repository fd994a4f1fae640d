"""Build the dataset of a loop from a snapshot of its logs, and check what was written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, get_or_create, hash_of, package_versions, version_of, write_text
from finetune_pipeline.curation.dataset_checks import inspect_dataset
from finetune_pipeline.curation.dataset_files import (
    COLUMNS,
    DATASET_CARD,
    PREFERENCE,
    PROMPT_COMPLETION,
    PROVENANCE_FILE,
    UNPAIRED_PREFERENCE,
)
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import DatasetManifest, RawLogsManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.settings import LoopSettings, home, project_path
from finetune_pipeline.training.auto_settings import DATA, choose_replay
from finetune_pipeline.wording import counted

SELECTION_SETTINGS = frozenset(
    {
        "near_similarity",
        "semantic",
        "semantic_similarity",
        "validation_fraction",
        "min_examples",
        "replay",
        "replay_ratio",
    }
)
"""Curation settings that do not change what is known of an example by itself, and so leave the filter cache valid."""

FILTER_PACKAGES = ("detect-secrets", "phonenumbers", "rensa", "jsonschema")
"""Packages whose version changes which secrets, near-duplicates and invalid answers are found."""


def dataset_settings(loop: LoopSettings) -> dict[str, Any]:
    """Return the settings and versions that decide, with the files that the settings name, what is in a dataset."""
    from finetune_pipeline.curation.filter import CODE_VERSION

    chosen = {f"up to {row.up_to:,.0f}": row.replay_ratio for row in DATA} if replay_is_chosen(loop) else {}
    return {
        **loop.curation.model_dump(exclude={"compute"}),  # it does not change the dataset
        **({"replay_ratio": chosen} if chosen else {}),
        "system_prompt": loop.system_prompt,
        "contents": [*COLUMNS, DATASET_CARD, PROVENANCE_FILE],
        "quotas": {
            source.name: {"max_examples": source.max_examples, "max_fraction": source.max_fraction}
            for source in loop.sources
        },
        "review": loop.review.model_dump(),
        "code_version": CODE_VERSION,
        "filter_packages": package_versions(*FILTER_PACKAGES),
    }


def replay_is_chosen(loop: LoopSettings) -> bool:
    """Return whether `training: auto` chooses the replay: the loop has replay examples, and no ratio is set."""
    given = loop.curation.model_fields_set
    return loop.training.auto and loop.curation.replay is not None and "replay_ratio" not in given


def curation_files(loop: LoopSettings) -> dict[str, str]:
    """Return the hashes of the files that decide what is in a dataset, by name."""
    return loop_files.question_files(loop) | loop_files.hashes(
        output_schema=project_path(loop.output_schema) if loop.output_schema else None,
        replay=loop_files.replay_path(loop),
        tokenizer=loop_files.tokenizer_path(loop),
    )


def build_dataset(loop: LoopSettings, raw_logs: Artifact[RawLogsManifest]) -> Artifact[DatasetManifest]:
    """Return the dataset of a snapshot under the loop's settings; build it if it does not exist yet."""
    from finetune_pipeline.curation.filter import CODE_VERSION, FilterCache

    files = curation_files(loop)
    inputs = {RawLogsManifest.stage: raw_logs.manifest.version, **files}
    settings = dataset_settings(loop)
    version = version_of(inputs, settings)

    # The cache key of a shard covers everything that the filter depends on, and nothing that only selection does.
    filter_inputs = {
        "code_version": CODE_VERSION,
        "settings": loop.curation.model_dump(exclude={"compute", *SELECTION_SETTINGS}),
        "review": loop.review.model_dump(),
        "files": files,
        "packages": package_versions("finetune-pipeline", *FILTER_PACKAGES),
    }
    shards = raw_logs.manifest.shards
    hashes = [raw_logs.manifest.files[shard].sha256 for shard in shards]
    cache = FilterCache(
        home() / "cache" / "curation" / loop.name,
        [hash_of({**filter_inputs, "shard": sha256})[:32] for sha256 in hashes],
    )

    def make(folder: Path) -> dict[str, Any]:
        built: dict[str, Any] = {"inputs": inputs, "settings": settings, "watermark": raw_logs.manifest.watermark}
        return curate_into(folder, loop, version, [raw_logs.path / shard for shard in shards], built, cache=cache)

    return get_or_create(DatasetManifest, loop.name, version, make)


def curate_into(
    folder: Path, loop: LoopSettings, version: str, shards: Sequence[Path], built: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Curate examples into a dataset's folder with its card, and return the fields of its manifest.

    Args:
        shards: Parquet files of the examples.
        built: the manifest's inputs, settings and watermark.
        options: further arguments of `curate`.
    """
    from finetune_pipeline.curation.dataset import curate
    from finetune_pipeline.curation.dataset_card import SAMPLE_ROWS_OF_SOURCE, dataset_card

    replay = loop_files.replay(loop)
    summary = curate(
        folder,
        shards,
        replay.examples,
        loop_files.policy(loop),
        loop_files.identity,
        system_prompt=loop.system_prompt,
        sample_size=SAMPLE_ROWS_OF_SOURCE,
        replay_ratio=(lambda train: choose_replay(train)[0]) if replay_is_chosen(loop) else None,
        **options,
    )
    summary = replace(summary, left_out=summary.left_out | replay.left_out)
    built = {**built, "packages": package_versions("finetune-pipeline", "pyarrow", *FILTER_PACKAGES)}
    write_text(folder / DATASET_CARD, dataset_card(loop.name, version, summary, **built))
    examples = summary.rows[PROMPT_COMPLETION]
    return {
        **built,
        "train": examples["train"] + summary.replayed,
        "validation": examples["validation"],
        "replayed": summary.replayed,
        "replay_reason": choose_replay(examples["train"])[1] if replay_is_chosen(loop) else "",
        "sources": summary.sources,
        "left_out": summary.left_out,
        "redacted": summary.redacted,
        "near_benchmark": list(summary.near_benchmark),
        "conflicts": [list(pair) for pair in summary.conflicts],
        "preference_pairs": summary.rows[PREFERENCE]["train"],
        "desirable": examples["train"],
        "undesirable": summary.rows[UNPAIRED_PREFERENCE]["train"],
    }


@dataclass(frozen=True)
class DatasetCheck:
    """The outcome of a blocking check of a dataset.

    Attributes:
        name: as in `DatasetManifest.blocking_checks`.
        description: a sentence, or empty.
        metadata: numbers and offenders, for people.
    """

    name: str
    passed: bool
    description: str
    metadata: dict[str, Any]


OFFENDERS_SHOWN = 20


def check_dataset(loop: LoopSettings, dataset: Artifact[DatasetManifest]) -> tuple[DatasetCheck, ...]:
    """Check what was written to a dataset, in one pass over its files.

    Raises:
        CurationError: an earlier version of the project wrote the dataset.
    """
    content = inspect_dataset(dataset.path, loop_files.policy(loop))
    examples, needed = content.examples, loop.curation.min_examples
    if loop.training.method in {"auto", "kto"}:  # these train on undesirable completions too
        examples += content.undesirable
    review = "; only examples that a reviewer approved train (finetune review)" if loop.review.required else ""
    remedy = "" if examples >= needed else "; log more feedback, or lower curation.min_examples"
    enough = DatasetCheck(
        "enough_examples",
        examples >= needed,
        f"{counted(examples, 'example')}, at least {needed:,} needed{review}{remedy}",
        {"examples": examples, "needed": needed},
    )
    offenders = {"no_benchmark_overlap": content.near_benchmark, "targets_parse": content.invalid_targets}
    return (
        enough,
        *(
            DatasetCheck(name, not found, "", {"offenders": len(found), "first": list(found[:OFFENDERS_SHOWN])})
            for name, found in offenders.items()
        ),
    )


def check_and_record(loop: LoopSettings, dataset: Artifact[DatasetManifest], run_id: str) -> tuple[DatasetCheck, ...]:
    """Check a dataset, and record the outcomes in the database.

    A model is promoted only if these outcomes exist and passed, whatever assets and checks a run selected.
    """
    checks = check_dataset(loop, dataset)
    record_outcomes(connect(), dataset, {check.name: check.passed for check in checks}, run_id)
    return checks
