"""Events that were acknowledged but are not in the store yet, in a file that outlives the process.

An application must not wait for the database, nor lose what it was told is recorded: `Recorder.add` returns once the
event is in the journal (a plain write: a kill of the process loses nothing), a thread takes the events over into the
store in batches, and the journal is emptied. What a killed process left behind is taken over by the next one, and by
every ingest. Ids make it harmless to take an event over twice.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal
from uuid import UUID

import sqlalchemy as sa
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from uuid_utils.compat import uuid7

from finetune_pipeline.artifacts import disk_full, flush
from finetune_pipeline.database import Database, DatabaseError
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import conflict, record
from finetune_pipeline.records import Event, Feedback, Interaction, not_in_future
from finetune_pipeline.settings import home, survives_power_cut

BATCH, BATCH_BYTES = 500, 4 * 2**20
SHRINK_BYTES = 16 * 2**20
"""What is in the store already may take this much of a journal before it is dropped, where traffic never pauses."""

_ITS_OWN_FAULT = (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.ProgrammingError)
"""What a database says of one event; all else that it says means that it can take nothing now, and later will."""

_RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)
_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_log = logging.getLogger(__name__)

Outcome = Literal["recorded", "duplicate", "conflict", "waiting", "refused"]
"""What became of an event; `waiting` is feedback whose interaction has not arrived, kept until it does, and `conflict`
a duplicate with other content than the stored event, which is kept."""

RewardOf = Callable[[str], RewardFunction]
"""The reward function of a loop, by the loop's name."""


def journal_folder() -> Path:
    """Where the journals lie, one for each process that records."""
    return home() / "journal"


class Recorder:
    """Takes events; a thread of its own brings them into the store. `close` waits for what is left.

    Attributes:
        full: why nothing can be written to the journal now.
        trouble: why the store takes nothing now.
        refused: which event the store refused for its own sake.

    Args:
        database: the store.
        reward_of: the reward function of a loop.
    """

    def __init__(self, database: Database, reward_of: RewardOf, folder: Path | None = None) -> None:
        self._database = database
        self._reward_of = reward_of
        folder = folder or journal_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{uuid7()}.jsonl"
        self._lock_file = FileLock(f"{self.path}.lock", timeout=0)
        self._lock_file.acquire()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._flush_each = survives_power_cut()
        if self._flush_each:
            flush(folder)  # the file's name has to survive too
        self._size = self._taken = 0
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._outcomes: dict[UUID, list[Future[Outcome]]] = {}
        self._newest: Future[Outcome] | None = None
        self._closing = False
        self.trouble: str | None = None
        self.refused: str | None = None
        self.full: str | None = None
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def add(self, event: Interaction | Feedback) -> "Future[Outcome]":
        """Record an event: on return it survives a kill; the future ends when it is in the store.

        Raises:
            ArtifactError: the disk is full; the event is not recorded.
        """
        line = event.model_dump_json().encode() + b"\n"
        done: Future[Outcome] = Future()
        with self._arrived:
            if self._closing:
                raise RuntimeError("the recorder is closed; what comes now is recorded by nobody")
            self._append(line)
            self._outcomes.setdefault(event.id, []).append(done)
            self._newest = done
            self._arrived.notify_all()
        return done

    def settled(self) -> "Future[Outcome] | None":
        """Ends when all that was added until now is in the store, which it is already where there is None."""
        with self._lock:
            return self._newest if self._newest is not None and not self._newest.done() else None

    @property
    def pending(self) -> int:
        """Bytes that are in the journal and not in the store yet."""
        return self._size - self._taken

    def wait(self, seconds: float) -> bool:
        """Wait until all that was added until now is in the store; False if that took too long."""
        newest = self.settled()
        return newest is None or not wait([newest], seconds).not_done

    def close(self, seconds: float = 10.0) -> None:
        """Take over what is left and end; what cannot be taken over in time stays in the journal."""
        self.wait(seconds)
        with self._arrived:
            self._closing = True
            self._arrived.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():  # it waits for the database; the file is its own until the process ends
            return
        with self._lock:
            empty = not self.pending
            os.close(self._file)
            if empty:
                self.path.unlink(missing_ok=True)
            self._lock_file.release()
            if empty:
                Path(f"{self.path}.lock").unlink(missing_ok=True)

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(28, "No space left on device")
            if self._flush_each:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)  # half a line must not stand before the next one
            if self.full is None:
                _log.error("nothing can be recorded: %s", error)
            self.full = f"nothing can be recorded: {error}"
            raise disk_full(self.path, error) from error
        self.full = None
        self._size += len(line)

    def _work(self) -> None:
        tries = 0
        while True:
            with self._arrived:
                while not self.pending and not self._closing:
                    self._arrived.wait()
                if self._closing and (not self.pending or tries):
                    return
                start, end = self._taken, self._size
            try:
                self._take_over(_lines(self._file, start, end))
                tries, self.trouble = 0, None
            except Exception as error:  # this thread must not end before the recorder does
                self.trouble = f"events wait in {self.path}, the store cannot take them: {error}"
                _log.warning(self.trouble)
                time.sleep(_RETRY_SECONDS[min(tries, len(_RETRY_SECONDS) - 1)])
                tries += 1

    def _take_over(self, lines: Sequence[bytes]) -> None:
        events = [_EVENT.validate_json(line) for line in lines]
        outcomes, refused = _record_each(self._database, events, self._reward_of, self.path.with_suffix(".refused"))
        self.refused = refused or self.refused
        with self._arrived:
            self._taken += sum(map(len, lines))
            if not self.pending:
                os.ftruncate(self._file, 0)
                self._taken = self._size = 0
            elif self._taken > SHRINK_BYTES:
                self._shrink()
            # Two futures of one id are answered in the order of their events.
            waiting = [self._answer_to(event.id) for event in events]
            self._arrived.notify_all()
        for future, outcome in zip(waiting, outcomes, strict=True):
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(outcome)

    def _shrink(self) -> None:
        """Put a file with what is left in the place of the whole one."""
        rest = os.pread(self._file, self._size - self._taken, self._taken)
        new = self.path.with_suffix(".new")
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
        try:
            if os.write(file, rest) < len(rest):
                raise OSError(28, "No space left on device")
            os.fsync(file)
            new.replace(self.path)
        except OSError as error:  # the disk is full: the journal stays as it is
            _log.warning("%s could not be made smaller: %s", self.path, error)
            os.close(file)
            new.unlink(missing_ok=True)
            return
        if self._flush_each:
            flush(self.path.parent)
        os.close(self._file)
        self._file, self._size, self._taken = file, len(rest), 0

    def _answer_to(self, id: UUID) -> "Future[Outcome] | None":
        futures = self._outcomes.get(id)
        if not futures:
            return None
        first = futures.pop(0)
        if not futures:
            del self._outcomes[id]
        return first


def record_all(database: Database, events: Sequence[Interaction | Feedback], reward_of: RewardOf) -> list[Outcome]:
    """Record events of any loops in one transaction; what became of each."""
    known: set[UUID] = set()
    waiting: set[UUID] = set()
    conflicts: list[Interaction | Feedback] = []
    with database.write() as connection:
        for loop in sorted({event.loop for event in events}):
            done = record(connection, loop, [event for event in events if event.loop == loop], reward_of(loop))
            known |= done.known
            waiting |= done.waiting
            conflicts += done.conflicts
    for event in conflicts:
        _log.warning("%s", conflict(event))
    outcomes: list[Outcome] = []
    for event in events:
        duplicate: Outcome = "conflict" if event in conflicts else "duplicate"
        outcomes.append(duplicate if event.id in known else "waiting" if event.id in waiting else "recorded")
        known.add(event.id)
    return outcomes


def take_over_orphans(database: Database, reward_of: RewardOf, folder: Path | None = None) -> int:
    """Bring into the store what killed processes left in their journals; those of living processes are left alone.

    Returns:
        How many events were added by that.
    """
    added = 0
    for path in sorted((folder or journal_folder()).glob("*.jsonl")):
        try:
            with FileLock(f"{path}.lock", timeout=0):
                if path.exists():  # another process may have taken it over in this moment
                    added += _take_over_file(path, database, reward_of)
        except Timeout:
            continue
        Path(f"{path}.lock").unlink(missing_ok=True)
    return added


def _take_over_file(path: Path, database: Database, reward_of: RewardOf) -> int:
    aside, added = path.with_suffix(".refused"), 0
    for events in _batches(path, aside):
        outcomes, _ = _record_each(database, events, reward_of, aside)
        added += sum(outcome in {"recorded", "waiting"} for outcome in outcomes)
    path.unlink()
    return added


def _record_each(
    database: Database, events: Sequence[Interaction | Feedback], reward_of: RewardOf, aside: Path
) -> tuple[list[Outcome], str | None]:
    """Record all of them; what the store refuses is put aside, so that it keeps nothing else waiting.

    Returns:
        What became of each, and why one was refused.
    """
    try:
        return record_all(database, events, reward_of), None
    except Exception as error:
        if _away(error):
            raise
        if len(events) > 1:  # one of them, or the loop's own reward function on it
            each = [_record_each(database, [event], reward_of, aside) for event in events]
            return [outcomes[0] for outcomes, _ in each], next((why for _, why in each if why), None)
        _log.exception("the store refused an event; it was moved to %s", aside)
        _put_aside(aside, events[0].model_dump_json().encode() + b"\n")
        why = f"{type(error).__name__}: {error}"
        return ["refused"], f"an event was refused ({why}); mend the cause, then `finetune feedback import {aside}`"


def _away(error: Exception) -> bool:
    """Whether the store can take nothing now, and later will: a lock, a full disk, a lost or read-only server."""
    if isinstance(error, sa.exc.DBAPIError):
        return not isinstance(error, _ITS_OWN_FAULT)
    return isinstance(error, DatabaseError | sa.exc.TimeoutError)


def _put_aside(aside: Path, line: bytes) -> None:
    with aside.open("ab") as file:
        file.write(line)


def _batches(path: Path, aside: Path) -> Iterator[list[Interaction | Feedback]]:
    batch: list[Interaction | Feedback] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # torn by the kill: nobody was told that it is recorded
                break
            try:
                event = _EVENT.validate_json(line)
                not_in_future(event.created_at)  # the clock was wrong when the gateway accepted it
                batch.append(event)
            except ValueError as error:
                what = (
                    "a line that is not an event"
                    if isinstance(error, ValidationError)
                    else f"an event whose time {error}"
                )
                _log.error("%s holds %s; it was moved to %s", path, what, aside)
                _put_aside(aside, line)
            size += len(line)
            if len(batch) >= BATCH or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _lines(file: int, start: int, end: int) -> list[bytes]:
    """At most BATCH whole lines between two places of the file, and not many more bytes than BATCH_BYTES of them."""
    lines: list[bytes] = []
    rest, position = b"", start
    while position < end and len(lines) < BATCH and not (lines and position - start >= BATCH_BYTES):
        chunk = os.pread(file, min(1 << 20, end - position), position)
        position += len(chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        lines += [line + b"\n" for line in whole]
    return lines[:BATCH]
