"""Feedback files: import of three kinds of JSON objects, and export as events or as Alpaca rows.

The keys of an object determine its kind, and one file may contain all kinds:

    {"event": "interaction" | "feedback", ...}                          the project's own events
    {"prompt", "output" or "response"[, "reward", "correction", ...]}   an interaction with its feedback
    {"instruction", "input", "output"[, "reward", ...]}                 Alpaca

The last two may have any other field of `records.Interaction`. Their `reward` is that of the output; a correction in
addition has the reward of a correction. A missing id, or one that is not a UUID, is derived from the content, so that
importing a file again adds nothing. A row that is excluded from training (`weight: 0`; or `train`, `trainable` or
`loss` false) is rejected. `sources.row_readers` reads the rows of a file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import UUID, uuid5

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.alpaca import alpaca_prompt, alpaca_row, history_messages
from finetune_pipeline.artifacts import hash_of, new_file
from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.client import FeedbackError, event_id, in_batches
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import (
    RecordResult,
    feedback_from_row,
    interaction_from_row,
    newest_offset,
    qualifies,
    record,
    source_feedback_id,
)
from finetune_pipeline.records import (
    LOSS_MASK_FIELDS,
    Feedback,
    Interaction,
    Turn,
    loss_mask_field,
    text_hash,
    validate_application_event,
    without_system_prompt,
)
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.tool_calls import unsupported_part
from finetune_pipeline.validation_messages import error_message, short_repr
from finetune_pipeline.wording import kind_of

_MAX_LISTED = 20
_FETCHED_ROWS = 500

Rows = Iterable[tuple[int, Any, str, bool]]
"""The rows of a file: line number, value, why it could not be read (else empty), and whether the rest is unreadable."""

Events = list[Interaction | Feedback]


@dataclass(frozen=True)
class InvalidLine:
    """A line that is not an event, and the reason."""

    path: Path
    line: int
    reason: str


@dataclass
class ImportResult:
    """The result of an import.

    Attributes:
        invalid: the first rejected lines.
        conflicts: events whose id already exists with different content.
    """

    lines: int = 0
    rejected: int = 0
    recorded: RecordResult = field(default_factory=RecordResult)
    invalid: list[InvalidLine] = field(default_factory=list)
    conflicts: list[Interaction | Feedback] = field(default_factory=list)


class ExportResult(NamedTuple):
    """How many events or examples were written, and how many interactions were left out."""

    written: int
    left_out: int


def import_rows(path: Path, rows: Rows, loop: LoopSettings, database: Database) -> ImportResult:
    """Store the valid rows of a file, and list the others.

    Raises:
        FeedbackError: the file cannot be read.
    """
    result = ImportResult()
    reward = reward_function(loop.feedback)

    def valid_events() -> Iterator[Interaction | Feedback]:
        for item in read_events(path, rows, loop):
            result.lines += 1
            if isinstance(item, InvalidLine):
                result.rejected += 1
                if len(result.invalid) < _MAX_LISTED:
                    result.invalid.append(item)
            else:
                yield from item

    try:
        for batch in in_batches(valid_events()):
            with database.write() as connection:
                done = record(connection, loop.name, batch, reward)
            result.recorded += RecordResult(done.interactions, done.feedback, done.duplicates)
            result.conflicts += done.conflicts
    except OSError as error:
        raise FeedbackError(f"{path} cannot be read ({error.strerror}). Fix this, then import it again.") from error
    return result


def read_events(path: Path, rows: Rows, loop: LoopSettings) -> Iterator[Events | InvalidLine]:
    """Yield the events of each row of a file, or why the row is invalid.

    Raises:
        OSError: the file cannot be read.
    """
    file_time = min(datetime.fromtimestamp(path.stat().st_mtime, UTC), datetime.now(UTC))
    for number, row, reason, _ in rows:
        if reason:
            yield InvalidLine(path, number, reason)
            continue
        try:
            events = _events(row, loop, file_time)
            corrections = (one.correction for one in events if isinstance(one, Feedback) and one.correction is not None)
            for problem in filter(None, (correction_problem(loop, correction) for correction in corrections)):
                raise ValueError(problem)
            yield events
        except ValidationError as error:
            yield InvalidLine(path, number, error_message(error))
        except ValueError as error:
            yield InvalidLine(path, number, str(error))


def export_events(path: Path, loop: LoopSettings, database: Database, *, force: bool = False) -> ExportResult:
    """Write the events that applications logged, one per line, each interaction before its feedback.

    This is the raw record, with secrets and personal data. A feedback has the `reward` that it counted for, unless its
    interaction is not in the file.

    Interactions of declared sources and dropped files are left out: they would be imported as an application's, while
    a sync brings them in with the same ids and retracts them when their source drops them. Feedback of people on them
    is written.

    Raises:
        FeedbackError: the file exists (and not `force`), or cannot be written.
    """
    reward = reward_function(loop.feedback)
    i = t.interactions.c
    with database.read() as connection, _new_export(path, force) as file:
        written = 0
        for event in _exported_events(connection, loop.name, reward):
            # Without fields that are null or, like the history, empty by default.
            exclude = {"history"} if isinstance(event, Interaction) and not event.history else set()
            file.write(event.model_dump_json(exclude_none=True, exclude=exclude) + "\n")
            written += 1
        return ExportResult(written, _count(connection, i.loop == loop.name, i.source.is_not(None)))


def export_alpaca(
    path: Path,
    loop: LoopSettings,
    database: Database,
    redact: Callable[[Sequence[str]], list[str]],
    *,
    min_reward: float = -1.0,
    force: bool = False,
) -> ExportResult:
    """Write a loop's examples, whatever they came from, as Alpaca rows with their reward.

    The system prompt is the instruction and the prompt the input; without a system prompt the prompt is the
    instruction. Messages before the prompt are pairs in `history`, see `alpaca`. A name that ends in .json gives a
    JSON array, any other JSON lines. Examples of retracted interactions are left out.

    Args:
        redact: removes secrets and personal data from the texts of an example, as before training.
        min_reward: examples with a lower reward are left out, except those that a person corrected.

    Raises:
        FeedbackError: the file exists (and not `force`), or cannot be written.
    """
    i, e = t.interactions.c, t.examples.c
    examples = (
        sa.select(i.prompt, i.history, e.target, e.reward)
        .join(t.examples, i.id == e.interaction_id)
        .where(i.loop == loop.name, e.loop == loop.name, i.retracted_offset.is_(None), qualifies(min_reward))
    )
    array = path.suffix == ".json"
    with database.read() as connection, _new_export(path, force) as file:
        written = 0
        file.write("[\n" if array else "")
        for row in (row for rows in _batches(connection, examples, i) for row in rows):
            turns = row.history or []
            *contents, prompt, target = redact([*(turn["content"] for turn in turns), row.prompt, row.target])
            history = [Turn(role=turn["role"], content=content) for turn, content in zip(turns, contents, strict=True)]
            alpaca = alpaca_row(prompt, history, target, loop.system_prompt)
            alpaca["reward"] = row.reward
            file.write(",\n" if array and written else "")
            file.write(json.dumps(alpaca, ensure_ascii=False) + ("" if array else "\n"))
            written += 1
        file.write("\n]\n" if array else "")
        return ExportResult(written, _count(connection, i.loop == loop.name, i.retracted_offset.is_not(None)))


def _events(row: Any, loop: LoopSettings, file_time: datetime) -> Events:
    if not isinstance(row, dict):
        raise ValueError(f"found {kind_of(row)}, expected a JSON object")
    if found := unsupported_part(row):
        raise ValueError(found)
    given = {"loop": loop.name, "created_at": file_time, **row}
    if given["loop"] != loop.name:
        raise ValueError(f"belongs to loop {given['loop']!r:.80}, but this file is read for {loop.name!r}")
    if "event" in row:
        kinds: dict[Any, type[Interaction | Feedback]] = {"interaction": Interaction, "feedback": Feedback}
        event = given["event"]
        if not isinstance(event, str) or event not in kinds:
            raise ValueError(f"unknown event {short_repr(event)}; expected one of interaction, feedback")
        identified = {"id": event_id(given["loop"], hash_of(row)), **given}
        return [validate_application_event(kinds[event].model_validate(identified))]
    if "instruction" in row:
        # The original data set also has `text`, which repeats the other three.
        fields = {key: value for key, value in given.items() if key not in {"instruction", "input", "text", "system"}}
        if "prompt" in fields:
            raise ValueError("instruction and input: expected two strings, and no prompt in addition")
        system = given.get("system")
        prompt = alpaca_prompt(given["instruction"], given.get("input"), system)
        fields["prompt"], _ = without_system_prompt(prompt, (), loop.system_prompt)
        if "history" in fields:
            fields["history"] = history_messages(fields["history"])
        if system not in (None, "", loop.system_prompt):
            fields["history"] = [{"role": "system", "content": system}, *(fields.get("history") or ())]
        return _flat_events(fields)
    if "prompt" in row:
        return _flat_events(given)
    raise ValueError("has none of the keys event, prompt, instruction; one of them says what the line is")


def _flat_events(given: dict[str, Any]) -> Events:
    """Return the interaction of a row that has its feedback as fields, and this feedback."""
    if ("output" in given) == ("response" in given):
        raise ValueError("output: expected the answer, as `output` or as `response`")
    if masked := loss_mask_field(given):
        raise ValueError(f"the row is excluded from training ({masked})")
    others = {"response", "reward", "correction", *LOSS_MASK_FIELDS}
    fields = {key: value for key, value in given.items() if key not in others}
    fields.setdefault("output", given.get("response"))
    if not _is_uuid(fields.get("id")):
        # A time that the row names is part of its content (and a string here); the file's time is not.
        content = {key: value for key, value in fields.items() if not isinstance(value, datetime)}
        fields["id"] = event_id(fields["loop"], hash_of(content))
    interaction = Interaction.model_validate(fields)
    validate_application_event(interaction)
    events: Events = [interaction]
    if given.get("reward") is not None:
        events.append(_feedback_on(interaction, "reward", reward=given["reward"]))
    if given.get("correction") is not None:
        events.append(_feedback_on(interaction, "correction", correction=given["correction"], user=interaction.user))
    return events


def _is_uuid(value: Any) -> bool:
    try:
        UUID(value)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _feedback_on(interaction: Interaction, kind: str, **values: Any) -> Feedback:
    answer_hash = text_hash(interaction.output)
    return Feedback.model_validate(
        {
            "id": uuid5(interaction.id, hash_of([kind, answer_hash, values])),
            "loop": interaction.loop,
            "interaction_id": interaction.id,
            "created_at": interaction.created_at,
            "kind": kind,
            "output_hash": answer_hash,
            **values,
        }
    )


@contextmanager
def _new_export(path: Path, force: bool) -> Iterator[IO[str]]:
    """Open a file that appears under its name only when it is complete."""
    try:
        with new_file(path, force=force) as file:
            yield file
    except FileExistsError as error:
        raise FeedbackError(f"{path} exists already; name another file, or overwrite it with --force") from error
    except OSError as error:
        raise FeedbackError(
            f"{path} could not be written ({error.strerror}), and nothing of it is left. Name a file in an existing "
            "folder, on a disk with free space."
        ) from error


def _exported_events(connection: sa.Connection, loop: str, reward: RewardFunction) -> Iterator[Interaction | Feedback]:
    i, f = t.interactions.c, t.feedback.c
    until = newest_offset(connection)
    own = sa.select(t.interactions).where(i.loop == loop, i.ingest_offset <= until, i.source.is_(None))
    for rows in _batches(connection, own, i):
        ids = [row.id for row in rows]
        about = sa.select(t.feedback).where(f.loop == loop, f.interaction_id.in_(ids)).order_by(f.ingest_offset)
        by_interaction: dict[UUID, list[Feedback]] = {}
        for row in connection.execute(about):
            by_interaction.setdefault(UUID(row.interaction_id), []).append(feedback_from_row(row))
        for interaction in map(interaction_from_row, rows):
            yield interaction
            for feedback in by_interaction.get(interaction.id, ()):
                yield feedback.model_copy(update={"reward": reward(feedback, interaction)})
    exported = sa.exists().where(i.id == f.interaction_id, i.loop == loop, i.source.is_(None))
    others = sa.select(t.feedback).where(f.loop == loop, f.ingest_offset <= until, ~exported)
    for rows in _batches(connection, others, f):
        for feedback in map(feedback_from_row, rows):
            # A source's own reward comes again with its next sync.
            on = feedback.interaction_id
            if feedback.id not in {source_feedback_id(on), source_feedback_id(on, feedback.reward)}:
                yield feedback


def _count(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(t.interactions).where(*conditions)
    return int(connection.execute(query).scalar_one())


def _batches(connection: sa.Connection, query: sa.Select[Any], columns: Any) -> Iterable[Any]:
    ordered = query.order_by(columns.ingest_offset).execution_options(yield_per=_FETCHED_ROWS)
    return connection.execute(ordered).partitions()
