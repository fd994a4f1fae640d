"""The plan of a training run: which settings fit a memory size, and what each adapter needs there."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION, read_split
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import feedback, interactions
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.build_dataset import replay_is_chosen
from finetune_pipeline.pipeline.row_settings import TokenLengths
from finetune_pipeline.pipeline.source_sync import limited, reader_for
from finetune_pipeline.records import Turn
from finetune_pipeline.settings import FilesSource, LoopSettings, PresetName, TrainingSettings
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.auto_settings import choose_replay
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
    rate_of,
    smaller_settings,
    uses_bf16,
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
        is_for_preset: the machine is a preset's, not this one.
    """

    machine: Machine
    options: tuple[PlannedTraining, ...]
    chosen: PlannedTraining | None
    refusal: str
    is_for_preset: bool = False


def plan_training(
    architecture: Architecture,
    given: TrainingSettings,
    *,
    examples: int,
    preset: PresetName | None = None,
    vram: float | None = None,
    length: int | None = None,
    mean_tokens: float | None = None,
) -> TrainingPlan:
    """Plan a training run for a preset's memory, a GPU of `vram` GB, or else this machine.

    Args:
        given: settings that the plan keeps where they are set; their preset counts if neither size is named.
        length: tokens of the longest example; None for the preset's.
        mean_tokens: of an example; None if it is unknown.
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
        chosen = _planned(architecture, best, machine, examples, mean_tokens)
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
            options.append(_planned(architecture, option, machine, examples, mean_tokens))
    return TrainingPlan(machine, tuple(options), chosen, refusal, preset is not None)


@dataclass(frozen=True)
class ExpectedData:
    """What a training of a loop would have.

    Attributes:
        examples: with replay.
        new: of these, without replay.
        mean_tokens: of an example, with the system prompt and an estimate of the chat template; None if unknown.
        origin: what the numbers are, in words.
    """

    examples: int
    new: int
    mean_tokens: float | None
    origin: str


def expected_data(loop: LoopSettings, tokenizer: Path | None = None) -> ExpectedData:
    """Return what a training of a loop would have: its newest dataset, or else what its logs and sources hold.

    Args:
        tokenizer: folder of the base model's; tokens are estimated without one.
    """
    lengths = TokenLengths(str(tokenizer or loop.base_model), loop.system_prompt)

    def mean(sample: Iterable[SourceRecord]) -> float | None:
        counts = [lengths.prompt(one) + lengths.answer(one) for one in islice(sample, _SAMPLE)]
        return sum(counts) / len(counts) if counts else None

    dataset = get_latest(DatasetManifest, loop.name)
    if dataset is not None:
        held = dataset.manifest
        rows = read_split(dataset.path, PROMPT_COMPLETION, "train", ["prompt", "history", "completion"])
        with suppress(CurationError):  # an earlier version of the project wrote it
            return ExpectedData(held.train, held.desirable, mean(map(_record, rows)), f"dataset {held.version}")
    logged, rated = _logged(loop)
    records = [*logged, *_declared(loop)]
    new = rated + len(records) - len(logged)
    if not new:
        return ExpectedData(ASSUMED_EXAMPLES, ASSUMED_EXAMPLES, None, "assumed, since it has no data yet")
    replay = 0
    if loop.curation.replay is not None:
        ratio = choose_replay(new)[0] if replay_is_chosen(loop) else loop.curation.replay_ratio
        with suppress(CurationError):  # `finetune check` names what cannot be read
            replay = min(round(ratio * new), len(loop_files.replay(loop).examples))
    origin = (
        "the rows of its sources"
        if not logged
        else "the rated interactions of its logs"
        if rated == new
        else ("the rows of its sources and rated interactions of its logs")
    )
    return ExpectedData(new + replay, new, mean(records), origin + (", with replay" if replay else ""))


_SAMPLE = 500
"""Examples whose tokens are counted."""


def _record(row: dict[str, Any]) -> SourceRecord:
    history = tuple(Turn(role=turn["role"], content=turn["content"]) for turn in row["history"] or ())
    return SourceRecord("", row["prompt"], row["completion"], history)


def _logged(loop: LoopSettings) -> tuple[list[SourceRecord], int]:
    """Return a loop's interactions in the database or else in unread event files, and how many have feedback."""
    records, rated = {}, set()
    for event in _events(loop):
        if event.get("event") == "feedback":
            rated.add(event.get("interaction_id"))
        elif event.get("event") == "interaction" and isinstance(event.get("prompt"), str):
            records[event.get("id")] = SourceRecord("", event["prompt"], str(event.get("output", "")))
    return list(records.values()), len(rated & records.keys())


def _events(loop: LoopSettings) -> Iterator[dict[str, Any]]:
    with connect().read() as connection:
        for row in connection.execute(sa.select(interactions).where(interactions.c.loop == loop.name)):
            yield {"event": "interaction", "id": str(row.id), "prompt": row.prompt, "output": row.output}
        for row in connection.execute(sa.select(feedback.c.interaction_id).where(feedback.c.loop == loop.name)):
            yield {"event": "feedback", "interaction_id": str(row.interaction_id)}
    for folder in loop.log_folders:
        for path in sorted(folder.glob("*.jsonl")):
            with suppress(OSError, ValueError), path.open(encoding="utf-8") as lines:
                yield from (event for line in lines if isinstance(event := json.loads(line), dict))


def _declared(loop: LoopSettings) -> Iterator[SourceRecord]:
    """Yield the rows of a loop's sources of kind files."""
    for source in loop.sources:
        if isinstance(source, FilesSource):
            with suppress(SourceError):  # `finetune check` names what cannot be read; a plan does without it
                for one in limited(reader_for(source, loop.curation.redaction)(source, None), source):
                    if isinstance(one, SourceRecord):
                        yield one


def _planned(
    architecture: Architecture,
    settings: TrainingSettings,
    machine: Machine,
    examples: int,
    mean_tokens: float | None,
) -> PlannedTraining:
    """Estimate a training run; without a mean length, its examples have half the maximum length."""
    memory = estimate_memory(architecture, settings, machine.device, bf16=uses_bf16(settings, machine))
    rate, source = rate_of(settings, machine)
    tokens = settings.max_length // 2 if mean_tokens is None else min(round(mean_tokens), settings.max_length)
    time = estimate_time(architecture, settings, examples=examples, tokens=tokens, rate=rate, source=source)
    return PlannedTraining(settings, memory, time if memory.bytes <= machine.bytes else None)
