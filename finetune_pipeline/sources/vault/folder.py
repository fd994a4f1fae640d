"""A vault's notes as they lie in its folder. Nothing is written, no link is followed, nothing hidden is opened."""

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_pipeline.sources.source_record import SkippedRecord


@dataclass(frozen=True)
class File:
    """A note's file, read once.

    Attributes:
        path: in the vault, with `/`.
        text: with `\\n` at the ends of its lines, whatever they were.
        modified: when it was last written, in UTC.
    """

    path: str
    text: str
    modified: datetime | None


def find(root: Path, ignore: Collection[str]) -> Iterator[str | SkippedRecord]:
    """Paths of the notes under a folder, in no order, and what cannot be read, or leads away from it.

    Args:
        ignore: folders that are left out, by name or by their path in the vault, in capitals or not.
    """
    ignored = {name.casefold() for name in ignore}
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                found = list(entries)
        except OSError as error:
            yield SkippedRecord(
                os.fsencode(folder).decode("utf-8", "replace"),
                f"this folder cannot be read: {error.strerror}",
                unreadable=True,
            )
            continue
        for entry in found:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or not ignored.isdisjoint({entry.name.casefold(), path.casefold()}):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif (one := _note(entry, path)) is not None:
                yield one


def _note(entry: os.DirEntry[str], path: str) -> str | SkippedRecord | None:
    name = os.fsencode(path).decode("utf-8", "replace")
    if entry.is_symlink():
        return SkippedRecord(name, "is a link, and links are not followed; put the note itself into the vault")
    if not entry.name.lower().endswith(".md"):
        return None
    return path if name == path else SkippedRecord(name, "its name is not UTF-8; rename it")


def load(root: Path, path: str, max_bytes: int) -> File | SkippedRecord:
    """Read a note, or say why it cannot be."""
    try:
        # The file may have become a link, or a pipe that never answers, since it was found.
        descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return SkippedRecord(path, "is no file")
            raw = file.read(max_bytes + 1)
    except OSError as error:
        return SkippedRecord(path, f"cannot be read: {error.strerror}", unreadable=True)
    if len(raw) > max_bytes:
        return SkippedRecord(path, f"is longer than {max_bytes} bytes (max_note_bytes)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return SkippedRecord(path, f"is not UTF-8 at byte {error.start}; save it as UTF-8")
    if "\x00" in text:
        return SkippedRecord(path, "holds a NUL character, which no note does; save it as text")
    return File(path, text.replace("\r\n", "\n").replace("\r", "\n"), _moment(status.st_mtime))


def _moment(seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None  # a file system may hold any number
