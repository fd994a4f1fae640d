"""`finetune model`: versions, the champion, the ways back, and room on the disk."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import actor, loop_option
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.database import Database
    from finetune_pipeline.registry.deletion import Fate
    from finetune_pipeline.registry.model_versions import ModelVersion


@click.group()
def model() -> None:
    """List, show, switch, roll back and delete model versions."""


@model.command("list")
@loop_option
def list_(loop: LoopSettings) -> None:
    """List the versions that were promoted, newest first; * serves."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.deployment_history import history, stack_of
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    serving = champion(database, loop.name)
    served = stack_of(history(database, loop.name))
    states = dict.fromkeys(served[-2:-1], "previous") | {serving.id if serving else None: "champion"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "right", "latency", "size", "deployed (UTC)", ""):
        table.add_column(heading, no_wrap=heading != "model", overflow="fold")
    for version in list_models(database, loop.name):
        mark = "*" if serving and version.id == serving.id else ""
        state = [states.get(version.id, ""), "deleted" if version.deleted_at else ""]
        table.add_row(mark, version.name, *_columns(version), " ".join(filter(None, state)))
    table.add_row("" if serving else "*", f"{loop.name}@base", "", "", "", "", states.get(None, ""))
    Console().print(table)


def _columns(version: "ModelVersion") -> tuple[str, str, str, str]:
    return (
        f"{version.accuracy:.1%}" if version.accuracy is not None else "",
        f"{version.latency_ms:,.0f} ms" if version.latency_ms is not None else _no_latency(version),
        f"{version.size_bytes / 1e6:,.1f} MB" if version.size_bytes is not None else "",
        f"{version.deployed_at:%Y-%m-%d %H:%M}" if version.deployed_at else "",
    )


def _no_latency(version: "ModelVersion") -> str:
    return "machine busy" if "speed_flag" in version.scores else ""


@model.command()
@click.argument("version", default="champion")
@click.option("--card", is_flag=True, help="Print the model card (Markdown) instead.")
@loop_option
def show(version: str, card: bool, loop: LoopSettings) -> None:
    """Show one VERSION: files, figures, lineage, training, report. Default: the champion."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.lineage import card as card_of
    from finetune_pipeline.registry.champion import resolve

    database = connect()
    found = resolve(database, version, loop.name)
    if found is None:
        click.echo(f"{loop.name}@base: the base model {loop.base_model}")
    elif card:
        click.echo(card_of(database, loop, found), nl=False)
    else:
        click.echo(click.style(found.name, bold=True))
        for name, value in _facts(database, found):
            click.echo(f"  {name:<9} {value}")


def _facts(database: "Database", found: "ModelVersion") -> Iterator[tuple[str, str]]:
    from finetune_pipeline.registry.training_jobs import find_training

    yield "GGUF", f"{found.gguf_path}"
    yield "SHA-256", found.gguf_sha256
    if found.adapter_path:
        yield "adapter", f"{found.adapter_path}"
        yield "SHA-256", f"{found.adapter_sha256}"
    yield "report", f"{found.report_path}"
    yield "promoted", f"{found.created_at:%Y-%m-%d %H:%M} UTC, {found.mode} training"
    for name in ("deployed", "retired", "deleted"):
        moment = getattr(found, f"{name}_at")
        if moment:
            yield name, f"{moment:%Y-%m-%d %H:%M} UTC"
    if found.size_bytes is not None:
        yield "size", f"{found.size_bytes / 1e6:,.1f} MB"
    yield from _listed("scores", found.scores)
    yield from _listed("lineage", found.lineage)
    training = find_training(database, found.loop, found.lineage.get("lora_adapter", ""))
    if training:
        yield from _listed("training", training.model_dump(exclude={"id", "loop", "watermark"}))


def _listed(title: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for number, (key, value) in enumerate(values.items()):
        yield title if number == 0 else "", f"{key}: {value}"


@model.command()
@click.argument("version")
@click.option("--reason", default="switched at the terminal", show_default=True, help="Kept in the history.")
@loop_option
def switch(version: str, reason: str, loop: LoopSettings) -> None:
    """Make VERSION (v1.2.0, or base) the champion."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import switch as switch_to

    found = switch_to(connect(), loop.name, version, actor(), reason)
    click.echo(f"{found.name if found else f'{loop.name}@base'} serves now")


@model.command()
@click.option("--reason", default="rolled back at the terminal", show_default=True, help="Kept in the history.")
@loop_option
def rollback(reason: str, loop: LoopSettings) -> None:
    """Bring back the champion that was there before; again goes further back."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import rollback as roll_back

    found = roll_back(connect(), loop.name, actor(), reason)
    click.echo(f"{found.name if found else f'{loop.name}@base'} serves again")


@model.command()
@loop_option
def history(loop: LoopSettings) -> None:
    """Show every move of the champion, oldest first."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.deployment_history import history as moves_of
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    names = {version.id: version.name for version in list_models(database, loop.name)}
    table = Table(box=None, pad_edge=False)
    for heading in ("when (UTC)", "what", "model", "by", "why"):
        table.add_column(heading, overflow="fold")
    for move in moves_of(database, loop.name):
        name = names.get(move.model_id or "", f"{loop.name}@base")
        table.add_row(f"{move.created_at:%Y-%m-%d %H:%M}", move.action, name, move.actor, move.reason)
    Console().print(table)


@model.command()
@click.option("--keep", type=click.IntRange(min=1), help="Moves of the champion whose models stay; default the YAML's.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@loop_option
def gc(keep: int | None, dry_run: bool, yes: bool, loop: LoopSettings) -> None:
    """Delete model files that nobody needs: old versions, rejected challengers, old base models.

    Champion, previous, the models of the last moves and whatever is being made stay. History and figures stay in the
    database.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base import base_hash, resolve_base_model
    from finetune_pipeline.registry.deletion import delete, survey

    database, base, moves = connect(), base_hash(resolve_base_model(loop.base_model)), keep or loop.registry.keep
    fates = survey(database, loop, base, moves)
    going = [fate for fate in fates if not fate.stays]
    _print_fates(fates)
    if not going:
        click.echo("nothing to delete")
        return
    what = f"{len(going)} of {len(fates)} folders, {_megabytes(going)}"
    if dry_run:
        click.echo(f"would delete {what}")
        return
    if not yes:
        click.confirm(f"delete {what}?", abort=True)
    gone = delete(database, loop, base, moves, [fate.folder.path for fate in going])
    click.echo(f"deleted {len(gone)} of {len(fates)} folders, {_megabytes(gone)}")
    if len(gone) < len(going):
        click.echo(f"{len(going) - len(gone)} came to be needed meanwhile and stay")


def _print_fates(fates: "Sequence[Fate]") -> None:
    for fate in sorted(fates, key=lambda fate: fate.stays):
        place = f"{fate.folder.path.parent.name}/{fate.folder.path.name}"
        click.echo(f"{'keep' if fate.stays else 'delete':<7} {_megabytes([fate]):>10}  {place}  {fate.reason}")


def _megabytes(fates: "Sequence[Fate]") -> str:
    return f"{sum(fate.folder.size for fate in fates) / 1e6:,.1f} MB"
