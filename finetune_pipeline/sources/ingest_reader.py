"""Read the files that a loop ingests: event logs, and conversations. A bad line does not stop the others.

JSON Lines files are read from where the last read ended, since a log grows. Other files are read from the start.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.records import Event, Feedback, Interaction, validate_application_event
from finetune_pipeline.settings import FileFormat
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.feedback_exports import ExportFormat, export_events, export_format
from finetune_pipeline.sources.row_readers import (
    LINE_ENDS,
    decode_line,
    files_of,
    is_utf16,
    layout_of,
    parse_constant,
    read_line,
    read_rows,
    without_nulls,
)
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline.tool_calls import unsupported_part
from finetune_pipeline.validation_messages import error_message

_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_TRACES = re.compile(
    r'"(?:user|user_id|userId|authorUserId|author|reviewer|id|interaction_id)"\s*:\s*"(?:\\.|[^"\\])*"'
)
_MAX_TRACES = 20
_BLOCK = 1 << 20

HOLE = (
    "contains NUL bytes: this part of the file was not written, or was cut off by a crash; the file is read again when "
    "it is written"
)
"""Why a line with NUL bytes is rejected."""

IngestFormat = FileFormat | ExportFormat | Literal["events"]
"""Format of the lines of a file."""


LineContent = Interaction | Feedback | SourceRecord | tuple[Interaction | Feedback, ...] | None
"""An event, a conversation, or the events of a row of another tool's export."""


@dataclass(frozen=True)
class IngestLine:
    """One line of a file."""

    number: int  # from 1
    end: int  # the offset behind it
    event: LineContent  # None if the line is rejected
    reason: str = ""  # why it is rejected
    excerpt: str = ""  # `trace` of a rejected line
    prefix_hash: str = ""  # for JSON Lines: SHA-256 of all bytes of the file up to `end`
    final: bool = False  # it is rejected whatever is appended to it, since it is complete JSON


def event_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a loop ingests, by name.

    Hidden and temporary files are left out, and links that lead out of the folder.

    Raises:
        SourceError: the folder does not exist.
    """
    if not folder.is_dir():
        raise SourceError(
            f"the log folder {folder} does not exist; create it, or correct ingest.folders in the loop's YAML"
        )
    return files_of(folder)


def grows(path: Path) -> bool:
    """Return whether a file is JSON Lines, so that appended lines can be read alone.

    Raises:
        OSError: the file cannot be read.
    """
    return path.suffix.lower() != ".json" and layout_of(path) == "lines" and not is_utf16(path)


def read_whole(
    path: Path, loop: str, *, max_line_bytes: int, form: IngestFormat = "auto", name: str = ""
) -> Iterator[IngestLine]:
    """Yield all lines of a file of any kind. The `end` of each is the file's size.

    Args:
        name: replaces the file's name in the provenance of conversations.

    Raises:
        OSError: the file cannot be read.
    """
    end = path.stat().st_size
    for number, value, reason, _ in read_rows(path, max_line_bytes):
        line = IngestLine(number, end, None, reason)
        parsed = line if reason else _with_event(value, loop, line, form, name or path.name)
        yield parsed if parsed.event else replace(parsed, excerpt=trace(json.dumps(value, default=str)))


class OpenLog:
    """A JSON Lines file that is hashed while it is read."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self._file = file
        self.name = name
        self._hash = hashlib.sha256()
        self._last = b""

    @property
    def offset(self) -> int:
        """Number of bytes read so far."""
        return self._file.tell()

    @property
    def prefix_hash(self) -> str:
        """SHA-256 (hex) of all bytes read so far."""
        return self._hash.hexdigest()

    @property
    def inside_a_line(self) -> bool:
        """Return whether the last byte read is not the end of a line."""
        return self._last not in {b"", *LINE_ENDS}

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
        raw = self.readline(limit + 1)
        if len(raw) > limit and raw.endswith(b"\0"):  # a hole in a sparse file may have gigabytes
            while block := self._file.read(_BLOCK):
                # Comparing first: stripping takes six times as long.
                nuls = len(block) if block == bytes(len(block)) else len(block) - len(block.lstrip(b"\0"))
                self._take(block[:nuls])
                if nuls < len(block):
                    self._file.seek(nuls - len(block), os.SEEK_CUR)
                    break
            raw = raw.rstrip(b"\0") + b"\0" + self.readline(limit + 1)
        return raw

    def readline(self, size: int, /) -> bytes:
        """Return the next line, at most `size` bytes of it."""
        if self._last == b"\r" and self._file.peek().startswith(b"\n"):  # written after the last read
            self._take(self._file.read(1))
        return self._take(read_line(self._file, size))

    def _take(self, data: bytes) -> bytes:
        self._hash.update(data)
        self._last = data[-1:] or self._last
        return data


@contextmanager
def open_log(path: Path, name: str = "") -> Iterator[OpenLog]:
    """Open a JSON Lines file; `name` as in `read_whole`.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        yield OpenLog(file, name or path.name)


def read_lines(
    log: OpenLog, loop: str, *, lines: int, max_line_bytes: int, form: IngestFormat = "auto"
) -> Iterator[IngestLine]:
    """Yield the lines of a file from its current offset, which `lines` lines precede.

    A last line without a line break is read only if it is complete JSON. Otherwise it may still be written, and is left
    for the next read. If a line has a hole (NUL bytes, from a crash or a truncated log), the text after the hole is
    read as a separate line, and the hole is reported.
    """
    # The rest of a last line that was read without its line break still belongs to that line.
    number = lines - 1 if log.inside_a_line else lines
    while raw := log.line(max_line_bytes):
        number += 1
        before, hole, written = raw.rpartition(b"\0")
        if len(written) > max_line_bytes and not written.endswith(LINE_ENDS):
            while (rest := log.readline(_BLOCK)) and not rest.endswith(LINE_ENDS):
                pass
            ended = not log.inside_a_line
            reason = f"longer than {max_line_bytes} bytes (ingest.max_line_bytes)"
            line = IngestLine(number, log.offset, None, reason, trace(written), log.prefix_hash)
        else:
            ended = written.endswith(LINE_ENDS)
            blank = IngestLine(number, log.offset, None, prefix_hash=log.prefix_hash)
            line = _parse_line(written, loop, blank, form, log.name)
        if line.event is None and not ended and not line.final:
            return
        if line.event is not None or (line.reason and not hole):
            yield line
        if hole:
            yield replace(line, event=None, reason=HOLE, excerpt=trace(before.strip(b"\0")))


def _parse_line(raw: bytes, loop: str, line: IngestLine, form: IngestFormat, name: str) -> IngestLine:
    try:
        text = decode_line(raw)
    except ValueError as error:
        return replace(line, reason=str(error), excerpt=trace(raw))
    if not text.strip():
        return line
    try:
        document = without_nulls(json.loads(text.strip(), parse_constant=parse_constant))
    except (ValueError, RecursionError) as error:
        return replace(line, reason=f"not JSON: {error}", excerpt=trace(raw))
    parsed = _with_event(document, loop, line, form, name)
    return parsed if parsed.event else replace(parsed, excerpt=trace(raw))


def _with_event(document: Any, loop: str, line: IngestLine, form: IngestFormat, name: str) -> IngestLine:
    """Return a line with its event or conversation, or with the reason why it is rejected."""
    is_conversation = isinstance(document, dict) and "event" not in document
    if form == "auto" and is_conversation:
        form = export_format(document) or form
    try:
        if form in get_args(ExportFormat):
            return replace(line, event=export_events(document, loop, cast("ExportFormat", form)))
        if form not in {"auto", "events"} or (form == "auto" and is_conversation):
            return replace(line, event=to_record(document, f"{name}:{line.number}", cast("FileFormat", form)))
        if isinstance(document, dict) and (found := unsupported_part(document)):
            return replace(line, reason=found, final=True)
        fields = {"loop": loop, **document} if isinstance(document, dict) else document
        event = validate_application_event(_EVENT.validate_python(fields))
    except ValidationError as error:
        return replace(line, reason=error_message(error), final=True)
    except ValueError as error:
        return replace(line, reason=str(error), final=True)
    if event.loop != loop:
        reason = f"belongs to loop {event.loop!r}, but this file is read for {loop!r}; name that loop with --loop"
        return replace(line, reason=reason, final=True)
    return replace(line, event=event)


def trace(content: bytes | str) -> str:
    """Return the authors and ids that a rejected line names, by which an erasure finds it; nothing else is kept of it.

    The line may be damaged, so this does not parse it.
    """
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    found = dict.fromkeys(match[0] for match in _TRACES.finditer(text))
    return " ".join(list(found)[:_MAX_TRACES]).replace("\x00", "\ufffd")
