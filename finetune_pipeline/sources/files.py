"""Read conversations from JSONL, JSON, CSV and Parquet files, in the formats of `conversations`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_pipeline.settings import FileFormat, FilesSource, project_path
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.row_readers import is_row_file, read_rows
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.text_files import find_files, printable

_IS_EVENT = "is an event of a log; put its file into the drop folder, or name its folder in ingest.folders"

EXAMPLE_ROW = {"prompt": "The printer on floor 2 is broken again.", "completion": "hardware"}
"""A row of the format prompt_completion, for messages and documentation."""


def has_rows(root: Path) -> bool:
    """Return whether a file, or a row file below a folder, has content. A file that cannot be read counts as such."""
    paths = [root] if root.is_file() else [root / path for path in find_files(root, is_row_file, inner_links=True)[0]]
    try:
        return any(path.stat().st_size > 0 for path in paths)
    except OSError:  # reading it will say why
        return True


def read(source: FilesSource, cursor: Any) -> Iterator[SourceRecord | SkippedRecord]:
    """Yield the conversations of a file, or of all files below a folder in the order of their names.

    There are no cursors: a row that is no longer in its file is retracted. Symbolic links are followed if they lead to
    a file within the folder. Hidden files and folders are left out.

    Raises:
        SourceError: the path does not exist, contains no row file, or cannot be read.
    """
    root = project_path(source.path)
    if root.is_file():
        try:
            yield from read_file(root, printable(root.name), source.format, source.max_line_bytes)
        except OSError as error:
            raise SourceError(f"{root} cannot be read ({error.strerror}); fix that, then run again") from error
        return
    if not root.is_dir():
        raise SourceError(f"source {source.name}: {root} does not exist; create it, or correct its path in the YAML")
    paths, skipped = find_files(root, is_row_file, inner_links=True)
    if not paths and skipped:
        raise SourceError(f"source {source.name}: {root}: {skipped[0].reason}; grant access to it")
    if not paths:  # an unmounted disk looks like this too, and must not retract everything
        raise SourceError(
            f"source {source.name}: found no .jsonl, .ndjson, .json, .csv, .tsv or .parquet file in {root}; put one "
            "there, or correct its path in the YAML"
        )
    yield from skipped
    for path in paths:
        try:
            yield from read_file(root / path, printable(path), source.format, source.max_line_bytes)
        except OSError as error:
            yield SkippedRecord(printable(path), f"cannot be read ({error.strerror})", unreadable=True)


def read_file(path: Path, name: str, form: FileFormat, max_bytes: int) -> Iterator[SourceRecord | SkippedRecord]:
    """Yield the conversations of one file. A damaged or incomplete file is reported as unreadable.

    Args:
        name: the file's name in the records' provenance.

    Raises:
        OSError: the file cannot be read.
    """
    for number, value, reason, breaks_off in read_rows(path, max_bytes):
        provenance = f"{name}:{number}"
        if breaks_off:
            yield SkippedRecord(name, f"row {number}: {reason}", unreadable=True)
        elif reason:
            yield SkippedRecord(provenance, reason)
        elif form == "auto" and isinstance(value, dict) and "event" in value:
            yield SkippedRecord(provenance, _IS_EVENT)
        else:
            try:
                yield replace(to_record(value, provenance, form), file=name)
            except ValueError as error:
                yield SkippedRecord(provenance, str(error))
