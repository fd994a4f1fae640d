"""`finetune feedback`: what people thought of the answers, into the store and out of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.settings import INGESTED, FeedbackSettings, LoopSettings, load_loop, load_loops

if TYPE_CHECKING:
    from finetune_pipeline.database import Database
    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.feedback.erasure import PersonData
    from finetune_pipeline.pipeline.lineage import MadeWith
    from finetune_pipeline.records import Rating

F = TypeVar("F", bound=Callable[..., Any])

_SHOWN = 10
_WIDTH = 100
_FILE = click.Path(dir_okay=False, path_type=Path)
_THUMBS = ("up", "down")


@click.group()
def feedback() -> None:
    """Log, correct, rate, count, export, import, retract and erase."""


def _key_option(command: F) -> F:
    return click.option("--key", metavar="TEXT", help="Your own name for this event: the same twice counts once.")(
        command
    )


def _user_option(help: str) -> Callable[[F], F]:
    return click.option("--user", metavar="NAME", help=help)


@feedback.command()
@click.option("--prompt", required=True, help="What was asked.")
@click.option("--output", required=True, help="What was answered.")
@click.option("--model", help="Which model answered: loop@version.")
@click.option("--confidence", type=float, help="0 to 1.")
@click.option("--validation-score", type=float, help="0 to 100.")
@_user_option("The author: whose words the prompt are.")
@click.option("--domain", help="Domain of the request.")
@click.option("--kind", help="Kind of the request.")
@click.option("--context", "retrieved_context", help="What was retrieved and put into the prompt.")
@click.option("--id", metavar="UUID", help="The interaction's id; default a new one.")
@_key_option
@loop_option
def log(loop: LoopSettings, prompt: str, output: str, **details: Any) -> None:
    """Log one exchange, and print the id by which feedback speaks of it."""
    given = {name: value for name, value in details.items() if value is not None}
    with _client(loop) as client:
        click.echo(client.log(prompt, output, **given))


@feedback.command()
@click.argument("interaction_id", metavar="ID")
@click.argument("text", required=False)
@click.option("--file", type=click.File("r", encoding="utf-8"), help="File with the answer; - reads the terminal.")
@_user_option("Who corrects.")
@_key_option
@loop_option
def correct(interaction_id: str, text: str | None, file: Any, user: str | None, key: str | None, **given: Any) -> None:
    """Give TEXT as what the answer to the interaction ID should have been."""
    if (text is None) == (file is None):
        raise click.UsageError("give the corrected answer as TEXT or with --file, one of the two")
    with _client(given["loop"]) as client:
        corrected = _read(file) if text is None else text
        done = client.correct(interaction_id, corrected, user=user, key=key)
    _tell(done, interaction_id)


@feedback.command()
@click.argument("interaction_id", metavar="ID")
@click.argument("value", type=click.Choice(["1", "2", "3", "4", "5", "gold", *_THUMBS]))
@_user_option("Who rates.")
@_key_option
@loop_option
def rate(loop: LoopSettings, interaction_id: str, value: str, user: str | None, key: str | None) -> None:
    """Rate the answer of the interaction ID: 1 to 5 stars, gold, up or down."""
    with _client(loop) as client:
        if value in _THUMBS:
            thumb = client.thumbs_up if value == "up" else client.thumbs_down
            done = thumb(interaction_id, user=user, key=key)
        else:
            done = client.rate(interaction_id, cast("Rating", value), user=user, key=key)
    _tell(done, interaction_id)


@feedback.command()
@loop_option
def stats(loop: LoopSettings) -> None:
    """Show how much feedback there is of which kind, and what waits."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import counters, unmatched_feedback

    with connect().read() as connection:
        counts = counters(connection, loop.name)
        # Looking for them goes through all feedback; the counters says at once whether there are any.
        waiting = unmatched_feedback(connection, loop.name, _SHOWN) if counts.get("unmatched") else ()
    Console().print(_stats_table(loop.name, counts))
    if waiting:
        click.echo(f"\nfeedback whose interaction has not arrived ({counts.get('unmatched', 0)}), oldest first:")
        for row in waiting:
            click.echo(f"  {row.id}  {row.kind} on {row.interaction_id}, {_age(row.created_at)}")


@feedback.command()
@click.option("--limit", type=click.IntRange(1), default=_SHOWN, show_default=True, help="How many.")
@loop_option
def flagged(loop: LoopSettings, limit: int) -> None:
    """List the newest answers that nobody has looked at, and that the model was not sure of."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import flagged_interactions

    with connect().read() as connection:
        found = flagged_interactions(connection, loop.name, limit)
    for one in found:
        sure = "" if one.confidence is None else f", confidence {one.confidence:.2f}"
        click.echo(f"{one.id}  {one.flag}{sure}")
        click.echo(f"  asked     {_line(one.prompt)}\n  answered  {_line(one.output)}")
    advice = "`finetune feedback correct ID TEXT` or `finetune feedback rate ID up` settles one"
    click.echo(advice if found else "none", err=True)


def _line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _WIDTH else joined[: _WIDTH - 3] + "..."


@feedback.command("export")
@click.argument("file", type=_FILE)
@click.option(
    "--format", "form", type=click.Choice(["events", "alpaca"]), default="events", show_default=True,
    help="events: the raw record, with all secrets and personal data in it, one JSON object a line. alpaca: what the "
    "examples teach, without them.",
)  # fmt: skip
@click.option(
    "--min-reward", type=click.FloatRange(-1, 1), help="alpaca: leave out examples below, but for corrected ones."
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@loop_option
def export(loop: LoopSettings, file: Path, form: str, min_reward: float | None, force: bool) -> None:
    """Write the loop's feedback to FILE; a name in .json makes alpaca an array, any other JSON lines."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.formats import export_events

    if form == "events":
        if min_reward is not None:
            raise click.UsageError("--min-reward goes with --format alpaca: events are exported all")
        done = export_events(file, loop, connect(), force=force)
        left_out = f"; left out: {done.left_out} conversations of declared sources and dropped files, which have them"
        click.echo(f"{done.written} events written to {file}{left_out if done.left_out else ''}")
    else:
        _export_alpaca(file, loop, -1.0 if min_reward is None else min_reward, force)


def _export_alpaca(file: Path, loop: LoopSettings, min_reward: float, force: bool) -> None:
    from finetune_pipeline.curation.redaction import redact
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.formats import export_alpaca

    replaced: Counter[str] = Counter()

    def clean(text: str) -> str:
        redacted = redact(text)
        replaced.update(redacted.counts)
        return redacted.text

    done = export_alpaca(file, loop, connect(), clean, min_reward=min_reward, force=force)
    what = ", ".join(f"{number} {kind}" for kind, number in sorted(replaced.items()))
    left_out = f"; left out: {done.left_out} that their source no longer has" if done.left_out else ""
    click.echo(f"{done.written} examples written to {file}; replaced by placeholders: {what or 'nothing'}{left_out}")


@feedback.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@loop_option
def import_(loop: LoopSettings, files: tuple[Path, ...]) -> None:
    """Read FILES: events, exchanges with a reward, or Alpaca; a file read twice adds nothing."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.formats import import_rows
    from finetune_pipeline.feedback.store import conflict_message
    from finetune_pipeline.sources.row_readers import read_rows

    unusable = []
    for path in files:
        done = import_rows(path, read_rows(path, loop.ingest.max_line_bytes), loop, connect())
        click.echo(
            f"{path}: {done.recorded.interactions} interactions and {done.recorded.feedback} feedback added, "
            f"{done.recorded.duplicates} known already, {done.rejected} of {done.lines} lines rejected"
        )
        for bad in done.bad:
            click.echo(f"  {bad.path}:{bad.line}: {bad.reason}", err=True)
        if done.rejected > len(done.bad):
            click.echo(f"  and {done.rejected - len(done.bad)} more", err=True)
        for event in done.conflicts[:_SHOWN]:
            click.echo(f"  {conflict_message(event)}", err=True)
        if len(done.conflicts) > _SHOWN:
            click.echo(f"  and {len(done.conflicts) - _SHOWN} more are known with other content", err=True)
        if done.rejected and done.rejected == done.lines:
            unusable.append(str(path))
    if unusable:
        raise click.ClickException(f"nothing in {', '.join(unusable)} could be read")


@feedback.command()
@click.option("--source", required=True, metavar="NAME", help="Of which source; one that is declared no longer, too.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@loop_option
def retract(loop: LoopSettings, source: str, yes: bool) -> None:
    """Have nothing teach any more of what came from a source.

    It stays in the store. Where the source is declared still, or again, the next run brings back what it has then.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.source_state import active_sources
    from finetune_pipeline.pipeline.source_sync import retract_source

    database = connect()
    with database.read() as connection:
        there = active_sources(connection, loop.name)
    if source not in there:
        names = ", ".join(f"{name} ({count})" for name, count in there.items()) or "none"
        raise click.ClickException(
            f"nothing of {source} teaches in {loop.name}; sources of which something does: {names}"
        )
    if not yes:
        click.confirm(f"Have the {there[source]} records of {source} teach nothing any more?", abort=True)
    count = retract_source(loop.name, source, database)
    click.echo(f"{count} records of {source} retracted; the next dataset is made without them")
    if any(one.name == source for one in loop.sources):
        click.echo(
            f"{source} is still declared: the next run brings back what it has, unless you take it out of the YAML"
        )


@feedback.command()
@click.option("--user", required=True, metavar="NAME", help="Whose data is deleted.")
@click.option("--loop", "name", metavar="NAME", help="Only of this loop; default all.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def erase(user: str, name: str | None, yes: bool) -> None:
    """Delete what the store holds of a person, and list what was made with it.

    Deleted are the person's interactions with all feedback and review decisions on them, and the person's feedback and
    review decisions on those of others.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.erasure import overwrite_deleted

    declared = {name: load_loop(name)} if name else load_loops()
    database = connect()
    _take_over(database)
    loops = {one: declared.get(one) for one in ([name] if name else _loop_names(database, declared))}
    # Afterwards nobody would know any more what was made with it, so that is looked up first.
    found = {one: _held_and_made(database, one, loop, user) for one, loop in loops.items()}
    if not any(held.count for held, _ in found.values()):
        click.echo(f"the store holds nothing of {user!r}; names are compared letter by letter")
    elif not yes:
        click.confirm(f"Delete this data of {user!r} for good?", abort=True)
    on_their_way = _logs_naming(user)  # before the deletion: what comes into the store until then goes with it
    for one, loop in loops.items():
        _erase(database, one, loop, user)
    wiped = overwrite_deleted(database)
    for one, loop in loops.items():
        _advise(one, loop, user, *found[one])
    _finish(on_their_way, wiped)


@contextmanager
def _client(loop: LoopSettings) -> Iterator["FeedbackClient"]:
    """A client of the local store; what is wrong with the given values is told in a line."""
    from pydantic import ValidationError

    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.validation_messages import error_message

    client = FeedbackClient(loop)
    try:
        yield client
    except ValidationError as error:
        raise click.ClickException(error_message(error)) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _read(file: Any) -> str:
    try:
        return str(file.read()).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file.name} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _tell(feedback_id: Any, interaction_id: str) -> None:
    """Print the feedback's id, and say so if nobody has logged what it speaks of."""
    from uuid import UUID

    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import find_interaction

    click.echo(feedback_id)
    with connect().read() as connection:
        known = find_interaction(connection, UUID(interaction_id)) is not None
    if not known:
        click.echo(f"interaction {interaction_id} has not arrived; the feedback waits for it", err=True)


def _stats_table(loop: str, counts: dict[str, int]) -> Table:
    table = Table(title=f"loop {loop}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    kinds = [(f"  {name.removeprefix('feedback.')}", name) for name in sorted(counts) if name.startswith("feedback.")]
    rows = [
        ("interactions", "interactions"),
        ("feedback", "feedback"),
        *kinds,
        ("examples", "examples"),
        ("  corrected by a person", "corrected"),
        ("  others with a reward above 0", "rewarded"),
        ("flagged when answered", "flagged"),
        ("feedback without its interaction", "unmatched"),
    ]
    for title, name in rows:
        table.add_row(title, f"{counts.get(name, 0):,}")
    return table


def _age(moment: datetime) -> str:
    # SQLite gives back times without their zone, which is UTC.
    passed = datetime.now(UTC) - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if passed < timedelta(hours=1):
        return f"{max(0, int(passed.total_seconds() // 60))} minutes old"
    return f"{passed.days} days old" if passed.days else f"{int(passed.total_seconds() // 3600)} hours old"


def _take_over(database: "Database") -> None:
    """Bring in what a killed server left in its journal, so that it does not come back later."""
    from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
    from finetune_pipeline.feedback.write_ahead_log import recover_orphans

    loops = load_loops()

    def reward_of(loop: str) -> RewardFunction:
        return reward_function(loops[loop].feedback if loop in loops else FeedbackSettings())

    recover_orphans(database, reward_of)


def _loop_names(database: "Database", declared: dict[str, LoopSettings]) -> list[str]:
    """All loops: those declared, and those that only the store still knows."""
    from finetune_pipeline.feedback.erasure import loops_with_data

    with database.read() as connection:
        return sorted({*declared, *loops_with_data(connection)})


def _held_and_made(
    database: "Database", name: str, loop: LoopSettings | None, user: str
) -> "tuple[PersonData, MadeWith]":
    """Print what the store holds of a person; returns it, and what was made with it."""
    from finetune_pipeline.feedback.erasure import person_data
    from finetune_pipeline.pipeline.lineage import MadeWith, made_with

    with database.read() as connection:
        held = person_data(connection, name, user)
    click.echo(
        f"{name}: {len(held.interactions)} interactions, {len(held.feedback)} feedback and {len(held.decisions)} "
        "review decisions"
    )
    return held, made_with(database, loop, held.affected_interactions) if loop else MadeWith()


def _erase(database: "Database", name: str, loop: LoopSettings | None, user: str) -> None:
    from finetune_pipeline.feedback.erasure import erase_user
    from finetune_pipeline.feedback.rewards import reward_function

    reward = reward_function(loop.feedback if loop else FeedbackSettings())
    with database.write() as connection:
        done = erase_user(connection, name, user, reward)
    click.echo(
        f"{name}: {done.interactions} interactions, {done.feedback} feedback, {done.decisions} review decisions and "
        f"{done.rejected_lines} excerpts of rejected lines deleted"
    )


def _advise(name: str, loop: LoopSettings | None, user: str, held: "PersonData", made: "MadeWith") -> None:
    lists = {"snapshots": made.snapshots, "datasets": made.datasets, "models": made.models, "weights": made.weights}
    for title, what in lists.items():
        if what:
            click.echo(f"{name}: {title} made with it:")
            _list(what)
    if any(lists.values()):
        click.echo(
            f"  They still hold it. `finetune run --loop {name}` makes new ones without it. When another model serves, "
            f"`finetune model gc --keep 1 --loop {name}` deletes the models, and rejected challengers too, with their "
            "folders in gguf_model; delete what is left of these folders then."
        )
    sources = [name for name in held.sources if name != INGESTED]
    if sources:
        click.echo(f"{name}: these sources gave what was deleted, and may hold it still:")
        _list(sources)
        click.echo("  Nothing that names the person as its author is taken from a source again; delete it there too.")
    files = _files_naming(user, loop) if loop else []
    if files:
        click.echo(f"{name}: these files still name the person:")
        _list(files)
        click.echo("  What was deleted never comes back from them, but events not read yet would: delete it there too.")


def _finish(on_their_way: Sequence[Path], wiped: bool) -> None:
    """Say what is not done yet, and how it will be."""
    left = []
    if on_their_way:
        left.append(
            "a running server's journal names the person, so events may still be on their way into the store "
            f"({', '.join(map(str, on_their_way))})"
        )
    if not wiped:
        left.append(
            "another program is reading or writing the database just now, so its log (the file ending in -wal) still "
            "holds the deleted text"
        )
    if left:
        raise click.ClickException(f"not all is gone yet: {'; and '.join(left)}. Run this again in a moment")


def _logs_naming(user: str) -> list[Path]:
    """Journals of living servers that name the person; those of dead ones were taken over."""
    from finetune_pipeline.feedback.write_ahead_log import write_ahead_log_folder

    return _naming(user, sorted(write_ahead_log_folder().glob("*.jsonl")))


def _files_naming(user: str, loop: LoopSettings) -> list[Path]:
    """Event files, and events that the store refused, that name the person."""
    from finetune_pipeline.feedback.write_ahead_log import write_ahead_log_folder
    from finetune_pipeline.sources.row_readers import files_of, layout_of, read_rows

    paths = [path for folder in loop.log_folders if folder.is_dir() for path in files_of(folder)]
    found = _naming(user, paths + sorted(write_ahead_log_folder().glob("*.refused")))
    for path in paths:
        with suppress(FileNotFoundError):  # taken away meanwhile
            if layout_of(path) in {"csv", "parquet"}:  # in which a name stands as it is, not as a JSON text
                rows = (row.value for row in read_rows(path, loop.ingest.max_line_bytes))
                if any(isinstance(row, dict) and str(row.get("user")) == user for row in rows):
                    found.append(path)
    return list(dict.fromkeys(found))


def _naming(user: str, paths: Sequence[Path]) -> list[Path]:
    """The files in which the person's name stands as a JSON text."""
    names = [json.dumps(user).encode(), json.dumps(user, ensure_ascii=False).encode()]
    found = []
    for path in paths:
        with suppress(FileNotFoundError), path.open("rb") as file:  # a journal that was emptied meanwhile
            if any(name in line for line in file for name in names):
                found.append(path)
    return found


def _list(items: Sequence[object]) -> None:
    for item in items:
        click.echo(f"    {item}")
