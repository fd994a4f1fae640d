"""The asset curated_dataset: what is fit to train on, split once and for all, and kept away from the benchmark."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.curation.card import DATASET_CARD, cell
from finetune_pipeline.curation.dataset import (
    invalid_targets,
    overlaps,
    read_all,
)
from finetune_pipeline.curation.provenance import PROVENANCE_FILE, first_provenances
from finetune_pipeline.curation.rules import CONFLICT
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import DatasetManifest, RawLogsManifest
from finetune_pipeline.orchestration.io_manager import pointers_key, upstream
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.build_dataset import dataset
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.subprocess_lifetime import die_with_run

NAMED = 20
PROVENANCES_NAMED = 3  # of each source; the others are in the file


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
        it is made of, with a sample, and `provenances.csv` where each example came from.
        """
        die_with_run()
        artifact = dataset(loop, raw_logs)
        manifest = artifact.manifest
        checks = list(_checks(loop, artifact))
        # Kept here and not by Dagster's event, so that they hold whatever was selected.
        record_outcomes(connect(), artifact, {one.check_name or "": one.passed for one in checks}, context.run.run_id)
        context.log.info(
            f"{manifest.train} to train on ({manifest.replayed} of them replayed), {manifest.validation} to validate; "
            f"beside them {manifest.pairs} pairs of a correction and the model's own answer, and "
            f"{manifest.undesirable} answers found bad; left out: {manifest.left_out or 'none'}"
        )
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact))
        yield from checks

    return curated_dataset


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
        "provenances": dg.MetadataValue.path(artifact.path / PROVENANCE_FILE),
        "origins_first": _origins(artifact),
        "left_out": sum(manifest.left_out.values()),
        "left_out_why": _table("reason", "examples", manifest.left_out),
        "redacted": sum(manifest.redacted.values()),
        "redacted_what": _table("kind", "places", manifest.redacted),
        "near_benchmark": list(manifest.near_benchmark[:NAMED]),
        "card": dg.MetadataValue.md((artifact.path / DATASET_CARD).read_text(encoding="utf-8")),
        "conflicts": manifest.left_out.get(CONFLICT, 0),
        "conflicts_first": [f"{kept} was kept, {other} says otherwise" for kept, other in manifest.conflicts],
        "version": manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }


def _origins(artifact: Artifact[DatasetManifest]) -> dg.MetadataValue[Any]:
    """The first provenances of each source: a row for each."""
    first = first_provenances(artifact.path, artifact.manifest.sources, PROVENANCES_NAMED)
    lines = [
        f"| {source} | {cell(provenance)} |" for source, provenances in first.items() for provenance in provenances
    ]
    return dg.MetadataValue.md("\n".join(["| source | provenance |", "|---|---|", *lines]))


def _table(name: str, number: str, counts: dict[str, int]) -> dg.MetadataValue[Any]:
    lines = [f"| {key} | {count} |" for key, count in counts.items()]
    return dg.MetadataValue.md("\n".join([f"| {name} | {number} |", "|---|---|", *lines]))


def _checks(loop: LoopSettings, artifact: Artifact[DatasetManifest]) -> Iterator[dg.AssetCheckResult]:
    # Asked of what was written, not of what was meant to be written.
    policy = loop_files.policy(loop)
    examples = sum(row.get("source", "replay") != "replay" for row in read_all(artifact.path))
    if loop.training.method in {"auto", "kto"}:  # which learn from answers found bad too
        examples += sum(row.get("label") is False for row in read_all(artifact.path))
    yield dg.AssetCheckResult(
        check_name="enough_examples",
        passed=examples >= loop.curation.min_examples,
        description=f"{examples} of {loop.curation.min_examples} needed"
        + ("; only what a reviewer approved trains (finetune review)" if loop.review.required else ""),
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
