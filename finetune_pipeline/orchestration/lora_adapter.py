"""The asset lora_adapter: the trained LoRA adapter."""

import time
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.export.base import base_stamp
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.orchestration.job_steps import job_step
from finetune_pipeline.orchestration.resources import loop_asset, materialized, picture
from finetune_pipeline.orchestration.training_config import training_config
from finetune_pipeline.pipeline.required_checks import dataset_of
from finetune_pipeline.pipeline.train import adapter_settings, describe_progress, settings_of_run, train_adapter
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.training.job import RESULT, Progress, TrainingResult
from finetune_pipeline.training.loss_curve import loss_curve_png
from finetune_pipeline.validation_messages import without_values

TRAINING_LOSS, VALIDATION_LOSS = "training loss", "validation loss"
THROUGHPUT = "throughput (tokens/s)"
"""Metadata that Dagster charts over the steps of a run and over all runs."""

LOG_SECONDS, OBSERVATION_SECONDS = 15.0, 60.0
"""Longest time between two reports of training, in the log and as an observation; at first there are 5 seconds."""


def lora_adapter_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset lora_adapter of a loop."""
    Config = training_config(loop)

    @loop_asset(
        loop,
        AdapterManifest,
        "curated_dataset",
        depends_on=(base_stamp(loop.base_model), adapter_settings(loop, loop.training)),
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
        started = last_log = last_observation = time.monotonic()

        def report(progress: Progress) -> None:
            nonlocal last_log, last_observation
            now, at_an_end = time.monotonic(), progress.step in (1, progress.steps)
            # Both are events in Dagster's database, so a long training run reports less often; people who watch it
            # read the log, and a chart needs fewer points.
            interval = max(5.0, 0.02 * (now - started))
            if at_an_end or now - last_log >= min(LOG_SECONDS, interval):
                last_log = now
                context.log.info(describe_progress(progress))
                step.progress(progress.model_dump(mode="json"), describe_progress(progress))
            if at_an_end or now - last_observation >= min(OBSERVATION_SECONDS, interval):
                last_observation = now
                context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=_measurements(progress)))

        with job_step(loop, context) as step:
            if step.dataset is not None:
                curated_dataset = dataset_of(loop.name, step.dataset)
            given = config.model_dump() | step.training  # type: ignore[attr-defined]
            settings = settings_of_run(step.loop, given)
            artifact = train_adapter(step.loop, settings, curated_dataset, context.run.run_id, report, context.log.info)
            step.made(f"trained the adapter {artifact.manifest.version}", adapter=artifact.manifest.version)
        metadata = _metadata(artifact)
        for rejection in metadata.get("rejections", []):
            context.log.warning(f"examples were left out: {rejection}")
        return materialized(artifact, metadata)

    return lora_adapter


def _measurements(progress: Progress) -> dict[str, Any]:
    """Return what Dagster charts while the adapter trains."""
    measurements: dict[str, Any] = {
        "step": progress.step,
        "epoch": round(progress.epoch, 2),
        TRAINING_LOSS: round(progress.loss, 4),
        "learning rate": float(f"{progress.learning_rate:.3g}"),
        THROUGHPUT: round(progress.tokens_per_second),
        "time left (s)": round(progress.seconds_left),
    }
    if progress.memory_bytes is not None:
        measurements["memory (GiB)"] = round(progress.memory_bytes / 2**30, 2)
    if progress.validation_loss is not None:
        measurements[VALIDATION_LOSS] = round(progress.validation_loss, 4)
    return measurements


def _metadata(artifact: Artifact[AdapterManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    result = TrainingResult.model_validate_json((artifact.path / RESULT).read_bytes())
    metadata: dict[str, Any] = {
        VALIDATION_LOSS: round(manifest.loss_after, 4),
        "validation loss before training": round(manifest.loss_before, 4),
        "steps": manifest.steps,
        "duration (s)": round(manifest.wall_seconds, 1),
        THROUGHPUT: round(manifest.tokens_per_second),
        "peak memory (GiB)": round(manifest.peak_memory_bytes / 2**30, 2),
        "loss curve": dg.MetadataValue.md(picture(loss_curve_png(result), "loss curve")),
        TRAINING_LOSS: round(manifest.train_loss, 4),
        "method": manifest.method,
        "reason for the method": manifest.method_reason,
        "mode": manifest.mode,
        "reason for the mode": manifest.mode_reason,
        "examples": manifest.examples,
        "left out, too long": manifest.too_long,
        "left out, rejected by the chat template": manifest.rejected,
        "seed": int(manifest.settings["seed"]),
        "device": manifest.device,
    }
    if manifest.settings_reason:
        metadata["reason for the settings"] = manifest.settings_reason
    if manifest.best_step is not None:
        metadata["best step"] = manifest.best_step
    if result.rejections:
        metadata["rejections"] = [f"{one.count} {one.split}: {without_values(one.reason)}" for one in result.rejections]
    return metadata
