"""`finetune feedback`: log interactions and feedback, and import, export, retract and erase them."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.feedback_search import commands, find_id
from finetune_pipeline.cli.options import LISTED, echo_some, json_option, loop_option, one_line, print_json
from finetune_pipeline.settings import LoopSettings, RedactionSettings
from finetune_pipeline.wording import counted, sentence

if TYPE_CHECKING:
    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.pipeline.erasure import ErasedLoop
    from finetune_pipeline.records import Rating

_BAR = 40
"""Width of the longest bar of the histogram."""
_FILE = click.Path(dir_okay=False, path_type=Path)
_THUMBS = ("up", "down")


_key_option = click.option(
    "--key", metavar="TEXT", help="Idempotency key: an event with the same key is recorded once."
)


@click.group()
def feedback() -> None:
    """Log, look up, import, export and erase interactions and feedback."""


for command in commands:
    feedback.add_command(command)


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
@click.argument("interaction", metavar="ID_OR_PROMPT", is_eager=True)
@click.argument("text", required=False)
@click.option("--file", type=click.File("r", encoding="utf-8"), help="File with the answer; - reads standard input.")
@click.option("--user", metavar="NAME", help="Author of the correction.")
@_key_option
@loop_option
def correct(interaction: str, text: str | None, file: Any, user: str | None, key: str | None, **given: Any) -> None:
    """Correct the answer of an interaction to TEXT.

    ID_OR_PROMPT is the interaction's id, or a prompt that only one interaction has.
    """
    if (text is None) == (file is None):
        raise click.UsageError("Give the corrected answer as TEXT or with --file, one of the two")
    interaction_id = find_id(given["loop"], interaction)
    with _client(given["loop"]) as client:
        if text is None:
            try:
                text = str(file.read()).removesuffix("\n")
            except UnicodeDecodeError as error:
                raise click.UsageError(f"{file.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
        feedback_id = client.correct(interaction_id, text, user=user, key=key)
    _print_feedback_id(feedback_id, interaction_id)


@feedback.command()
@click.argument("interaction", metavar="ID_OR_PROMPT", is_eager=True)
@click.argument("value", metavar="VALUE", type=click.Choice(["1", "2", "3", "4", "5", "gold", *_THUMBS]))
@click.option("--user", metavar="NAME", help="Author of the rating.")
@_key_option
@loop_option
def rate(loop: LoopSettings, interaction: str, value: str, user: str | None, key: str | None) -> None:
    """Rate the answer of an interaction.

    ID_OR_PROMPT is the interaction's id, or a prompt that only one interaction has.
    VALUE is 1 to 5 (stars), gold (an exemplary answer), up or down (thumbs).
    """
    interaction_id = find_id(loop, interaction)
    with _client(loop) as client:
        if value in _THUMBS:
            thumb = client.thumbs_up if value == "up" else client.thumbs_down
            feedback_id = thumb(interaction_id, user=user, key=key)
        else:
            feedback_id = client.rate(interaction_id, cast("Rating", value), user=user, key=key)
    _print_feedback_id(feedback_id, interaction_id)


@feedback.command()
@json_option
@loop_option
def stats(loop: LoopSettings, as_json: bool) -> None:
    """Count interactions, feedback and examples.

    Shows the rewards, how much the users agree, and lists unmatched feedback, whose interaction has not arrived.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.feedback.statistics import BINS, agreement, reward_statistics
    from finetune_pipeline.feedback.store import counters, unmatched_feedback
    from finetune_pipeline.registry.trainings import count_trainings

    database = connect()
    with database.read() as connection:
        counts = counters(connection, loop.name)
        # The query reads all feedback, so it runs only if the counter says that there is something to find.
        unmatched = unmatched_feedback(connection, loop.name, LISTED) if counts["unmatched"] else ()
        rewards = reward_statistics(connection, loop.name)
        agreed = agreement(connection, loop.name, reward_function(loop.feedback))
    trainings = count_trainings(database, loop.name)
    by_kind = {name.removeprefix("feedback."): name for name in sorted(counts) if name.startswith("feedback.")}
    if as_json:
        names = ("interactions", "feedback", "examples", "corrected", "rewarded", "flagged", "unmatched")
        print_json(
            {
                "loop": loop.name,
                **{name: counts[name] for name in names},
                "by_kind": {kind: counts[name] for kind, name in by_kind.items()},
                "trainings": trainings,
                "average_reward": rewards.average,
                "histogram": [
                    {"from": low, "to": high, "examples": count}
                    for (low, high), count in zip(BINS, rewards.histogram, strict=True)
                ],
                "agreement": agreed,
                "unmatched_feedback": [row._asdict() for row in unmatched],
            }
        )
        return
    table = Table(title=f"loop {loop.name}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for title, name in (
        ("interactions", "interactions"),
        ("feedback events", "feedback"),
        *((f"  {kind}", name) for kind, name in by_kind.items()),
        ("examples", "examples"),
        ("  corrected by a person", "corrected"),
        ("  answers nobody objected to", "implicit"),
        ("  others with a reward above 0", "rewarded"),
        ("flagged for review", "flagged"),
        ("unmatched feedback", "unmatched"),
    ):
        table.add_row(title, f"{counts[name]:,}")
    table.add_row("trainings", f"{trainings:,}")
    table.add_row("average reward", "none" if rewards.average is None else f"{rewards.average:+.2f}")
    alpha = "undefined" if agreed.alpha is None else f"{agreed.alpha:.2f}"
    table.add_row("agreement of users (Krippendorff's alpha, nominal: for or against)", alpha)
    table.add_row("  answers that several users rated", f"{agreed.answers:,}")
    Console().print(table)
    if counts["examples"]:
        click.echo("\nrewards of the examples:")
        most = max(rewards.histogram)
        for (low, high), count in zip(BINS, rewards.histogram, strict=True):
            bar = "#" * math.ceil(_BAR * count / most)
            click.echo(f"  {low:+.1f} to {high:+.1f} {count:>8,}  {bar}".rstrip())
    if unmatched:
        click.echo(f"\nunmatched feedback, whose interaction has not arrived ({counts['unmatched']}), oldest first:")
        for row in unmatched:
            click.echo(f"  {row.id}  {row.kind} on {row.interaction_id}, {_age(row.created_at)}")


@feedback.command()
@click.option("--limit", type=click.IntRange(1), default=LISTED, show_default=True, help="Maximum number of answers.")
@json_option
@loop_option
def flagged(loop: LoopSettings, limit: int, as_json: bool) -> None:
    """List flagged answers that nobody has reviewed.

    An answer is flagged, for example, because of low confidence. The newest come first.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import flagged_interactions

    with connect().read() as connection:
        found = flagged_interactions(connection, loop.name, limit)
    if as_json:
        print_json([one.model_dump(mode="json", exclude={"event"}, exclude_none=True) for one in found])
        return
    for one in found:
        confidence = "" if one.confidence is None else f"confidence {one.confidence:.2f}"
        known = confidence in str(one.flag)
        click.echo(f"{one.id}  {one.flag}{'' if known else f', {confidence}'}")
        click.echo(f"  prompt  {one_line(one.prompt)}\n  output  {one_line(one.output)}")
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
            f"loop {loop.name} has no active records of {source}. Sources with active records: {names}"
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
@click.option(
    "--scrub-dagster",
    is_flag=True,
    help="Also remove the name, these texts, and samples in dataset cards, which earlier versions stored there, from "
    "Dagster's history and the logs of finetune run.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def erase(user: str, name: str | None, scrub_dagster: bool, yes: bool) -> None:
    """Delete a person's data, and list what was made with it.

    This deletes the person's interactions with all feedback and review decisions on them, and the person's feedback
    and review decisions on interactions of others.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.erasure import erase_person, find_person, texts_of

    if not user.strip():
        raise click.UsageError("--user is empty; give the name as it is in the events")
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
    elif not scrub_dagster:
        click.echo(
            "Dagster's history and the logs of runs are not searched for these texts: --scrub-dagster does that, now, "
            "since after the erasure the texts are unknown"
        )
    if any(one.data.count for one in held) and not yes:
        click.confirm(f"Delete this data of {user!r} for good?", abort=True)
    texts = texts_of(database, held) if scrub_dagster else set()
    result = erase_person(database, user, held)
    for loop in result.loops:
        _print_erased(loop)
    if scrub_dagster:
        _scrub_dagster(user, texts, {one.loop.curation.redaction if one.loop else RedactionSettings() for one in held})
    dagster = "" if scrub_dagster else "Dagster's history and the logs of runs (--scrub-dagster), "
    click.echo(
        f"not reached: {dagster}backups, logs of other programs, models and GGUFs that were exported elsewhere, and "
        "promoted models that were trained on the data, until they are deleted"
    )
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


def _scrub_dagster(user: str, texts: Collection[str], redactions: Collection[RedactionSettings]) -> None:
    from finetune_pipeline.orchestration.scrub import dagster_home, scrub_home
    from finetune_pipeline.pipeline.erasure import MIN_TEXT

    done = scrub_home([user], sorted(texts), redactions)
    if not dagster_home().is_dir():
        click.echo(f"there is no Dagster home {dagster_home()}; set DAGSTER_HOME if it is elsewhere")
    rows = ", ".join(f"{counted(count, 'row')} of {table}" for table, count in sorted(done.rows.items())) or "0 rows"
    logs = counted(len(done.logs), "log")
    click.echo(f"Dagster's history: rewrote {rows} and {logs}; runs and events stay, without these texts")
    if not texts:
        click.echo("  Only the name was searched: the store has no texts of the person, as after an earlier erasure")
    elif short := sum(len(text.strip()) < MIN_TEXT for text in texts):
        click.echo(
            f"  not searched: {counted(short, 'text')} of fewer than {MIN_TEXT} characters, since other people's texts "
            "have them, too"
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
            "serves, and a rollback would restore none of the old ones (`finetune model switch base` and back makes it "
            f"restore the base model), `finetune model gc --keep 1 --loop {name}` deletes them, rejected challengers "
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
    if any(vars(loop.comparisons).values()):
        click.echo(
            f"{name}: {counted(loop.comparisons.prompts, 'prompt')} and {counted(loop.comparisons.pairs, 'pair')} of "
            f"comparisons overwritten, {counted(loop.comparisons.votes, 'vote')} deleted"
        )
    if loop.texts:
        click.echo(f"{name}: these files contain texts of the person, or the same texts of others:")
        _print_list([f"{path} ({counted(count, 'text')})" for path, count in loop.texts.items()])
        click.echo(
            "  Remove the questions from the benchmark and the replay file, delete the folders of the reports, and "
            "delete uploaded files, or upload them without these lines."
        )


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


def _print_feedback_id(feedback_id: UUID, interaction_id: UUID) -> None:
    """Print the feedback's id, and a note if its interaction has not arrived."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import find_interaction

    click.echo(feedback_id)
    with connect().read() as connection:
        found = find_interaction(connection, interaction_id)
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


def _print_list(items: Sequence[object]) -> None:
    for item in items:
        click.echo(f"    {item}")
