"""`finetune train`: which settings fit in memory; and training jobs: watch, pause, resume and cancel them."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.artifacts import stage_folder
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.options import UNLIMITED, json_option, loop_option, print_json
from finetune_pipeline.database import Database
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.registry.training_jobs import IN_PROGRESS, TrainingJob, events_of, find_job, list_jobs
from finetune_pipeline.settings import (
    LoopSettings,
    PresetName,
    SettingsError,
    TrainingSettings,
    home,
    load_loop,
    load_loops,
    project_path,
    the_loop,
    with_loop,
)
from finetune_pipeline.wording import duration

if TYPE_CHECKING:
    from finetune_pipeline.pipeline.needs import FreeSpace, StageNeed
    from finetune_pipeline.pipeline.plan import PlannedTraining

POLL_SECONDS = 0.5
"""Time between two questions to Dagster whether a run has ended."""


@click.group(short_help="Plan training; watch, pause, resume and cancel jobs.")
def train() -> None:
    """Estimate training; watch, pause, resume and cancel training jobs."""


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

    Lists adapter, batch, length, peak memory and time for each option, and how they were estimated, and what each stage
    of a run needs, from training to serving. The tokenizer and chat template of a base model that is on this machine
    are checked first.
    """
    from finetune_pipeline.export.base import dequantized_base, local_tokenizer
    from finetune_pipeline.pipeline.check_loop import vocabulary_problems
    from finetune_pipeline.pipeline.needs import free_space, shortages, stage_needs
    from finetune_pipeline.pipeline.plan import ASSUMED_EXAMPLES, ExpectedData, expected_data, plan_training
    from finetune_pipeline.pipeline.train import with_chosen
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.estimate import ERROR

    if vram is not None and preset is not None:
        raise SettingsError("--vram and --preset both name a memory size; give one of them")
    if vram is not None and not math.isfinite(vram):  # click accepts nan for a number within any range
        raise SettingsError(f"--vram {vram} is not a memory size; give a number of GB, such as --vram 12")
    chosen = None if base and not loop else the_loop(loop)
    name, given = (chosen.base_model, chosen.training) if chosen else ("", TrainingSettings())
    architecture = architecture_of(dequantized_base(base or name))
    folder = local_tokenizer(base or name)
    problems = vocabulary_problems(folder, chosen) if folder else []
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise SettingsError(f"the base model {base or name} cannot be trained and served:{lines}")
    if chosen is not None:
        data = expected_data(chosen, folder)
    else:
        data = ExpectedData(ASSUMED_EXAMPLES, ASSUMED_EXAMPLES, None, "assumed; set --examples")
    if examples is not None:
        data = ExpectedData(examples, examples, data.mean_tokens, "--examples")
    examples = data.examples
    method = {} if given.method != "auto" else {"method": "sft"}
    given, why = with_chosen(given.model_copy(update=method), base or name, data.new)
    planned = plan_training(
        architecture, given, examples=examples, preset=preset, vram=vram, length=length, mean_tokens=data.mean_tokens
    )
    needs: tuple[StageNeed, ...] = ()
    if chosen is not None and planned.chosen is not None:
        best_settings, peak = planned.chosen.settings, planned.chosen.memory.bytes
        file = project_path(base or name)
        gguf = file if file.is_file() else None
        needs = stage_needs(architecture, chosen, best_settings, peak, planned.machine.device, gguf=gguf)
    elsewhere = vram is not None or planned.is_for_preset
    free = free_space()
    short = [] if elsewhere else shortages(needs, free)
    if as_json:
        machine = {"device": planned.machine.device, "usable_bytes": int(planned.machine.bytes)}
        options = [_option_json(option) for option in planned.options]
        best_json = _option_json(planned.chosen) if planned.chosen else None
        print_json(
            {"base_model": architecture.name, "parameters": architecture.parameters, "examples": examples,
             "examples_from": data.origin, "mean_tokens": data.mean_tokens, "auto": why, **machine,
             "options": options, "chosen": best_json, "stages": needs, "free": None if elsewhere else free,
             "shortages": short}
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
        assumed = ", assuming a mean length of half of max_length" if data.mean_tokens is None else ""
        click.echo(f"time: {duration(time.seconds)}{idle}{assumed}: {time.formula}")
        click.echo(f"examples: {examples:,} ({data.origin})")
    if why:
        click.echo(f"settings: {why}")
    if needs:
        _show_needs(needs, None if elsewhere else free, short)
    click.echo("\ntraining:")
    names = ("adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name in (*names, "max_length"):
        click.echo(f"  {name}: {getattr(best, name)}")
    click.echo(f"  gradient_checkpointing: {str(best.gradient_checkpointing).lower()}")


def _show_needs(needs: "tuple[StageNeed, ...]", free: "FreeSpace | None", short: list[str]) -> None:
    click.echo("\nstages of a run:")
    table = Table(box=None, pad_edge=False)
    for heading in ("  stage", "disk", "memory", ""):
        table.add_column(heading)
    for one in needs:
        memory = f"{one.memory / 1e9:.1f} GB{' (GPU)' if one.device == 'gpu' else ''}"
        table.add_row(f"  {one.stage}", f"{one.disk / 1e9:.1f} GB", memory, one.formula)
    Console(width=UNLIMITED).print(table)
    for problem in short:
        click.secho(f"Warning: {problem}", fg="yellow")
    if free is not None and not short:
        click.echo(f"that suffices: {free.disk / 1e9:.0f} GB of disk and {free.memory / 1e9:.0f} GB of memory are free")


def _option_json(option: "PlannedTraining") -> dict[str, object]:
    keys = {"adapter", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps",
            "max_length", "gradient_checkpointing"}  # fmt: skip
    return {
        "settings": option.settings.model_dump(include=keys),
        "peak_bytes": int(option.memory.bytes),
        "fits": option.time is not None,
        "seconds": option.time.seconds if option.time else None,
    }


@train.command("list", short_help="List training jobs and finished trainings.")
@json_option
@loop_option
def list_(loop: LoopSettings, as_json: bool) -> None:
    """List training jobs, however they were started, and finished trainings with their figures; newest first."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.jobs import describe_job
    from finetune_pipeline.registry.trainings import list_trainings

    db = connect()
    jobs = [describe_job(db, job) for job in _up_to_date(db, list_jobs(db, loop.name))]
    trainings = list_trainings(db, loop.name)
    if as_json:
        print_json({"jobs": jobs, "trainings": trainings})
        return
    if jobs:
        table = Table(box=None, pad_edge=False)
        for heading in ("job", "created (UTC)", "by", "status", "trained", "left", "loss", "adapter"):
            table.add_column(heading, no_wrap=True)
        for job in jobs:
            table.add_row(
                job["id"],
                f"{job['created_at']:%Y-%m-%d %H:%M}",
                f"{job['created_by']} ({job['origin']})",
                _status(job),
                "" if job["percent"] is None else f"{job['percent']:.0f}%",
                "" if job["seconds_left"] is None else duration(job["seconds_left"]),
                f"{job['progress']['loss']:.3f}" if job["progress"] else "",
                job["adapter"] or "",
            )
        Console(width=UNLIMITED).print(table)
    if not trainings:
        click.echo(f"no training of loop {loop.name} has finished; `{with_loop('finetune run', loop)}` runs one")
        return
    table = Table(box=None, pad_edge=False, title="" if jobs else None)
    for heading in ("adapter", "finished (UTC)", "method", "mode", "examples", "steps", "loss", "time", "device"):
        table.add_column(heading, no_wrap=True)
    for one in trainings:
        loss = f"{one.loss_before:.3f} -> {one.loss_after:.3f}"
        finished, took = f"{one.created_at:%Y-%m-%d %H:%M}", duration(one.wall_seconds)
        numbers = (f"{one.examples:,}", f"{one.steps:,}", loss, took, one.device)
        table.add_row(one.id, finished, one.method, one.mode, *numbers)
    Console(width=UNLIMITED).print(table)


@train.command(short_help="Show a training job or a finished training.")
@click.argument("id", required=False)
@json_option
@loop_option
def show(id: str | None, loop: LoopSettings, as_json: bool) -> None:
    """Show one training job or one finished training, by default the newest job.

    ID is a job or an adapter that `finetune train list` shows.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.jobs import describe_job
    from finetune_pipeline.registry.trainings import list_trainings

    db = connect()
    trainings = {training.id: training for training in list_trainings(db, loop.name)}
    newest = list_jobs(db, loop.name, limit=1)
    if id is None and newest:
        id = newest[0].id
    if id is not None and id.startswith("ftjob-"):
        (job,) = _up_to_date(db, [find_job(db, id)])
        described = describe_job(db, job)
        if as_json:
            print_json({**described, "training": trainings.get(job.adapter or "")})
            return
        _show_job(described, [event.message for event in events_of(db, job.id)])
        if job.adapter not in trainings:
            return
        id = job.adapter
    if not trainings or (id and id not in trainings):
        known = f"its adapters are: {', '.join(trainings)}" if trainings else "no training has finished"
        raise SettingsError(f"loop {loop.name} has no adapter {id or ''}: {known}".replace("  ", " "))
    training = trainings[id or next(iter(trainings))]
    folder = stage_folder(loop.name, AdapterManifest.stage) / training.id
    if as_json:
        print_json({**training.model_dump(), "folder": folder if folder.is_dir() else None})
        return
    click.echo(click.style(training.id, bold=True))
    worded = {
        "peak_memory_bytes": f"{training.peak_memory_bytes / 2**30:.2f} GiB",
        "wall_seconds": duration(training.wall_seconds),
        "created_at": f"{training.created_at:%Y-%m-%d %H:%M} UTC",
    }
    for name, value in (training.model_dump(exclude={"id"}) | worded).items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        title = name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
        click.echo(f"  {title:<18} {'none' if value is None else shown}")
    click.echo(f"  {'files':<18} {folder if folder.is_dir() else 'deleted'}")


_EVENTS_SHOWN = 8


def _show_job(job: dict[str, Any], events: list[str]) -> None:
    click.echo(click.style(job["id"], bold=True))
    click.echo(f"  {'status':<18} {_status(job)}")
    for name in ("error", "loop", "origin", "created_by", "settings", "dataset", "adapter", "report", "suffix"):
        if job[name]:
            click.echo(f"  {name.replace('_', ' '):<18} {job[name]}")
    for name in ("created_at", "started_at", "finished_at"):
        if job[name]:
            click.echo(f"  {name.removesuffix('_at'):<18} {job[name]:%Y-%m-%d %H:%M} UTC")
    if job["progress"]:
        from finetune_pipeline.pipeline.train import describe_progress
        from finetune_pipeline.training.job import Progress

        click.echo(f"  {'progress':<18} {describe_progress(Progress(**job['progress']))}")
    click.echo(f"  {'Dagster runs':<18} {', '.join(job['runs']) or 'none'}")
    for number, message in enumerate(events[-_EVENTS_SHOWN:]):
        click.echo(f"  {'' if number else 'newest events':<18} {message}")


def _status(job: dict[str, Any]) -> str:
    asked = {"launch": "waits for Dagster", "pause": "pausing", "cancel": "canceling"}.get(job["wanted"] or "")
    return f"{job['status']} ({asked})" if asked else str(job["status"])


def _up_to_date(db: Database, jobs: list[TrainingJob]) -> list[TrainingJob]:
    """Return jobs with the statuses of their runs, as this home's Dagster has them; no webserver is needed."""
    home = Path(environment()["DAGSTER_HOME"]) if any(job.status in IN_PROGRESS for job in jobs) else None
    if home is None or not home.is_dir():
        return jobs
    from finetune_pipeline.orchestration.stored_runs import refresh_jobs

    return refresh_jobs(db, str(home), jobs)


@train.command(short_help="Pause a training job; its checkpoint is kept.")
@click.argument("id")
@json_option
def pause(id: str, as_json: bool) -> None:
    """Pause a training job: its run ends and its last checkpoint is kept.

    ID is a job that `finetune train list` shows. Dagster has to run, for example by `finetune ui`.
    """
    _change(id, "pause", as_json)


@train.command(short_help="Resume a paused training job.")
@click.argument("id")
@json_option
def resume(id: str, as_json: bool) -> None:
    """Resume a paused training job from its last checkpoint, with another run of Dagster.

    ID is a job that `finetune train list` shows. Dagster has to run, for example by `finetune ui`.
    """
    _change(id, "resume", as_json)


@train.command(short_help="Cancel a training job; its checkpoint is kept.")
@click.argument("id")
@json_option
def cancel(id: str, as_json: bool) -> None:
    """Cancel a training job: its run and training process end, and its last checkpoint is kept.

    ID is a job that `finetune train list` shows. Dagster has to run, for example by `finetune ui`.
    """
    _change(id, "cancel", as_json)


def _change(id: str, action: Literal["pause", "resume", "cancel"], as_json: bool) -> None:
    """Pause, resume or cancel a job, wait until that is done, and show the job."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.orchestrator import Orchestrator, dagster_url
    from finetune_pipeline.pipeline import jobs

    db, orchestrator = connect(), Orchestrator(dagster_url(home()))
    loops = load_loops()
    name = find_job(db, id).loop
    if action == "resume":
        job = jobs.resume(db, orchestrator, load_loop(name), id)
    else:
        job = {"pause": jobs.pause, "cancel": jobs.cancel}[action](db, orchestrator, loops.get(name), id)
        if job.wanted is not None and not as_json:
            click.echo("waiting until its run has ended; Ctrl-C does not undo it")
        while job.wanted in ("pause", "cancel"):
            time.sleep(POLL_SECONDS)
            job = jobs.sync(db, orchestrator, loops.get(name), job)
    described = jobs.describe_job(db, job)
    if as_json:
        print_json(described)
    else:
        click.echo(f"{id} is {_status(described)}")
