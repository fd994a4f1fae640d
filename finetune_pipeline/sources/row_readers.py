"""The rows of a file one at a time: JSON lines, a JSON array, CSV or Parquet. A bad row is named, the others go on."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.validation_messages import short_repr

SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})
"""How files of rows are named."""

_BLOCK = 1 << 16
_PARQUET_ROWS = 256
_NESTED = frozenset({"messages", "conversations", "conversation", "history"})
_SHOWN = 1_000
_LONGEST_SIGN = 12  # an escaped surrogate pair; no other sign of JSON but texts and numbers is longer


class FileRow(NamedTuple):
    """A row, or why there is none.

    Attributes:
        number: the line at which it begins; in a JSON array and in Parquet its own number, from 1.
        value: the row without null fields, or the empty cells of CSV.
        reason: why it could not be read; empty if it could.
        breaks_off: nor could anything behind it, so nobody knows what the rest of the file holds.
    """

    number: int
    value: Any
    reason: str = ""
    breaks_off: bool = False


@dataclass(frozen=True)
class _Bad:
    reason: str
    breaks_off: bool = False


_Numbered = Iterator[tuple[int, Any]]
"""A row's number, and its value or why there is none."""


def files_of(folder: Path, inside: Path | None = None) -> list[Path]:
    """The files of rows in a folder, by name, without hidden ones, and links to such or out of it (or `inside`)."""
    within = (inside or folder).resolve()
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file() and _is_open(path.resolve(), within))


def _is_open(path: Path, within: Path) -> bool:
    """Whether it lies in the folder, and nothing on the way there is hidden."""
    return path.is_relative_to(within) and not any(part.startswith(".") for part in path.relative_to(within).parts)


def readable(name: str) -> str:
    """A file's name as text that can be written and stored: bytes of it that are not UTF-8 become replacement signs."""
    return os.fsencode(name).decode("utf-8", "replace")


def layout_of(path: Path) -> Literal["lines", "array", "csv", "parquet"]:
    """How the rows stand in a file: CSV by its name, anything else by its first bytes.

    Raises:
        OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        return "csv"
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix == ".json" and not begins:  # emptied to be written restarted, rather than without a row
        return "array"
    return "array" if begins == b"[" and suffix not in {".jsonl", ".ndjson"} else "lines"


def read_rows(path: Path, max_bytes: int) -> Iterator[FileRow]:
    """Every row of a file, in memory hardly more than one at a time (of Parquet, a few hundred).

    Args:
        max_bytes: a longer row is not read.

    Raises:
        OSError: the file cannot be read.
    """
    readers = {"lines": _json_lines, "array": _json_array, "csv": _csv_rows, "parquet": _parquet_rows}
    for number, value in readers[layout_of(path)](path, max_bytes):
        bad = isinstance(value, _Bad)
        yield FileRow(number, None, value.reason, value.breaks_off) if bad else FileRow(number, without_nulls(value))


def without_nulls(value: Any) -> Any:
    """Return a row without its null fields, and its turns without theirs.

    pandas and datasets write every column in every row, so null means that a row has no such field. So does NaN, which
    pandas writes for a missing value.
    """
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if not _is_missing(field)}
    return [without_nulls(element) for element in value] if isinstance(value, list) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def constant(name: str) -> None:
    """Return None for NaN, which means a missing value in a row; refuse Infinity."""
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


def _json_lines(path: Path, max_bytes: int) -> _Numbered:
    for number, text in _lines(path, max_bytes):
        yield number, text if isinstance(text, _Bad) else _value(text)


def _json_array(path: Path, max_bytes: int) -> _Numbered:
    for number, text in _elements(path, max_bytes):
        yield number, text if isinstance(text, _Bad) else _value(text)


def _value(text: str) -> Any:
    try:
        return parse_json(text, constant)
    except InvalidJsonError as error:
        return _Bad(str(error))


def _lines(path: Path, max_bytes: int) -> _Numbered:
    number, first = 0, True
    with path.open("rb") as file:
        while raw := file.readline(max_bytes + 1):
            number += 1
            if len(raw) > max_bytes and not raw.endswith(b"\n"):
                _skip_line(file)
                yield number, _Bad(_too_long(max_bytes))
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, _Bad(f"not UTF-8: {error.reason} at byte {error.start}")
                continue
            if first and path.suffix.lower() == ".json" and text.startswith("{") and not text.endswith("}"):
                reason = "the file is one JSON object; expected an array of rows, or one object a line"
                yield number, _Bad(reason, breaks_off=True)
                return
            if text:
                first = False
                yield number, text


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
        pass


def _elements(path: Path, max_bytes: int) -> _Numbered:
    """The elements of a JSON array, one at a time; after a fault in the array itself nothing more can be told apart."""
    with path.open("rb") as file:
        number = 0
        try:
            for number, text in enumerate(_Array(file, max_bytes).elements(), start=1):
                yield number, text
        except (ValueError, RecursionError) as error:
            reason = f"{error}; nothing after it was read" if isinstance(error, _Fault) else f"not JSON: {error}"
            yield number + 1, _Bad(reason, breaks_off=True)


class _Fault(ValueError):
    """The array does not go on as an array does."""


class _Array:
    """Reads a JSON array through a buffer that holds hardly more than one element."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._max = max_bytes
        self._rest = ""
        self._ended = False

    def elements(self) -> Iterator[str]:
        self._expect("[")
        if self._next() == "]":
            self._expect("]")
        else:
            while True:
                self._next()
                yield self._element()
                if self._next() == "]":
                    self._expect("]")
                    break
                self._expect(",")
        if self._next():
            self._fill(_BLOCK)  # what the buffer's end cut in two, nobody could redact
            raise _Fault(f"found {short_repr(self._rest[:_SHOWN])} after the end of the array")

    def _element(self) -> str:
        decoder = json.JSONDecoder()
        while True:
            try:
                _, end = decoder.raw_decode(self._rest)
                return self._take(end)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise _Fault(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise _Fault("not JSON: nested too deep") from None
            if len(self._rest) > self._max:
                raise _Fault(f"not JSON, or {_too_long(self._max)}")
            self._fill(max(_BLOCK, len(self._rest)))  # doubled, so that a long element is not parsed too often

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the fault may only be that the element is not all in the buffer yet."""
        return error.msg.startswith("Unterminated") or error.pos > len(self._rest) - _LONGEST_SIGN

    def _next(self) -> str:
        """The next sign that is no white space, left where it is."""
        while True:
            kept = self._rest.lstrip()
            self._take(len(self._rest) - len(kept))
            if kept or self._ended:
                return kept[:1]
            self._fill(_BLOCK)

    def _expect(self, sign: str) -> None:
        found = self._next()
        if found != sign:
            raise _Fault(f"found {found or 'the end of the file'!r}, expected {sign!r}")
        self._take(1)

    def _take(self, length: int) -> str:
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def _fill(self, size: int) -> None:
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise _Fault(f"not UTF-8: {error.reason}") from None
        self._ended = not more
        self._rest += more


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes} bytes, which is the limit (max_line_bytes)"


class _TextLines:
    """Lines of a CSV file as text: bytes that are not UTF-8 stay recognisable, and a line that is too long is cut."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max = max_bytes
        self._first = True
        self.cut = False

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        raw = self._file.readline(self._max + 1)
        if not raw:
            raise StopIteration
        if len(raw) > self._max and not raw.endswith(b"\n"):
            _skip_line(self._file)
            self.cut = True
        encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
        return raw.decode(encoding, "surrogateescape")


def _csv_rows(path: Path, max_bytes: int) -> _Numbered:
    csv.field_size_limit(max_bytes)  # the module has one for the whole process, and nothing else here reads CSV
    with path.open("rb") as file:
        lines = _TextLines(file, max_bytes)
        first = next(lines, "")
        reader = csv.reader(chain([first], lines), delimiter=_delimiter(path, first), strict=True)
        names: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield number, _Bad(f"not CSV: {error}")
                continue
            if cells is None:
                return
            cut, lines.cut = lines.cut, False
            if not names and cells:
                names = [cell.strip() for cell in cells]
                if problem := _bad_header(names, cut):
                    yield number, _Bad(problem, breaks_off=True)
                    return
            elif cells:
                yield number, _Bad(_too_long(max_bytes)) if cut else _csv_row(names, cells)


def _delimiter(path: Path, header: str) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)


def _bad_header(names: Sequence[str], cut: bool) -> str:
    if cut or not _is_text(names) or any("\x00" in name for name in names):
        return "the first line is no header of a CSV file in UTF-8; save it as UTF-8, with the columns' names first"
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"the header names {short_repr(', '.join(twice))} twice; give each column a name of its own" if twice else ""


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> Any:
    """A row by the names of its columns, without the empty cells; conversations in cells are JSON."""
    if len(cells) != len(names):
        return _Bad(f"has {len(cells)} cells, and the header {len(names)}")
    if not _is_text(cells):
        return _Bad("not UTF-8")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    for name in _NESTED & row.keys():
        if row[name].lstrip().startswith("["):
            row[name] = _value(row[name])
            if isinstance(row[name], _Bad):
                return _Bad(f"{name}: {row[name].reason}")
    return row


def _is_text(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, max_bytes: int) -> _Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in _parquet_values(batch):
                    number += 1
                    yield number, _within(row, max_bytes)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; damaged pages are an OSError of Arrow without a number
        said = " ".join(str(error).split())[:160]
        yield number + 1, _Bad(f"not Parquet: {said}; nothing after it was read", breaks_off=True)


def _parquet_values(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in it; row by row it can be told where
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield _Bad(f"not UTF-8: {error.reason}")


def _within(row: Any, max_bytes: int) -> Any:
    if isinstance(row, _Bad):
        return row
    if sum(len(value) for value in row.values() if isinstance(value, str | bytes)) > max_bytes:
        return _Bad(_too_long(max_bytes))
    return row
