"""Read the rows of JSON Lines, JSON array, CSV and Parquet files one at a time. A bad row does not stop the others."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.sources.text_files import is_visible_file
from finetune_pipeline.validation_messages import short_repr

SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})
"""File name extensions of row files."""

BLOCK = 1 << 16
"""Bytes of a long line that are skipped at once."""

_PARQUET_ROWS = 256
_NESTED_COLUMNS = frozenset({"messages", "conversations", "conversation", "history"})
_SHOWN = 1_000
_LONGEST_TOKEN = 12  # an escaped surrogate pair; only strings and numbers are longer


class FileRow(NamedTuple):
    """A row, or the reason why it cannot be read.

    Attributes:
        number: the line where it begins; in a JSON array and in Parquet its number, from 1.
        value: the row without null fields, and without empty cells of CSV.
        reason: why it cannot be read; empty if it can.
        breaks_off: the rest of the file cannot be read either, so its content is unknown.
    """

    number: int
    value: Any
    reason: str = ""
    breaks_off: bool = False


@dataclass(frozen=True)
class _BadRow:
    reason: str
    breaks_off: bool = False


_NumberedRows = Iterator[tuple[int, Any]]
"""A row's number, and its value or a _BadRow."""


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
        head = file.read(BLOCK)
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
    readers = {"lines": _json_lines, "array": _json_array, "csv": _csv_rows, "parquet": _parquet_rows}
    for number, value in readers[layout_of(path)](path, max_bytes):
        if isinstance(value, _BadRow):
            yield FileRow(number, None, value.reason, value.breaks_off)
        else:
            yield FileRow(number, without_nulls(value))


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


def parse_constant(name: str) -> None:
    """Return None for NaN, which means a missing value in a row; reject Infinity."""
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


class LineSource(Protocol):
    """A binary file, as far as reading lines needs it."""

    def readline(self, size: int, /) -> bytes:
        """Return the next line, at most `size` bytes of it."""


def skip_line(file: LineSource) -> None:
    """Skip the rest of a line."""
    while (rest := file.readline(BLOCK)) and not rest.endswith(b"\n"):
        pass


def decode_line(raw: bytes, number: int) -> str:
    """Return a line as text, without the byte order mark of the first line.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def _read_line(file: LineSource, max_bytes: int) -> tuple[bytes, bool]:
    """Return the next line, and whether it was cut because it is too long."""
    raw = file.readline(max_bytes + 1)
    is_cut = len(raw) > max_bytes and not raw.endswith(b"\n")
    if is_cut:
        skip_line(file)
    return raw, is_cut


def too_long(max_bytes: int) -> str:
    """Return the reason why a row is rejected unread."""
    return f"longer than {max_bytes} bytes, which is the limit (max_line_bytes)"


def _parse(text: str) -> Any:
    try:
        return parse_json(text, parse_constant)
    except InvalidJsonError as error:
        return _BadRow(str(error))


def _json_lines(path: Path, max_bytes: int) -> _NumberedRows:
    number, is_first_row = 0, True
    with path.open("rb") as file:
        while True:
            raw, is_cut = _read_line(file, max_bytes)
            if not raw:
                return
            number += 1
            if is_cut:
                yield number, _BadRow(too_long(max_bytes))
                continue
            try:
                text = decode_line(raw, number).strip()
            except ValueError as error:
                yield number, _BadRow(str(error))
                continue
            if is_first_row and path.suffix.lower() == ".json" and text.startswith("{") and not text.endswith("}"):
                reason = "the file is one JSON object; expected an array of rows, or one object per line"
                yield number, _BadRow(reason, breaks_off=True)
                return
            if text:
                is_first_row = False
                yield number, _parse(text)


def _json_array(path: Path, max_bytes: int) -> _NumberedRows:
    with path.open("rb") as file:
        number = 0
        try:
            for number, text in enumerate(_JsonArrayReader(file, max_bytes).elements(), start=1):
                yield number, _parse(text)
        except (ValueError, RecursionError) as error:
            # After an error in the array itself, the following elements cannot be told apart.
            reason = f"{error}; nothing after it was read" if isinstance(error, _ArrayError) else f"not JSON: {error}"
            yield number + 1, _BadRow(reason, breaks_off=True)


class _ArrayError(ValueError):
    """The file is not a well-formed JSON array."""


class _JsonArrayReader:
    """Reads the elements of a JSON array through a buffer of about one element."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._max = max_bytes
        self._buffer = ""
        self._ended = False

    def elements(self) -> Iterator[str]:
        """Yield the JSON text of each element."""
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
        else:
            while True:
                self._peek()
                yield self._element()
                if self._peek() == "]":
                    self._expect("]")
                    break
                self._expect(",")
        if self._peek():
            self._fill(BLOCK)  # redaction would not recognize a secret that the buffer cut in two
            raise _ArrayError(f"found {short_repr(self._buffer[:_SHOWN])} after the end of the array")

    def _element(self) -> str:
        decoder = json.JSONDecoder()
        while True:
            try:
                _, end = decoder.raw_decode(self._buffer)
                return self._take(end)
            except json.JSONDecodeError as error:
                # An error at the end of the buffer may only mean that the element continues behind it.
                near_end = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _LONGEST_TOKEN
                if self._ended or not near_end:
                    raise _ArrayError(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise _ArrayError("not JSON: nested too deep") from None
            if len(self._buffer) > self._max:
                raise _ArrayError(f"not JSON, or {too_long(self._max)}")
            self._fill(max(BLOCK, len(self._buffer)))  # doubled, so that a long element is parsed few times

    def _peek(self) -> str:
        """Return the next character that is not white space, without taking it."""
        while True:
            kept = self._buffer.lstrip()
            self._take(len(self._buffer) - len(kept))
            if kept or self._ended:
                return kept[:1]
            self._fill(BLOCK)

    def _expect(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise _ArrayError(f"found {found or 'the end of the file'!r}, expected {character!r}")
        self._take(1)

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _fill(self, size: int) -> None:
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise _ArrayError(f"not UTF-8: {error.reason}") from None
        self._ended = not more
        self._buffer += more


class _CsvLines:
    """The lines of a CSV file as text. Bytes that are not UTF-8 become surrogates, and too long lines are cut."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max = max_bytes
        self._encoding = "utf-8-sig"
        self.cut = False

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        raw, is_cut = _read_line(self._file, self._max)
        if not raw:
            raise StopIteration
        self.cut = self.cut or is_cut
        encoding, self._encoding = self._encoding, "utf-8"
        return raw.decode(encoding, "surrogateescape")


def _csv_rows(path: Path, max_bytes: int) -> _NumberedRows:
    csv.field_size_limit(max_bytes)  # a limit of the process; nothing else here reads CSV
    with path.open("rb") as file:
        lines = _CsvLines(file, max_bytes)
        first = next(lines, "")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield number, _BadRow(f"not CSV: {error}")
                continue
            if cells is None:
                return
            cut, lines.cut = lines.cut, False
            if not names and cells:
                names = [cell.strip() for cell in cells]
                if problem := _header_problem(names, cut):
                    yield number, _BadRow(problem, breaks_off=True)
                    return
            elif cells:
                yield number, _BadRow(too_long(max_bytes)) if cut else _csv_row(names, cells)


def _header_problem(names: Sequence[str], cut: bool) -> str:
    if cut or not _is_utf8(names) or any("\x00" in name for name in names):
        return "the first line is not a CSV header in UTF-8; save the file as UTF-8, with the column names first"
    repeated = sorted({name for name in names if names.count(name) > 1})
    return f"the header contains {short_repr(', '.join(repeated))} twice; rename one column" if repeated else ""


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> Any:
    """Return a row by column names, without empty cells. Conversations in cells are JSON."""
    if len(cells) != len(names):
        return _BadRow(f"has {len(cells)} cells, but the header has {len(names)}")
    if not _is_utf8(cells):
        return _BadRow("not UTF-8")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    for name in _NESTED_COLUMNS & row.keys():
        if row[name].lstrip().startswith("["):
            row[name] = _parse(row[name])
            if isinstance(row[name], _BadRow):
                return _BadRow(f"{name}: {row[name].reason}")
    return row


def _is_utf8(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, max_bytes: int) -> _NumberedRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in _parquet_values(batch):
                    number += 1
                    size = (
                        0
                        if isinstance(row, _BadRow)
                        else sum(len(value) for value in row.values() if isinstance(value, str | bytes))
                    )
                    yield number, _BadRow(too_long(max_bytes)) if size > max_bytes else row
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; Arrow reports damaged pages as an OSError without a number
        message = " ".join(str(error).split())[:160]
        yield number + 1, _BadRow(f"not Parquet: {message}; nothing after it was read", breaks_off=True)


def _parquet_values(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # read it row by row, to find which row it is
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield _BadRow(f"not UTF-8: {error.reason}")
