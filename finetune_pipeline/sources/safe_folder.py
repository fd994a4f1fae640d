"""The texts of a folder: never outside it, not what is hidden, not what git ignores; links are not followed."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from finetune_pipeline.sources.source_record import SkippedRecord, SourceError

_IGNORE_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class TextFile:
    """A file's text, lines ended by a line source alone."""

    path: str
    """From the folder on, with slashes."""
    text: str


@dataclass(frozen=True)
class _Rules:
    """The .gitignore of a folder: what it says of a path below it."""

    folder: str
    spec: GitIgnoreSpec


def texts(
    root: Path, wanted: Callable[[str], bool], ignore: tuple[str, ...] = (), *, max_bytes: int
) -> Iterator[TextFile | SkippedRecord]:
    """The UTF-8 texts under a folder in the order of their names, and what of the wanted ones cannot be read.

    What git ignores is judged by the .gitignore files of the folder itself, in git's order of precedence. Git is not
    asked, since a repository's own configuration can make git run commands.

    Args:
        wanted: tells by a file's name whether it is read.
        ignore: names of folders that are left out.
        max_bytes: larger files are left out.

    Raises:
        SourceError: the folder is not there or cannot be read.
    """
    try:
        next(root.iterdir(), None)
    except OSError as error:
        raise SourceError(f"{root} cannot be read as a folder ({error.strerror}); correct its path") from error
    folders: list[tuple[str, tuple[_Rules, ...]]] = [("", ())]
    while folders:
        folder, rules = folders.pop()
        rules = (*rules, *_rules(root, folder))
        below: list[tuple[str, tuple[_Rules, ...]]] = []
        for found in _entries(root, folder, rules, wanted, ignore):
            if isinstance(found, SkippedRecord):
                yield found
            elif found.endswith("/"):
                below.append((found, rules))
            else:
                yield _text(root, found, max_bytes)
        folders += reversed(below)


def some(found: Iterator[TextFile | SkippedRecord], nothing: str) -> Iterator[TextFile | SkippedRecord]:
    """What was found, and an error behind it where there was nothing to be found.

    A disk that is not mounted looks like an empty folder, and must not retract everything.

    Raises:
        SourceError: there was nothing; `nothing` says what was looked for, and where.
    """
    there = False
    for one in found:
        there = there or isinstance(one, TextFile) or not one.unreadable
        yield one
    if not there:
        raise SourceError(f"{nothing}; put it there, correct the path in the loop's YAML, or bring the disk back")


def _entries(
    root: Path, folder: str, rules: tuple[_Rules, ...], wanted: Callable[[str], bool], ignore: tuple[str, ...]
) -> Iterator[str | SkippedRecord]:
    """What of one folder is read: paths of files, and of folders with a slash behind."""
    try:
        with os.scandir(root / folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        yield SkippedRecord(_shown(folder).rstrip("/"), f"the folder cannot be read: {error.strerror}", unreadable=True)
        return
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        path = f"{folder}{entry.name}/" if is_folder else f"{folder}{entry.name}"
        of_use = entry.name not in ignore if is_folder else wanted(entry.name)
        link = entry.is_symlink() and (of_use or "." not in entry.name)
        if entry.name.startswith(".") or not (of_use or link) or _ignored(path, rules):
            continue
        if link:
            yield SkippedRecord(_shown(path), "is a symbolic link, and links are not followed")
        elif _shown(path) != path:
            yield SkippedRecord(_shown(path), "its name is not UTF-8; rename it")
        elif is_folder or entry.is_file(follow_symlinks=False):
            yield path


def _text(root: Path, path: str, max_bytes: int) -> TextFile | SkippedRecord:
    try:
        # A link that came in place of the file since its folder was read is not followed either.
        with os.fdopen(os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        return SkippedRecord(path, f"cannot be read: {error.strerror}", unreadable=True)
    if len(data) > max_bytes:
        return SkippedRecord(path, f"is larger than {max_bytes:,} bytes")
    if (at := data.find(b"\0")) >= 0:
        return SkippedRecord(f"{path}:{_line(data, at)}", "holds a null byte, which no text has")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return SkippedRecord(f"{path}:{_line(data, error.start)}", f"is not UTF-8: {error.reason}")
    return TextFile(path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _rules(root: Path, folder: str) -> list[_Rules]:
    own = [] if folder or (root / ".git").is_symlink() or (root / ".git/info").is_symlink() else [".git/info/exclude"]
    names = [*own, ".gitignore"]
    return [_Rules(folder, spec) for name in names if (spec := _spec(root / folder / name)) is not None]


def _spec(path: Path) -> GitIgnoreSpec | None:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            lines = file.read(_IGNORE_FILE_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    return GitIgnoreSpec.from_lines(line for line in lines if _understood(line))


def _understood(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False  # git takes no notice of such a line either
    return True


def _ignored(path: str, rules: tuple[_Rules, ...]) -> bool:
    """Whether git ignores it: the last word is that of the nearest .gitignore that says anything of it."""
    for one in reversed(rules):
        include = one.spec.check_file(path.removeprefix(one.folder)).include
        if include is not None:
            return include
    return False
