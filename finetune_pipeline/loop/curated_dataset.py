"""The asset curated_dataset: what is fit to train on, split once and for all, and kept away from the benchmark."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact, obtain, package_versions, version_of, write_text
from finetune_pipeline.children import die_with_run
from finetune_pipeline.curation.card import DATASET_CARD, DatasetCard, dataset_card
from finetune_pipeline.curation.dataset import (
    DATASET,
    Curated,
    curate,
    invalid_targets,
    overlaps,
    read_all,
    write_dataset,
)
from finetune_pipeline.curation.preferences import LABELLED, PAIRS
from finetune_pipeline.feedback.store import content_hash
from finetune_pipeline.loop import reading
from finetune_pipeline.loop.io import pointers_key, upstream
from finetune_pipeline.records import DatasetManifest, Example, RawLogsManifest, conversation
from finetune_pipeline.settings import LoopSettings, project_path

NAMED = 20


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
        DPO) and the answers found good and found bad (`labelled/`, for KTO), split in the same way. `card.md` says what
        it is made of, with a sample.
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
        **loop.curation.model_dump(),
        "system_prompt": loop.system_prompt,
        "holds": [DATASET, PAIRS, LABELLED, DATASET_CARD],
        "quotas": {name: asdict(quota) for name, quota in policy.quotas.items()},
        "review": loop.review.model_dump(),
    }

    version = version_of(inputs, settings)

    def make(folder: Path) -> dict[str, Any]:
        curated = curate(taught(raw_logs), reading.replay(loop), policy, identity)
        write_dataset(curated, folder, loop.system_prompt)
        made: dict[str, Any] = {
            "inputs": inputs,
            "settings": settings,
            "packages": package_versions("finetune-pipeline", "datasets"),
            "watermark": raw_logs.manifest.watermark,
        }
        card = dataset_card(DatasetCard(loop.name, version, curated=curated, **made))
        write_text(folder / DATASET_CARD, card)
        return {**made, **_figures(curated)}

    return obtain(DatasetManifest, loop.name, version, make)


def taught(raw_logs: Artifact[RawLogsManifest]) -> Iterator[Example]:
    """What every interaction of a snapshot teaches; a later part's row of it stands instead of an earlier one."""
    import pyarrow.parquet as pq

    seen: set[str] = set()
    first = raw_logs.manifest.parts[0]
    for part in reversed(raw_logs.manifest.parts):
        for batch in pq.ParquetFile(raw_logs.path / part).iter_batches():
            rows = [row for row in batch.to_pylist() if row["interaction_id"] not in seen]
            if part != first:  # nothing is older than the first, and it may be the history of years
                seen.update(row["interaction_id"] for row in rows)
            yield from (_example(row) for row in rows if row["target"] is not None)


def _example(row: dict[str, Any]) -> Example:
    values = {name: row[name] for name in Example.model_fields if name in row}  # an older snapshot has fewer
    return Example.model_validate({**values, "history": values["history"] or ()})


def identity(example: Example) -> str:
    """The content hash by which the store knows an example again after it was judged."""
    return content_hash(conversation(example.prompt, example.history), example.target)


def _figures(curated: Curated) -> dict[str, Any]:
    return {
        "train": len(curated.train),
        "validation": len(curated.validation),
        "replayed": curated.replayed,
        "sources": curated.sources,
        "left_out": curated.left_out,
        "redacted": curated.redacted,
        "near_benchmark": list(curated.near_benchmark),
        "pairs": len(curated.pairs["train"]),
        "desirable": len(curated.train) - curated.replayed,
        "undesirable": len(curated.undesirable["train"]),
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
        "card": dg.MetadataValue.md((artifact.path / DATASET_CARD).read_text(encoding="utf-8")),
        "version": manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }


def _table(name: str, number: str, counts: dict[str, int]) -> dg.MetadataValue[Any]:
    lines = [f"| {key} | {count} |" for key, count in counts.items()]
    return dg.MetadataValue.md("\n".join([f"| {name} | {number} |", "|---|---|", *lines]))


def _checks(loop: LoopSettings, artifact: Artifact[DatasetManifest]) -> Iterator[dg.AssetCheckResult]:
    # Asked of what was written, not of what was meant to be written.
    rows = list(read_all(artifact.path))
    policy = reading.policy(loop)
    examples = sum(row.get("source", "replay") != "replay" for row in rows)
    if loop.training.method in {"auto", "kto"}:  # which learn from answers found bad too
        examples += sum(row.get("label") is False for row in rows)
    yield dg.AssetCheckResult(
        check_name="enough_examples",
        passed=examples >= loop.curation.min_examples,
        metadata={
            "examples": examples,
            "needed": loop.curation.min_examples,
            "what to do": "log more feedback, or lower curation.min_examples",
        },
    )
    yield _offenders("no_benchmark_overlap", overlaps(rows, policy))
    yield _offenders("targets_parse", invalid_targets(rows, policy))


def _offenders(name: str, offenders: Sequence[str]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        passed=not offenders,
        metadata={"offenders": len(offenders), "first": list(offenders[:NAMED])},
    )
