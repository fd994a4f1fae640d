"""`finetune ingest`: logs and other files into the store, without Dagster."""

from pathlib import Path
from typing import get_args

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.database import Database, connect
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.pipeline.ingest import IngestReport, ingest_file
from finetune_pipeline.pipeline.ingest import ingest as ingest_all
from finetune_pipeline.settings import FileFormat, LoopSettings
from finetune_pipeline.sources.ingest_ledger import position, rejected_lines
from finetune_pipeline.sources.ingest_reader import IngestFormat
from finetune_pipeline.sources.row_readers import SUFFIXES


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice((*get_args(FileFormat), "events")), default="auto", show_default=True,
    help="What the rows of FILES are; auto tells by their fields, row by row.",
)  # fmt: skip
@loop_option
def ingest(files: tuple[Path, ...], form: IngestFormat, loop: LoopSettings) -> None:
    """Take FILES into the store, or all new files of the loop's folders.

    JSONL, JSON, CSV and Parquet are read: events of a log, and conversations in the forms that docs/sources.md names.
    """
    if form != "auto" and not files:
        raise click.UsageError("--format goes with FILES: in the folders each row tells by its fields what it is")
    database = connect()
    total = IngestReport()
    if files:
        reward = reward_function(loop.feedback)
        for path in files:
            total.add(_read(loop, database, path.resolve(), reward, form))
    else:
        total = ingest_all(loop, database, click.echo)
    recorded = total.recorded
    click.echo(
        f"{total.files} files: {recorded.interactions} interactions and {recorded.feedback} feedback added, "
        f"{recorded.duplicates} known already, {total.rejected} lines rejected"
    )
    if total.conflicts:
        click.echo(f"{total.conflicts} events have an id that is known with other content:", err=True)
        for named in total.conflicting:
            click.echo(f"  {named}", err=True)
    if total.rejected:
        with database.read() as connection:
            for row in rejected_lines(connection, loop.name, 10, [path.resolve() for path in files]):
                click.echo(f"  {row.path}:{row.line}: {row.reason}", err=True)
    if files and total.rejected and not recorded.interactions + recorded.feedback + recorded.duplicates:
        advice = "no row could be used: mend them as the reasons say, or name what they are with --format"
        unnamed = [path for path in files if path.suffix.lower() not in SUFFIXES]
        if unnamed:  # by its first bytes a table of text cannot be told from anything else
            advice += f"; where {unnamed[0].name} is CSV, name the file {unnamed[0].stem}.csv"
        raise click.ClickException(advice)


def _read(
    loop: LoopSettings, database: Database, path: Path, reward: RewardFunction, form: IngestFormat
) -> IngestReport:
    try:
        done = ingest_file(loop, database, path, reward, form)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read ({error.strerror}); mend it, then run again") from error
    with database.read() as connection:
        left = path.stat().st_size - position(connection, loop.name, path).offset
    if left > 0:
        click.echo(f"{path}: its last line is not whole ({left} bytes); it is read when it is", err=True)
    return done
