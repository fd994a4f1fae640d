"""`finetune model`: versions, the champion, and the ways back."""

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import actor, loop_option
from finetune_pipeline.settings import LoopSettings


@click.group()
def model() -> None:
    """List, show, switch and roll back model versions."""


@model.command("list")
@loop_option
def list_(loop: LoopSettings) -> None:
    """List the versions that were promoted, newest first; * serves."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.models import list_models

    database = connect()
    serving = champion(database, loop.name)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "right", "promoted (UTC)", "training"):
        table.add_column(heading, no_wrap=True)
    for version in list_models(database, loop.name):
        mark = "*" if serving and version.id == serving.id else ""
        when = f"{version.created_at:%Y-%m-%d %H:%M}"
        table.add_row(mark, version.name, _right(version.scores), when, version.mode)
    table.add_row("" if serving else "*", f"{loop.name}@base", "", "", "")
    Console().print(table)


@model.command()
@click.argument("version", default="champion")
@loop_option
def show(version: str, loop: LoopSettings) -> None:
    """Show one VERSION: scores, lineage, report. Default: the champion."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import resolve

    found = resolve(connect(), version, loop.name)
    if found is None:
        click.echo(f"{loop.name}@base: the base model {loop.base_model}")
        return
    click.echo(click.style(found.name, bold=True))
    click.echo(f"  GGUF      {found.gguf_path}")
    click.echo(f"  SHA-256   {found.gguf_sha256}")
    click.echo(f"  report    {found.report_path}")
    click.echo(f"  promoted  {found.created_at:%Y-%m-%d %H:%M} UTC, {found.mode} training")
    for title, values in (("scores", found.scores), ("lineage", found.lineage)):
        for number, (key, value) in enumerate(values.items()):
            click.echo(f"  {title if number == 0 else '':<9} {key}: {value}")


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
    from finetune_pipeline.registry.history import history as moves_of
    from finetune_pipeline.registry.models import list_models

    database = connect()
    names = {version.id: version.name for version in list_models(database, loop.name)}
    table = Table(box=None, pad_edge=False)
    for heading in ("when (UTC)", "what", "model", "by", "why"):
        table.add_column(heading, overflow="fold")
    for move in moves_of(database, loop.name):
        name = names.get(move.model_id or "", f"{loop.name}@base")
        table.add_row(f"{move.created_at:%Y-%m-%d %H:%M}", move.action, name, move.actor, move.reason)
    Console().print(table)


def _right(scores: dict[str, object]) -> str:
    accuracy = scores.get("accuracy")
    return f"{accuracy:.1%}" if isinstance(accuracy, float) else ""
