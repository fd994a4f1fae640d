"""Event files: one JSON object a line, read from where the last reading ended; a bad line never stops the others."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.records import Event, Feedback, Interaction
from finetune_pipeline.sources.item import SourceError

_EVENT: TypeAdapter[Interaction | Feedback] = TypeAdapter(Event)
_EXCERPT = 200
_TAIL = 4_096


@dataclass(frozen=True)
class Line:
    """One line of a file: an event, or the reason why it is none."""

    number: int
    end: int
    event: Interaction | Feedback | None
    reason: str = ""
    excerpt: str = ""
    final: bool = False
    """Refused whatever may still be written behind it: it is whole JSON, but no event."""


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, by name; hidden and temporary ones are left out.

    Raises:
        SourceError: the folder is not there.
    """
    if not folder.is_dir():
        raise SourceError(
            f"the source folder {folder} is not there; create it, or correct sources.folders in the loop's YAML"
        )
    return sorted(path for path in folder.glob("*.jsonl") if path.is_file() and not path.name.startswith("."))


def read_lines(path: Path, task: str, *, offset: int, lines: int, max_line_bytes: int) -> Iterator[Line]:
    """Read a file from a byte offset, where `lines` lines lie behind.

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
                line = _parse(raw, number, file.tell(), task)
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


def _parse(raw: bytes, number: int, end: int, task: str) -> Line:
    if not raw.strip():
        return Line(number, end, None)
    try:
        document = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse_constant)
        event = _EVENT.validate_python({"task": task, **document} if isinstance(document, dict) else document)
    except UnicodeDecodeError as error:
        return Line(number, end, None, f"not UTF-8: {error.reason} at byte {error.start}", _excerpt(raw))
    except ValidationError as error:
        return Line(number, end, None, _first_error(error), _excerpt(raw), final=True)
    except (ValueError, RecursionError) as error:
        return Line(number, end, None, f"not JSON: {error}", _excerpt(raw))
    if event.task != task:
        reason = f"is of task {event.task!r}, this folder is read for {task!r}"
        return Line(number, end, None, reason, _excerpt(raw), final=True)
    return Line(number, end, event)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


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
