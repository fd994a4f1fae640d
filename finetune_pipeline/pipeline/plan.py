"""The plan of a training run: which settings fit a memory size, and what each adapter needs there."""

from contextlib import suppress
from dataclasses import dataclass, replace

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline.source_sync import limited, reader_for
from finetune_pipeline.settings import FilesSource, LoopSettings, PresetName, TrainingSettings
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.estimate import MemoryEstimate, TimeEstimate, estimate_memory, estimate_time
from finetune_pipeline.training.presets import (
    CHANGEABLE,
    PRESETS,
    USABLE,
    Machine,
    does_not_fit,
    first_fitting,
    fits,
    machine_of,
    nearest_preset,
    smaller_settings,
    with_preferred,
)

ASSUMED_EXAMPLES = 1_000
"""Training examples of a plan for which there is no data."""


@dataclass(frozen=True)
class PlannedTraining:
    """A training run with its estimated memory and time; without a time if it does not fit."""

    settings: TrainingSettings
    memory: MemoryEstimate
    time: TimeEstimate | None


@dataclass(frozen=True)
class TrainingPlan:
    """What fits a machine.

    Attributes:
        machine: to train on.
        options: each adapter with and without gradient checkpointing: the largest micro-batch that fits, else the
            smallest one.
        chosen: the first settings that fit; None if none do.
        refusal: why none do, and what to change; empty if some do.
    """

    machine: Machine
    options: tuple[PlannedTraining, ...]
    chosen: PlannedTraining | None
    refusal: str


def plan_training(
    architecture: Architecture,
    given: TrainingSettings,
    *,
    examples: int,
    preset: PresetName | None = None,
    vram: float | None = None,
    length: int | None = None,
) -> TrainingPlan:
    """Plan a training run for a preset's memory, a GPU of `vram` GB, or else this machine.

    Args:
        given: settings that the plan keeps where they are set; their preset counts if neither size is named.
        length: tokens of the longest example; None for the preset's.
    """
    preset = preset or (given.preset if vram is None else None)
    if preset is not None:
        machine = machine_of(preset)
    elif vram is not None:
        machine = replace(machine_of(nearest_preset(vram)), bytes=vram * 2**30 * USABLE)
    else:
        from finetune_pipeline.training.hardware import this_machine

        machine = this_machine()
    if length is not None:
        given = TrainingSettings(**given.model_dump(include=given.model_fields_set) | {"max_length": length})
    nearest = preset or ("cpu" if machine.device == "cpu" else nearest_preset(machine.bytes / 2**30 / USABLE))
    preferred = with_preferred(given, PRESETS[nearest])
    free = CHANGEABLE - given.model_fields_set
    best = first_fitting(architecture, preferred, free, machine)
    chosen, refusal = None, ""
    if best is None:
        where = f"preset {preset}" if preset else f"{vram:g} GB" if vram else "this machine"
        refusal = does_not_fit(architecture, preferred, free, machine, where)
    else:
        chosen = _planned(architecture, best, machine, examples)
    options = []
    batch_settings = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    start = best or preferred
    update = start.per_device_train_batch_size * start.gradient_accumulation_steps
    whole = {"per_device_train_batch_size": update, "gradient_accumulation_steps": 1}
    for adapter in ("lora", "qlora"):
        for checkpointing in (False, True):
            changes = {**whole, "adapter": adapter, "gradient_checkpointing": checkpointing}
            candidates = list(smaller_settings(start.model_copy(update=changes), batch_settings))
            option = next((one for one in candidates if fits(architecture, one, machine)), candidates[-1])
            options.append(_planned(architecture, option, machine, examples))
    return TrainingPlan(machine, tuple(options), chosen, refusal)


def expected_examples(loop: LoopSettings) -> tuple[int, str]:
    """Return how many examples a training of a loop would have, and what that number is, in words."""
    dataset = get_latest(DatasetManifest, loop.name)
    if dataset is not None:
        return dataset.manifest.train, f"dataset {dataset.manifest.version}"
    rows = 0
    for source in loop.sources:
        if isinstance(source, FilesSource):
            with suppress(SourceError):  # `finetune check` names what cannot be read; a plan does without it
                records = limited(reader_for(source, loop.curation.redaction)(source, None), source)
                rows += sum(isinstance(one, SourceRecord) for one in records)
    return (rows, "the rows of its sources") if rows else (ASSUMED_EXAMPLES, "assumed, since it has no data yet")


def _planned(
    architecture: Architecture, settings: TrainingSettings, machine: Machine, examples: int
) -> PlannedTraining:
    """Estimate a training run whose examples have half the maximum length."""
    memory = estimate_memory(architecture, settings, machine.device, bf16=machine.bf16)
    time = estimate_time(
        architecture,
        settings,
        examples=examples,
        tokens=settings.max_length // 2,
        rate=machine.rate,
        source=machine.source,
    )
    return PlannedTraining(settings, memory, time if memory.bytes <= machine.bytes else None)
