"""Files that clients upload to train on: `$FINETUNE_HOME/files/file-.../content.jsonl` with `file.json` beside it.

A file is written into a hidden folder, flushed, and renamed into place, so that it is complete or absent. It is kept as
it was sent, with whatever it holds, until it is deleted; datasets made from it are redacted.
"""

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, ValidationError

from finetune_pipeline.artifacts import flush, write_text
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.settings import home

MAX_FILE_BYTES = 512 * 2**20
"""Largest file in bytes, as at OpenAI."""

_CONTENT, _FACTS = "content.jsonl", "file.json"
_ID = re.compile(r"file-[0-9a-f]{24}")
_ABANDONED_SECONDS = 86_400  # no upload takes so long


class UnknownFileError(LookupError):
    """There is no file with this id."""


class FileTooLargeError(ValueError):
    """A file has more than MAX_FILE_BYTES."""


class UploadedFile(Record):
    """A file as it was uploaded."""

    id: str
    filename: str
    bytes: int = Field(ge=0)
    sha256: str
    uploaded_by: str = Field(description="Name of the API key.")
    created_at: UtcDatetime

    @property
    def path(self) -> Path:
        """The file's content."""
        return _folder() / self.id / _CONTENT


class NewFile:
    """A file that is being uploaded."""

    def __init__(self, folder: Path, content: BinaryIO) -> None:
        self.size = 0
        self._folder, self._content, self._hash = folder, content, hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append data.

        Raises:
            FileTooLargeError: there is too much of it.
        """
        self.size += len(data)
        if self.size > MAX_FILE_BYTES:
            raise FileTooLargeError(f"the file is larger than {MAX_FILE_BYTES:,} bytes; split it")
        self._hash.update(data)
        self._content.write(data)

    def flushed(self) -> Path:
        """Return the path at which what was written can be read, until the file is published or discarded."""
        self._content.flush()
        return self._folder / _CONTENT

    def publish(self, filename: str, uploaded_by: str) -> UploadedFile:
        """Make the file appear under a new id."""
        self._content.close()
        flush(self._folder / _CONTENT)
        file = UploadedFile(
            id=f"file-{secrets.token_hex(12)}",
            filename=filename,
            bytes=self.size,
            sha256=self._hash.hexdigest(),
            uploaded_by=uploaded_by,
            created_at=datetime.now(UTC),
        )
        write_text(self._folder / _FACTS, file.model_dump_json(indent=2) + "\n")
        self._folder.rename(_folder() / file.id)
        flush(_folder())
        return file


@contextmanager
def new_file() -> Iterator[NewFile]:
    """Open a file to upload; without `publish`, nothing of it remains."""
    folder = _folder() / f".upload-{secrets.token_hex(12)}"
    folder.mkdir(parents=True)
    for left in _folder().glob(".upload-*"):  # by a killed gateway
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    try:
        with (folder / _CONTENT).open("wb") as content:
            yield NewFile(folder, content)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_file(id: str) -> UploadedFile:
    """Return a file.

    Raises:
        UnknownFileError: there is none with this id.
    """
    try:
        if _ID.fullmatch(id):
            return UploadedFile.model_validate_json((_folder() / id / _FACTS).read_bytes())
    except (OSError, ValidationError):  # deleted, or damaged
        pass
    raise UnknownFileError(f"there is no file {id[:100]!r}; upload it, or list the files")


def list_files() -> list[UploadedFile]:
    """Return all files, oldest first."""
    found = []
    for path in _folder().glob(f"file-*/{_FACTS}"):
        with suppress(OSError, ValidationError):
            found.append(UploadedFile.model_validate_json(path.read_bytes()))
    return sorted(found, key=lambda file: (file.created_at, file.id))


def delete_file(id: str) -> None:
    """Delete a file; datasets that were made from it stay.

    Raises:
        UnknownFileError: there is none with this id.
    """
    folder = find_file(id).path.parent
    hidden = folder.with_name(f".upload-{secrets.token_hex(12)}")
    with suppress(FileNotFoundError):  # two deletions at once
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _folder() -> Path:
    return home() / "files"
