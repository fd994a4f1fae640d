"""Train the adapter of a dataset: the work of the asset lora_adapter."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, get_or_create, package_versions, version_of, wait_for_lock
from finetune_pipeline.curation.dataset_files import PREFERENCE, PROMPT_COMPLETION, UNPAIRED_PREFERENCE, type_folder
from finetune_pipeline.database import connect
from finetune_pipeline.export.base import base_hash, dequantized_base, resolve_base_model
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.pipeline.incremental import training_start, write_subset
from finetune_pipeline.pipeline.loop_files import PACKAGES
from finetune_pipeline.registry.trainings import Training, record_training
from finetune_pipeline.settings import LoopSettings, TrainingSettings, home
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.auto_settings import CHOSEN, choose_settings
from finetune_pipeline.training.checkpoints import last_complete, step_of
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import ADAPTER, CHECKPOINTS, JobConfig, Progress, TrainingError
from finetune_pipeline.training.method_choice import DatasetCounts, choose_method
from finetune_pipeline.training.presets import PRESETS, apply_preset

DATASET_TYPES = {"sft": PROMPT_COMPLETION, "dpo": PREFERENCE, "kto": UNPAIRED_PREFERENCE}
"""Training method -> the dataset type that it trains on, which is a folder of the dataset."""


def left_to_preset(loop: LoopSettings) -> set[str]:
    """Return the names of the settings that the loop's preset fills."""
    preset = loop.training.preset
    return set() if preset is None else set(PRESETS[preset].preferred) - loop.training.model_fields_set


def left_to_auto(loop: LoopSettings) -> set[str]:
    """Return the names of the settings that `training: auto` chooses for the loop."""
    return set(CHOSEN) - loop.training.model_fields_set if loop.training.auto else set()


def with_chosen(settings: TrainingSettings, base_model: str, examples: int) -> tuple[TrainingSettings, str]:
    """Return settings with what auto chooses, and the reason; unchanged, without a reason, if it chooses nothing.

    Args:
        settings: with the method that trains.
        base_model: as in the loop's YAML.
        examples: to train on, without replay.

    Raises:
        TrainingError: the size of the base model is unknown.
    """
    free = set(CHOSEN) - settings.model_fields_set if settings.auto else set()
    fixed = settings.model_copy(update={"auto": False})  # with the same values, the adapter is the same
    if not free:
        return fixed, ""
    if settings.method != "sft":
        return fixed, f"auto chooses nothing for {settings.method}, which was not measured; these are the defaults"
    try:
        architecture = architecture_of(dequantized_base(base_model))
    except TrainingError as error:
        needed = " and ".join(f"training.{name}" for name in CHOSEN if name in free)
        raise TrainingError(f"training: auto has to know the size of the base model; set {needed}: {error}") from error
    chosen = choose_settings(examples, architecture.parameters)
    values = {name: getattr(chosen, name) for name in CHOSEN if name in free}
    named = ", ".join(
        f"{name} {str(value).lower() if isinstance(value, bool) else f'{value:g}'}" for name, value in values.items()
    )
    return fixed.model_copy(update=values), f"{named}, chosen by auto {chosen.reason}"


def settings_of_run(loop: LoopSettings, overrides: dict[str, Any]) -> TrainingSettings:
    """Return the loop's training settings with those that were set for one run.

    Args:
        overrides: setting -> value; None leaves a setting to the loop's preset or to auto if that fills it.
    """
    left = left_to_preset(loop) | left_to_auto(loop)
    given = {name: value for name, value in overrides.items() if value is not None or name not in left}
    return TrainingSettings.model_validate(loop.training.model_dump(exclude_unset=True) | given)


def adapter_settings(loop: LoopSettings, settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that an adapter depends on."""
    return {**settings.model_dump(mode="json", exclude={"report_to"}), "system_prompt": loop.system_prompt}


def train_adapter(
    loop: LoopSettings,
    settings: TrainingSettings,
    dataset: Artifact[DatasetManifest],
    run_id: str,
    on_progress: Callable[[Progress], None],
    log: Callable[[str], None],
) -> Artifact[AdapterManifest]:
    """Return the adapter for this dataset and these settings, trained unless it exists, and record the training run.

    A machine trains one adapter at a time. A file lock ensures that, not one of Dagster's pools: a killed run keeps its
    slot in a pool, and the next run would wait forever.
    """
    base, held = resolve_base_model(loop.base_model), dataset.manifest
    counts = DatasetCounts(
        desirable=held.train - held.replayed, pairs=held.preference_pairs, undesirable=held.undesirable
    )
    method, reason = choose_method(settings.method, counts)
    settings = settings.model_copy(update={"method": method})
    if settings.preset is not None:
        filled_by_preset = PRESETS[settings.preset].preferred
        settings = apply_preset(settings, architecture_of(dequantized_base(loop.base_model)))
        filled = ", ".join(f"{name} {getattr(settings, name)}" for name in filled_by_preset)
        log(f"with preset {settings.preset}: {filled}")
    dataset_type = DATASET_TYPES[method]
    begin = training_start(loop, settings, dataset, dataset_type, base_hash(base))
    log(f"{begin.mode} training, {begin.reason}; {reason}")
    settings, why = with_chosen(settings, loop.base_model, begin.new or held.desirable)
    if why:
        log(why)

    inputs = {DatasetManifest.stage: held.version, "base_model": base_hash(base)}
    datasets = {held.version: dataset.sha256}
    if begin.adapter is not None:
        inputs["initial_adapter"] = begin.adapter.manifest.version
        datasets = {**begin.adapter.manifest.datasets, **datasets}
    hashed_settings = {
        **adapter_settings(loop, settings),
        "mode": begin.mode,  # as it is trained, which differs from the setting where incremental is not possible
    }

    def make(folder: Path) -> dict[str, Any]:
        examples = type_folder(dataset.path, dataset_type)
        if begin.rows is not None:
            examples = write_subset(examples, begin.rows, folder / dataset_type)
        job = JobConfig(
            base_model=base,
            dataset=examples if dataset_type == PROMPT_COMPLETION else dataset.path / PROMPT_COMPLETION,
            preferences=None if dataset_type == PROMPT_COMPLETION else examples,
            system_prompt=loop.system_prompt,
            output=folder,
            settings=settings,
            initial_adapter=begin.adapter.path / ADAPTER if begin.adapter else None,
        )
        with wait_for_lock(home() / "training", "training run", log):
            checkpoint = last_complete(folder / CHECKPOINTS, job.key)
            if checkpoint is not None:
                log(f"resumes from the checkpoint of step {step_of(checkpoint)}")
            result = train(job, on_progress)
        if begin.rows is not None:
            shutil.rmtree(examples)  # personal data stays in the dataset and is not copied beside the weights
        measured = {**result.model_dump(), "rejected": result.rejected}
        return {
            "inputs": inputs,
            "settings": hashed_settings,
            "packages": package_versions(*PACKAGES),
            "base_model": str(base),
            "base_hash": inputs["base_model"],
            "mode": begin.mode,
            "mode_reason": begin.reason,
            "new_examples": begin.new,
            "method_reason": reason,
            "settings_reason": why,
            "datasets": datasets,
            "watermark": held.watermark,
            **{name: measured[name] for name in AdapterManifest.model_fields if name in measured},
        }

    version = version_of(inputs, hashed_settings)
    adapter = get_or_create(AdapterManifest, loop.name, version, make, keep=True)
    record_training(connect(), training_of(adapter.manifest, run_id))
    return adapter


def training_of(manifest: AdapterManifest, run_id: str) -> Training:
    """Return what the registry keeps of a training run after its adapter is deleted."""
    known = {
        **manifest.model_dump(),
        "id": manifest.version,
        "run_id": run_id,
        "dataset": manifest.inputs[DatasetManifest.stage],
        "initial_adapter": manifest.inputs.get("initial_adapter"),
        "method": "{method}, {adapter}".format_map(manifest.settings),
    }
    return Training(**{name: known[name] for name in Training.model_fields})


def describe_progress(progress: Progress) -> str:
    """Return one line on how far a training run is."""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    memory = "" if progress.memory_bytes is None else f"{progress.memory_bytes / 2**30:.1f} GiB, "
    validation = "" if progress.validation_loss is None else f"validation loss {progress.validation_loss:.3f}, "
    return (
        f"training {progress.step / progress.steps:.0%}, step {progress.step} of {progress.steps}, "
        f"epoch {progress.epoch:.1f}, loss {progress.loss:.3f}, {validation}"
        f"learning rate {progress.learning_rate:.2g}, {progress.tokens_per_second:,.0f} tokens/s, "
        f"{memory}{minutes}:{seconds:02d} left"
    )
