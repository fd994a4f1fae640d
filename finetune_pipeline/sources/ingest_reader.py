"""Files that loops take in: events of a log, and conversations made elsewhere; a bad line never stops the others.

JSON lines are read from where the last reading ended, since a log grows. Other files are read whole.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.records import Event, Feedback, Interaction, validate_application_event
from finetune_pipeline.settings import FileFormat
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.row_readers import constant, files_of, layout_of, read_rows, without_nulls
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline.validation_messages import error_messages

_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_EXCERPT = 200
_BLOCK = 1 << 20

HOLE = (
    "contains NUL bytes: this part of the file was not written, or was cut off by a crash; the file is read again when "
    "it is written"
)
"""Why a line with NUL bytes is rejected."""


IngestFormat = FileFormat | Literal["events"]
"""What the lines of a file are."""


@dataclass(frozen=True)
class IngestLine:
    """One line of a file: an event or a conversation, or the reason why it is neither."""

    number: int
    end: int
    event: Interaction | Feedback | SourceRecord | None
    reason: str = ""
    excerpt: str = ""
    prefix_hash: str = ""
    """For JSON lines: SHA-256 of all bytes of the file up to `end`."""
    final: bool = False
    """Refused whatever may still be written behind it: it is whole JSON, but nothing that can be taken in."""


def event_files(folder: Path) -> list[Path]:
    """The files of a folder that a loop takes in, by name.

    Hidden and temporary ones are left out, and links that lead out of the folder.

    Raises:
        SourceError: the folder is not there.
    """
    if not folder.is_dir():
        raise SourceError(
            f"the source folder {folder} is not there; create it, or correct ingest.folders in the loop's YAML"
        )
    return files_of(folder)


def grows(path: Path) -> bool:
    """Whether a file is JSON lines, of which what was appended can be read alone.

    Raises:
        OSError: it cannot be read.
    """
    return path.suffix.lower() != ".json" and layout_of(path) == "lines"


def read_whole(
    path: Path, loop: str, *, max_line_bytes: int, form: IngestFormat = "auto", name: str = ""
) -> Iterator[IngestLine]:
    """Read a file of any kind from its start; each line's `end` is the file's.

    Args:
        name: how the provenances of conversations call the file; default by its own name.

    Raises:
        OSError: it cannot be read.
    """
    end = path.stat().st_size
    for number, value, reason, _ in read_rows(path, max_line_bytes):
        if reason:
            yield IngestLine(number, end, None, reason)
        else:
            yield _understood(value, loop, IngestLine(number, end, None), form, name or path.name)


class OpenLog:
    """A file of JSON lines that is read once, in order, and hashed while it is read."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self.name = name
        self._hash = hashlib.sha256()
        self._last = b""

    @property
    def offset(self) -> int:
        """Number of bytes that were read."""
        return self._file.tell()

    @property
    def prefix_hash(self) -> str:
        """SHA-256 (hex) of all bytes that were read."""
        return self._hash.hexdigest()

    @property
    def inside_a_line(self) -> bool:
        """Whether the last byte that was read is not the end of a line."""
        return self._last not in {b"", b"\n"}

    def skip_if_unchanged(self, offset: int, prefix_hash: str) -> bool:
        """Skip to an offset if the bytes before it are unchanged, else stay at the start; return whether it skipped."""
        left = offset
        while left and (block := self._take(self._file.read(min(_BLOCK, left)))):
            left -= len(block)
        if not left and self.prefix_hash == prefix_hash:
            return True
        self._file.seek(0)
        self._hash, self._last = hashlib.sha256(), b""
        return False

    def line(self, limit: int) -> bytes:
        """Return the next line, at most `limit` + 1 bytes of it; a run of NUL bytes in it is reduced to one."""
        raw = self._take(self._file.readline(limit + 1))
        if len(raw) > limit and raw.endswith(b"\0"):  # a hole in a sparse file may have gigabytes
            while block := self._file.read(_BLOCK):
                # Comparing first: stripping takes six times as long.
                nuls = len(block) if block == bytes(len(block)) else len(block) - len(block.lstrip(b"\0"))
                self._take(block[:nuls])
                if nuls < len(block):
                    self._file.seek(nuls - len(block), os.SEEK_CUR)
                    break
            raw = raw.rstrip(b"\0") + b"\0" + self._take(self._file.readline(limit + 1))
        return raw

    def skip_line(self) -> bool:
        """Skip the rest of a line; return whether it ends."""
        while rest := self._take(self._file.readline(_BLOCK)):
            if rest.endswith(b"\n"):
                return True
        return False

    def _take(self, data: bytes) -> bytes:
        self._hash.update(data)
        self._last = data[-1:] or self._last
        return data


@contextmanager
def open_log(path: Path, name: str = "") -> Iterator[OpenLog]:
    """Open a file of JSON lines; `name` as in `read_whole`.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        yield OpenLog(file, name or path.name)


def read_lines(
    log: OpenLog, loop: str, *, lines: int, max_line_bytes: int, form: IngestFormat = "auto"
) -> Iterator[IngestLine]:
    """Read a file from its current offset, which `lines` lines precede.

    A last line without a line break is read only if it is complete JSON: otherwise it may still be written, and is left
    for the next time. If a line has a hole (NUL bytes, from a crash or a truncated log), the text after the hole is
    read as a line of its own, and the hole is reported.
    """
    # What follows a last line that had no end yet still belongs to that line.
    number = lines - 1 if log.inside_a_line else lines
    while raw := log.line(max_line_bytes):
        number += 1
        before, hole, written = raw.rpartition(b"\0")
        if len(written) > max_line_bytes and not written.endswith(b"\n"):
            ended = log.skip_line()
            reason = f"longer than {max_line_bytes} bytes (ingest.max_line_bytes)"
            line = IngestLine(number, log.offset, None, reason, _excerpt(written), log.prefix_hash)
        else:
            ended = written.endswith(b"\n")
            blank = IngestLine(number, log.offset, None, prefix_hash=log.prefix_hash)
            line = _parse(written, loop, blank, form, log.name)
        if line.event is None and not ended and not line.final:
            return
        if line.event is not None or (line.reason and not hole):
            yield line
        if hole:
            yield replace(line, event=None, reason=HOLE, excerpt=_excerpt(before.strip(b"\0")))


def _parse(raw: bytes, loop: str, line: IngestLine, form: IngestFormat, name: str) -> IngestLine:
    if not raw.strip():
        return line
    try:
        text = raw.decode("utf-8-sig" if line.number == 1 else "utf-8")
        document = without_nulls(json.loads(text, parse_constant=constant))
    except UnicodeDecodeError as error:
        return replace(line, reason=f"not UTF-8: {error.reason} at byte {error.start}", excerpt=_excerpt(raw))
    except (ValueError, RecursionError) as error:
        return replace(line, reason=f"not JSON: {error}", excerpt=_excerpt(raw))
    understood = _understood(document, loop, line, form, name)
    return understood if understood.event else replace(understood, excerpt=_excerpt(raw))


def _understood(document: Any, loop: str, line: IngestLine, form: IngestFormat, name: str) -> IngestLine:
    """A line with what it says, as an event or as a conversation, or with why it says neither."""
    conversation = isinstance(document, dict) and "event" not in document
    try:
        if form not in {"auto", "events"} or (form == "auto" and conversation):
            return replace(line, event=to_record(document, f"{name}:{line.number}", cast("FileFormat", form)))
        event = validate_application_event(
            _EVENT.validate_python({"loop": loop, **document} if isinstance(document, dict) else document)
        )
    except ValidationError as error:
        return replace(line, reason=_first_error(error), final=True)
    except ValueError as error:
        return replace(line, reason=str(error), final=True)
    if event.loop != loop:
        return replace(line, reason=f"is of loop {event.loop!r}, this folder is read for {loop!r}", final=True)
    return replace(line, event=event)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] in {"union_tag_not_found", "union_tag_invalid"}:
        found = f"is {first['ctx']['tag']!r}" if "tag" in first.get("ctx", {}) else "is not there"
        return f"event: {found}, expected 'interaction' or 'feedback'"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return error_messages(error)[0] + more


def _excerpt(raw: bytes) -> str:
    return raw[:_EXCERPT].decode("utf-8", "replace").replace("\x00", "�").strip()
