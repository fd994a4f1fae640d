"""`finetune train plan`: which training settings fit a memory size, what they need, and how that was estimated."""

import math
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import the_loop
from finetune_pipeline.settings import PresetName, SettingsError, TrainingSettings


@click.group()
def train() -> None:
    """Estimate memory and time of a training run."""


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
    base: str | None, vram: float | None, preset: PresetName | None, loop: str | None, examples: int, length: int | None
) -> None:
    """Show which settings fit in memory, and print their YAML.

    Lists adapter, batch, length, peak memory and time for each option, and how they were estimated.
    """
    from finetune_pipeline.pipeline.plan import plan_training
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.estimate import ERROR

    if vram is not None and preset is not None:
        raise SettingsError("--vram and --preset both name a memory size; give one of them")
    if vram is not None and not math.isfinite(vram):  # click accepts nan for a number within any range
        raise SettingsError(f"--vram {vram} is not a memory size; give a number of GB, such as --vram 12")
    if base and not loop:
        architecture, given = architecture_of(base), TrainingSettings()
    else:
        chosen = the_loop(loop)
        architecture, given = architecture_of(base or chosen.base_model), chosen.training
    planned = plan_training(architecture, given, examples=examples, preset=preset, vram=vram, length=length)
    size, unit = (1e9, "billion") if architecture.parameters >= 1e8 else (1e6, "million")
    parameters = f"{architecture.parameters / size:.2f} {unit} parameters"
    click.echo(f"{architecture.name}: {parameters}, {architecture.layers} layers")
    click.echo(f"usable memory: {planned.machine.bytes / 2**30:.1f} GiB ({planned.machine.device.upper()})")
    table = Table(box=None, pad_edge=False)
    for heading in ("adapter", "checkpointing", "batch", "tokens", "peak", "fits", "time"):
        table.add_column(heading)
    for option in planned.options:
        settings = option.settings
        table.add_row(
            settings.adapter,
            "yes" if settings.gradient_checkpointing else "no",
            f"{settings.per_device_train_batch_size} x {settings.gradient_accumulation_steps}",
            f"{settings.max_length:,}",
            f"{option.memory.bytes / 2**30:.1f} GiB",
            "yes" if option.time else "no",
            duration(option.time.seconds) if option.time else "",
        )
    Console().print(table)
    if planned.chosen is None:
        raise SettingsError(planned.refusal)
    best, need, time = planned.chosen.settings, planned.chosen.memory, planned.chosen.time
    click.echo(f"\nchosen: peak {need.bytes / 2**30:.2f} GiB, which may be off by {ERROR:.0%}")
    for part in need.parts:
        click.echo(f"  {part.name:<13} {part.bytes / 2**30:6.2f} GiB  {part.formula}")
    if time is not None:
        click.echo(f"time: {duration(time.seconds)}, assuming a mean length of half of max_length: {time.formula}")
    click.echo("\ntraining:")
    names = ("adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name in (*names, "max_length"):
        click.echo(f"  {name}: {getattr(best, name)}")
    click.echo(f"  gradient_checkpointing: {str(best.gradient_checkpointing).lower()}")


def duration(seconds: float) -> str:
    """Return a duration in a unit that suits its length."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
