"""Read a loop's declared sources into the store.

Each batch of records is one transaction, together with the cursor at its end. A source without cursors yields all that
it contains, so what it does not yield is retracted at the end of the sync.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.artifacts import wait_for_lock
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.erasure import erased_users
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.source_state import (
    active_at,
    delete_cursor,
    read_cursor,
    replace_skipped_records,
    write_cursor,
)
from finetune_pipeline.feedback.store import (
    InteractionState,
    interaction_states,
    interactions_of_source,
    record,
    restore,
    retract,
    source_feedback_id,
    take_offsets,
)
from finetune_pipeline.pipeline.source_events import ERASED, declared_id, source_events, without_own_system_prompt
from finetune_pipeline.records import Feedback, Interaction
from finetune_pipeline.settings import (
    ChunkedSettings,
    CodeSource,
    DocumentsSource,
    FilesSource,
    IngestedSource,
    LogsSource,
    LoopSettings,
    RedactionSettings,
    Source,
    VaultSource,
    home,
)
from finetune_pipeline.sources.source_record import Cursor, SkippedRecord, SourceError, SourceOutput, SourceRecord
from finetune_pipeline.validation_messages import error_message, short_message
from finetune_pipeline.wording import count_reason, counted, counted_reasons

_log = logging.getLogger(__name__)
_BATCH = 1_000
_COUNTED_ROWS = 10_000
_MAX_PROVENANCE, _MAX_REASON = 1_000, 300  # characters
_MAX_SKIPPED = 10_000  # skipped records that are kept with their reasons; all are counted
_MAX_IN_MESSAGE = 3
_BETWEEN_CURSORS = 100_000  # a source with cursors yields one at least this often

Reader = Callable[[Any, Any], Iterator[SourceOutput]]
"""A function that reads a source: (settings, last cursor or None) -> records, skipped records and cursors."""


@dataclass
class SourceReport:
    """The result of reading one source.

    Attributes:
        records: usable records that it gave.
        files: files that they came from; 0 for a database.
        new: records that the store did not have.
        retracted: earlier records that it no longer has.
        skipped: records that could not be used.
        reasons: why they could not be used, with counts.
        error: why it could not be read to its end; empty if it was.
    """

    name: str
    records: int = 0
    files: int = 0
    new: int = 0
    retracted: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    error: str = ""

    def __str__(self) -> str:
        """Return the line of the run's log."""
        records = counted(self.records, "record") + (f" from {counted(self.files, 'file')}" if self.files else "")
        text = f"{self.name}: {records}, {self.new:,} new, {self.retracted:,} retracted, {self.skipped:,} skipped"
        if self.reasons:
            text += f" ({counted_reasons(self.reasons)})"
        return text + (f"; {self.error}" if self.error else "")


def sync_sources(loop: LoopSettings, database: Database, log: Callable[[str], None]) -> list[SourceReport]:
    """Read every declared source of a loop. If one fails, its report says why, and the others are read."""
    reports = []
    for source in loop.sources:
        if isinstance(source, LogsSource | IngestedSource):
            continue  # `ingest` reads these
        try:
            report = sync_source(loop, source, database, reader_for(source, loop.curation.redaction), log)
        except SourceError as error:
            report = SourceReport(source.name, error=redact(str(error), loop.curation.redaction).text)
        except (OSError, RuntimeError, ValueError) as error:  # an unforeseen problem with a path, permission or host
            found = redact(f"{type(error).__name__}: {error}", loop.curation.redaction).text
            advice = "fix the cause, or correct the source's settings in the loop's YAML"
            report = SourceReport(source.name, error=f"cannot be read ({found}); {advice}")
        log(str(report))
        reports.append(report)
    return reports


def reader_for(source: Source, redaction: RedactionSettings) -> Reader:
    """Return the function `read` of `finetune_pipeline.sources.<kind>`."""
    module: Any = import_module(f"finetune_pipeline.sources.{source.kind}")
    read: Reader = module.read
    if isinstance(source, CodeSource | DocumentsSource | VaultSource):  # a teacher gets redacted text only
        read = partial(module.read, redact=lambda text: redact(text, redaction).text)
    return read


def limited(output: Iterable[SourceOutput], source: Source) -> Iterator[SourceOutput]:
    """Yield what a source yields up to its `max_chunks` records. What follows is not read."""
    most, records = source.max_chunks if isinstance(source, ChunkedSettings) else None, 0
    for one in output:
        if isinstance(one, SourceRecord):
            if records == most:
                reason = f"more than {counted(records, 'record')} (max_chunks): not read"
                yield SkippedRecord(f"from {one.provenance} on", reason)
                return
            records += 1
        yield one


def sync_source(
    loop: LoopSettings, source: Source, database: Database, read: Reader, log: Callable[[str], None] = _log.info
) -> SourceReport:
    """Record what a source yields, and retract what it no longer contains.

    A record's id is a hash of its source, content and key, so an unchanged record that is read again changes nothing,
    even at another place. A changed record has a new id, and the old one is retracted.

    Raises:
        SourceError: the source cannot be read; what it gave before is recorded.
    """
    sync = _Sync(loop, source, database, reward_function(loop.feedback))
    # Two syncs at once would each retract what only the other has seen.
    with wait_for_lock(home() / "cache" / "sources" / loop.name / source.name, f"sync of {source.name}", log):
        with database.read() as connection:
            cursor = read_cursor(connection, loop.name, source.name)
        for batch in _batches(limited(read(source, cursor), source)):
            sync.add(batch)
        sync.finish()
    return sync.report


def unread_rows(loop: LoopSettings, source: FilesSource, database: Database) -> int:
    """Return how many of the first 10,000 rows of a file source the store does not have and a sync would record.

    Nothing is written. 0 if the source cannot be read, which `finetune check` and the next sync say.
    """
    sync, unread = _Sync(loop, source, database, reward_function(loop.feedback)), 0
    rows = islice(reader_for(source, loop.curation.redaction)(source, None), _COUNTED_ROWS)
    with suppress(SourceError), database.read() as connection:
        for batch in _batches(rows):
            made = sync._events_of(connection, batch)
            unread += len(made) - len(interaction_states(connection, list(made)))
    return unread


def retract_source(loop: str, source: str, database: Database) -> int:
    """Retract everything that came from a source, and delete its cursor. Return the number of retracted records.

    If the source is still declared, the next sync restores what it has.
    """
    with database.write() as connection:
        take_offsets(connection, 0)  # locks the store for other writers until the commit
        active = [id for id, _, retracted in interactions_of_source(connection, loop, source) if not retracted]
        delete_cursor(connection, loop, source)
        return retract(connection, loop, active)


@dataclass
class _Sync:
    """The state of one sync.

    Attributes:
        files: the files that its records came from.
        given: ids of all records so far, as 16 bytes each, since there may be a million; unused after a cursor.
        repeats: id -> further records with the same content.
        skipped: provenance -> reason, of the first skipped records.
        unreadable: provenance -> reason, of what could not be opened or read to its end.
        deferred: provenances of what the source left for a later sync.
        since_cursor: provenance -> id of its record since the last cursor; empty if the record was skipped.
        cursor_written: whether this sync resumes from cursors, and does not retract at its end.
        restart: the last cursor of a sync that restarted; written at the end.
    """

    loop: LoopSettings
    source: Source
    database: Database
    reward: RewardFunction
    given: set[bytes] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    repeats: Counter[bytes] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    deferred: set[str] = field(default_factory=set)
    since_cursor: dict[str, str] = field(default_factory=dict)
    cursor_written: bool = False
    restart: Cursor | None = None

    def __post_init__(self) -> None:
        self.report = SourceReport(self.source.name)

    def add(self, batch: list[SourceOutput]) -> None:
        """Record a batch in one transaction: add new records, restore retracted ones, and write its cursor."""
        loop = self.loop.name
        with self.database.write() as connection:
            take_offsets(connection, 0)  # until the commit nobody else adds an event or erases a person
            made = self._events_of(connection, batch)
            known = interaction_states(connection, list(made))
            events = [event for id, pair in made.items() if id not in known for event in pair]
            recorded = record(connection, loop, events, self.reward)
            provenances = {id: str(made[id][0].provenance) for id in known}
            changed = {
                id: at
                for id, at in provenances.items()
                if known[id] != InteractionState(retracted=False, provenance=at)
            }
            restore(connection, loop, changed, self.reward)
            cursor = batch[-1] if batch and isinstance(batch[-1], Cursor) else None
            if cursor is not None and cursor.restarted:
                self.restart = cursor
            elif cursor is not None:
                self.cursor_written = True
                self.given.clear()
                at_old = active_at(connection, loop, self.source.name, sorted(self.since_cursor))
                superseded = [id for id, provenance in at_old if id != self.since_cursor[provenance]]
                self.report.retracted += retract(connection, loop, superseded)
                write_cursor(connection, loop, self.source.name, cursor.value)
                self.since_cursor.clear()
        self.report.new += recorded.interactions

    def finish(self) -> None:
        """End a complete sync: retract what it did not yield, and write the skipped records."""
        loop, source = self.loop.name, self.source.name
        # If nothing was usable, the settings are probably wrong, so nothing is retracted.
        expected = self.unreadable.keys() | self.deferred
        unusable = any(reason != ERASED and at not in expected for at, reason in self.skipped.items())
        unusable = unusable and not self.report.records
        with self.database.write() as connection:
            if not self.cursor_written and not unusable:
                gone = [
                    id
                    for id, provenance, retracted in interactions_of_source(connection, loop, source)
                    if not (retracted or uuid.UUID(id).bytes in self.given or self._may_still_exist(provenance))
                ]
                self.report.retracted += retract(connection, loop, gone)
                if self.restart is not None:
                    write_cursor(connection, loop, source, self.restart.value)
            # Provenances that differ only in what redaction replaces are one entry; all are counted.
            skipped = {self._redacted(at)[:_MAX_PROVENANCE]: reason for at, reason in sorted(self.skipped.items())}
            replace_skipped_records(connection, loop, source, skipped)
        if self.unreadable:
            # Quoted, like every value in a message: a provenance may be the title of a note.
            reasons = [f"{at!r}: {why}" for at, why in sorted(self.unreadable.items())]
            first = [self._redacted(reason) for reason in reasons[:_MAX_IN_MESSAGE]]
            left = len(reasons) - len(first)
            more = f"; and {left} more" if left else ""
            self.report.error = f"not read to its end, and nothing retracted there: {'; '.join(first)}{more}"
        elif unusable:
            provenance, reason = min(self.skipped.items())
            self.report.error = (
                f"no record is usable, so nothing was retracted ({self._redacted(provenance)!r}: {reason}); correct "
                "the source or its settings, or retract its records with `finetune feedback retract --source "
                f"{self.source.name}`"
            )

    def _may_still_exist(self, provenance: str) -> bool:
        """Return whether a record was deferred, or is at or below something unreadable."""
        if provenance in self.deferred or provenance.rpartition(" [")[0] in self.deferred:
            return True
        below = ("/", ":", "#", " [")
        return any(
            not at or provenance == at or provenance.startswith(tuple(at + separator for separator in below))
            for at in self.unreadable
        )

    def _events_of(
        self, connection: sa.Connection, batch: list[SourceOutput]
    ) -> dict[str, tuple[Interaction, Feedback]]:
        """Return the events of a batch by the interaction's id, and note what is skipped."""
        users = {one.user for one in batch if isinstance(one, SourceRecord) and one.user is not None}
        erased = erased_users(connection, self.loop.name, users)
        made = {}
        for one in batch:
            if isinstance(one, SkippedRecord):
                self._skip(one)
            elif isinstance(one, SourceRecord) and one.user in erased:
                self._skip(SkippedRecord(one.provenance, ERASED))
            elif isinstance(one, SourceRecord):
                if one.model_output is not None and (problem := correction_problem(self.loop, one.answer)):
                    self._skip(SkippedRecord(one.provenance, problem))
                    continue
                try:
                    interaction, feedback = self._events(one)
                except ValidationError as error:
                    self._skip(SkippedRecord(one.provenance, error_message(error)))
                    continue
                made[str(interaction.id)] = (interaction, feedback)
                self.report.records += 1
                self.files |= {one.file} - {""}
                self.report.files = len(self.files)
                if not self.cursor_written:
                    self.given.add(interaction.id.bytes)
                self._note(one.provenance, str(interaction.id))
        return made

    def _events(self, one: SourceRecord) -> tuple[Interaction, Feedback]:
        source: Any = self.source
        reward = source.reward if one.reward is None else one.reward
        one = without_own_system_prompt(one, self.loop)
        id = declared_id(self.loop.name, source.name, one, reward)
        if id.bytes in self.given and not one.keyed:
            # Repeats are numbered, since their line numbers change with every line before them.
            self.repeats[id.bytes] += 1
            id = uuid.uuid5(id, str(self.repeats[id.bytes]))
        return source_events(self.loop.name, source.name, one, id, reward, source_feedback_id(id))

    def _redacted(self, text: str) -> str:
        return redact(text, self.loop.curation.redaction).text

    def _skip(self, one: SkippedRecord) -> None:
        """Note a skipped record. A reason may quote a secret, so it is redacted."""
        provenance = one.provenance[:_MAX_PROVENANCE]
        reason = short_message(self._redacted(one.reason), _MAX_REASON)
        if provenance not in self.skipped:
            self.report.skipped += 1
            count_reason(self.report.reasons, reason)
        if len(self.skipped) < _MAX_SKIPPED:
            self.skipped[provenance] = reason
        if one.unreadable:
            self.unreadable[one.provenance] = reason
        elif one.deferred:
            self.deferred.add(one.provenance)
        else:
            self._note(one.provenance, "")

    def _note(self, provenance: str, id: str) -> None:
        if len(self.since_cursor) < _BETWEEN_CURSORS:  # a larger number means a source without cursors
            self.since_cursor[provenance] = id


def _batches(output: Iterable[SourceOutput]) -> Iterator[list[SourceOutput]]:
    """Yield batches. A batch ends at a cursor, when it is full, and where reading the source fails."""
    batch: list[SourceOutput] = []
    try:
        for one in output:
            batch.append(one)
            if isinstance(one, Cursor) or len(batch) >= _BATCH:
                yield batch
                batch = []
    except Exception:
        if batch:  # keep what a teacher was paid for
            yield batch
        raise
    if batch:
        yield batch
