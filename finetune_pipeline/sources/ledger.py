"""The ledger of event files: how far each was read, and which lines were refused, kept with the events themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.sources.jsonl import Line, event_files, tail_hash


@dataclass(frozen=True)
class Position:
    """How far a file was read."""

    offset: int = 0
    lines: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class UnreadFile:
    """A file as it was before it is read."""

    path: Path
    size: int
    mtime_ns: int


def position(connection: sa.Connection, task: str, path: Path) -> Position:
    """Where to go on in a file: at its start if it is new, or was rewritten since."""
    row = _row(connection, task, path)
    if row is None or path.stat().st_size < row.offset or tail_hash(path, row.offset) != row.tail_hash:
        return Position()
    return Position(row.offset, row.lines, row.rejected)


def advance(
    connection: sa.Connection, task: str, file: UnreadFile, start: Position, lines: Sequence[Line], *, finished: bool
) -> Position:
    """Write down that these lines were taken, and quarantine the refused ones among them.

    Args:
        file: as it was before reading, so that what was appended meanwhile makes it unread again.
        finished: it was read to its end.
    """
    path = file.path
    refused = [line for line in lines if line.event is None]
    end = lines[-1].end if lines else start.offset
    reached = Position(end, lines[-1].number if lines else start.lines, start.rejected + len(refused))
    _replace_rejected(connection, task, path, start, refused)
    own = sa.and_(t.ingested_files.c.task == task, t.ingested_files.c.path == str(path))
    connection.execute(t.ingested_files.delete().where(own))
    connection.execute(
        t.ingested_files.insert().values(
            task=task,
            path=str(path),
            size=file.size,
            mtime_ns=file.mtime_ns,
            offset=reached.offset,
            lines=reached.lines,
            rejected=reached.rejected,
            tail_hash=tail_hash(path, reached.offset),
            finished=finished,
        )
    )
    return reached


def unread(connection: sa.Connection, task: str, folders: Sequence[Path]) -> list[UnreadFile]:
    """Files that the ledger does not know, or that changed since; it looks at names, sizes and times only."""
    f = t.ingested_files.c
    rows = connection.execute(sa.select(f.path, f.size, f.mtime_ns, f.finished).where(f.task == task))
    known = {row.path: (row.size, row.mtime_ns) for row in rows if row.finished}
    paths = [path for folder in folders if folder.is_dir() for path in event_files(folder)]
    files = [file for path in paths if (file := _look_at(path)) is not None]
    return [file for file in files if known.get(str(file.path)) != (file.size, file.mtime_ns)]


@dataclass(frozen=True)
class ReadTotals:
    """What a loop's event files held so far; `unfinished` of them end in a line that is not whole yet."""

    files: int
    lines: int
    rejected: int
    unfinished: int


def read_totals(connection: sa.Connection, task: str) -> ReadTotals:
    """The sums over a loop's event files."""
    f = t.ingested_files.c
    sums = [sa.func.sum(f.lines), sa.func.sum(f.rejected), sa.func.sum(sa.case((f.size > f.offset, 1), else_=0))]
    row = connection.execute(sa.select(sa.func.count(), *sums).where(f.task == task)).one()
    return ReadTotals(*(int(value or 0) for value in row))


def rejected_lines(connection: sa.Connection, task: str, limit: int, paths: Sequence[Path] = ()) -> Sequence[Any]:
    """The first refused lines, of these files or of all: path, line, reason."""
    r = t.rejected_lines.c
    query = sa.select(r.path, r.line, r.reason).where(r.task == task).order_by(r.path, r.line).limit(limit)
    if paths:
        query = query.where(r.path.in_([str(path) for path in paths]))
    return connection.execute(query).all()


def _row(connection: sa.Connection, task: str, path: Path) -> Any:
    f = t.ingested_files.c
    return connection.execute(sa.select(t.ingested_files).where(f.task == task, f.path == str(path))).one_or_none()


def _replace_rejected(
    connection: sa.Connection, task: str, path: Path, start: Position, refused: Sequence[Line]
) -> None:
    r = t.rejected_lines.c
    # A rewritten file is read anew: what was refused from here on is no longer said of it.
    connection.execute(t.rejected_lines.delete().where(r.task == task, r.path == str(path), r.line > start.lines))
    rows = [
        {"task": task, "path": str(path), "line": x.number, "reason": x.reason, "excerpt": x.excerpt} for x in refused
    ]
    if rows:
        connection.execute(t.rejected_lines.insert(), rows)


def _look_at(path: Path) -> UnreadFile | None:
    try:
        stat = path.stat()
    except FileNotFoundError:  # taken away since its folder was listed
        return None
    return UnreadFile(path, stat.st_size, stat.st_mtime_ns)
