"""`finetune train plan`: which training fits a memory size, what it needs, and how that was estimated."""

import math
from dataclasses import replace
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
    "--preset", type=click.Choice(get_args(PresetName)), help="Plan for a preset's memory; default the loop's preset."
)
@click.option(
    "--loop", metavar="NAME", help="Start from this loop's base model and settings; without --base, the only loop's."
)
@click.option("--examples", default=1000, show_default=True, type=click.IntRange(1), help="Training examples.")
@click.option("--length", type=click.IntRange(16), help="Tokens of the longest example; default the preset's.")
def plan(
    base: str | None, vram: float | None, preset: str | None, loop: str | None, examples: int, length: int | None
) -> None:
    """Show what fits: adapter, batch, length, peak memory part by part, time, and the YAML for it."""
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.estimate import ERROR, estimate_memory, estimate_time
    from finetune_pipeline.training.presets import (
        CHANGEABLE,
        PRESETS,
        USABLE,
        does_not_fit,
        first_fitting,
        nearest_preset,
        with_preferred,
    )

    if vram is not None and preset is not None:
        raise SettingsError("--vram and --preset both name a memory size; give one of them")
    if vram is not None and not math.isfinite(vram):  # click accepts nan for a number within any range
        raise SettingsError(f"--vram {vram} is not a memory size; give a number of GB, such as --vram 12")
    if base and not loop:
        architecture, given = architecture_of(base), TrainingSettings()
    else:
        chosen = the_loop(loop)
        architecture, given = architecture_of(base or chosen.base_model), chosen.training
    preset = preset or (given.preset if vram is None else None)
    machine = _machine(vram, preset)
    if length is not None:
        given = TrainingSettings(**given.model_dump(include=given.model_fields_set) | {"max_length": length})
    nearest = preset or ("cpu" if machine.device == "cpu" else nearest_preset(machine.bytes / 2**30 / USABLE))
    preferred = with_preferred(given, PRESETS[nearest])
    free = CHANGEABLE - given.model_fields_set
    best = first_fitting(architecture, preferred, free, machine)
    size, unit = (1e9, "billion") if architecture.parameters >= 1e8 else (1e6, "million")
    parameters = f"{architecture.parameters / size:.2f} {unit} parameters"
    click.echo(f"{architecture.name}: {parameters}, {architecture.layers} layers")
    click.echo(f"usable memory: {machine.bytes / 2**30:.1f} GiB of a {machine.device.upper()}")
    Console().print(_table(architecture, best or preferred, machine, examples))
    if best is None:
        where = f"preset {preset}" if preset else f"{vram:g} GB" if vram else "this machine"
        raise SettingsError(does_not_fit(architecture, preferred, free, machine, where))
    need = estimate_memory(architecture, best, machine.device, bf16=machine.bf16)
    click.echo(f"\nchosen: peak {need.bytes / 2**30:.2f} GiB, which may be off by {ERROR:.0%}")
    for part in need.parts:
        click.echo(f"  {part.name:<13} {part.bytes / 2**30:6.2f} GiB  {part.formula}")
    time = estimate_time(
        architecture, best, examples=examples, tokens=best.max_length // 2, rate=machine.rate, source=machine.source
    )
    click.echo(f"time: {duration(time.seconds)}, for examples of half the length: {time.formula}")
    click.echo("\ntraining:")
    names = ("adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name in (*names, "max_length"):
        click.echo(f"  {name}: {getattr(best, name)}")
    click.echo(f"  gradient_checkpointing: {str(best.gradient_checkpointing).lower()}")


def _machine(vram: float | None, preset: str | None) -> "Machine":
    from finetune_pipeline.training.presets import USABLE, machine_of, nearest_preset

    if preset is not None:
        return machine_of(preset)
    if vram is not None:
        return replace(machine_of(nearest_preset(vram)), bytes=vram * 2**30 * USABLE)
    from finetune_pipeline.training.hardware import this_machine

    return this_machine()


def _table(architecture: "Architecture", settings: TrainingSettings, machine: "Machine", examples: int) -> Table:
    """Tabulate each adapter with and without checkpointing: the largest micro-batch that fits, or the smallest one."""
    from finetune_pipeline.training.estimate import estimate_memory, estimate_time
    from finetune_pipeline.training.presets import fits, smaller_settings

    table = Table(box=None, pad_edge=False)
    for heading in ("adapter", "checkpointing", "batch", "tokens", "peak", "", "time"):
        table.add_column(heading)
    batch_settings = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    whole = {"per_device_train_batch_size": update, "gradient_accumulation_steps": 1}
    for adapter in ("lora", "qlora"):
        for checkpointing in (False, True):
            changes = {**whole, "adapter": adapter, "gradient_checkpointing": checkpointing}
            candidates = list(smaller_settings(settings.model_copy(update=changes), batch_settings))
            row = next((one for one in candidates if fits(architecture, one, machine)), candidates[-1])
            need = estimate_memory(architecture, row, machine.device, bf16=machine.bf16)
            time = estimate_time(
                architecture, row, examples=examples, tokens=row.max_length // 2, rate=machine.rate, source=""
            )
            fit = need.bytes <= machine.bytes
            table.add_row(
                adapter,
                "yes" if checkpointing else "no",
                f"{row.per_device_train_batch_size} x {row.gradient_accumulation_steps}",
                f"{row.max_length:,}",
                f"{need.bytes / 2**30:.1f} GiB",
                "fits" if fit else "does not fit",
                duration(time.seconds) if fit else "",
            )
    return table


def duration(seconds: float) -> str:
    """Return a duration in a unit that suits its length."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
