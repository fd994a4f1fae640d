"""A write-ahead log in front of the store: acknowledged events survive a kill before they are in the database.

An application must neither wait for the database nor lose an event that was acknowledged. `Recorder.add` returns as
soon as the event is in the log, a file of this process; a thread moves the events to the store in batches and empties
the log. The next process, and every ingest, recovers the log of a process that was killed. Moving an event twice does
no harm, because its id is recorded once.
"""

import json
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
from finetune_pipeline.feedback.store import conflict_message, record
from finetune_pipeline.records import Event, Feedback, Interaction, not_in_future
from finetune_pipeline.settings import home, survives_power_cut
from finetune_pipeline.validation_messages import RENAMED_FIELDS

BATCH, BATCH_BYTES = 500, 4 * 2**20
SHRINK_BYTES = 16 * 2**20
"""Where traffic never pauses, the log is rewritten when this much of it is in the store already."""

_SUFFIX, _DEAD_LETTER_SUFFIX = ".jsonl", ".dead_letter"
_EARLIER_FOLDER, _EARLIER_DEAD_LETTER_SUFFIX = "journal", ".refused"
"""Names of earlier versions: what a server of such a version left is still recovered, and still found by `erase`."""

_REJECTIONS = (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.ProgrammingError)
"""Database errors about one event. Every other database error means that nothing can be written at the moment."""

_RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)

_REST_SECONDS = 0.02
"""Pause after each move: under load, one transaction then takes several events, and less CPU time from answers."""

_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_log = logging.getLogger(__name__)

Outcome = Literal["recorded", "duplicate", "conflict", "unmatched", "dead_lettered"]
"""What happened to an event. `waiting`: feedback that is stored before its interaction has arrived. `conflict`: another
event with this id is stored and stays."""

RewardOf = Callable[[str], RewardFunction]
"""Returns the reward function of a loop, given the loop's name."""


def write_ahead_log_folder() -> Path:
    """Return the folder of the logs, one per recording process."""
    return home() / "write_ahead_log"


def log_files() -> list[Path]:
    """Return the logs of all processes, running or not."""
    folders = (write_ahead_log_folder(), home() / _EARLIER_FOLDER)
    return [path for folder in folders for path in sorted(folder.glob(f"*{_SUFFIX}"))]


def dead_letter_files() -> list[Path]:
    """Return the files of events that the store rejected."""
    return [
        *sorted(write_ahead_log_folder().glob(f"*{_DEAD_LETTER_SUFFIX}")),
        *sorted((home() / _EARLIER_FOLDER).glob(f"*{_EARLIER_DEAD_LETTER_SUFFIX}")),
    ]


class Recorder:
    """The log of this process, and the thread that moves its events to the store.

    Attributes:
        disk_error: why nothing can be written to the log now; None if it can.
        store_error: why the store takes no events now; None if it does.
        dead_letter: which event the store rejected last, and why; None without one.

    Args:
        database: the store.
        reward_of: returns the reward function of a loop.
    """

    def __init__(self, database: Database, reward_of: RewardOf) -> None:
        self._database = database
        self._reward_of = reward_of
        folder = write_ahead_log_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{uuid7()}{_SUFFIX}"
        self._lock_file = FileLock(f"{self.path}.lock", timeout=0)
        self._lock_file.acquire()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._flush_each = survives_power_cut()
        if self._flush_each:
            flush(folder)  # the new file's directory entry has to survive too
        self._size = self._moved = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._futures: dict[UUID, list[Future[Outcome]]] = {}
        self._newest: Future[Outcome] | None = None
        self._closing = False
        self.store_error: str | None = None
        self.dead_letter: str | None = None
        self.disk_error: str | None = None
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def add(self, event: Interaction | Feedback) -> "Future[Outcome]":
        """Record an event. When this returns, a kill cannot lose it; the future completes when it is in the store.

        Raises:
            ArtifactError: the disk is full; the event is not recorded.
        """
        line = event.model_dump_json().encode() + b"\n"
        future: Future[Outcome] = Future()
        with self._changed:
            if self._closing:
                raise RuntimeError("the recorder is closed and records nothing more")
            self._append(line)
            self._futures.setdefault(event.id, []).append(future)
            self._newest = future
            self._changed.notify_all()
        return future

    def newest_pending(self) -> "Future[Outcome] | None":
        """Return a future that completes when all events added so far are in the store; None if they are."""
        with self._lock:
            return self._newest if self._newest is not None and not self._newest.done() else None

    def find_pending(self, id: UUID) -> Interaction | None:
        """Return the interaction with this id from the part of the log that is not in the store yet.

        It reads that part, so it takes long if the store was away for long. If it returns None, the store has the
        interaction or nobody has.
        """
        with self._lock:
            if not self.pending:
                return None
            file, start = self.path.open("rb"), self._moved
        with file:
            file.seek(start)
            for line in file:
                if str(id).encode() in line and line.endswith(b"\n"):
                    event = _EVENT.validate_json(line)
                    if isinstance(event, Interaction) and event.id == id:
                        return event
        return None

    @property
    def pending(self) -> int:
        """The bytes of the log that are not in the store yet."""
        return self._size - self._moved

    def wait(self, seconds: float) -> bool:
        """Wait until all events added so far are in the store; return False if that takes longer."""
        newest = self.newest_pending()
        return newest is None or not wait([newest], seconds).not_done

    def close(self, seconds: float = 10.0) -> None:
        """Move the remaining events to the store and stop; those that cannot be moved in time stay in the log."""
        self.wait(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():  # it waits for the database; the process keeps the file until it ends
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
            os.ftruncate(self._file, self._size)  # otherwise the next event would be appended to half a line
            if self.disk_error is None:
                _log.error("nothing can be recorded: %s", error)
            self.disk_error = f"nothing can be recorded: {error}"
            raise disk_full(self.path, error) from error
        self.disk_error = None
        self._size += len(line)

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                while not self.pending and not self._closing:
                    self._changed.wait()
                if self._closing and (not self.pending or failures):
                    return
                start, end = self._moved, self._size
            try:
                self._move_to_store(_read_lines(self._file, start, end))
                failures, self.store_error = 0, None
                time.sleep(_REST_SECONDS)
            except Exception as error:  # this thread must not end before the recorder is closed
                self.store_error = f"events wait in {self.path}, because the store cannot take them: {error}"
                _log.warning(self.store_error)
                time.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1

    def _move_to_store(self, lines: Sequence[bytes]) -> None:
        events = [_EVENT.validate_json(line) for line in lines]
        outcomes, dead_letter = _record_or_dead_letter(self._database, events, self._reward_of, self.path.stem)
        self.dead_letter = dead_letter or self.dead_letter
        with self._changed:
            self._moved += sum(map(len, lines))
            if not self.pending:
                os.ftruncate(self._file, 0)
                self._moved = self._size = 0
            elif self._moved > SHRINK_BYTES:
                self._shrink()
            # Several futures of one id are completed in the order of their events.
            futures = [self._pop_future(event.id) for event in events]
            self._changed.notify_all()
        for future, outcome in zip(futures, outcomes, strict=True):
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(outcome)

    def _shrink(self) -> None:
        """Replace the log by a file that contains only the events that are not in the store."""
        rest = os.pread(self._file, self._size - self._moved, self._moved)
        new = self.path.with_suffix(".new")
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
        try:
            if os.write(file, rest) < len(rest):
                raise OSError(28, "No space left on device")
            os.fsync(file)
            new.replace(self.path)
        except OSError as error:  # the disk is full: the log stays as it is
            _log.warning("%s could not be made smaller: %s", self.path, error)
            os.close(file)
            new.unlink(missing_ok=True)
            return
        if self._flush_each:
            flush(self.path.parent)
        os.close(self._file)
        self._file, self._size, self._moved = file, len(rest), 0

    def _pop_future(self, id: UUID) -> "Future[Outcome] | None":
        futures = self._futures.get(id)
        if not futures:
            return None
        first = futures.pop(0)
        if not futures:
            del self._futures[id]
        return first


def record_all(database: Database, events: Sequence[Interaction | Feedback], reward_of: RewardOf) -> list[Outcome]:
    """Record events of any loops in one transaction; return the outcome of each."""
    duplicates: set[UUID] = set()
    unmatched: set[UUID] = set()
    conflicts: list[Interaction | Feedback] = []
    with database.write() as connection:
        for loop in sorted({event.loop for event in events}):
            result = record(connection, loop, [event for event in events if event.loop == loop], reward_of(loop))
            duplicates |= result.duplicate_ids
            unmatched |= result.unmatched_ids
            conflicts += result.conflicts
    for event in conflicts:
        _log.warning("%s", conflict_message(event))
    outcomes: list[Outcome] = []
    for event in events:
        if event.id in duplicates:
            outcomes.append("conflict" if event in conflicts else "duplicate")
        else:
            outcomes.append("unmatched" if event.id in unmatched else "recorded")
            duplicates.add(event.id)
    return outcomes


def recover_orphans(database: Database, reward_of: RewardOf) -> int:
    """Move the logs of killed processes to the store; return how many events this added.

    Logs of running processes are locked by them and left alone.
    """
    added = 0
    for path in log_files():
        try:
            with FileLock(f"{path}.lock", timeout=0):
                if path.exists():  # else another process has recovered it since
                    for events in _read_batches(path):
                        outcomes, _ = _record_or_dead_letter(database, events, reward_of, path.stem)
                        added += sum(outcome in {"recorded", "unmatched"} for outcome in outcomes)
                    path.unlink()
        except Timeout:
            continue
        Path(f"{path}.lock").unlink(missing_ok=True)
    return added


def _record_or_dead_letter(
    database: Database, events: Sequence[Interaction | Feedback], reward_of: RewardOf, log_name: str
) -> tuple[list[Outcome], str | None]:
    """Record events; move those that the store rejects to the dead-letter file, so that they block no others.

    Returns:
        The outcome of each event, and why one was rejected.
    """
    try:
        return record_all(database, events, reward_of), None
    except Exception as error:
        if _is_temporary(error):
            raise
        if len(events) > 1:  # find the event that the store, or the loop's own reward function, rejects
            single = [_record_or_dead_letter(database, [event], reward_of, log_name) for event in events]
            return [outcomes[0] for outcomes, _ in single], next((reason for _, reason in single if reason), None)
        file = _dead_letter(log_name, events[0].model_dump_json().encode() + b"\n")
        _log.exception("the store rejected an event; it was moved to %s", file)
        reason = f"{type(error).__name__}: {error}"
        return ["dead_lettered"], (
            f"the store rejected an event ({reason}); fix the cause, then run `finetune feedback import {file}`"
        )


def _is_temporary(error: Exception) -> bool:
    """Return whether the store takes nothing at the moment: a lock, a full disk, a lost or read-only server."""
    if isinstance(error, sa.exc.DBAPIError):
        return not isinstance(error, _REJECTIONS)
    return isinstance(error, DatabaseError | sa.exc.TimeoutError)


def _dead_letter(log_name: str, line: bytes) -> Path:
    path = write_ahead_log_folder() / f"{log_name}{_DEAD_LETTER_SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(line)
    return path


def _read_batches(path: Path) -> Iterator[list[Interaction | Feedback]]:
    batch: list[Interaction | Feedback] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # the kill cut it off, so it was never acknowledged
                break
            try:
                event = _parse(line)
                not_in_future(event.created_at)  # the clock was wrong when the gateway accepted it
                batch.append(event)
            except ValueError as error:
                what = "a line that is not an event" if isinstance(error, ValidationError) else f"an event: {error}"
                _log.error("%s contains %s; it was moved to %s", path, what, _dead_letter(path.stem, line))
            size += len(line)
            if len(batch) >= BATCH or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parse(line: bytes) -> Interaction | Feedback:
    """Return the event of a line; a server of an earlier version wrote some fields under other names.

    The event was acknowledged, so it is not rejected for its field names.
    """
    try:
        return _EVENT.validate_json(line)
    except ValidationError:
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or not fields.keys() & RENAMED_FIELDS.keys():
            raise
        return _EVENT.validate_python({RENAMED_FIELDS.get(name, name): value for name, value in fields.items()})


def _read_lines(file: int, start: int, end: int) -> list[bytes]:
    """Return at most BATCH whole lines between two offsets of a file, and not many more than BATCH_BYTES bytes."""
    lines: list[bytes] = []
    rest, position = b"", start
    while position < end and len(lines) < BATCH and not (lines and position - start >= BATCH_BYTES):
        chunk = os.pread(file, min(1 << 20, end - position), position)
        position += len(chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        lines += [line + b"\n" for line in whole]
    return lines[:BATCH]
