"""The asset curated_dataset: the datasets to train on, built from raw_logs, with blocking checks."""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.curation.acceptance import CONFLICT
from finetune_pipeline.curation.dataset_card import SAMPLE_HEADING
from finetune_pipeline.curation.dataset_files import DATASET_CARD
from finetune_pipeline.manifests import DatasetManifest, RawLogsManifest
from finetune_pipeline.markdown_table import markdown_table
from finetune_pipeline.orchestration.job_steps import job_step
from finetune_pipeline.orchestration.resources import loop_asset, materialized
from finetune_pipeline.pipeline.build_dataset import OFFENDERS_SHOWN, build_dataset, dataset_settings
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.wording import counted


def curated_dataset_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset curated_dataset of a loop."""

    @loop_asset(
        loop,
        DatasetManifest,
        "raw_logs",
        depends_on=dataset_settings(loop),
        files=(loop.evaluation.benchmark, loop.evaluation.sealed_benchmark, loop.output_schema, loop.curation.replay),
        kinds={"huggingface"},
    )
    def curated_dataset(
        context: dg.AssetExecutionContext, raw_logs: Artifact[RawLogsManifest]
    ) -> dg.MaterializeResult[Any]:
        """The training and validation sets: accepted examples, deduplicated, redacted and without benchmark questions.

        If a check is red: log or review more feedback (enough_examples), or look at the examples in the check's
        metadata and correct or retract them (no_benchmark_overlap, targets_parse), then materialize raw_logs again.

        `prompt_completion/` is for SFT, `preference/` for DPO and `unpaired_preference/` for KTO. `card.md` describes
        the dataset with a sample, and `provenance.csv` says where each example came from.
        """
        with job_step(loop, context) as step:
            artifact = build_dataset(step.loop, raw_logs)
            step.made(f"built the dataset {artifact.manifest.version}", dataset=artifact.manifest.version)
        manifest = artifact.manifest
        left_out = ", ".join(f"{count:,} ({reason})" for reason, count in manifest.left_out.items())
        context.log.info(
            f"{counted(manifest.train - manifest.replayed, 'training example')} + {manifest.replayed:,} replay, "
            f"{manifest.validation:,} for validation, {counted(manifest.preference_pairs, 'preference pair')}, "
            f"{counted(manifest.undesirable, 'undesirable completion')}; left out: {left_out or 'none'}"
        )
        if manifest.replay_reason:
            context.log.info(f"replay examples, chosen by auto: {manifest.replay_reason}")
        return materialized(artifact, _metadata(artifact))

    return curated_dataset


def _metadata(artifact: Artifact[DatasetManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    # The sample at the end of the card is personal text, which must not enter Dagster's database. Neither must
    # provenances, which may be titles of notes.
    card = (artifact.path / DATASET_CARD).read_text(encoding="utf-8").partition(f"\n{SAMPLE_HEADING}\n")[0]
    return {
        "training examples": manifest.train - manifest.replayed,
        "validation examples": manifest.validation,
        "replay examples": manifest.replayed,
        **({"reason for the replay": manifest.replay_reason} if manifest.replay_reason else {}),
        "preference pairs": manifest.preference_pairs,
        "left out": sum(manifest.left_out.values()),
        "redacted values": sum(manifest.redacted.values()),
        "dagster/row_count": manifest.train + manifest.validation,
        "card": dg.MetadataValue.md(card),
        "desirable answers": manifest.desirable,
        "undesirable answers": manifest.undesirable,
        "sources": _table(["source", "examples"], manifest.sources.items()),
        "left out, by reason": _table(["reason", "examples"], manifest.left_out.items()),
        "redacted values, by kind": _table(["kind", "number"], manifest.redacted.items()),
        "near-duplicates of the benchmark": list(manifest.near_benchmark[:OFFENDERS_SHOWN]),
        "conflicts": manifest.left_out.get(CONFLICT, 0),
        "conflicts, sample": [f"{kept} was kept, {other} has another answer" for kept, other in manifest.conflicts],
    }


def _table(headings: list[str], rows: Iterable[tuple[Any, ...]]) -> dg.MetadataValue[Any]:
    return dg.MetadataValue.md(markdown_table(headings, rows))
