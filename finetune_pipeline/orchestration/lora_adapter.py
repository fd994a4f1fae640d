"""The asset lora_adapter: the training, in a process of its own, watched from here."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin

import dagster as dg
from pydantic import Field, create_model

from finetune_pipeline.artifacts import Artifact, get_or_create, package_versions, version_of, wait_for_lock
from finetune_pipeline.curation.dataset_files import PREFERENCE, PROMPT_COMPLETION, UNPAIRED_PREFERENCE, type_folder
from finetune_pipeline.database import connect
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.orchestration.io_manager import picture, pointers_key, upstream
from finetune_pipeline.pipeline.incremental import start, write_subset
from finetune_pipeline.pipeline.loop_files import PACKAGES
from finetune_pipeline.registry.training_jobs import TrainingJob, record_training_job
from finetune_pipeline.settings import LoopSettings, TrainingSettings, home
from finetune_pipeline.subprocess_lifetime import die_with_run
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.checkpoints import last_complete, step_of
from finetune_pipeline.training.job import ADAPTER, CHECKPOINTS, RESULT, JobConfig, Progress, TrainingResult
from finetune_pipeline.training.launch import train
from finetune_pipeline.training.loss_curve import curve_png
from finetune_pipeline.training.methods import Counts, choose
from finetune_pipeline.training.presets import PRESETS, settled

REPORT_EVERY_SECONDS = 5.0
PARTS = {"sft": PROMPT_COMPLETION, "dpo": PREFERENCE, "kto": UNPAIRED_PREFERENCE}
"""What a method trains on, in the dataset's folder."""

NOT_IN_THE_LAUNCHPAD = {
    "lora_target_modules",
    "trainable_token_indices",
    "loss_type",
    "loss_weights",
    "report_to",
    "preset",
}
"""Settings that Dagster's config has no type for, or that fill others."""


def training_config(loop: LoopSettings) -> type[dg.Config]:
    """Dagster config with one field for each plain hyperparameter; the loop's YAML gives the defaults.

    What the loop leaves to its preset is None here and filled when the step runs: a base model that is not there, or
    does not fit, is an error of this loop's training, and not of loading all loops.
    """
    left = _left_to_preset(loop)
    fields: dict[str, Any] = {}
    for name, field in TrainingSettings.model_fields.items():
        if name in left:
            told = f"{field.description} Empty: preset {loop.training.preset} fills it."
            # Dagster's config has no optional Literal.
            kind: Any = str if get_origin(field.annotation) is Literal else field.annotation
            fields[name] = (kind | None, Field(default=None, description=told))
        elif name not in NOT_IN_THE_LAUNCHPAD:
            default = getattr(loop.training, name)
            fields[name] = (field.annotation, Field(default=default, description=field.description))
    return create_model("TrainingConfig", __base__=dg.Config, **fields)


def run_settings(loop: LoopSettings, config: dict[str, Any]) -> TrainingSettings:
    """The settings of one run: the loop's, with the launchpad's instead; what neither sets is left to the preset."""
    left = _left_to_preset(loop)
    said = {name: value for name, value in config.items() if value is not None or name not in left}
    return TrainingSettings.model_validate(loop.training.model_dump(exclude_unset=True) | said)


def _left_to_preset(loop: LoopSettings) -> set[str]:
    """Names of the settings that the loop's preset fills."""
    preset = loop.training.preset
    return set() if preset is None else set(PRESETS[preset].wish) - loop.training.model_fields_set


def lora_adapter_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset lora_adapter of a loop."""
    Config = training_config(loop)

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        ins={"curated_dataset": upstream(loop)},
        kinds={"pytorch", "huggingface"},
    )
    def lora_adapter(
        context: dg.AssetExecutionContext,
        config: Config,  # type: ignore[valid-type]
        curated_dataset: Artifact[DatasetManifest],
    ) -> dg.MaterializeResult[Any]:
        """The trained LoRA adapter.

        By supervised fine-tuning on the answers only, by DPO on pairs of a corrected and the model's own answer, or by
        KTO on answers found good and bad; `method: auto` chooses by what the dataset holds. The training
        is its own process; a killed one goes on from its last checkpoint when it is started again with the same dataset
        and settings.
        """
        die_with_run()
        settings = run_settings(loop, config.model_dump())  # type: ignore[attr-defined]
        artifact = adapter(loop, settings, curated_dataset, _reporter(context), context.log.info)
        record_training_job(connect(), training_run(artifact.manifest, context.run.run_id))
        metadata = _metadata(artifact)
        for rejection in metadata.get("rejections", []):
            context.log.warning(f"examples were left out: {rejection}")
        return dg.MaterializeResult(value=artifact, metadata=metadata)

    return lora_adapter


def adapter(
    loop: LoopSettings,
    settings: TrainingSettings,
    dataset: Artifact[DatasetManifest],
    on_progress: Callable[[Progress], None],
    tell: Callable[[str], None],
) -> Artifact[AdapterManifest]:
    """The adapter that this dataset and these settings give, trained if it is not there yet.

    One training runs at a time. A lock of the process sees to it and no pool of Dagster's: a run that is killed keeps
    its place in a pool, and the next one would wait for ever.
    """
    base = resolve_base_model(loop.base_model)
    held = dataset.manifest
    choice = choose(
        settings.method, Counts(good=held.train - held.replayed, pairs=held.preference_pairs, bad=held.undesirable)
    )
    settings = _settled(loop.base_model, settings.model_copy(update={"method": choice.method}), tell)
    part = PARTS[choice.method]
    begin = start(loop, settings, dataset, part, base_hash(base))
    tell(f"{begin.mode} training, {begin.reason}; by {choice.reason}")
    inputs = {"curated_dataset": dataset.manifest.version, "base_model": base_hash(base)}
    if begin.adapter is not None:
        inputs["initial_adapter"] = begin.adapter.manifest.version
    shaping = {**settings.model_dump(mode="json", exclude={"report_to"}), "system_prompt": loop.system_prompt}
    shaping["mode"] = begin.mode  # what is done, not what was wished for

    def make(folder: Path) -> dict[str, Any]:
        examples = type_folder(dataset.path, part)
        where = examples if begin.rows is None else write_subset(examples, begin.rows, folder / part)
        job = JobConfig(
            base_model=base,
            dataset=where if part == PROMPT_COMPLETION else dataset.path / PROMPT_COMPLETION,
            preferences=None if part == PROMPT_COMPLETION else where,
            system_prompt=loop.system_prompt,
            output=folder,
            settings=settings,
            initial_adapter=begin.adapter.path / ADAPTER if begin.adapter else None,
        )
        with wait_for_lock(home() / "training", "training", tell):
            done = last_complete(folder / CHECKPOINTS, job.key)
            if done is not None:
                tell(f"goes on from the checkpoint of step {step_of(done)}")
            result = train(job, on_progress)
        if begin.rows is not None:
            shutil.rmtree(where)  # what people said lies in the dataset, and need not lie beside the weights as well
        return {
            "inputs": inputs,
            "settings": shaping,
            "packages": package_versions(*PACKAGES),
            "base_model": str(base),
            "base_hash": inputs["base_model"],
            "mode": begin.mode,
            "mode_reason": begin.reason,
            "new_examples": begin.new,
            "method_reason": choice.reason,
            "datasets": _learned_from(dataset, begin.adapter),
            "watermark": dataset.manifest.watermark,
            **_figures(result),
        }

    return get_or_create(AdapterManifest, loop.name, version_of(inputs, shaping), make, keep=True)


def _learned_from(dataset: Artifact[DatasetManifest], initial: Artifact[AdapterManifest] | None) -> dict[str, str]:
    return {**(initial.manifest.datasets if initial else {}), dataset.manifest.version: dataset.sha256}


def _settled(base_model: str, settings: TrainingSettings, tell: Callable[[str], None]) -> TrainingSettings:
    if settings.preset is None:
        return settings
    filled = settled(settings, architecture_of(base_model))
    values = ", ".join(f"{name} {getattr(filled, name)}" for name in PRESETS[settings.preset].wish)
    tell(f"with preset {settings.preset}: {values}")
    return filled


def training_run(manifest: AdapterManifest, run_id: str) -> TrainingJob:
    """What the registry keeps of a training.

    Args:
        manifest: of the adapter.
        run_id: Dagster's run, which knows how it went.
    """
    known = {**manifest.model_dump(), "id": manifest.version, "run_id": run_id}
    known |= {
        "dataset": manifest.inputs["curated_dataset"],
        "initial_adapter": manifest.inputs.get("initial_adapter"),
        "method": "{method}, {adapter}".format_map(manifest.settings),
    }
    return TrainingJob(**{name: known[name] for name in TrainingJob.model_fields})


def _figures(result: TrainingResult) -> dict[str, Any]:
    known = {**result.model_dump(), "rejected": result.rejected}
    return {name: known[name] for name in AdapterManifest.model_fields if name in known}


def _reporter(context: dg.AssetExecutionContext) -> Callable[[Progress], None]:
    """Says the progress in the run's log, and as observations that Dagster charts, at most every few seconds."""
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < REPORT_EVERY_SECONDS and progress.step not in (1, progress.steps):
            return
        last = time.monotonic()
        context.log.info(describe(progress))
        figures = {
            "step": progress.step,
            "epoch": progress.epoch,
            "training_loss": progress.loss,
            "learning_rate": progress.learning_rate,
            "tokens_per_second": progress.tokens_per_second,
            "seconds_left": progress.eta_seconds,
        }
        if progress.memory_bytes is not None:
            figures["memory_mb"] = progress.memory_bytes / 1e6
        if progress.validation_loss is not None:
            figures["validation_loss"] = progress.validation_loss
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=figures))

    return report


def describe(progress: Progress) -> str:
    """One line on how far a training is."""
    minutes, seconds = divmod(round(progress.eta_seconds), 60)
    memory = "" if progress.memory_bytes is None else f"{progress.memory_bytes / 2**30:.1f} GiB, "
    validated = "" if progress.validation_loss is None else f"held out {progress.validation_loss:.3f}, "
    return (
        f"training step {progress.step} of {progress.steps}, epoch {progress.epoch:.1f}, loss {progress.loss:.3f}, "
        f"{validated}learning rate {progress.learning_rate:.2g}, {progress.tokens_per_second:,.0f} tokens/s, "
        f"{memory}{minutes}:{seconds:02d} left"
    )


def _metadata(artifact: Artifact[AdapterManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    result = TrainingResult.model_validate_json((artifact.path / RESULT).read_bytes())
    return {
        "method": manifest.method,
        "method_reason": manifest.method_reason,
        "loss_before": manifest.loss_before,
        "loss_after": manifest.loss_after,
        "training_loss": manifest.train_loss,
        "tokens_per_second": manifest.tokens_per_second,
        "wall_seconds": manifest.wall_seconds,
        "peak_memory_mb": manifest.peak_memory_bytes / 1e6,
        "steps": manifest.steps,
        "best_step": manifest.best_step,
        "mode": manifest.mode,
        "mode_reason": manifest.mode_reason,
        "examples": manifest.examples,
        "too_long": manifest.too_long,
        "rejected": manifest.rejected,
        **(
            {"rejections": [f"{one.count} {one.split}: {one}" for one in result.rejections]}
            if result.rejections
            else {}
        ),
        "device": manifest.device,
        "seed": int(manifest.settings["seed"]),
        "loss_curve": picture(curve_png(result), "loss curve"),
        "version": manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }
