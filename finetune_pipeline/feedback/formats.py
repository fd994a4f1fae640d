"""Files of feedback: what other programs wrote, and what others shall read.

Three kinds of object are read, told apart by their keys, mixed as they may be:

    {"event": "interaction" | "feedback", ...}                          the project's own events
    {"prompt", "output" or "response"[, "reward", "correction", ...]}   one exchange with what was thought of it
    {"instruction", "input", "output"[, "reward", ...]}                 Alpaca

The last two take every other field of `records.Interaction` too. Their `reward` is of the output, and a correction
beside it is worth what the table of rewards says. Without an id, or with one that is no UUID, it follows from the
content, so that a file that is read twice adds nothing. A row marked as not to be trained on (`weight: 0`, or `train`,
`trainable` or `loss` false) is rejected. Reading the rows of a file is done elsewhere.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from uuid import UUID, uuid5

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.alpaca import alpaca_prompt, alpaca_row, history_messages
from finetune_pipeline.artifacts import hash_of, new_file
from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.client import FeedbackError, event_id, in_batches
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import RecordResult, newest_offset, qualifies, record, source_feedback_id
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
from finetune_pipeline.validation_messages import error_message

_SHOWN = 20
_ROWS = 500

Rows = Iterable[tuple[int, Any, str, bool]]
"""The rows of a file: the line at which each begins, its value, why it could not be read (else empty), and whether
nothing behind it could be."""

Events = list[Interaction | Feedback]
E = TypeVar("E", Interaction, Feedback)


@dataclass(frozen=True)
class InvalidLine:
    """A line that is no event, and why."""

    path: Path
    line: int
    reason: str


@dataclass
class ImportResult:
    """What reading a file did.

    Attributes:
        invalid: the first rejected lines.
        conflicts: events whose id is known with other content.
    """

    lines: int = 0
    rejected: int = 0
    recorded: RecordResult = field(default_factory=RecordResult)
    invalid: list[InvalidLine] = field(default_factory=list)
    conflicts: list[Interaction | Feedback] = field(default_factory=list)


class ExportResult(NamedTuple):
    """How many lines, or examples, were written, and how many interactions were left out."""

    written: int
    left_out: int


def import_rows(path: Path, rows: Rows, loop: LoopSettings, database: Database) -> ImportResult:
    """Take the rows of a file into the store, of any of the formats; a bad one is named and the others are taken.

    Raises:
        FeedbackError: the file cannot be read.
    """
    result = ImportResult()
    reward = reward_function(loop.feedback)
    try:
        for batch in in_batches(_good(path, rows, loop, result)):
            with database.write() as connection:
                done = record(connection, loop.name, batch, reward)
            result.recorded += RecordResult(done.interactions, done.feedback, done.duplicates)
            result.conflicts += done.conflicts
    except OSError as error:
        raise FeedbackError(f"{path} cannot be read ({error.strerror}); mend it, then import it again") from error
    return result


def read_events(path: Path, rows: Rows, loop: LoopSettings) -> Iterator[Events | InvalidLine]:
    """What each row of a file says: its events, or why it says nothing.

    Raises:
        OSError: the file cannot be read.
    """
    moment = min(datetime.fromtimestamp(path.stat().st_mtime, UTC), datetime.now(UTC))
    for number, document, reason, _ in rows:
        if reason:
            yield InvalidLine(path, number, reason)
            continue
        try:
            yield _events(document, loop, moment)
        except ValidationError as error:
            yield InvalidLine(path, number, error_message(error))
        except ValueError as error:
            yield InvalidLine(path, number, str(error))


def export_events(path: Path, loop: LoopSettings, database: Database, *, force: bool = False) -> ExportResult:
    """Write what applications logged, and what was said of it, a line each, interactions before their feedback.

    It is the raw record: secrets and personal data stay in it. A feedback has the `reward` that it counted for, unless
    its interaction is not in the file.

    What declared sources and dropped files gave is left out: it stands there, comes from there with the same ids, and
    is taken back when it is gone there, none of which an event could say. What people said of it is written.

    Raises:
        FeedbackError: the file is there already (and not `force`), or cannot be written.
    """
    reward = reward_function(loop.feedback)
    with database.read() as connection, _written(path, force) as file:
        written = 0
        for line in _event_lines(connection, loop.name, reward):
            file.write(line + "\n")
            written += 1
        i = t.interactions.c
        return ExportResult(written, _count(connection, i.loop == loop.name, i.source.is_not(None)))


def export_alpaca(
    path: Path,
    loop: LoopSettings,
    database: Database,
    redact: Callable[[str], str],
    *,
    min_reward: float = -1.0,
    force: bool = False,
) -> ExportResult:
    """Write what a loop's interactions teach, whatever gave them: instruction, input, answer as it should be, reward.

    What was retracted, since its source no longer has it, teaches nothing and is left out.

    The system prompt is the instruction and the prompt the input; without a system prompt the prompt is the
    instruction. What was said before the prompt stands in `history`. A name that ends in .json gives a JSON array,
    any other JSON lines.

    Args:
        redact: takes secrets and personal data out of a text, as before training: prompts, answers and history.
        min_reward: examples below it are left out, but for those that a person corrected.

    Raises:
        FeedbackError: the file is there already (and not `force`), or cannot be written.
    """
    array = path.suffix == ".json"
    with database.read() as connection, _written(path, force) as file:
        written = 0
        file.write("[\n" if array else "")
        for row in _taught(connection, loop.name, min_reward):
            file.write(",\n" if array and written else "")
            history = [Turn(role=turn["role"], content=redact(turn["content"])) for turn in row.history or ()]
            line = alpaca_row(redact(row.prompt), history, redact(row.target), loop.system_prompt)
            line["reward"] = row.reward
            file.write(json.dumps(line, ensure_ascii=False) + ("" if array else "\n"))
            written += 1
        file.write("\n]\n" if array else "")
        i = t.interactions.c
        return ExportResult(written, _count(connection, i.loop == loop.name, i.retracted_offset.is_not(None)))


def _good(path: Path, rows: Rows, loop: LoopSettings, result: ImportResult) -> Iterator[Interaction | Feedback]:
    for item in read_events(path, rows, loop):
        result.lines += 1
        if isinstance(item, InvalidLine):
            result.rejected += 1
            if len(result.invalid) < _SHOWN:
                result.invalid.append(item)
        else:
            yield from item


def _events(document: Any, loop: LoopSettings, moment: datetime) -> Events:
    if not isinstance(document, dict):
        raise ValueError(f"found {type(document).__name__}, expected a JSON object")
    given = {"loop": loop.name, "created_at": moment, **document}
    if given["loop"] != loop.name:
        raise ValueError(f"is of loop {given['loop']!r:.80}, this file is read for {loop.name!r}")
    if "event" in document:
        return [_own_event(given, document)]
    if "instruction" in document:
        return _exchange(_from_alpaca(given, loop.system_prompt))
    if "prompt" in document:
        return _exchange(given)
    raise ValueError("none of the keys event, prompt, instruction is there; one of them says what the line is")


def _own_event(given: dict[str, Any], document: Any) -> Interaction | Feedback:
    kinds: dict[Any, type[Interaction | Feedback]] = {"interaction": Interaction, "feedback": Feedback}
    event = given["event"]
    if not isinstance(event, str) or event not in kinds:
        raise ValueError(f"event: found {event!r:.80}, expected interaction or feedback")
    return validate_application_event(
        kinds[event].model_validate({"id": event_id(given["loop"], hash_of(document)), **given})
    )


def _from_alpaca(given: dict[str, Any], system_prompt: str) -> dict[str, Any]:
    # The original data set also has `text`, which repeats the other three.
    rest = {key: value for key, value in given.items() if key not in {"instruction", "input", "text", "system"}}
    if "prompt" in rest:
        raise ValueError("instruction and input: expected two strings, and no prompt in addition")
    system = given.get("system")
    prompt = alpaca_prompt(given["instruction"], given.get("input"), system)
    if "history" in rest:
        rest["history"] = history_messages(rest["history"])
    if system and system != system_prompt:
        rest["history"] = [{"role": "system", "content": system}, *(rest.get("history") or ())]
    return {**rest, "prompt": without_system_prompt(prompt, (), system_prompt)[0]}


def _exchange(given: dict[str, Any]) -> Events:
    """The interaction of a flat line, and the feedback on it."""
    if ("output" in given) == ("response" in given):
        raise ValueError("output: expected the answer, as `output` or as `response`")
    if marked := loss_mask_field(given):
        raise ValueError(f"the line is not to be trained on ({marked})")
    beside = {"response", "reward", "correction", *LOSS_MASK_FIELDS}
    own = {key: value for key, value in given.items() if key not in beside}
    own.setdefault("output", given.get("response"))
    if not _is_uuid(own.get("id")):
        # The time of the file is no part of what the line says; a time that it names itself is.
        content = {key: value for key, value in own.items() if not isinstance(value, datetime)}
        own["id"] = event_id(own["loop"], hash_of(content))
    interaction = Interaction.model_validate(own)
    validate_application_event(interaction)
    events: Events = [interaction]
    if given.get("reward") is not None:
        events.append(_on(interaction, "reward", reward=given["reward"]))
    if given.get("correction") is not None:
        events.append(_on(interaction, "correction", correction=given["correction"], user=interaction.user))
    return events


def _is_uuid(value: Any) -> bool:
    try:
        UUID(value)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _on(interaction: Interaction, kind: str, **values: Any) -> Feedback:
    about = text_hash(interaction.output)
    return Feedback.model_validate(
        {
            "id": uuid5(interaction.id, hash_of([kind, about, values])),
            "loop": interaction.loop,
            "interaction_id": interaction.id,
            "created_at": interaction.created_at,
            "kind": kind,
            "output_hash": about,
            **values,
        }
    )


@contextmanager
def _written(path: Path, force: bool) -> Iterator[IO[str]]:
    """A file that is there whole or not at all."""
    try:
        with new_file(path, force=force) as file:
            yield file
    except FileExistsError as error:
        raise FeedbackError(f"{path} is there already; name another file, or overwrite it with --force") from error
    except OSError as error:
        raise FeedbackError(
            f"{path} could not be written ({error.strerror}); nothing is left of it. Name a file in a folder that is "
            "there, on a disk with room"
        ) from error


def _event_lines(connection: sa.Connection, loop: str, reward: RewardFunction) -> Iterator[str]:
    i, f = t.interactions.c, t.feedback.c
    until = newest_offset(connection)
    own = sa.select(t.interactions).where(i.loop == loop, i.ingest_offset <= until, i.source.is_(None))
    for rows in _partitions(connection, own, i):
        ids = [row.id for row in rows]
        about = sa.select(t.feedback).where(f.loop == loop, f.interaction_id.in_(ids)).order_by(f.ingest_offset)
        by_interaction: dict[UUID, list[Feedback]] = {}
        for row in connection.execute(about):
            by_interaction.setdefault(UUID(row.interaction_id), []).append(_record(Feedback, row))
        for interaction in (_record(Interaction, row) for row in rows):
            yield interaction.model_dump_json(exclude_none=True, exclude=_no_history(interaction))
            for feedback in by_interaction.get(interaction.id, ()):
                rewarded = feedback.model_copy(update={"reward": reward(feedback, interaction)})
                yield rewarded.model_dump_json(exclude_none=True)
    written = sa.exists().where(i.id == f.interaction_id, i.loop == loop, i.source.is_(None))
    for rows in _partitions(
        connection, sa.select(t.feedback).where(f.loop == loop, f.ingest_offset <= until, ~written), f
    ):
        for one in (_record(Feedback, row) for row in rows):
            given_on = one.interaction_id
            if one.id not in {source_feedback_id(given_on), source_feedback_id(given_on, one.reward)}:
                yield one.model_dump_json(exclude_none=True)


def _record(kind: type[E], row: sa.Row[Any]) -> E:
    values = row._asdict()
    return kind.model_validate(
        {k: v for k, v in values.items() if k not in {"ingest_offset", "retracted_offset"} and v is not None}
    )


def _count(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(t.interactions).where(*which)).scalar_one())


def _no_history(interaction: Interaction) -> set[str]:
    return set() if interaction.history else {"history"}


def _taught(connection: sa.Connection, loop: str, min_reward: float) -> Iterator[sa.Row[Any]]:
    i, e = t.interactions.c, t.examples.c
    query = (
        sa.select(i.prompt, i.history, e.target, e.reward)
        .join(t.examples, i.id == e.interaction_id)
        .where(i.loop == loop, e.loop == loop, i.retracted_offset.is_(None), qualifies(min_reward))
    )
    for rows in _partitions(connection, query, i):
        yield from rows


def _partitions(connection: sa.Connection, query: sa.Select[Any], columns: Any) -> Iterable[Any]:
    ordered = query.order_by(columns.ingest_offset).execution_options(yield_per=_ROWS)
    return connection.execute(ordered).partitions()
