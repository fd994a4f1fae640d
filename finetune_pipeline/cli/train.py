"""`finetune train`: which settings fit a memory size and how that was estimated; and finished training runs."""

import math
from typing import TYPE_CHECKING, get_args

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.artifacts import stage_folder
from finetune_pipeline.cli.options import UNLIMITED, json_option, loop_option, print_json
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.settings import LoopSettings, PresetName, SettingsError, TrainingSettings, the_loop, with_loop
from finetune_pipeline.wording import duration

if TYPE_CHECKING:
    from finetune_pipeline.pipeline.plan import PlannedTraining


@click.group()
def train() -> None:
    """Estimate training, and show finished training runs."""


@train.command()
@click.option("--base", metavar="M", help="Base model: a folder, or a Hugging Face id; default the loop's.")
@click.option("--vram", type=click.FloatRange(1), metavar="GB", help="Memory of a GPU; default this machine's.")
@click.option(
    "--preset", type=click.Choice(get_args(PresetName)), help="Plan for a preset's memory; default the loop's preset."
)
@click.option(
    "--loop", metavar="NAME", help="Start from this loop's base model and settings; without --base, the only loop's."
)
@click.option(
    "--examples",
    type=click.IntRange(1),
    help="Training examples; default those of the loop's newest dataset, the rows of its sources, or 1,000.",
)
@click.option("--length", type=click.IntRange(16), help="Tokens of the longest example; default the preset's.")
@json_option
def plan(
    base: str | None,
    vram: float | None,
    preset: PresetName | None,
    loop: str | None,
    examples: int | None,
    length: int | None,
    as_json: bool,
) -> None:
    """Show which settings fit in memory, and print their YAML.

    Lists adapter, batch, length, peak memory and time for each option, and how they were estimated. The tokenizer and
    chat template of a base model that is on this machine are checked first.
    """
    from finetune_pipeline.export.base import local_tokenizer
    from finetune_pipeline.pipeline.check_loop import vocabulary_problems
    from finetune_pipeline.pipeline.plan import ASSUMED_EXAMPLES, expected_examples, plan_training
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.estimate import ERROR

    if vram is not None and preset is not None:
        raise SettingsError("--vram and --preset both name a memory size; give one of them")
    if vram is not None and not math.isfinite(vram):  # click accepts nan for a number within any range
        raise SettingsError(f"--vram {vram} is not a memory size; give a number of GB, such as --vram 12")
    chosen = None if base and not loop else the_loop(loop)
    name, given = (chosen.base_model, chosen.training) if chosen else ("", TrainingSettings())
    architecture = architecture_of(base or name)
    folder = local_tokenizer(base or name)
    problems = vocabulary_problems(folder, chosen) if folder else []
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise SettingsError(f"the base model {base or name} cannot be trained and served:{lines}")
    origin = "--examples"
    if examples is None:
        examples, origin = expected_examples(chosen) if chosen else (ASSUMED_EXAMPLES, "assumed; set --examples")
    planned = plan_training(architecture, given, examples=examples, preset=preset, vram=vram, length=length)
    if as_json:
        machine = {"device": planned.machine.device, "usable_bytes": int(planned.machine.bytes)}
        options = [_option_json(option) for option in planned.options]
        best_json = _option_json(planned.chosen) if planned.chosen else None
        print_json(
            {"base_model": architecture.name, "parameters": architecture.parameters, "examples": examples,
             "examples_from": origin, **machine, "options": options, "chosen": best_json}
        )  # fmt: skip
        if planned.chosen is None:
            raise SettingsError(planned.refusal)
        return
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
        idle = " on idle cores" if planned.machine.device == "cpu" else ""
        assumed = "assuming a mean length of half of max_length"
        click.echo(f"time: {duration(time.seconds)}{idle}, {assumed}: {time.formula}")
        click.echo(f"examples: {examples:,} ({origin})")
    click.echo("\ntraining:")
    names = ("adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name in (*names, "max_length"):
        click.echo(f"  {name}: {getattr(best, name)}")
    click.echo(f"  gradient_checkpointing: {str(best.gradient_checkpointing).lower()}")


def _option_json(option: "PlannedTraining") -> dict[str, object]:
    keys = {"adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps",
            "max_length", "gradient_checkpointing"}  # fmt: skip
    return {
        "settings": option.settings.model_dump(include=keys),
        "peak_bytes": int(option.memory.bytes),
        "fits": option.time is not None,
        "seconds": option.time.seconds if option.time else None,
    }


@train.command("list")
@json_option
@loop_option
def list_(loop: LoopSettings, as_json: bool) -> None:
    """List finished training runs, newest first."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.trainings import list_trainings

    jobs = list_trainings(connect(), loop.name)
    if as_json:
        print_json(jobs)
        return
    if not jobs:
        click.echo(f"no training of loop {loop.name} has finished; `{with_loop('finetune run', loop)}` runs one")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("adapter", "finished (UTC)", "method", "mode", "examples", "steps", "loss", "time", "device"):
        table.add_column(heading, no_wrap=True)
    for job in jobs:
        loss = f"{job.loss_before:.3f} -> {job.loss_after:.3f}"
        finished, took = f"{job.created_at:%Y-%m-%d %H:%M}", duration(job.wall_seconds)
        numbers = (f"{job.examples:,}", f"{job.steps:,}", loss, took, job.device)
        table.add_row(job.id, finished, job.method, job.mode, *numbers)
    Console(width=UNLIMITED).print(table)


@train.command()
@click.argument("adapter", required=False)
@json_option
@loop_option
def show(adapter: str | None, loop: LoopSettings, as_json: bool) -> None:
    """Show one finished training run, by default the newest.

    ADAPTER is a version that `finetune train list` shows.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.trainings import list_trainings

    jobs = {job.id: job for job in list_trainings(connect(), loop.name)}
    if not jobs or (adapter and adapter not in jobs):
        known = f"its adapters are: {', '.join(jobs)}" if jobs else "no training has finished"
        raise SettingsError(f"loop {loop.name} has no adapter {adapter or ''}: {known}".replace("  ", " "))
    job = jobs[adapter or next(iter(jobs))]
    folder = stage_folder(loop.name, AdapterManifest.stage) / job.id
    if as_json:
        print_json({**job.model_dump(), "folder": folder if folder.is_dir() else None})
        return
    click.echo(click.style(job.id, bold=True))
    worded = {
        "peak_memory_bytes": f"{job.peak_memory_bytes / 2**30:.2f} GiB",
        "wall_seconds": duration(job.wall_seconds),
        "created_at": f"{job.created_at:%Y-%m-%d %H:%M} UTC",
    }
    for name, value in (job.model_dump(exclude={"id"}) | worded).items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        title = name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
        click.echo(f"  {title:<18} {'none' if value is None else shown}")
    click.echo(f"  {'files':<18} {folder if folder.is_dir() else 'deleted'}")
