"""Taking files into the store. No Dagster here: the raw_logs asset and `finetune ingest` both do it this way."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import sqlalchemy as sa

from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.erasure import erased_users
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import RecordResult, conflict_message, recompute_marked, record, take_offsets
from finetune_pipeline.feedback.write_ahead_log import recover_orphans
from finetune_pipeline.pipeline.source_events import ERASED, ingested_events
from finetune_pipeline.records import Feedback, Interaction, without_system_prompt
from finetune_pipeline.settings import LoopSettings, load_loop
from finetune_pipeline.sources import ingest_ledger
from finetune_pipeline.sources.ingest_reader import (
    IngestFormat,
    IngestLine,
    event_files,
    grows,
    open_log,
    read_lines,
    read_whole,
)
from finetune_pipeline.sources.row_readers import readable
from finetune_pipeline.sources.source_record import SourceRecord

BATCH = 1_000
NAMED = 20
_PROVENANCE = 900  # an provenance may have 1,000 characters
_QUIET_NS = 5 * 10**9


@dataclass
class IngestReport:
    """What one ingest did.

    Attributes:
        rewritten: files whose already read bytes changed, so they were read again from the start.
        conflicts: events whose id is known with other content; `conflicting` describes the first of them.
        unreadable: the files that could not be opened, and why.
    """

    files: int = 0
    lines: int = 0
    rejected: int = 0
    rewritten: int = 0
    conflicts: int = 0
    recorded: RecordResult = field(default_factory=RecordResult)
    conflicting: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: "IngestReport") -> None:
        """Count another one in."""
        self.files += other.files
        self.lines += other.lines
        self.rejected += other.rejected
        self.rewritten += other.rewritten
        self.conflicts += other.conflicts
        self.recorded += other.recorded
        self.conflicting = (self.conflicting + other.conflicting)[:NAMED]
        self.unreadable += other.unreadable


def ingest(loop: LoopSettings, database: Database, tell: Callable[[str], None]) -> IngestReport:
    """Take every unread file of the loop's folders into the store, and say what was found in each.

    Each batch of lines and the file's place in the ledger are one transaction, so a kill loses nothing and nothing
    counts twice. A file that cannot be read is named, and the others go on.

    Raises:
        SourceError: a folder that the YAML names is not there.
    """
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    for folder in loop.log_folders:
        event_files(folder)  # a declared folder that is missing is an error, not an empty source
    reward = reward_function(loop.feedback)
    left = recover_orphans(database, lambda name: reward if name == loop.name else _reward_of(name))
    if left:
        tell(f"{left} events that a killed gateway had acknowledged were recovered from its write-ahead log")
    with database.write() as connection:
        if repaired := recompute_marked(connection, loop.name, reward):
            tell(f"the examples of {repaired} interactions were recomputed: their events had times in the future")
    with database.read() as connection:
        files = ingest_ledger.unread(connection, loop.name, loop.log_folders)
    total = IngestReport()
    for number, file in enumerate(files, start=1):
        name = f"file {number} of {len(files)}, {readable(file.path.name)}"
        if _being_written(file):
            tell(f"{name}: is just being written; it is read the next time")
            continue
        one = _ingest_if_readable(loop, database, file.path, reward)
        total.add(one)
        tell(f"{name}: {_describe(one)}")
    return total


def _ingest_if_readable(loop: LoopSettings, database: Database, path: Path, reward: RewardFunction) -> IngestReport:
    if readable(str(path)) != str(path):
        return IngestReport(unreadable=[f"{readable(str(path))}: its name is not UTF-8; rename it"])
    try:
        return ingest_file(loop, database, path, reward)
    except OSError as error:
        return IngestReport(unreadable=[f"{path}: {error.strerror}; mend it or take it away"])


def ingest_file(
    loop: LoopSettings, database: Database, path: Path, reward: RewardFunction, form: IngestFormat = "auto"
) -> IngestReport:
    """Take one file: JSON lines from where the ledger left them, any other from its start.

    What a killed reading had taken of it counts no second time, since ids follow from the content.

    Args:
        form: what its rows are; when it is named, the whole file is read, whatever the ledger says.

    Raises:
        OSError: it cannot be read.
    """
    result = IngestReport(files=1)
    file = ingest_ledger.look_at(path)
    with ExitStack() as opened:
        position, lines = _lines(loop, database, file, form, result, opened)
        for batch, last in _batches(lines):
            with database.write() as connection:
                take_offsets(connection, 0)  # until commit nobody is erased
                batch = _without_forgotten(connection, loop, batch)
                events = [(line, event) for line in batch for event in _events(loop, line)]
                done = record(connection, loop.name, [event for _, event in events], reward)
                position = ingest_ledger.advance(connection, loop.name, file, position, batch, finished=last)
            result.recorded += RecordResult(done.interactions, done.feedback, done.duplicates)
            result.lines += len(batch)
            result.rejected += sum(line.event is None for line in batch)
            result.conflicts += len(done.conflicts)
            named = (
                f"{path}:{line.number}: {conflict_message(event)}" for line, event in events if event in done.conflicts
            )
            result.conflicting += islice(named, NAMED - len(result.conflicting))
    return result


def _lines(
    loop: LoopSettings,
    database: Database,
    file: ingest_ledger.UnreadFile,
    form: IngestFormat,
    result: IngestReport,
    opened: ExitStack,
) -> tuple[ingest_ledger.Position, Iterator[IngestLine]]:
    """Return where the reading of a file starts, and its lines from there on; `opened` closes the file."""
    path, limit = file.path, loop.ingest.max_line_bytes
    inside = any(path.parent == folder for folder in loop.log_folders)
    name = path.name if inside else str(path)[-_PROVENANCE:]
    if not grows(path):
        whole = read_whole(path, loop.name, max_line_bytes=limit, form=form, name=name)
        return ingest_ledger.Position(offset=file.size), _asking(loop, whole)
    log = opened.enter_context(open_log(path, name))
    start = ingest_ledger.Position()
    if form == "auto":
        with database.read() as connection:
            known = ingest_ledger.position(connection, loop.name, path)
        if log.skip_if_unchanged(known.offset, known.prefix_hash):
            start = known
        else:
            result.rewritten = int(known.offset > 0)
    lines = read_lines(log, loop.name, lines=start.lines, max_line_bytes=limit, form=form)
    return start, _asking(loop, lines)


def _asking(loop: LoopSettings, lines: Iterator[IngestLine]) -> Iterator[IngestLine]:
    """The lines, without the conversations in which nothing is asked but what the loop's own system prompt says.

    The reason of a refused one is shown, and says what was found: it is redacted. Its excerpt is not shown; by it the
    line is deleted when a user has to be erased.
    """
    for line in lines:
        item = line.event
        if (
            isinstance(item, SourceRecord)
            and not without_system_prompt(item.prompt, item.history, loop.system_prompt)[0]
        ):
            yield replace(line, event=None, reason="nothing is asked beside the loop's own system prompt")
        else:
            yield replace(line, reason=redact(line.reason).text) if line.event is None else line


def _without_forgotten(connection: sa.Connection, loop: LoopSettings, batch: list[IngestLine]) -> list[IngestLine]:
    """The lines, without the conversations whose author was erased."""
    users = {line.event.user for line in batch if isinstance(line.event, SourceRecord) and line.event.user is not None}
    gone = erased_users(connection, loop.name, users)
    return [
        replace(line, event=None, reason=ERASED)
        if isinstance(line.event, SourceRecord) and line.event.user in gone
        else line
        for line in batch
    ]


def _events(loop: LoopSettings, line: IngestLine) -> Sequence[Interaction | Feedback]:
    if isinstance(line.event, SourceRecord):
        return ingested_events(loop, line.event)
    return () if line.event is None else (line.event,)


def _being_written(file: ingest_ledger.UnreadFile) -> bool:
    """Whether somebody may still be writing a CSV file: nothing in it would tell that its last row is only a part."""
    if file.path.suffix.lower() not in {".csv", ".tsv"} or time.time_ns() - file.mtime_ns > _QUIET_NS:
        return False
    with suppress(OSError), file.path.open("rb") as opened:
        opened.seek(max(0, file.size - 1))
        return opened.read(1) not in {b"\n", b""}
    return False


def _reward_of(loop: str) -> RewardFunction:
    return reward_function(load_loop(loop).feedback)


def _describe(one: IngestReport) -> str:
    if one.unreadable:
        return one.unreadable[0]
    said = f"{one.recorded.interactions} interactions, {one.recorded.feedback} feedback, "
    said += f"{one.recorded.duplicates} known already, {one.rejected} lines rejected"
    if one.rewritten:
        said += "; it was rewritten since it was last read, so it was read again from the start"
    if one.conflicts:
        said += f"; {one.conflicts} events have an id that is known with other content: {one.conflicting[0]}"
    return said


def _batches(lines: Iterator[IngestLine]) -> Iterator[tuple[list[IngestLine], bool]]:
    """Batches of lines, each with whether it is the last; there is always one, perhaps empty."""
    while True:
        batch = list(islice(lines, BATCH))
        yield batch, len(batch) < BATCH
        if len(batch) < BATCH:
            return
