"""`finetune ingest`: ingest event logs and other files, without Dagster."""

from pathlib import Path
from typing import get_args

import click

from finetune_pipeline.cli.options import LISTED, echo_some, json_option, loop_option, print_json
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.source_state import skipped_records
from finetune_pipeline.pipeline.ingest import IngestReport, ingest_file
from finetune_pipeline.pipeline.ingest import ingest as ingest_all
from finetune_pipeline.settings import FileFormat, LoopSettings
from finetune_pipeline.sources.feedback_exports import ExportFormat
from finetune_pipeline.sources.ingest_ledger import position, rejected_lines
from finetune_pipeline.sources.ingest_reader import IngestFormat
from finetune_pipeline.sources.row_readers import SUFFIXES
from finetune_pipeline.wording import counted

_PROBLEMS = 1_000


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice((*get_args(FileFormat), *get_args(ExportFormat), "events")),
    default="auto", show_default=True,
    help="Format of the rows of FILES; auto detects it from the fields of each row.",
)  # fmt: skip
@click.option("--problems", is_flag=True, help="Read nothing; list rejected lines, and skipped records of sources.")
@json_option
@loop_option
def ingest(files: tuple[Path, ...], form: IngestFormat, problems: bool, as_json: bool, loop: LoopSettings) -> None:
    """Ingest FILES, or new files of the loop's folders.

    Reads JSONL, JSON, CSV and Parquet: events of a log, conversations, and the feedback exports of Open WebUI and
    Langfuse, in the formats of docs/reference/formats.md.
    """
    if form != "auto" and not files:
        raise click.UsageError(
            "--format needs FILES: for the files in the loop's folders, the format is detected from each row"
        )
    if as_json and not problems:
        raise click.UsageError("--json needs --problems, which it prints")
    database = connect()
    if problems:
        with database.read() as connection:
            rejected = rejected_lines(connection, loop.name, _PROBLEMS)
            skipped = skipped_records(connection, loop, _PROBLEMS)
        if as_json:
            found = {"rejected_lines": rejected, "skipped_records": skipped}
            print_json({"loop": loop.name} | {name: [row._asdict() for row in rows] for name, rows in found.items()})
            return
        lines = [f"{row.path}:{row.line}: {row.reason}" for row in rejected]
        lines += [f"{row.source}: {row.provenance}: {row.reason}" for row in skipped]
        click.echo("\n".join(lines) or f"loop {loop.name} has no rejected lines and no skipped records")
        return
    total, unchanged = IngestReport(), []
    if files:
        reward = reward_function(loop.feedback)
        for path in (file.resolve() for file in files):
            try:
                report = ingest_file(loop, database, path, reward, form)
            except OSError as error:
                raise click.ClickException(
                    f"{path} cannot be read ({error.strerror}); fix that, then run again"
                ) from error
            total.add(report)
            with database.read() as connection:
                left = path.stat().st_size - position(connection, loop.name, path).offset
            if left > 0:
                click.echo(
                    f"{path}: its last line is incomplete ({counted(left, 'byte')}); it is read when it is complete",
                    err=True,
                )
            elif not report.lines and path.stat().st_size:
                unchanged.append(path)
                click.echo(f"{path}: unchanged since it was read")
        if len(unchanged) == len(files):
            return
    else:
        total = ingest_all(loop, database, click.echo)
        if not total.files and not total.unreadable:
            click.echo(f"no new file in {', '.join(map(str, loop.log_folders))}")
            return
    recorded = total.recorded
    click.echo(
        f"{counted(total.files, 'file')}: {counted(recorded.interactions, 'interaction')} and "
        f"{counted(recorded.feedback, 'feedback event')} added, {counted(recorded.duplicates, 'duplicate')}, "
        f"{counted(total.rejected, 'line')} rejected"
    )
    if total.conflicts:
        click.echo(f"{counted(total.conflicts, 'event')} whose id already exists with different content:", err=True)
        echo_some(total.conflicting[:LISTED], total.conflicts)
    if files:  # the log of the folders has named the reasons
        _echo_reasons(total)
    elif total.rejected:
        click.echo("  `finetune ingest --problems` lists them", err=True)
    if files and total.rejected and not recorded.interactions + recorded.feedback + recorded.duplicates:
        advice = "No row is usable: fix the rows as the reasons say, or name their format with --format"
        unnamed = [path for path in files if path.suffix.lower() not in SUFFIXES]
        if unnamed:  # CSV is recognized by its name only
            advice += f"; if {unnamed[0].name} is CSV, rename it to {unnamed[0].stem}.csv"
        raise click.ClickException(advice)


def _echo_reasons(report: IngestReport) -> None:
    """Print each reason why lines were rejected once, the most frequent first, with the first line that has it."""
    places = {reason: f"{path}:{line}: " for path, line, reason in reversed(report.rejections)}
    for reason, count in report.reasons.most_common(LISTED):
        more = f" (and {counted(count - 1, 'more line')})" if count > 1 else ""
        click.echo(f"  {places.get(reason, '')}{reason}{more}", err=True)
    if len(report.reasons) > LISTED:
        click.echo(f"  and {counted(len(report.reasons) - LISTED, 'more reason')}", err=True)
