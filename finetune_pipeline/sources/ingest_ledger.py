"""The ledger of ingested files: how far each was read, and which lines were rejected. Kept in the event store."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.sources.ingest_reader import IngestLine, event_files

_MAX_INTEGER = 2**63 - 1
_CLOCK_TICK_SECONDS = 0.02
"""File systems record times in ticks of up to 10 ms, so two changes within one tick have the same time."""


@dataclass(frozen=True)
class Position:
    """How far a file was read."""

    offset: int = 0
    lines: int = 0
    rejected: int = 0
    prefix_hash: str = ""  # SHA-256 of the bytes before the offset; empty for a file that is read completely each time


@dataclass(frozen=True)
class UnreadFile:
    """A file's stat before it is read.

    A change of its content changes at least one field, even if size and `mtime` stay the same.
    """

    path: Path
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class ReadTotals:
    """Totals over all ingested files of a loop."""

    files: int
    lines: int
    rejected: int
    unfinished: int  # files that end in an incomplete line


def position(connection: sa.Connection, loop: str, path: Path) -> Position:
    """Return how far a file was read; valid only while the bytes before that are unchanged."""
    f = t.ingested_files.c
    query = sa.select(t.ingested_files).where(f.loop == loop, f.path == str(path))
    row = connection.execute(query).one_or_none()
    return Position() if row is None else Position(row.offset, row.lines, row.rejected, row.prefix_hash)


def advance(
    connection: sa.Connection,
    loop: str,
    file: UnreadFile,
    start: Position,
    lines: Sequence[IngestLine],
    *,
    finished: bool,
) -> Position:
    """Record that these lines were read, and quarantine the rejected ones.

    Args:
        file: its stat before it was read, so that later changes make it unread again.
        finished: it was read to its end.
    """
    rejected = [line for line in lines if line.event is None]
    reached = start
    if lines:
        last = lines[-1]
        reached = Position(last.end, last.number, start.rejected + len(rejected), last.prefix_hash)
    r, f, path = t.rejected_lines.c, t.ingested_files.c, str(file.path)
    # When a file is read again, its lines from here on are accepted or rejected again.
    connection.execute(t.rejected_lines.delete().where(r.loop == loop, r.path == path, r.line > start.lines))
    if rejected:
        rows = [
            {"loop": loop, "path": path, "line": line.number, "reason": line.reason, "excerpt": line.excerpt}
            for line in rejected
        ]
        connection.execute(t.rejected_lines.insert(), rows)
    connection.execute(t.ingested_files.delete().where(f.loop == loop, f.path == path))
    row = {**asdict(file), **asdict(reached), "loop": loop, "path": path, "finished": finished}
    connection.execute(t.ingested_files.insert(), row)
    return reached


def unread(connection: sa.Connection, loop: str, folders: Sequence[Path]) -> list[UnreadFile]:
    """Return the files that the ledger does not know, or whose `stat` changed since they were read."""
    f = t.ingested_files.c
    columns = (f.path, f.inode, f.size, f.mtime_ns, f.ctime_ns)
    rows = connection.execute(sa.select(*columns).where(f.loop == loop, f.finished)).all()
    known = {UnreadFile(Path(row.path), *row[1:]) for row in rows}
    paths = [path for folder in folders if folder.is_dir() for path in event_files(folder)]
    files = []
    for path in paths:
        with suppress(FileNotFoundError):  # removed since its folder was listed
            if (file := _stat(path)) not in known:
                files.append(file)
    return files


def look_at(path: Path) -> UnreadFile:
    """Return a file's stat at a moment from which on every change gives it a later time.

    Raises:
        OSError: the file does not exist, or access is denied.
    """
    if time.time() - path.stat().st_ctime < _CLOCK_TICK_SECONDS:
        time.sleep(_CLOCK_TICK_SECONDS)
    return _stat(path)


def _stat(path: Path) -> UnreadFile:
    stat = path.stat()
    inode = stat.st_ino & _MAX_INTEGER  # some file systems have larger numbers than database integers hold
    return UnreadFile(path, inode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def read_totals(connection: sa.Connection, loop: str) -> ReadTotals:
    """Return the totals over a loop's ingested files."""
    f = t.ingested_files.c
    sums = [sa.func.sum(f.lines), sa.func.sum(f.rejected), sa.func.sum(sa.case((f.size > f.offset, 1), else_=0))]
    row = connection.execute(sa.select(sa.func.count(), *sums).where(f.loop == loop)).one()
    return ReadTotals(*(int(value or 0) for value in row))


def rejected_lines(connection: sa.Connection, loop: str, limit: int, paths: Sequence[Path] = ()) -> Sequence[Any]:
    """Return the first rejected lines of these files, or of all: path, line, reason."""
    r = t.rejected_lines.c
    query = sa.select(r.path, r.line, r.reason).where(r.loop == loop).order_by(r.path, r.line).limit(limit)
    if paths:
        query = query.where(r.path.in_([str(path) for path in paths]))
    return connection.execute(query).all()
