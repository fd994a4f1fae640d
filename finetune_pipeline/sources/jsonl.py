"""Files that loops take in: events of a log, and conversations made elsewhere; a bad line never stops the others.

JSON lines are read from where the last reading ended, since a log grows. Other files are read whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.records import Event, Feedback, Interaction, logged
from finetune_pipeline.settings import FileFormat
from finetune_pipeline.sources.conversations import to_item
from finetune_pipeline.sources.item import Item, SourceError
from finetune_pipeline.sources.rows import constant, files_of, layout_of, read_rows, without_nulls

_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_EXCERPT = 200
_TAIL = 4_096


Form = FileFormat | Literal["events"]
"""What the lines of a file are."""


@dataclass(frozen=True)
class Line:
    """One line of a file: an event or a conversation, or the reason why it is neither."""

    number: int
    end: int
    event: Interaction | Feedback | Item | None
    reason: str = ""
    excerpt: str = ""
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
            f"the source folder {folder} is not there; create it, or correct sources.folders in the loop's YAML"
        )
    return files_of(folder)


def grows(path: Path) -> bool:
    """Whether a file is JSON lines, of which what was appended can be read alone.

    Raises:
        OSError: it cannot be read.
    """
    return path.suffix.lower() != ".json" and layout_of(path) == "lines"


def read_whole(path: Path, task: str, *, max_line_bytes: int, form: Form = "auto", name: str = "") -> Iterator[Line]:
    """Read a file of any kind from its start; each line's `end` is the file's.

    Args:
        name: how the origins of conversations call the file; default by its own name.

    Raises:
        OSError: it cannot be read.
    """
    end = path.stat().st_size
    for number, value, reason, _ in read_rows(path, max_line_bytes):
        if reason:
            yield Line(number, end, None, reason)
        else:
            yield _understood(value, task, Line(number, end, None), form, name or path.name)


def read_lines(
    path: Path, task: str, *, offset: int, lines: int, max_line_bytes: int, form: Form = "auto", name: str = ""
) -> Iterator[Line]:
    """Read a file from a byte offset, where `lines` lines lie behind; `name` as in `read_whole`.

    A last line without its end is read only if it is whole JSON: otherwise someone may still be writing it, and it is
    left for the next time.
    """
    with path.open("rb") as file:
        # What follows a last line that had no end yet still belongs to that line.
        number = lines - 1 if _inside_a_line(file, offset) else lines
        file.seek(offset)
        while raw := file.readline(max_line_bytes + 1):
            number += 1
            too_long = len(raw) > max_line_bytes and not raw.endswith(b"\n")
            if too_long:
                ended = _skip_line(file)
                reason = f"longer than {max_line_bytes} bytes (sources.max_line_bytes)"
                line = Line(number, file.tell(), None, reason, _excerpt(raw))
            else:
                ended = raw.endswith(b"\n")
                line = _parse(raw, task, Line(number, file.tell(), None), form, name or path.name)
            if line.event is None and not ended and not line.final:
                return
            if line.event is not None or line.reason:
                yield line


def tail_hash(path: Path, offset: int) -> str:
    """A hash of the last bytes before an offset: it changes when a file was rewritten instead of continued."""
    with path.open("rb") as file:
        file.seek(max(0, offset - _TAIL))
        return hashlib.sha256(file.read(min(offset, _TAIL))).hexdigest()


def _inside_a_line(file: Any, offset: int) -> bool:
    file.seek(max(0, offset - 1))
    return offset > 0 and file.read(1) != b"\n"


def _skip_line(file: Any) -> bool:
    while rest := file.readline(1 << 16):
        if rest.endswith(b"\n"):
            return True
    return False


def _parse(raw: bytes, task: str, line: Line, form: Form, name: str) -> Line:
    if not raw.strip():
        return line
    try:
        text = raw.decode("utf-8-sig" if line.number == 1 else "utf-8")
        document = without_nulls(json.loads(text, parse_constant=constant))
    except UnicodeDecodeError as error:
        return replace(line, reason=f"not UTF-8: {error.reason} at byte {error.start}", excerpt=_excerpt(raw))
    except (ValueError, RecursionError) as error:
        return replace(line, reason=f"not JSON: {error}", excerpt=_excerpt(raw))
    understood = _understood(document, task, line, form, name)
    return understood if understood.event else replace(understood, excerpt=_excerpt(raw))


def _understood(document: Any, task: str, line: Line, form: Form, name: str) -> Line:
    """A line with what it says, as an event or as a conversation, or with why it says neither."""
    conversation = isinstance(document, dict) and "event" not in document
    try:
        if form not in {"auto", "events"} or (form == "auto" and conversation):
            return replace(line, event=to_item(document, f"{name}:{line.number}", cast("FileFormat", form)))
        event = logged(_EVENT.validate_python({"task": task, **document} if isinstance(document, dict) else document))
    except ValidationError as error:
        return replace(line, reason=_first_error(error), final=True)
    except ValueError as error:
        return replace(line, reason=str(error), final=True)
    if event.task != task:
        return replace(line, reason=f"is of task {event.task!r}, this folder is read for {task!r}", final=True)
    return replace(line, event=event)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] in {"union_tag_not_found", "union_tag_invalid"}:
        found = f"is {first['ctx']['tag']!r}" if "tag" in first.get("ctx", {}) else "is not there"
        return f"event: {found}, expected 'interaction' or 'feedback'"
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where + ': ' if where else ''}{first['msg']}{more}"


def _excerpt(raw: bytes) -> str:
    return raw[:_EXCERPT].decode("utf-8", "replace").replace("\x00", "�").strip()
