"""The asset lora_adapter: the trained LoRA adapter."""

import time
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.orchestration.resources import loop_asset, materialized, picture
from finetune_pipeline.orchestration.training_config import training_config
from finetune_pipeline.pipeline.train import describe_progress, settings_of_run, train_adapter
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.training.job import RESULT, Progress, TrainingResult
from finetune_pipeline.training.loss_curve import loss_curve_png

REPORT_SECONDS = (5.0, 60.0)
"""Shortest and longest time between two reports of the progress; in between, 2 % of the elapsed time."""

MANIFEST_FIELDS = (
    "method", "method_reason", "mode", "mode_reason", "examples", "too_long", "rejected", "steps", "best_step",
    "loss_before", "loss_after", "tokens_per_second", "wall_seconds", "device", "version",
)  # fmt: skip
"""Fields of the manifest that are metadata under the same name."""


def lora_adapter_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset lora_adapter of a loop."""
    Config = training_config(loop)

    @loop_asset(
        loop,
        AdapterManifest,
        "curated_dataset",
        depends_on=(loop.base_model, loop.system_prompt, loop.training),
        kinds={"pytorch", "huggingface"},
    )
    def lora_adapter(
        context: dg.AssetExecutionContext,
        config: Config,  # type: ignore[valid-type]
        curated_dataset: Artifact[DatasetManifest],
    ) -> dg.MaterializeResult[Any]:
        """The LoRA adapter, trained by SFT, DPO or KTO on the dataset.

        If it fails: the message says which setting or file to change. A killed training run resumes from its last
        complete checkpoint when it is materialized again with the same dataset and settings.
        """
        started = last_report = time.monotonic()

        def report(progress: Progress) -> None:
            nonlocal last_report
            now = time.monotonic()
            # Every report is an event in Dagster's database, so a long training run reports less often.
            shortest, longest = REPORT_SECONDS
            due = now - last_report >= min(longest, max(shortest, 0.02 * (now - started)))
            if due or progress.step in (1, progress.steps):
                last_report = now
                context.log.info(describe_progress(progress))
                context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=_measurements(progress)))

        settings = settings_of_run(loop, config.model_dump())  # type: ignore[attr-defined]
        artifact = train_adapter(loop, settings, curated_dataset, context.run.run_id, report, context.log.info)
        metadata = _metadata(artifact)
        for rejection in metadata.get("rejections", []):
            context.log.warning(f"examples were left out: {rejection}")
        return materialized(artifact, metadata)

    return lora_adapter


def _measurements(progress: Progress) -> dict[str, Any]:
    """Return what Dagster charts while the adapter trains."""
    measurements: dict[str, Any] = {
        "step": progress.step,
        "epoch": progress.epoch,
        "train_loss": progress.loss,
        "learning_rate": progress.learning_rate,
        "tokens_per_second": progress.tokens_per_second,
        "seconds_left": progress.seconds_left,
    }
    if progress.memory_bytes is not None:
        measurements["memory_mb"] = progress.memory_bytes / 1e6
    if progress.validation_loss is not None:
        measurements["validation_loss"] = progress.validation_loss
    return measurements


def _metadata(artifact: Artifact[AdapterManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    result = TrainingResult.model_validate_json((artifact.path / RESULT).read_bytes())
    metadata = {
        **{name: getattr(manifest, name) for name in MANIFEST_FIELDS},
        "train_loss": manifest.train_loss,
        "peak_memory_mb": manifest.peak_memory_bytes / 1e6,
        "seed": int(manifest.settings["seed"]),
        "loss_curve": picture(loss_curve_png(result), "loss curve"),
        "path": dg.MetadataValue.path(artifact.path),
    }
    if result.rejections:
        metadata["rejections"] = [f"{one.count} {one.split}: {one}" for one in result.rejections]
    return metadata
