"""The ledger of event files: how far each was read, and which lines were refused, kept with the events themselves."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.sources.ingest_reader import IngestLine, event_files

_LARGEST_INTEGER = 2**63 - 1
_CLOCK_TICK_SECONDS = 0.02
"""File systems record times in ticks of up to 10 ms, so two changes within one tick have the same time."""


@dataclass(frozen=True)
class Position:
    """How far a file was read."""

    offset: int = 0
    lines: int = 0
    rejected: int = 0
    prefix_hash: str = ""
    """SHA-256 of the bytes before the offset; empty for a file that is read completely each time."""


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
    """Write down that these lines were taken, and quarantine the refused ones among them.

    Args:
        file: as it was before reading, so that what was appended meanwhile makes it unread again.
        finished: it was read to its end.
    """
    path = file.path
    refused = [line for line in lines if line.event is None]
    reached = start
    if lines:
        last = lines[-1]
        reached = Position(last.end, last.number, start.rejected + len(refused), last.prefix_hash)
    _replace_rejected(connection, loop, path, start, refused)
    own = sa.and_(t.ingested_files.c.loop == loop, t.ingested_files.c.path == str(path))
    connection.execute(t.ingested_files.delete().where(own))
    connection.execute(
        t.ingested_files.insert().values(
            loop=loop,
            path=str(path),
            inode=file.inode,
            size=file.size,
            mtime_ns=file.mtime_ns,
            ctime_ns=file.ctime_ns,
            offset=reached.offset,
            lines=reached.lines,
            rejected=reached.rejected,
            prefix_hash=reached.prefix_hash,
            finished=finished,
        )
    )
    return reached


def unread(connection: sa.Connection, loop: str, folders: Sequence[Path]) -> list[UnreadFile]:
    """Return the files that the ledger does not know or that changed since, judged by `stat` alone."""
    f = t.ingested_files.c
    columns = (f.path, f.inode, f.size, f.mtime_ns, f.ctime_ns)
    rows = connection.execute(sa.select(*columns).where(f.loop == loop, f.finished)).all()
    known = {UnreadFile(Path(row.path), *row[1:]) for row in rows}
    paths = [path for folder in folders if folder.is_dir() for path in event_files(folder)]
    files = []
    for path in paths:
        with suppress(FileNotFoundError):  # removed since its folder was listed
            files.append(_as_it_is(path))
    return [file for file in files if file not in known]


def look_at(path: Path) -> UnreadFile:
    """Return a file's stat at a moment from which on every change gives it a later time.

    Raises:
        OSError: it does not exist, or may not be read.
    """
    if time.time() - path.stat().st_ctime < _CLOCK_TICK_SECONDS:
        time.sleep(_CLOCK_TICK_SECONDS)
    return _as_it_is(path)


def _as_it_is(path: Path) -> UnreadFile:
    stat = path.stat()
    inode = stat.st_ino & _LARGEST_INTEGER  # some file systems have larger numbers than database integers hold
    return UnreadFile(path, inode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class ReadTotals:
    """What a loop's event files held so far; `unfinished` of them end in a line that is not whole yet."""

    files: int
    lines: int
    rejected: int
    unfinished: int


def read_totals(connection: sa.Connection, loop: str) -> ReadTotals:
    """The sums over a loop's event files."""
    f = t.ingested_files.c
    sums = [sa.func.sum(f.lines), sa.func.sum(f.rejected), sa.func.sum(sa.case((f.size > f.offset, 1), else_=0))]
    row = connection.execute(sa.select(sa.func.count(), *sums).where(f.loop == loop)).one()
    return ReadTotals(*(int(value or 0) for value in row))


def rejected_lines(connection: sa.Connection, loop: str, limit: int, paths: Sequence[Path] = ()) -> Sequence[Any]:
    """The first refused lines, of these files or of all: path, line, reason."""
    r = t.rejected_lines.c
    query = sa.select(r.path, r.line, r.reason).where(r.loop == loop).order_by(r.path, r.line).limit(limit)
    if paths:
        query = query.where(r.path.in_([str(path) for path in paths]))
    return connection.execute(query).all()


def _replace_rejected(
    connection: sa.Connection, loop: str, path: Path, start: Position, refused: Sequence[IngestLine]
) -> None:
    r = t.rejected_lines.c
    # A rewritten file is read restarted: what was refused from here on is no longer said of it.
    connection.execute(t.rejected_lines.delete().where(r.loop == loop, r.path == str(path), r.line > start.lines))
    rows = [
        {"loop": loop, "path": str(path), "line": x.number, "reason": x.reason, "excerpt": x.excerpt} for x in refused
    ]
    if rows:
        connection.execute(t.rejected_lines.insert(), rows)
