"""Files of feedback: what other programs wrote, and what others shall read.

Three kinds of object are read, told apart by their keys, mixed as they may be:

    {"event": "interaction" | "feedback", ...}                          the project's own events
    {"prompt", "output" or "response"[, "reward", "correction", ...]}   one exchange with what was thought of it
    {"instruction", "input", "output"[, "reward", ...]}                 Alpaca

They stand one a line, or all in one JSON array. The last two take every other field of `records.Interaction` too. Their
`reward` is of the output, and a correction beside it is worth what the table of rewards says. Without an id, or with
one that is no UUID, it follows from the content, so that a file that is read twice adds nothing.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import UUID, uuid5

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.artifacts import flush, hash_of
from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.client import FeedbackError, event_id, in_batches
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import Recorded, good_enough, newest_sequence, record
from finetune_pipeline.records import Feedback, Interaction, text_hash
from finetune_pipeline.schemas import Unreadable, parse_json
from finetune_pipeline.settings import LoopSettings

_SHOWN = 20
_BLOCK = 1 << 16
_ROWS = 500
_LONGEST_SIGN = 12  # an escaped surrogate pair; no other sign of JSON but texts and numbers is longer

Events = list[Interaction | Feedback]
E = TypeVar("E", Interaction, Feedback)


@dataclass(frozen=True)
class BadLine:
    """A line that is no event, and why."""

    path: Path
    line: int
    reason: str


@dataclass
class Imported:
    """What reading a file did; `bad` are the first of the refused lines."""

    lines: int = 0
    rejected: int = 0
    recorded: Recorded = field(default_factory=Recorded)
    bad: list[BadLine] = field(default_factory=list)


def import_file(path: Path, loop: LoopSettings, database: Database) -> Imported:
    """Take a file of any of the formats into the store; a bad line is named and the others are taken.

    Raises:
        FeedbackError: the file cannot be read.
    """
    result = Imported()
    reward = reward_function(loop.feedback)
    try:
        for batch in in_batches(_good(path, loop, result)):
            with database.write() as connection:
                done = record(connection, loop.name, batch, reward)
            result.recorded += Recorded(done.interactions, done.feedback, done.duplicates)
    except OSError as error:
        raise FeedbackError(f"{path} cannot be read ({error.strerror}); mend it, then import it again") from error
    return result


def read_events(path: Path, loop: LoopSettings) -> Iterator[Events | BadLine]:
    """What each line (or each element of an array) says: its events, or why it says nothing.

    Raises:
        OSError: the file cannot be read.
    """
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    for number, text in _texts(path, loop.sources.max_line_bytes):
        if isinstance(text, BadLine):
            yield text
            continue
        try:
            yield _events(parse_json(text), loop, moment)
        except ValidationError as error:
            yield BadLine(path, number, explain(error))
        except (Unreadable, ValueError) as error:
            yield BadLine(path, number, str(error))


def export_events(path: Path, loop: LoopSettings, database: Database, *, force: bool = False) -> int:
    """Write all events of a loop as they are, one JSON object a line, each interaction followed by its feedback.

    It is the raw record: secrets and personal data stay in it. A feedback has the `reward` that it counted for, unless
    its interaction never arrived.

    Returns:
        How many lines were written.

    Raises:
        FeedbackError: the file is there already (and not `force`), or cannot be written.
    """
    reward = reward_function(loop.feedback)
    with database.read() as connection, _written(path, force) as file:
        written = 0
        for line in _event_lines(connection, loop.name, reward):
            file.write(line + "\n")
            written += 1
        return written


def export_alpaca(
    path: Path,
    loop: LoopSettings,
    database: Database,
    redact: Callable[[str], str],
    *,
    min_reward: float = -1.0,
    force: bool = False,
) -> int:
    """Write what a loop's interactions teach: instruction, input, output as it should be, reward.

    The system prompt is the instruction and the prompt the input; without a system prompt the prompt is the
    instruction. What was said before the prompt stands in `history`. A name that ends in .json gives a JSON array,
    any other JSON lines.

    Args:
        redact: takes secrets and personal data out of a text, as before training: prompts, answers and history.
        min_reward: examples below it are left out, but for those that a person corrected.

    Returns:
        How many examples were written.

    Raises:
        FeedbackError: the file is there already (and not `force`), or cannot be written.
    """
    array = path.suffix == ".json"
    with database.read() as connection, _written(path, force) as file:
        written = 0
        file.write("[\n" if array else "")
        for row in _taught(connection, loop.name, min_reward):
            file.write(",\n" if array and written else "")
            file.write(_json(_alpaca_row(row, loop.system_prompt, redact)) + ("" if array else "\n"))
            written += 1
        file.write("\n]\n" if array else "")
        return written


def explain(error: ValidationError) -> str:
    """What is wrong with a record, in a line: which field, what was found, what was expected."""
    return "; ".join(_explained(one) for one in error.errors(include_url=False))


def _explained(one: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in one["loc"])
    message = str(one["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    if one["type"] == "missing":
        return f"{where}: is missing"
    if one["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    return f"{where}: found {one['input']!r:.80}, {message.replace('Input should be', 'expected')}"


def _good(path: Path, loop: LoopSettings, result: Imported) -> Iterator[Interaction | Feedback]:
    for item in read_events(path, loop):
        result.lines += 1
        if isinstance(item, BadLine):
            result.rejected += 1
            if len(result.bad) < _SHOWN:
                result.bad.append(item)
        else:
            yield from item


def _events(document: Any, loop: LoopSettings, moment: datetime) -> Events:
    if not isinstance(document, dict):
        raise ValueError(f"found {type(document).__name__}, expected a JSON object")
    given = {"task": loop.name, "created_at": moment, **document}
    if given["task"] != loop.name:
        raise ValueError(f"is of task {given['task']!r:.80}, this file is read for {loop.name!r}")
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
    return kinds[event].model_validate({"id": event_id(given["task"], hash_of(document)), **given})


def _from_alpaca(given: dict[str, Any], system_prompt: str) -> dict[str, Any]:
    # `text` is what the original data set has beside them: the three in one.
    rest = {key: value for key, value in given.items() if key not in {"instruction", "input", "text"}}
    parts = (given["instruction"], given.get("input") or "")
    if "prompt" in rest or not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction and input: expected two texts, and no prompt beside them")
    instruction, asked = parts
    prompt = asked if instruction == system_prompt else "\n\n".join(part for part in parts if part)
    return {**rest, "prompt": prompt}


def _exchange(given: dict[str, Any]) -> Events:
    """The interaction of a flat line, and the feedback on it."""
    if ("output" in given) == ("response" in given):
        raise ValueError("output: expected the answer, as `output` or as `response`")
    own = {key: value for key, value in given.items() if key not in {"response", "reward", "correction"}}
    own.setdefault("output", given.get("response"))
    if not _is_uuid(own.get("id")):
        # The time of the file is no part of what the line says; a time that it names itself is.
        content = {key: value for key, value in own.items() if not isinstance(value, datetime)}
        own["id"] = event_id(own["task"], hash_of(content))
    interaction = Interaction.model_validate(own)
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
            "task": interaction.task,
            "interaction_id": interaction.id,
            "created_at": interaction.created_at,
            "kind": kind,
            "output_hash": about,
            **values,
        }
    )


def _texts(path: Path, max_bytes: int) -> Iterator[tuple[int, str | BadLine]]:
    """The JSON texts of a file with the numbers of their lines; what is too long or not UTF-8 is a bad line."""
    with path.open("rb") as file:
        head = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        yield from _elements(path, file, max_bytes) if head[:1] == b"[" else _lines(path, file, max_bytes)


def _lines(path: Path, file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, str | BadLine]]:
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        if len(raw) > max_bytes and not raw.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, BadLine(path, number, _too_long(max_bytes))
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, BadLine(path, number, f"not UTF-8: {error.reason} at byte {error.start}")
            continue
        if text:
            yield number, text


def _elements(path: Path, file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, str | BadLine]]:
    """The elements of a JSON array, one at a time; after a fault in the array itself nothing more can be told apart."""
    array = _Array(file, max_bytes)
    try:
        yield from array.elements()
    except (ValueError, RecursionError) as error:
        reason = f"{error}; nothing after it was read" if isinstance(error, _Fault) else f"not JSON: {error}"
        yield array.line, BadLine(path, array.line, reason)


class _Fault(ValueError):
    """The array does not go on as an array does."""


class _Array:
    """Reads a JSON array through a buffer that holds hardly more than one element."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        import io

        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._max = max_bytes
        self._rest = ""
        self._ended = False
        self.line = 1

    def elements(self) -> Iterator[tuple[int, str | BadLine]]:
        self._expect("[")
        if self._next() == "]":
            self._expect("]")
        else:
            while True:
                self._next()
                line = self.line
                yield line, self._element()
                if self._next() == "]":
                    self._expect("]")
                    break
                self._expect(",")
        if self._next():
            raise _Fault(f"found {self._rest[:20]!r} after the end of the array")

    def _element(self) -> str:
        decoder = json.JSONDecoder()
        while True:
            try:
                _, end = decoder.raw_decode(self._rest)
                return self._take(end)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise _Fault(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise _Fault("not JSON: nested too deep") from None
            if len(self._rest) > self._max:
                raise _Fault(f"not JSON, or {_too_long(self._max)}")
            self._fill(max(_BLOCK, len(self._rest)))  # doubled, so that a long element is not parsed too often

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the fault may only be that the element is not all in the buffer yet."""
        return error.msg.startswith("Unterminated") or error.pos > len(self._rest) - _LONGEST_SIGN

    def _next(self) -> str:
        """The next sign that is no white space, left where it is."""
        while True:
            kept = self._rest.lstrip()
            self._take(len(self._rest) - len(kept))
            if kept or self._ended:
                return kept[:1]
            self._fill(_BLOCK)

    def _expect(self, sign: str) -> None:
        found = self._next()
        if found != sign:
            raise _Fault(f"found {found or 'the end of the file'!r}, expected {sign!r}")
        self._take(1)

    def _take(self, length: int) -> str:
        taken, self._rest = self._rest[:length], self._rest[length:]
        self.line += taken.count("\n")
        return taken

    def _fill(self, size: int) -> None:
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise _Fault(f"not UTF-8: {error.reason}") from None
        self._ended = not more
        self._rest += more


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes} bytes (sources.max_line_bytes)"


@contextmanager
def _written(path: Path, force: bool) -> Iterator[IO[str]]:
    """A file that is there whole or not at all."""
    if path.exists() and not force:
        raise FeedbackError(f"{path} is there already; name another file, or overwrite it with --force")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise FeedbackError(
            f"{path} could not be written ({error.strerror}); nothing is left of it. Name a file in a folder that is "
            "there, on a disk with room"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _event_lines(connection: sa.Connection, task: str, reward: RewardFunction) -> Iterator[str]:
    i, f = t.interactions.c, t.feedback.c
    until = newest_sequence(connection)
    for rows in _partitions(connection, sa.select(t.interactions).where(i.task == task, i.sequence <= until), i):
        ids = [row.id for row in rows]
        about = sa.select(t.feedback).where(f.task == task, f.interaction_id.in_(ids)).order_by(f.sequence)
        by_interaction: dict[UUID, list[Feedback]] = {}
        for row in connection.execute(about):
            by_interaction.setdefault(UUID(row.interaction_id), []).append(_record(Feedback, row))
        for interaction in (_record(Interaction, row) for row in rows):
            yield interaction.model_dump_json(exclude_none=True, exclude=_no_history(interaction))
            for feedback in by_interaction.get(interaction.id, ()):
                rewarded = feedback.model_copy(update={"reward": reward(feedback, interaction)})
                yield rewarded.model_dump_json(exclude_none=True)
    known = sa.exists().where(i.id == f.interaction_id, i.task == task)
    for rows in _partitions(connection, sa.select(t.feedback).where(f.task == task, f.sequence <= until, ~known), f):
        for row in rows:
            yield _record(Feedback, row).model_dump_json(exclude_none=True)


def _record(kind: type[E], row: sa.Row[Any]) -> E:
    values = row._asdict()
    return kind.model_validate({k: v for k, v in values.items() if k != "sequence" and v is not None})


def _no_history(interaction: Interaction) -> set[str]:
    return set() if interaction.history else {"history"}


def _taught(connection: sa.Connection, task: str, min_reward: float) -> Iterator[sa.Row[Any]]:
    i, e = t.interactions.c, t.examples.c
    query = (
        sa.select(i.prompt, i.history, e.target, e.reward)
        .join(t.examples, i.id == e.interaction_id)
        .where(i.task == task, e.task == task, good_enough(min_reward))
    )
    for rows in _partitions(connection, query, i):
        yield from rows


def _partitions(connection: sa.Connection, query: sa.Select[Any], columns: Any) -> Iterable[Any]:
    ordered = query.order_by(columns.sequence).execution_options(yield_per=_ROWS)
    return connection.execute(ordered).partitions()


def _alpaca_row(row: sa.Row[Any], system_prompt: str, redact: Callable[[str], str]) -> dict[str, Any]:
    prompt = redact(row.prompt)
    asked = {"instruction": system_prompt, "input": prompt} if system_prompt else {"instruction": prompt}
    history = [{**turn, "content": redact(turn["content"])} for turn in row.history or ()]
    said = {"history": history} if history else {}
    return {"input": "", **asked, **said, "output": redact(row.target), "reward": row.reward}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
