"""The asset curated_dataset: what is fit to train on, split once and for all, and kept away from the benchmark."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact, hash_of, obtain, package_versions, version_of
from finetune_pipeline.children import die_with_run
from finetune_pipeline.curation.dataset import (
    DATASET,
    SPLITS,
    Curated,
    curate_files,
    invalid_targets,
    overlaps,
    read_all,
    write_dataset,
)
from finetune_pipeline.curation.preferences import LABELLED, PAIRS
from finetune_pipeline.curation.rules import CONFLICT
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.loop import reading
from finetune_pipeline.loop.io import pointers_key, upstream
from finetune_pipeline.records import DatasetManifest, Example, RawLogsManifest
from finetune_pipeline.settings import LoopSettings, home, project_path

if TYPE_CHECKING:
    from finetune_pipeline.curation.sifted import Cache

NAMED = 20
OF_THE_CHOICE = frozenset(
    {"near_similarity", "semantic", "semantic_similarity", "validation_share", "min_examples", "replay", "replay_ratio"}
)
"""Settings of curation that say nothing of an example by itself."""


def curated_dataset_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset curated_dataset of a loop, with its blocking checks."""

    def check(name: str, description: str) -> dg.AssetCheckSpec:
        key = [*loop.prefix, "curated_dataset"]
        return dg.AssetCheckSpec(name, asset=key, description=description, blocking=True)

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        ins={"raw_logs": upstream(loop)},
        check_specs=[
            check("enough_examples", f"At least {loop.curation.min_examples} examples are fit to train on."),
            check("no_benchmark_overlap", "No example is a near-duplicate of a benchmark question."),
            check("targets_parse", "Every answer to learn passes the output schema."),
        ],
        kinds={"huggingface"},
    )
    def curated_dataset(
        context: dg.AssetExecutionContext, raw_logs: Artifact[RawLogsManifest]
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """The training set: examples that people or validators found good, without duplicates.

        Secrets and personal data are replaced by placeholders first. Every prompt's hash says whether it trains or
        validates, so it never moves between cycles. Near-duplicates of the benchmark are taken out and named; replayed
        examples are mixed in against forgetting.

        Beside the answers to learn (`dataset/`, for SFT) lie corrections with what the model had said (`pairs/`, for
        DPO) and the answers found good and found bad (`labelled/`, for KTO), split in the same way.
        """
        die_with_run()
        artifact = dataset(loop, raw_logs)
        manifest = artifact.manifest
        context.log.info(
            f"{manifest.train} to train on ({manifest.replayed} of them replayed), {manifest.validation} to validate; "
            f"beside them {manifest.pairs} pairs of a correction and the model's own answer, and "
            f"{manifest.undesirable} answers found bad; left out: {manifest.left_out or 'none'}"
        )
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact))
        yield from _checks(loop, artifact)

    return curated_dataset


def dataset(loop: LoopSettings, raw_logs: Artifact[RawLogsManifest]) -> Artifact[DatasetManifest]:
    """The dataset that these logs give under the loop's settings, made if it is not there yet."""
    files = reading.hashes(
        benchmark=project_path(loop.evaluation.benchmark),
        output_schema=project_path(loop.output_schema) if loop.output_schema else None,
        replay=reading.replay_path(loop),
    )
    inputs = {"raw_logs": raw_logs.manifest.version, **files}
    policy = reading.policy(loop)
    settings = {
        **loop.curation.model_dump(exclude={"compute"}),  # wherever it is made, it is the same
        "system_prompt": loop.system_prompt,
        "holds": [DATASET, PAIRS, LABELLED],
        "quotas": {name: asdict(quota) for name, quota in policy.quotas.items()},
    }

    def make(folder: Path) -> dict[str, Any]:
        paths = [raw_logs.path / part for part in raw_logs.manifest.parts]
        curated = curate_files(paths, reading.replay(loop), policy, reading.identity, _cache(loop, raw_logs, files))
        write_dataset(curated, folder, loop.system_prompt)
        return {
            "inputs": inputs,
            "settings": settings,
            "packages": package_versions("finetune-pipeline", "datasets"),
            "watermark": raw_logs.manifest.watermark,
            **_figures(curated),
        }

    return obtain(DatasetManifest, loop.name, version_of(inputs, settings), make)


def _cache(loop: LoopSettings, raw_logs: Artifact[RawLogsManifest], files: dict[str, str]) -> "Cache":
    """What was found of each part of the logs by these settings and files: the next dataset looks at new parts only."""
    from finetune_pipeline.curation.sifted import Cache
    from finetune_pipeline.curation.sifting import FORM

    base = str(resolve_base_model(loop.base_model)) if reading.policy(loop).tokens else ""
    given = {
        "form": FORM,
        "settings": loop.curation.model_dump(exclude={"compute", *OF_THE_CHOICE}),
        "files": files,
        "base": base,
        "packages": package_versions("finetune-pipeline", "detect-secrets", "phonenumbers", "rensa", "jsonschema"),
    }
    records = raw_logs.manifest.files
    keys = [hash_of({**given, "part": records[part].sha256})[:32] for part in raw_logs.manifest.parts]
    return Cache(home() / "cache" / "curation" / loop.name, keys)


def taught(raw_logs: Artifact[RawLogsManifest]) -> Iterator[Example]:
    """What every interaction of a snapshot teaches; a later part's row of it stands instead of an earlier one."""
    from finetune_pipeline.curation.sifting import example_of
    from finetune_pipeline.curation.snapshot import ROWS, Part, Rows

    parts = [Part(raw_logs.path / part) for part in raw_logs.manifest.parts]
    stands = iter((~Rows(parts).superseded()).tolist())
    for part in parts:
        for batch in part.batches(ROWS):
            yield from (example_of(row) for row in batch.to_pylist() if next(stands) and row["target"] is not None)


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


def _metadata(artifact: Artifact[DatasetManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "train": manifest.train,
        "validation": manifest.validation,
        "replayed": manifest.replayed,
        "examples": manifest.train + manifest.validation - manifest.replayed,
        "pairs": manifest.pairs,
        "desirable": manifest.desirable,
        "undesirable": manifest.undesirable,
        "sources": _table("source", "examples", manifest.sources),
        "left_out": sum(manifest.left_out.values()),
        "left_out_why": _table("reason", "examples", manifest.left_out),
        "redacted": sum(manifest.redacted.values()),
        "redacted_what": _table("kind", "places", manifest.redacted),
        "near_benchmark": list(manifest.near_benchmark[:NAMED]),
        "conflicts": manifest.left_out.get(CONFLICT, 0),
        "conflicts_first": [f"{kept} was kept, {other} says otherwise" for kept, other in manifest.conflicts],
        "version": manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }


def _table(name: str, number: str, counts: dict[str, int]) -> dg.MetadataValue[Any]:
    lines = [f"| {key} | {count} |" for key, count in counts.items()]
    return dg.MetadataValue.md("\n".join([f"| {name} | {number} |", "|---|---|", *lines]))


def _checks(loop: LoopSettings, artifact: Artifact[DatasetManifest]) -> Iterator[dg.AssetCheckResult]:
    # Asked of what was written, not of what was meant to be written.
    policy = reading.policy(loop)
    examples = sum(row.get("source", "replay") != "replay" for row in read_all(artifact.path))
    if loop.training.method in {"auto", "kto"}:  # which learn from answers found bad too
        examples += sum(row.get("label") is False for row in read_all(artifact.path))
    yield dg.AssetCheckResult(
        check_name="enough_examples",
        passed=examples >= loop.curation.min_examples,
        metadata={
            "examples": examples,
            "needed": loop.curation.min_examples,
            "what to do": "log more feedback, or lower curation.min_examples",
        },
    )
    yield _offenders("no_benchmark_overlap", overlaps(read_all(artifact.path), policy))
    yield _offenders("targets_parse", invalid_targets(read_all(artifact.path), policy))


def _offenders(name: str, offenders: Sequence[str]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        passed=not offenders,
        metadata={"offenders": len(offenders), "first": list(offenders[:NAMED])},
    )
