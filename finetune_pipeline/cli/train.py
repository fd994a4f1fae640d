"""`finetune train plan`: which training fits a memory size, what it takes, and how that was reckoned."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import the_loop
from finetune_pipeline.settings import PresetName, SettingsError, TrainingSettings

if TYPE_CHECKING:
    from finetune_pipeline.training.architecture import Architecture
    from finetune_pipeline.training.presets import Machine


@click.group()
def train() -> None:
    """Plan a training."""


@train.command()
@click.option("--base", metavar="M", help="Base model: a folder, or a Hugging Face id; default the loop's.")
@click.option("--vram", type=click.FloatRange(1), metavar="GB", help="Memory of a GPU; default this machine's.")
@click.option(
    "--preset", type=click.Choice(get_args(PresetName)), help="Plan for a preset's memory instead; default the loop's."
)
@click.option(
    "--loop", metavar="NAME", help="Begin with this loop's base model and settings; without --base, the only loop's."
)
@click.option("--examples", default=1000, show_default=True, type=click.IntRange(1), help="Training examples.")
@click.option("--length", type=click.IntRange(16), help="Longest example, in tokens; default the preset's.")
def plan(
    base: str | None, vram: float | None, preset: str | None, loop: str | None, examples: int, length: int | None
) -> None:
    """Say what fits: method, batch, length, peak memory part by part, time, and the YAML for it."""
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.presets import CHANGEABLE, PRESETS, does_not_fit, first_fitting, nearest, with_wish

    if vram is not None and preset is not None:
        raise SettingsError("--vram and --preset both name a memory size; give one of them")
    if vram is not None and not math.isfinite(vram):  # click takes nan for a number within any range
        raise SettingsError(f"--vram {vram} is no memory size; give a number of GB, as --vram 12")
    if base and not loop:
        architecture, given = architecture_of(base), TrainingSettings()
    else:
        chosen = the_loop(loop)
        architecture, given = architecture_of(base or chosen.base_model), chosen.training
    preset = preset or (given.preset if vram is None else None)
    machine = _machine(vram, preset)
    if length is not None:
        given = TrainingSettings(**given.model_dump(include=given.model_fields_set) | {"max_length": length})
    size = preset or ("cpu" if machine.device == "cpu" else nearest(machine.bytes / 2**30 / 0.95))
    wished = with_wish(given, PRESETS[size])
    free = CHANGEABLE - given.model_fields_set
    best = first_fitting(architecture, wished, free, machine)
    click.echo(
        f"{architecture.name}: {architecture.parameters / 1e9:.2f} billion parameters, {architecture.layers} layers"
    )
    click.echo(f"memory to use: {machine.bytes / 2**30:.1f} GiB of a {machine.device.upper()}")
    Console().print(_table(architecture, best or wished, machine, examples))
    if best is None:
        where = f"preset {preset}" if preset else f"{vram:g} GB" if vram else "this machine"
        raise SettingsError(does_not_fit(architecture, wished, free, machine, where))
    for line in _details(architecture, best, machine, examples):
        click.echo(line)


def _machine(vram: float | None, preset: str | None) -> "Machine":
    from dataclasses import replace

    from finetune_pipeline.training.presets import USABLE, machine_of, nearest

    if preset is not None:
        return machine_of(preset)
    if vram is not None:
        return replace(machine_of(nearest(vram)), bytes=vram * 2**30 * USABLE)
    from finetune_pipeline.training.hardware import this_machine

    return this_machine()


def _table(architecture: "Architecture", settings: TrainingSettings, machine: "Machine", examples: int) -> Table:
    """Each method with and without checkpointing at the largest micro-batch that fits, or its need at the least."""
    from finetune_pipeline.training.estimate import memory, time
    from finetune_pipeline.training.presets import fits, ladder

    table = Table(box=None, pad_edge=False)
    for heading in ("method", "checkpointing", "batch", "tokens", "peak", "", "time"):
        table.add_column(heading)
    for adapter in ("lora", "qlora"):
        for recompute in (False, True):
            examples_an_update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
            change: dict[str, object] = {"adapter": adapter, "gradient_checkpointing": recompute}
            change |= {"per_device_train_batch_size": examples_an_update, "gradient_accumulation_steps": 1}
            rungs = list(
                ladder(
                    settings.model_copy(update=change), {"per_device_train_batch_size", "gradient_accumulation_steps"}
                )
            )
            row = next((rung for rung in rungs if fits(architecture, rung, machine)), rungs[-1])
            need = memory(architecture, row, machine.device, bf16=machine.bf16)
            took = time(architecture, row, examples=examples, tokens=row.max_length // 2, rate=machine.rate, source="")
            fit = need.bytes <= machine.bytes
            table.add_row(
                adapter, "yes" if recompute else "no",
                f"{row.per_device_train_batch_size} x {row.gradient_accumulation_steps}", f"{row.max_length:,}",
                f"{need.bytes / 2**30:.1f} GiB", "fits" if fit else "does not fit",
                duration(took.seconds) if fit else "",
            )  # fmt: skip
    return table


def _details(
    architecture: "Architecture", settings: TrainingSettings, machine: "Machine", examples: int
) -> Iterator[str]:
    from finetune_pipeline.training.estimate import ERROR, memory, time

    need = memory(architecture, settings, machine.device, bf16=machine.bf16)
    yield f"\nchosen: peak {need.bytes / 2**30:.2f} GiB, which may be off by {ERROR:.0%}"
    for part in need.parts:
        yield f"  {part.name:<13} {part.bytes / 2**30:6.2f} GiB  {part.formula}"
    tokens = settings.max_length // 2
    took = time(architecture, settings, examples=examples, tokens=tokens, rate=machine.rate, source=machine.source)
    yield f"time: {duration(took.seconds)}, for examples of half the length: {took.formula}"
    yield "\ntraining:"
    for name in (
        "adapter",
        "lora_r",
        "lora_alpha",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
    ):
        yield f"  {name}: {getattr(settings, name)}"
    yield f"  gradient_checkpointing: {str(settings.gradient_checkpointing).lower()}"


def duration(seconds: float) -> str:
    """A span of time in words that suit its length."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
