"""`finetune feedback`: log interactions and feedback, and import, export, retract and erase them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import LISTED, echo_some, loop_option
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.wording import counted, sentence

if TYPE_CHECKING:
    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.pipeline.erasure import ErasedLoop
    from finetune_pipeline.records import Rating

_WIDTH = 100
_FILE = click.Path(dir_okay=False, path_type=Path)
_THUMBS = ("up", "down")


_key_option = click.option(
    "--key", metavar="TEXT", help="Idempotency key: an event with the same key is recorded once."
)


@click.group()
def feedback() -> None:
    """Log, import, export and erase interactions and feedback."""


@feedback.command()
@click.option("--prompt", required=True, help="The prompt.")
@click.option("--output", required=True, help="The model's answer.")
@click.option("--model", help="The model that answered: loop@version.")
@click.option("--confidence", type=float, help="The model's confidence in the answer, 0 to 1.")
@click.option("--validation-score", type=float, help="Score of an automatic validation, 0 to 100.")
@click.option("--user", metavar="NAME", help="Author of the prompt.")
@click.option("--domain", help="Domain of the request.")
@click.option("--kind", help="Kind of the request.")
@click.option("--context", "retrieved_context", help="Retrieved text that was put into the prompt.")
@click.option("--id", metavar="UUID", help="Id of the interaction; default a new one.")
@_key_option
@loop_option
def log(loop: LoopSettings, prompt: str, output: str, **details: Any) -> None:
    """Log one interaction and print its id."""
    given = {name: value for name, value in details.items() if value is not None}
    with _client(loop) as client:
        click.echo(client.log(prompt, output, **given))


@feedback.command()
@click.argument("interaction_id", metavar="ID")
@click.argument("text", required=False)
@click.option("--file", type=click.File("r", encoding="utf-8"), help="File with the answer; - reads standard input.")
@click.option("--user", metavar="NAME", help="Author of the correction.")
@_key_option
@loop_option
def correct(interaction_id: str, text: str | None, file: Any, user: str | None, key: str | None, **given: Any) -> None:
    """Correct the answer of the interaction ID to TEXT."""
    if (text is None) == (file is None):
        raise click.UsageError("Give the corrected answer as TEXT or with --file, one of the two")
    with _client(given["loop"]) as client:
        if text is None:
            try:
                text = str(file.read()).removesuffix("\n")
            except UnicodeDecodeError as error:
                raise click.UsageError(f"{file.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
        feedback_id = client.correct(interaction_id, text, user=user, key=key)
    _print_feedback_id(feedback_id, interaction_id)


@feedback.command()
@click.argument("interaction_id", metavar="ID")
@click.argument("value", metavar="VALUE", type=click.Choice(["1", "2", "3", "4", "5", "gold", *_THUMBS]))
@click.option("--user", metavar="NAME", help="Author of the rating.")
@_key_option
@loop_option
def rate(loop: LoopSettings, interaction_id: str, value: str, user: str | None, key: str | None) -> None:
    """Rate the answer of the interaction ID.

    VALUE is 1 to 5 (stars), gold (an exemplary answer), up or down (thumbs).
    """
    with _client(loop) as client:
        if value in _THUMBS:
            thumb = client.thumbs_up if value == "up" else client.thumbs_down
            feedback_id = thumb(interaction_id, user=user, key=key)
        else:
            feedback_id = client.rate(interaction_id, cast("Rating", value), user=user, key=key)
    _print_feedback_id(feedback_id, interaction_id)


@feedback.command()
@loop_option
def stats(loop: LoopSettings) -> None:
    """Count interactions, feedback and examples.

    Also lists unmatched feedback, whose interaction has not arrived.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import counters, unmatched_feedback

    with connect().read() as connection:
        counts = counters(connection, loop.name)
        # The query reads all feedback, so it runs only if the counter says that there is something to find.
        unmatched = unmatched_feedback(connection, loop.name, LISTED) if counts["unmatched"] else ()
    table = Table(title=f"loop {loop.name}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    kinds = [(f"  {name.removeprefix('feedback.')}", name) for name in sorted(counts) if name.startswith("feedback.")]
    for title, name in (
        ("interactions", "interactions"),
        ("feedback events", "feedback"),
        *kinds,
        ("examples", "examples"),
        ("  corrected by a person", "corrected"),
        ("  others with a reward above 0", "rewarded"),
        ("flagged for review", "flagged"),
        ("unmatched feedback", "unmatched"),
    ):
        table.add_row(title, f"{counts[name]:,}")
    Console().print(table)
    if unmatched:
        click.echo(f"\nunmatched feedback, whose interaction has not arrived ({counts['unmatched']}), oldest first:")
        for row in unmatched:
            click.echo(f"  {row.id}  {row.kind} on {row.interaction_id}, {_age(row.created_at)}")


@feedback.command()
@click.option("--limit", type=click.IntRange(1), default=LISTED, show_default=True, help="Maximum number of answers.")
@loop_option
def flagged(loop: LoopSettings, limit: int) -> None:
    """List flagged answers that nobody has reviewed.

    An answer is flagged, for example, because of low confidence. The newest come first.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import flagged_interactions

    with connect().read() as connection:
        found = flagged_interactions(connection, loop.name, limit)
    for one in found:
        confidence = "" if one.confidence is None else f"confidence {one.confidence:.2f}"
        known = confidence in str(one.flag)
        click.echo(f"{one.id}  {one.flag}{'' if known else f', {confidence}'}")
        click.echo(f"  prompt  {_one_line(one.prompt)}\n  output  {_one_line(one.output)}")
    advice = "`finetune feedback correct ID TEXT` or `finetune feedback rate ID up` settles one"
    click.echo(advice if found else f"no flagged answer of loop {loop.name} is unreviewed", err=True)


@feedback.command("export")
@click.argument("file", type=_FILE)
@click.option(
    "--format", "form", type=click.Choice(["events", "alpaca"]), default="events", show_default=True,
    help="events: the raw record, with all secrets and personal data in it, one JSON object per line. alpaca: the "
    "examples, without secrets and personal data.",
)  # fmt: skip
@click.option(
    "--min-reward", type=click.FloatRange(-1, 1), help="alpaca: leave out uncorrected examples with a lower reward."
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@loop_option
def export(loop: LoopSettings, file: Path, form: str, min_reward: float | None, force: bool) -> None:
    """Write the loop's feedback to FILE.

    With alpaca, a name that ends in .json makes FILE a JSON array, any other name JSON lines.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.formats import export_events
    from finetune_pipeline.pipeline.feedback_files import export_examples

    if form == "events":
        if min_reward is not None:
            raise click.UsageError("--min-reward goes with --format alpaca: all events are exported")
        done = export_events(file, loop, connect(), force=force)
        left_out = f"; left out {counted(done.left_out, 'interaction')} of declared sources and dropped files"
        click.echo(f"{counted(done.written, 'event')} written to {file}{left_out if done.left_out else ''}")
        return
    done, replaced = export_examples(
        file, loop, connect(), min_reward=-1.0 if min_reward is None else min_reward, force=force
    )
    counts = ", ".join(f"{number:,} {kind}" for kind, number in sorted(replaced.items()))
    left_out = f"; left out {done.left_out:,} that their source no longer has" if done.left_out else ""
    written = counted(done.written, "example")
    click.echo(f"{written} written to {file}; replaced by placeholders: {counts or 'nothing'}{left_out}")


@feedback.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@loop_option
def import_(loop: LoopSettings, files: tuple[Path, ...]) -> None:
    """Import FILES of events or of rows with a reward.

    A file has events, interactions with a reward, or Alpaca rows. Importing it again adds nothing.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.formats import import_rows
    from finetune_pipeline.feedback.store import conflict_message
    from finetune_pipeline.sources.row_readers import read_rows

    unusable = []
    for path in files:
        done = import_rows(path, read_rows(path, loop.ingest.max_line_bytes), loop, connect())
        click.echo(
            f"{path}: {counted(done.recorded.interactions, 'interaction')} and "
            f"{counted(done.recorded.feedback, 'feedback event')} added, "
            f"{counted(done.recorded.duplicates, 'duplicate')}, {done.rejected:,} of "
            f"{counted(done.lines, 'line')} rejected"
        )
        echo_some([f"{line.path}:{line.line}: {line.reason}" for line in done.invalid], done.rejected)
        if done.conflicts:
            click.echo(
                f"{counted(len(done.conflicts), 'event')} whose id already exists with different content:", err=True
            )
        echo_some([conflict_message(event) for event in done.conflicts[:LISTED]], len(done.conflicts))
        if done.rejected and done.rejected == done.lines:
            unusable.append(str(path))
    if unusable:
        raise click.ClickException(f"No line of {', '.join(unusable)} could be imported.")


@feedback.command()
@click.option("--source", required=True, metavar="NAME", help="The source; also one that is not declared any more.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@loop_option
def retract(loop: LoopSettings, source: str, yes: bool) -> None:
    """Exclude the records of a source from training.

    The interactions stay in the store. If the source is declared, the next run restores what it contains then.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.source_state import active_sources
    from finetune_pipeline.pipeline.source_sync import retract_source

    database = connect()
    with database.read() as connection:
        active = active_sources(connection, loop.name)
    if source not in active:
        names = ", ".join(f"{name} ({count})" for name, count in active.items()) or "none"
        raise click.ClickException(
            f"{loop.name} has no active records of {source}. Sources with active records: {names}"
        )
    if not yes:
        click.confirm(f"Retract {counted(active[source], 'record')} of {source}?", abort=True)
    count = retract_source(loop.name, source, database)
    click.echo(f"{counted(count, 'record')} of {source} retracted; the next dataset is made without them")
    if any(one.name == source for one in loop.sources):
        click.echo(
            f"{source} is still declared: the next run restores what it contains, unless you remove it in the YAML"
        )


@feedback.command()
@click.option("--user", required=True, metavar="NAME", help="The person whose data is deleted.")
@click.option("--loop", "name", metavar="NAME", help="Delete it in this loop only; default all loops.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def erase(user: str, name: str | None, yes: bool) -> None:
    """Delete a person's data, and list what was made with it.

    This deletes the person's interactions with all feedback and review decisions on them, and the person's feedback
    and review decisions on interactions of others.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.erasure import erase_person, find_person

    database = connect()
    held = find_person(database, user, name)
    for one in held:
        click.echo(
            f"{one.name}: {counted(len(one.data.interactions), 'interaction')}, "
            f"{counted(len(one.data.feedback), 'feedback event')} and "
            f"{counted(len(one.data.decisions), 'review decision')}"
        )
    if not any(one.data.count for one in held):
        click.echo(f"the store holds nothing of {user!r}; names must match exactly")
    elif not yes:
        click.confirm(f"Delete this data of {user!r} for good?", abort=True)
    result = erase_person(database, user, held)
    for loop in result.loops:
        _print_erased(loop)
    remaining = []
    if result.write_ahead_logs:
        remaining.append(
            "the write-ahead log of a running server names the person, so events may still be on their way into the "
            f"store ({', '.join(map(str, result.write_ahead_logs))})"
        )
    if result.database_busy:
        remaining.append(
            "another program is using the database, so its log (the file ending in -wal) still contains the deleted "
            "text"
        )
    if remaining:
        raise click.ClickException(
            f"The erasure is not complete: {'; and '.join(remaining)}. Run this again in a moment."
        )


def _print_erased(loop: "ErasedLoop") -> None:
    name, done = loop.name, loop.erased
    click.echo(
        f"{name}: {counted(done.interactions, 'interaction')}, "
        f"{counted(done.feedback, 'feedback event')}, "
        f"{counted(done.decisions, 'review decision')} and {counted(done.rejected_lines, 'excerpt')} of rejected lines "
        "deleted"
    )
    artifacts: dict[str, Sequence[object]] = {kind: found for kind, found in vars(loop.artifacts).items() if found}
    for kind, found in artifacts.items():
        click.echo(f"{name}: {kind} made with the deleted data:")
        _print_list(found)
    if artifacts:
        click.echo(
            f"  They still contain it. `finetune run --loop {name}` makes new ones without it. When another model "
            f"serves, `finetune model gc --keep 1 --loop {name}` deletes the old models, rejected challengers "
            "included, with their folders in gguf_model. Then delete what is left of these folders."
        )
    if loop.sources:
        click.echo(f"{name}: the deleted data came from these sources, which may still contain it:")
        _print_list(loop.sources)
        click.echo("  Sources bring in nothing more by this author, but delete the data there, too.")
    if loop.files:
        click.echo(f"{name}: these files still contain the person's name:")
        _print_list(loop.files)
        click.echo("  Deleted events are not ingested again, but new ones would be: delete them there, too.")


@contextmanager
def _client(loop: LoopSettings) -> Iterator["FeedbackClient"]:
    """Yield a client of the local store, and report invalid values in one line."""
    from pydantic import ValidationError

    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.validation_messages import error_message

    client = FeedbackClient(loop)
    try:
        yield client
    except ValidationError as error:
        raise click.ClickException(sentence(error_message(error))) from error
    except ValueError as error:
        raise click.ClickException(sentence(str(error))) from error


def _print_feedback_id(feedback_id: Any, interaction_id: str) -> None:
    """Print the feedback's id, and a note if its interaction has not arrived."""
    from uuid import UUID

    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import find_interaction

    click.echo(feedback_id)
    with connect().read() as connection:
        found = find_interaction(connection, UUID(interaction_id))
    if found is None:
        click.echo(
            f"unmatched: interaction {interaction_id} has not arrived; the feedback counts once it does", err=True
        )


def _age(moment: datetime) -> str:
    # SQLite returns times without a time zone, in UTC.
    passed = datetime.now(UTC) - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if passed < timedelta(hours=1):
        return f"{max(0, int(passed.total_seconds() // 60))} minutes old"
    return f"{passed.days} days old" if passed.days else f"{int(passed.total_seconds() // 3600)} hours old"


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _WIDTH else joined[: _WIDTH - 3] + "..."


def _print_list(items: Sequence[object]) -> None:
    for item in items:
        click.echo(f"    {item}")
