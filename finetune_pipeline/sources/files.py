"""Files of conversations that were made elsewhere: JSONL, JSON, CSV or Parquet, in the forms of `conversations`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune_pipeline.settings import FileFormat, FilesSource, project_path
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.row_readers import files_of, read_rows, readable
from finetune_pipeline.sources.source_record import Reading, SkippedRecord, SourceError, SourceRecord

_AN_EVENT = "is an event of a log; put its file into the drop folder, or name its folder in ingest.folders"


def read(source: FilesSource, cursor: Any) -> Reading:
    """All conversations of a file, or of the files of a folder and of those in it, in the order of their names.

    It has no cursors: a row that is there no longer is retracted. Of links, only those that stay within the folder are
    followed, and hidden files and folders are left out.

    Raises:
        SourceError: it is not there, holds no file of rows, or cannot be read.
    """
    root = project_path(source.path)
    for path in _files(root, source.name):
        if isinstance(path, SkippedRecord):
            yield path
            continue
        name = readable(path.name if path == root else str(path.relative_to(root)))
        try:
            yield from read_file(path, name, source.format, source.max_line_bytes)
        except OSError as error:
            if path == root:
                raise SourceError(f"{root} cannot be read ({error.strerror}); mend it, then run again") from error
            yield SkippedRecord(name, f"cannot be read ({error.strerror})", unreadable=True)


def read_file(path: Path, name: str, form: FileFormat, max_bytes: int) -> Iterator[SourceRecord | SkippedRecord]:
    """The conversations of one file; each says the file by `name`, and its line.

    A file that is damaged or only half written is unreadable as a whole: nobody knows what of it is gone.

    Raises:
        OSError: it cannot be read.
    """
    for number, value, reason, breaks_off in read_rows(path, max_bytes):
        provenance = f"{name}:{number}"
        if breaks_off:
            yield SkippedRecord(name, f"row {number}: {reason}", unreadable=True)
        elif reason:
            yield SkippedRecord(provenance, reason)
        elif form == "auto" and isinstance(value, dict) and "event" in value:
            yield SkippedRecord(provenance, _AN_EVENT)
        else:
            try:
                yield to_record(value, provenance, form)
            except ValueError as error:
                yield SkippedRecord(provenance, str(error))


def _files(root: Path, name: str) -> Sequence[Path | SkippedRecord]:
    """The files of rows, and the folders that cannot be looked into."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise SourceError(f"source {name}: {root} is not there; create it, or correct its path in the loop's YAML")
    found: list[Path] = []
    closed: dict[str, str] = {}
    for folder, below, _ in os.walk(root, onerror=lambda error: closed.update({error.filename: str(error.strerror)})):
        below[:] = sorted(one for one in below if not one.startswith("."))
        try:
            found += files_of(Path(folder), root)
        except OSError as error:  # its names can be listed, and nothing in it looked at
            closed[folder] = str(error.strerror)
    if not found and closed:
        raise SourceError(f"source {name}: {root} cannot be read ({closed.popitem()[1]}); mend its rights")
    if not found:  # a disk that is not mounted looks like this too, and must not retract everything
        raise SourceError(f"source {name}: no file .jsonl, .json, .csv, .tsv or .parquet lies in {root}; put one there")
    unreadable = [(readable(os.path.relpath(folder, root)), reason) for folder, reason in closed.items()]
    return [
        *(SkippedRecord(folder, f"cannot be read ({reason})", unreadable=True) for folder, reason in unreadable),
        *found,
    ]
