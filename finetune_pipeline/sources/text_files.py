"""Find and read the files of a folder. Hidden files are left out, and nothing outside the folder is read."""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from pathspec import GitIgnoreSpec

from finetune_pipeline.sources.source_record import SkippedRecord, SourceError

_IGNORE_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class TextFile:
    """The text of a file."""

    path: str  # relative to the folder, with slashes
    text: str  # with "\n" as the only line break
    modified: datetime | None  # time of the last change, in UTC; None if the file system has an impossible one


_IgnoreRules = tuple[str, GitIgnoreSpec]
"""A folder, and the .gitignore rules that apply to paths below it."""


def find_files(
    root: Path,
    wanted: Callable[[str], bool],
    *,
    ignored_folder: Callable[[str], bool] = lambda path: False,
    use_gitignore: bool = False,
    inner_links: bool = False,
) -> tuple[list[str], list[SkippedRecord]]:
    """Return the paths of wanted files, relative to the root, in a fixed order, and what cannot be read.

    Args:
        wanted: returns whether to read a file, from its path.
        ignored_folder: returns whether to leave out a folder, from its path.
        use_gitignore: leave out what the folder's own .gitignore files exclude. Git itself is not run, since a
            repository's configuration can make git run commands.
        inner_links: follow symbolic links to files that are inside the root and not hidden, and silently leave out
            all other links. By default links are not followed but reported.
    """
    paths: list[str] = []
    skipped: list[SkippedRecord] = []
    folders: list[tuple[str, list[_IgnoreRules]]] = [("", [])]
    while folders:
        folder, rules = folders.pop()
        if use_gitignore:
            rules = [*rules, *_ignore_rules(root, folder)]
        try:
            with os.scandir(root / folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder cannot be read: {error.strerror}"
            skipped.append(SkippedRecord(printable(folder).rstrip("/"), reason, unreadable=True))
            continue
        below: list[tuple[str, list[_IgnoreRules]]] = []
        for entry in entries:
            is_folder, is_link = entry.is_dir(follow_symlinks=False), entry.is_symlink()
            path = f"{folder}{entry.name}/" if is_folder else f"{folder}{entry.name}"
            if entry.name.startswith(".") or _is_git_ignored(path, rules):
                continue
            if (is_folder or is_link) and ignored_folder(path.rstrip("/")):
                continue
            if is_folder:
                below.append((path, rules))
            elif is_link and inner_links:
                try:
                    if wanted(path) and is_visible_file(root / path, root):
                        paths.append(path)
                except OSError as error:  # the link leads into a folder that cannot be read
                    reason = f"cannot be read: {error.strerror}"
                    skipped.append(SkippedRecord(printable(path), reason, unreadable=True))
            # A link without an extension may lead to a folder of wanted files.
            elif is_link and (wanted(path) or "." not in entry.name):
                skipped.append(SkippedRecord(printable(path), "is a symbolic link, and links are not followed"))
            elif wanted(path):
                paths.append(path)
        folders += reversed(below)
    return paths, skipped


def is_visible_file(path: Path, folder: Path) -> bool:
    """Return whether a path is, or links to, a file inside the folder of which no part of the path is hidden."""
    if not path.is_file():  # before resolve, which raises an error on a link to itself
        return False
    real, root = path.resolve(), folder.resolve()
    return real.is_relative_to(root) and not any(part.startswith(".") for part in real.relative_to(root).parts)


def read_text(root: Path, path: str, *, max_bytes: int, setting: str = "") -> TextFile | SkippedRecord:
    """Read a UTF-8 file; `setting` is the setting that limits its size, for the message."""
    if printable(path) != path:
        return SkippedRecord(printable(path), "its name is not UTF-8; rename it")
    try:
        with _open_no_follow(root / path) as file:  # it may have become a link since its folder was read
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return SkippedRecord(path, "is not a regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        return SkippedRecord(path, f"cannot be read: {error.strerror}", unreadable=True)
    if len(data) > max_bytes:
        return SkippedRecord(path, f"is larger than {max_bytes:,} bytes" + (f" ({setting})" if setting else ""))
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        return SkippedRecord(f"{path}:{line}", "contains a null byte; save it as text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return SkippedRecord(f"{path}:{line}", f"is not UTF-8 ({error.reason}); save it as UTF-8")
    try:
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
    except (ValueError, OverflowError, OSError):
        modified = None
    return TextFile(path, text.replace("\r\n", "\n").replace("\r", "\n"), modified)


def read_texts(
    root: Path,
    wanted: Callable[[str], bool],
    *,
    max_bytes: int,
    ignored_folders: tuple[str, ...] = (),
    if_empty: str = "",
) -> Iterator[TextFile | SkippedRecord]:
    """Yield the wanted texts below a folder, except what git ignores.

    Args:
        if_empty: raise an error with this message if nothing is found. An unmounted disk looks like an empty folder,
            and must not retract everything.

    Raises:
        SourceError: the folder does not exist or cannot be read, or nothing was found.
    """
    try:
        next(root.iterdir(), None)
    except OSError as error:
        raise SourceError(f"{root} cannot be read as a folder ({error.strerror}); correct its path") from error
    paths, skipped = find_files(
        root, wanted, ignored_folder=lambda path: path.rpartition("/")[2] in ignored_folders, use_gitignore=True
    )
    found_any = False
    for one in chain(skipped, (read_text(root, path, max_bytes=max_bytes) for path in paths)):
        found_any = found_any or isinstance(one, TextFile) or not one.unreadable
        yield one
    if if_empty and not found_any:
        raise SourceError(f"{if_empty}; put it there, correct the path in the loop's YAML, or mount the disk again")


def printable(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _open_no_follow(path: Path) -> BinaryIO:
    """Open a file for reading, but not through a link, and without waiting for the writer of a pipe."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))


def _ignore_rules(root: Path, folder: str) -> list[_IgnoreRules]:
    """Return the rules that a folder adds: its .gitignore, and for the root .git/info/exclude."""
    names = [".gitignore"]
    if not folder and not (root / ".git").is_symlink() and not (root / ".git/info").is_symlink():
        names.insert(0, ".git/info/exclude")
    rules = []
    for name in names:
        try:
            with _open_no_follow(root / folder / name) as file:
                lines = file.read(_IGNORE_FILE_BYTES).decode("utf-8", "surrogateescape").split("\n")
        except OSError:
            continue
        valid = []
        for line in lines:
            with suppress(ValueError, re.error):  # git skips an invalid line too
                GitIgnoreSpec.from_lines([line])
                valid.append(line)
        rules.append((folder, GitIgnoreSpec.from_lines(valid)))
    return rules


def _is_git_ignored(path: str, rules: Sequence[_IgnoreRules]) -> bool:
    """Return whether git ignores a path: the nearest .gitignore with a matching pattern decides."""
    for folder, spec in reversed(rules):
        include = spec.check_file(path.removeprefix(folder)).include
        if include is not None:
            return include
    return False
