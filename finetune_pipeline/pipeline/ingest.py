"""Ingest files into the store: event logs, and conversations that were dropped or named on the command line."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import sqlalchemy as sa

from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.erasure import erased_users
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import RecordResult, conflict_message, recompute_marked, record, take_offsets
from finetune_pipeline.feedback.write_ahead_log import recover_orphans
from finetune_pipeline.pipeline.implicit_acceptance import accept_unrated
from finetune_pipeline.pipeline.source_events import ERASED, ingested_events
from finetune_pipeline.records import Feedback, Interaction, without_system_prompt
from finetune_pipeline.settings import LoopSettings, load_loop
from finetune_pipeline.sources import ingest_ledger
from finetune_pipeline.sources.ingest_reader import (
    IngestFormat,
    IngestLine,
    LineContent,
    event_files,
    grows,
    open_log,
    read_lines,
    read_whole,
    trace,
)
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.sources.text_files import printable
from finetune_pipeline.wording import count_reason, counted, counted_reasons

BATCH = 1_000
_MAX_DESCRIBED = 20  # rejected lines and conflicts that are described; all are counted
_MAX_PATH = 900  # characters of a path in a provenance, which may have 1,000
_QUIET_NS = 5 * 10**9


@dataclass
class IngestReport:
    """The result of ingesting files.

    Attributes:
        reasons: why lines were rejected, with counts.
        rewritten: files of which bytes that were read before changed, so they were read again from the start.
        rejections: the first rejected lines: path, line, reason.
        conflicts: events whose id already exists with different content; `conflicting` describes the first of them.
        unreadable: the files that could not be opened, and why.
    """

    files: int = 0
    lines: int = 0
    rejected: int = 0
    rewritten: int = 0
    conflicts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejections: list[tuple[Path, int, str]] = field(default_factory=list)
    recorded: RecordResult = field(default_factory=RecordResult)
    conflicting: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: "IngestReport") -> None:
        """Add the numbers of another report."""
        self.files += other.files
        self.lines += other.lines
        self.rejected += other.rejected
        self.reasons += other.reasons
        self.rewritten += other.rewritten
        self.conflicts += other.conflicts
        self.recorded += other.recorded
        self.conflicting += other.conflicting[: _room(self.conflicting)]
        self.rejections += other.rejections[: _room(self.rejections)]
        self.unreadable += other.unreadable

    def __str__(self) -> str:
        """Return the line of the run's log, for the report of one file."""
        if self.unreadable:
            return self.unreadable[0]
        text = f"{counted(self.recorded.interactions, 'interaction')}, "
        text += f"{counted(self.recorded.feedback, 'feedback event')}, "
        text += f"{counted(self.recorded.duplicates, 'duplicate')}, {counted(self.rejected, 'line')} rejected"
        if self.rejections:
            _, line, reason = self.rejections[0]
            text += f" ({'first reason: ' if self.rejected > 1 else ''}line {line}: {reason})"
            if len(self.reasons) > 1:
                text += f", by reason {counted_reasons(self.reasons)}"
        if self.rewritten:
            text += "; the file was rewritten since it was last read, so it was read again from the start"
        if self.conflicts:
            conflicts = counted(self.conflicts, "event")
            text += f"; {conflicts} whose id already exists with different content: {self.conflicting[0]}"
        return text


def ingest(loop: LoopSettings, database: Database, log: Callable[[str], None]) -> IngestReport:
    """Ingest every unread file of the loop's folders. A file that cannot be read does not stop the others.

    Each batch of lines is one transaction, together with the file's position in the ledger. So a killed process loses
    nothing, and nothing counts twice.

    Raises:
        SourceError: a folder that the YAML names does not exist.
    """
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    for folder in loop.log_folders:
        event_files(folder)  # raises an error if a declared folder is missing
    reward = reward_function(loop.feedback)

    def reward_of(name: str) -> RewardFunction:
        return reward if name == loop.name else reward_function(load_loop(name).feedback)

    if recovered := recover_orphans(database, reward_of):
        log(f"recovered {counted(recovered, 'event')} from the write-ahead log of a killed gateway")
    with database.write() as connection:
        if repaired := recompute_marked(connection, loop.name, reward):
            log(f"recomputed the examples of {counted(repaired, 'interaction')} by the rules of this version")
    with database.read() as connection:
        files = ingest_ledger.unread(connection, loop.name, loop.log_folders)
    total = IngestReport()
    for number, file in enumerate(files, start=1):
        path = file.path
        name = f"file {number} of {len(files)}, {printable(path.name)}"
        if _may_be_incomplete(file):
            log(f"{name}: is just being written; it is read the next time")
            continue
        if printable(str(path)) != str(path):
            report = IngestReport(unreadable=[f"{printable(str(path))}: its name is not UTF-8; rename it"])
        else:
            try:
                report = ingest_file(loop, database, path, reward)
            except OSError as error:
                report = IngestReport(unreadable=[f"{path}: {error.strerror}; fix that, or move the file away"])
        total.add(report)
        log(f"{name}: {report}")
    if accepted := accept_unrated(loop, database, datetime.now(UTC)):
        verb = "counts" if accepted == 1 else "count"
        log(f"{counted(accepted, 'answer')} nobody objected to {verb} as accepted from now on")
    return total


def ingest_file(
    loop: LoopSettings, database: Database, path: Path, reward: RewardFunction, form: IngestFormat = "auto"
) -> IngestReport:
    """Ingest one file: JSON Lines from the ledger's position, any other file from its start.

    Ids follow from the content, so what a killed process has already recorded is not counted again.

    Args:
        form: format of its rows; if it is given, the file is read from its start, whatever the ledger says.

    Raises:
        OSError: the file cannot be read.
    """
    report = IngestReport(files=1)
    file = ingest_ledger.look_at(path)
    with ExitStack() as opened:
        position, lines = _open(loop, database, file, form, report, opened)
        is_last = False
        while not is_last:
            batch = list(islice(lines, BATCH))
            is_last = len(batch) < BATCH
            with database.write() as connection:
                take_offsets(connection, 0)  # until the commit nobody else erases a person
                batch = _reject_erased(connection, loop, batch)
                events = [(line, event) for line in batch for event in _events(loop, line)]
                done = record(connection, loop.name, [event for _, event in events], reward)
                position = ingest_ledger.advance(connection, loop.name, file, position, batch, finished=is_last)
            report.recorded += RecordResult(done.interactions, done.feedback, done.duplicates)
            report.lines += len(batch)
            rejected = [line for line in batch if line.event is None]
            report.rejected += len(rejected)
            for line in rejected:
                count_reason(report.reasons, line.reason)
            report.rejections += ((path, line.number, line.reason) for line in rejected[: _room(report.rejections)])
            report.conflicts += len(done.conflicts)
            named = (
                f"{path}:{line.number}: {conflict_message(event)}" for line, event in events if event in done.conflicts
            )
            report.conflicting += islice(named, _room(report.conflicting))
    return report


def _room(described: Sequence[object]) -> int:
    return max(0, _MAX_DESCRIBED - len(described))


def _open(
    loop: LoopSettings,
    database: Database,
    file: ingest_ledger.UnreadFile,
    form: IngestFormat,
    report: IngestReport,
    opened: ExitStack,
) -> tuple[ingest_ledger.Position, Iterator[IngestLine]]:
    """Return the position from which a file is read, and its lines from there; `opened` closes the file."""
    path, limit = file.path, loop.ingest.max_line_bytes
    inside = any(path.parent == folder for folder in loop.log_folders)
    name = path.name if inside else str(path)[-_MAX_PATH:]
    if not grows(path):
        lines = read_whole(path, loop.name, max_line_bytes=limit, form=form, name=name)
        return ingest_ledger.Position(offset=file.size), _checked(loop, lines)
    log = opened.enter_context(open_log(path, name))
    start = ingest_ledger.Position()
    if form == "auto":
        with database.read() as connection:
            known = ingest_ledger.position(connection, loop.name, path)
        if log.skip_if_unchanged(known.offset, known.prefix_hash):
            start = known
        else:
            report.rewritten = int(known.offset > 0)
    lines = read_lines(log, loop.name, lines=start.lines, max_line_bytes=limit, form=form)
    return start, _checked(loop, lines)


def _checked(loop: LoopSettings, lines: Iterator[IngestLine]) -> Iterator[IngestLine]:
    """Reject what only the loop's settings forbid, and redact reasons.

    These are conversations whose prompt is only the loop's own system prompt, and corrections that its output schema
    does not accept.

    A reason may quote the line, so an erasure has to find it: the excerpt has the authors and ids.
    """
    for line in lines:
        event = line.event
        if (
            isinstance(event, SourceRecord)
            and not without_system_prompt(event.prompt, event.history, loop.system_prompt)[0]
        ):
            yield replace(line, event=None, reason="the prompt contains nothing but the loop's own system prompt")
        elif problem := next(filter(None, (correction_problem(loop, text) for text in _corrections(event))), None):
            own = (event,) if isinstance(event, Feedback) else event if isinstance(event, tuple) else ()
            excerpt = " ".join(trace(one.model_dump_json(exclude={"correction", "prompt", "output"})) for one in own)
            author = f'"user": {json.dumps(event.user)}' if isinstance(event, SourceRecord) else excerpt
            yield replace(line, event=None, reason=redact(problem, loop.curation.redaction).text, excerpt=author)
        else:
            yield replace(line, reason=redact(line.reason, loop.curation.redaction).text) if event is None else line


def _corrections(event: LineContent) -> list[str]:
    if isinstance(event, SourceRecord):
        return [] if event.model_output is None else [event.answer]
    events = event if isinstance(event, tuple) else (event,)
    return [one.correction for one in events if isinstance(one, Feedback) and one.correction is not None]


def _reject_erased(connection: sa.Connection, loop: LoopSettings, batch: list[IngestLine]) -> list[IngestLine]:
    """Reject the conversations and feedback of erased authors."""
    users = {user for line in batch for user in _authors(line.event)}
    erased = erased_users(connection, loop.name, users)
    return [replace(line, event=None, reason=ERASED) if _authors(line.event) & erased else line for line in batch]


def _authors(event: LineContent) -> set[str]:
    """Return the authors in a file that has no ids of ours, by which erased events would be known."""
    if isinstance(event, SourceRecord):
        return set() if event.user is None else {event.user}
    return {one.user for one in event if one.user is not None} if isinstance(event, tuple) else set()


def _events(loop: LoopSettings, line: IngestLine) -> Sequence[Interaction | Feedback]:
    if isinstance(line.event, SourceRecord):
        return ingested_events(loop, line.event)
    if isinstance(line.event, tuple):
        return line.event
    return () if line.event is None else (line.event,)


def _may_be_incomplete(file: ingest_ledger.UnreadFile) -> bool:
    """Return whether a CSV file may still be written. Unlike in JSON, an incomplete last row looks complete."""
    if file.path.suffix.lower() not in {".csv", ".tsv"} or time.time_ns() - file.mtime_ns > _QUIET_NS:
        return False
    with suppress(OSError), file.path.open("rb") as opened:
        opened.seek(max(0, file.size - 1))
        return opened.read(1) not in {b"\n", b""}
    return False
