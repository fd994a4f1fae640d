"""`finetune ingest`: event files into the store, without Dagster."""

from pathlib import Path

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.loop.ingest import Ingested, ingest_file
from finetune_pipeline.loop.ingest import ingest as ingest_all
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ledger import rejected_lines


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@loop_option
def ingest(files: tuple[Path, ...], loop: LoopSettings) -> None:
    """Take event FILES into the store, or all new files of the loop's folders."""
    database = connect()
    total = Ingested()
    if files:
        reward = reward_function(loop.feedback)
        for path in files:
            total.add(ingest_file(loop, database, path.resolve(), reward))
    else:
        total = ingest_all(loop, database, click.echo)
    recorded = total.recorded
    click.echo(
        f"{total.files} files: {recorded.interactions} interactions and {recorded.feedback} feedback added, "
        f"{recorded.duplicates} known already, {total.rejected} lines rejected"
    )
    if total.rejected:
        with database.read() as connection:
            for row in rejected_lines(connection, loop.name, 10, [path.resolve() for path in files]):
                click.echo(f"  {row.path}:{row.line}: {row.reason}", err=True)
    if files and total.rejected and not recorded.interactions + recorded.feedback + recorded.duplicates:
        raise click.ClickException(
            "no line is an event of this loop; `finetune feedback import` reads exchanges with a reward, and Alpaca"
        )
