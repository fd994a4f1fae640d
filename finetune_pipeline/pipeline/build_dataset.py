"""The dataset that a snapshot of the logs gives: what the asset curated_dataset makes. No Dagster here."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import Artifact, get_or_create, hash_of, package_versions, version_of, write_text
from finetune_pipeline.curation.card import DATASET_CARD, DatasetCard, dataset_card
from finetune_pipeline.curation.dataset import DATASET, SPLITS, Curated, curate_files, write_dataset
from finetune_pipeline.curation.preferences import LABELLED, PAIRS
from finetune_pipeline.curation.provenance import PROVENANCE_FILE
from finetune_pipeline.manifests import DatasetManifest, RawLogsManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import Example
from finetune_pipeline.settings import LoopSettings, home, project_path

if TYPE_CHECKING:
    from finetune_pipeline.curation.sifted import Cache

OF_THE_CHOICE = frozenset(
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
"""Settings of curation that say nothing of an example by itself."""
FOUND_BY = ("detect-secrets", "phonenumbers", "rensa", "jsonschema")
"""Packages by which secrets, near-duplicates and valid answers are told: with others, a dataset is made anew."""


def dataset(loop: LoopSettings, raw_logs: Artifact[RawLogsManifest]) -> Artifact[DatasetManifest]:
    """The dataset that these logs give under the loop's settings, made if it is not there yet."""
    from finetune_pipeline.curation.sifting import FORM

    files = loop_files.hashes(
        benchmark=project_path(loop.evaluation.benchmark),
        output_schema=project_path(loop.output_schema) if loop.output_schema else None,
        replay=loop_files.replay_path(loop),
        tokenizer=loop_files.tokenizer_path(loop),
    )
    inputs = {"raw_logs": raw_logs.manifest.version, **files}
    policy = loop_files.policy(loop)
    settings = {
        **loop.curation.model_dump(exclude={"compute"}),  # wherever it is made, it is the same
        "system_prompt": loop.system_prompt,
        "holds": [DATASET, PAIRS, LABELLED, DATASET_CARD, PROVENANCE_FILE],
        "quotas": {name: asdict(quota) for name, quota in policy.quotas.items()},
        "review": loop.review.model_dump(),
        "form": FORM,
        "found_by": package_versions(*FOUND_BY),
    }
    version = version_of(inputs, settings)

    def make(folder: Path) -> dict[str, Any]:
        paths = [raw_logs.path / part for part in raw_logs.manifest.shards]
        curated = curate_files(
            paths, loop_files.replay(loop), policy, loop_files.identity, _cache(loop, raw_logs, files)
        )
        write_dataset(curated, folder, loop.system_prompt)
        made: dict[str, Any] = {
            "inputs": inputs,
            "settings": settings,
            "packages": package_versions("finetune-pipeline", "pyarrow", *FOUND_BY),
            "watermark": raw_logs.manifest.watermark,
        }
        card = dataset_card(DatasetCard(loop.name, version, curated=curated, **made))
        write_text(folder / DATASET_CARD, card)
        return {**made, **_figures(curated)}

    return get_or_create(DatasetManifest, loop.name, version, make)


def _cache(loop: LoopSettings, raw_logs: Artifact[RawLogsManifest], files: dict[str, str]) -> "Cache":
    """What was found of each part of the logs by these settings and files: the next dataset looks at new parts only."""
    from finetune_pipeline.curation.sifted import Cache
    from finetune_pipeline.curation.sifting import FORM

    given = {
        "form": FORM,
        "settings": loop.curation.model_dump(exclude={"compute", *OF_THE_CHOICE}),
        "review": loop.review.model_dump(),
        "files": files,
        "packages": package_versions("finetune-pipeline", *FOUND_BY),
    }
    records = raw_logs.manifest.files
    keys = [hash_of({**given, "part": records[part].sha256})[:32] for part in raw_logs.manifest.shards]
    return Cache(home() / "cache" / "curation" / loop.name, keys)


def taught(raw_logs: Artifact[RawLogsManifest]) -> Iterator[Example]:
    """What every interaction of a snapshot teaches; a later part's row of it stands instead of an earlier one."""
    from finetune_pipeline.curation.sifting import example_of_row
    from finetune_pipeline.curation.snapshot import ROWS, Part, Rows

    parts = [Part(raw_logs.path / part) for part in raw_logs.manifest.shards]
    stands = iter((~Rows(parts).superseded()).tolist())
    for part in parts:
        for batch in part.batches(ROWS):
            yield from (example_of_row(row) for row in batch.to_pylist() if next(stands) and row["target"] is not None)


def _figures(curated: Curated) -> dict[str, Any]:
    held = {split: curated.count(DATASET, split) for split in SPLITS}
    return {
        "train": held["train"] + curated.replayed,
        "validation": held["validation"],
        "replayed": curated.replayed,
        "sources": curated.sources,
        "left_out": curated.left_out,
        "redacted": curated.redacted,
        "near_benchmark": list(curated.near_benchmark),
        "conflicts": [list(pair) for pair in curated.conflicts],
        "pairs": curated.count(PAIRS, "train"),
        "desirable": held["train"],
        "undesirable": curated.count(LABELLED, "train"),
    }
