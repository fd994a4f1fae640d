"""Read the rows of JSON Lines, JSON array, CSV and Parquet files one at a time. A bad row does not stop the others."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from finetune_pipeline.schemas import InvalidJsonError, parse_json, unique_members
from finetune_pipeline.sources.text_files import is_visible_file
from finetune_pipeline.validation_messages import short_repr

SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})
"""File name extensions of row files."""

LINE_ENDS = (b"\n", b"\r")
"""What the last byte of a complete line is."""

UTF16 = "the file is UTF-16, expected UTF-8; save it as UTF-8"
"""Why a file with the byte order mark of UTF-16 or UTF-32 is not read, as Windows PowerShell writes with `>`."""

_BLOCK = 1 << 16
_PARQUET_ROWS = 256
_NESTED_COLUMNS = frozenset({"messages", "conversations", "conversation", "history"})
_ANSWERS = frozenset({"completion", "response", "output", "correction"})
_SHOWN = 1_000
_LONGEST_TOKEN = 12  # an escaped surrogate pair; only strings and numbers are longer


class FileRow(NamedTuple):
    """A row, or the reason why it cannot be read."""

    number: int  # the line where it begins; in a JSON array and in Parquet its number, from 1
    value: Any  # the row without null fields, and without empty cells of CSV
    reason: str = ""  # why it cannot be read; empty if it can
    breaks_off: bool = False  # the rest of the file cannot be read either, so its content is unknown


def files_of(folder: Path) -> list[Path]:
    """Return the row files in a folder by name. Hidden files are left out, and links that lead out of the folder."""
    found = (path for path in folder.iterdir() if is_row_file(path.name) and not path.name.startswith("."))
    return sorted(path for path in found if is_visible_file(path, folder))


def is_row_file(name: str) -> bool:
    """Return whether a file has the extension of a row file."""
    return Path(name).suffix.lower() in SUFFIXES


def layout_of(path: Path) -> Literal["lines", "array", "csv", "parquet"]:
    """Return how a file stores its rows: CSV by its name, anything else by its first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        return "csv"
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix == ".json" and not first:  # truncated before it is written again, rather than empty
        return "array"
    return "array" if first == b"[" and suffix not in {".jsonl", ".ndjson"} else "lines"


def read_rows(path: Path, max_bytes: int) -> Iterator[FileRow]:
    """Yield every row of a file. Only one row is in memory at a time (of Parquet, a few hundred).

    Args:
        max_bytes: longer rows are rejected unread.

    Raises:
        OSError: the file cannot be read.
    """
    if is_utf16(path):
        yield FileRow(1, None, UTF16, breaks_off=True)
        return
    readers = {"lines": _json_lines, "array": _json_array, "csv": _csv_rows, "parquet": _parquet_rows}
    for row in readers[layout_of(path)](path, max_bytes):
        yield row._replace(value=without_nulls(row.value))


def is_utf16(path: Path) -> bool:
    """Return whether a file begins with the byte order mark of UTF-16 or UTF-32.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(2) in {b"\xff\xfe", b"\xfe\xff"}


def without_nulls(value: Any) -> Any:
    """Return a row without its null fields, and its turns without theirs.

    pandas and datasets write every column in every row, so null means that a row has no such field. So does NaN, which
    pandas writes for a missing value. In an answer that is a JSON object, null is a value.
    """
    if isinstance(value, dict):
        return {
            name: field if name in _ANSWERS and isinstance(field, dict) else without_nulls(field)
            for name, field in value.items()
            if field is not None and not (isinstance(field, float) and math.isnan(field))
        }
    return [without_nulls(element) for element in value] if isinstance(value, list) else value


def parse_constant(name: str) -> None:
    """Return None for NaN, which means a missing value in a row; reject Infinity."""
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


def decode_line(raw: bytes) -> str:
    """Return a line as text, without a byte order mark, which joined files have in the middle too.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8") from None


def read_line(file: io.BufferedReader, max_bytes: int) -> bytes:
    """Return the next line with its end: LF, CRLF, or CR, which old spreadsheets write.

    Args:
        max_bytes: the line is cut there; CRLF is never cut in two.
    """
    parts: list[bytes] = []
    left = max_bytes
    while left and (ahead := file.peek()):
        ends = [at for at in (ahead.find(b"\n"), ahead.find(b"\r")) if at >= 0]
        part = file.read(min(left, min(ends) + 1 if ends else len(ahead)))
        parts.append(part)
        left -= len(part)
        if part.endswith(b"\r") and file.peek().startswith(b"\n"):
            parts.append(file.read(1))
        if part.endswith(LINE_ENDS):
            break
    return b"".join(parts)


def _read_line(file: io.BufferedReader, max_bytes: int) -> tuple[bytes, bool]:
    """Return the next line, and whether it was cut because it is too long."""
    raw = read_line(file, max_bytes + 1)
    if len(raw) <= max_bytes or raw.endswith(LINE_ENDS):
        return raw, False
    while (rest := read_line(file, _BLOCK)) and not rest.endswith(LINE_ENDS):
        pass
    return raw, True


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes} bytes, which is the limit (max_line_bytes)"


def _json_row(number: int, text: str) -> FileRow:
    try:
        return FileRow(number, parse_json(text, parse_constant, unique_members))
    except InvalidJsonError as error:
        return FileRow(number, None, str(error))


def _json_lines(path: Path, max_bytes: int) -> Iterator[FileRow]:
    is_first_row = True
    with path.open("rb") as file:
        for number in count(1):
            raw, is_cut = _read_line(file, max_bytes)
            if not raw:
                return
            if is_cut:
                yield FileRow(number, None, _too_long(max_bytes))
                continue
            try:
                text = decode_line(raw).strip()
            except ValueError as error:
                yield FileRow(number, None, str(error))
                continue
            if is_first_row and path.suffix.lower() == ".json" and text.startswith("{") and not text.endswith("}"):
                reason = "the file is one JSON object; expected an array of rows, or one object per line"
                yield FileRow(number, None, reason, breaks_off=True)
                return
            if text:
                is_first_row = False
                yield _json_row(number, text)


def _json_array(path: Path, max_bytes: int) -> Iterator[FileRow]:
    number = 0
    with path.open("rb") as file:
        try:
            for number, text in enumerate(_array_elements(file, max_bytes), start=1):
                yield _json_row(number, text)
        except (ValueError, RecursionError) as error:
            # After an error in the array itself, the following elements cannot be told apart.
            reason = f"{error}; nothing after it was read" if isinstance(error, _ArrayError) else f"not JSON: {error}"
            yield FileRow(number + 1, None, reason, breaks_off=True)


class _ArrayError(ValueError):
    """The file is not a well-formed JSON array."""


def _array_elements(file: BinaryIO, max_bytes: int) -> Iterator[str]:
    """Yield the JSON text of each element of an array, through a buffer of about one element."""
    text, decoder = io.TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder()
    buffer, ended = "", False

    def fill(size: int) -> None:
        nonlocal buffer, ended
        try:
            more = text.read(size)
        except UnicodeDecodeError as error:
            raise _ArrayError(f"not UTF-8: {error.reason}; save the file as UTF-8") from None
        buffer, ended = buffer + more, not more

    def next_character() -> str:
        """Skip white space, and return the character after it; empty at the end of the file."""
        nonlocal buffer
        while not (buffer := buffer.lstrip()) and not ended:
            fill(_BLOCK)
        return buffer[:1]

    def skip(expected: str) -> None:
        nonlocal buffer
        found = next_character()
        if found != expected:
            raise _ArrayError(f"found {found or 'the end of the file'!r}, expected {expected!r}")
        buffer = buffer[1:]

    skip("[")
    is_first = True
    while next_character() != "]":
        if not is_first:
            skip(",")
            next_character()
        is_first, end = False, 0
        while not end:
            try:
                _, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                # An error at the end of the buffer may only mean that the element continues behind it.
                near_end = error.msg.startswith("Unterminated") or error.pos > len(buffer) - _LONGEST_TOKEN
                if ended or not near_end:
                    raise _ArrayError(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise _ArrayError("not JSON: nested too deep") from None
            if not end:
                if len(buffer) > max_bytes:
                    raise _ArrayError(f"not JSON, or {_too_long(max_bytes)}")
                fill(max(_BLOCK, len(buffer)))  # doubled, so that a long element is parsed few times
        yield buffer[:end]
        buffer = buffer[end:]
    skip("]")
    if next_character():
        fill(_BLOCK)  # redaction would not recognize a secret that the buffer cut in two
        raise _ArrayError(f"found {short_repr(buffer[:_SHOWN])} after the end of the array")


def _csv_rows(path: Path, max_bytes: int) -> Iterator[FileRow]:
    csv.field_size_limit(max_bytes)  # a limit of the process; nothing else here reads CSV
    is_cut = False  # a line of the row was too long

    def lines() -> Iterator[str]:
        """Yield the lines. Bytes that are not UTF-8 become surrogates, and too long lines are cut."""
        nonlocal is_cut
        encoding = "utf-8-sig"
        while True:
            raw, was_cut = _read_line(file, max_bytes)
            if not raw:
                return
            is_cut = is_cut or was_cut
            yield raw.decode(encoding, "surrogateescape")
            encoding = "utf-8"

    with path.open("rb") as file:
        rest = lines()
        first = next(rest, "")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader(chain([first], rest), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield FileRow(number, None, f"not CSV: {error}")
                continue
            if cells is None:
                return
            if not cells:
                is_cut = False
                continue
            if names:
                yield FileRow(number, None, _too_long(max_bytes)) if is_cut else _csv_row(number, names, cells)
                is_cut = False
                continue
            names = [cell.strip() for cell in cells]
            if is_cut or not _is_utf8(names) or any("\x00" in name for name in names):
                reason = "the first line is not a CSV header in UTF-8"
                advice = "save the file as UTF-8, with the column names first"
            elif repeated := sorted({name for name in names if names.count(name) > 1}):
                reason = f"the header contains {short_repr(', '.join(repeated))} twice"
                advice = "rename one column"
            else:
                continue
            yield FileRow(number, None, f"{reason}; {advice}", breaks_off=True)
            return


def _csv_row(number: int, names: Sequence[str], cells: Sequence[str]) -> FileRow:
    """Return a row by column names, without empty cells. Conversations in cells are JSON."""
    if len(cells) != len(names):
        return FileRow(number, None, f"has {len(cells)} cells, but the header has {len(names)}")
    if not _is_utf8(cells):
        return FileRow(number, None, "not UTF-8; save the file as UTF-8")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    for name in _NESTED_COLUMNS & row.keys():
        if row[name].lstrip().startswith("["):
            try:
                row[name] = parse_json(row[name], parse_constant, unique_members)
            except InvalidJsonError as error:
                return FileRow(number, None, f"{name}: {error}")
    return FileRow(number, row)


def _is_utf8(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, max_bytes: int) -> Iterator[FileRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:  # read it row by row, to find which row it is
                    rows = []
                    for index in range(batch.num_rows):
                        try:
                            rows += batch.slice(index, 1).to_pylist()
                        except UnicodeDecodeError as error:
                            rows.append(f"not UTF-8: {error.reason}")
                for row in rows:
                    number += 1
                    if isinstance(row, str):
                        yield FileRow(number, None, row)
                    elif sum(len(value) for value in row.values() if isinstance(value, str | bytes)) > max_bytes:
                        yield FileRow(number, None, _too_long(max_bytes))
                    else:
                        yield FileRow(number, row)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; Arrow reports damaged pages as an OSError without a number
        message = " ".join(str(error).split())[:160]
        yield FileRow(number + 1, None, f"not Parquet: {message}; nothing after it was read", breaks_off=True)
