"""Find and read the files of a folder. Hidden files are left out, and nothing outside the folder is read."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pathspec import GitIgnoreSpec

from finetune_pipeline.sources.source_record import SkippedRecord, SourceError

_IGNORE_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class TextFile:
    r"""The text of a file.

    Attributes:
        path: relative to the folder, with slashes.
        text: with `\n` as the only line break.
        modified: time of the last change, in UTC; None if the file system has an impossible one.
    """

    path: str
    text: str
    modified: datetime | None


@dataclass(frozen=True)
class _IgnoreRules:
    """The .gitignore of a folder, which applies to paths below it."""

    folder: str
    spec: GitIgnoreSpec


def find_files(
    root: Path,
    wanted: Callable[[str], bool],
    *,
    ignored_folder: Callable[[str], bool] = lambda path: False,
    use_gitignore: bool = False,
    inner_links: bool = False,
) -> Iterator[str | SkippedRecord]:
    """Yield the paths of wanted files, relative to the root, in a fixed order, and what cannot be read.

    Args:
        wanted: returns whether to read a file, from its name.
        ignored_folder: returns whether to leave out a folder, from its path.
        use_gitignore: leave out what the folder's own .gitignore files exclude. Git itself is not run, since a
            repository's configuration can make git run commands.
        inner_links: follow symbolic links to files that are inside the root and not hidden, and leave out all other
            links without a word. By default links are not followed but reported.
    """
    folders: list[tuple[str, tuple[_IgnoreRules, ...]]] = [("", ())]
    while folders:
        folder, rules = folders.pop()
        if use_gitignore:
            rules = (*rules, *_ignore_rules(root, folder))
        try:
            with os.scandir(root / folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder cannot be read: {error.strerror}"
            yield SkippedRecord(printable(folder).rstrip("/"), reason, unreadable=True)
            continue
        below: list[tuple[str, tuple[_IgnoreRules, ...]]] = []
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            path = f"{folder}{entry.name}/" if is_folder else f"{folder}{entry.name}"
            if entry.name.startswith(".") or _is_git_ignored(path, rules):
                continue
            if (is_folder or entry.is_symlink()) and ignored_folder(path.rstrip("/")):
                continue
            if is_folder:
                below.append((path, rules))
            elif entry.is_symlink() and inner_links:
                try:
                    if wanted(entry.name) and is_visible_file(root / path, root):
                        yield path
                except OSError as error:  # the link leads into a folder that cannot be read
                    yield SkippedRecord(printable(path), f"cannot be read: {error.strerror}", unreadable=True)
            # A link without an extension may lead to a folder of wanted files.
            elif entry.is_symlink() and (wanted(entry.name) or "." not in entry.name):
                yield SkippedRecord(printable(path), "is a symbolic link, and links are not followed")
            elif wanted(entry.name):
                yield path
        folders += reversed(below)


def is_visible_file(path: Path, folder: Path) -> bool:
    """Return whether a path is, or links to, a file inside the folder of which no part of the path is hidden."""
    if not path.is_file():  # before resolve, which raises an error on a link to itself
        return False
    real, root = path.resolve(), folder.resolve()
    return real.is_relative_to(root) and not any(part.startswith(".") for part in real.relative_to(root).parts)


def read_text(root: Path, path: str, *, max_bytes: int, setting: str = "") -> TextFile | SkippedRecord:
    """Read a UTF-8 file.

    Args:
        setting: name of the setting that limits the size, for the message.
    """
    if printable(path) != path:
        return SkippedRecord(printable(path), "its name is not UTF-8; rename it")
    try:
        # The file may have become a link since its folder was read (NOFOLLOW), or a pipe without a writer (NONBLOCK).
        descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
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
    root: Path, wanted: Callable[[str], bool], ignored_folders: tuple[str, ...] = (), *, max_bytes: int
) -> Iterator[TextFile | SkippedRecord]:
    """Yield the wanted texts below a folder, except what git ignores.

    Raises:
        SourceError: the folder does not exist or cannot be read.
    """
    try:
        next(root.iterdir(), None)
    except OSError as error:
        raise SourceError(f"{root} cannot be read as a folder ({error.strerror}); correct its path") from error

    def is_ignored(path: str) -> bool:
        return path.rpartition("/")[2] in ignored_folders

    for found in find_files(root, wanted, ignored_folder=is_ignored, use_gitignore=True):
        yield found if isinstance(found, SkippedRecord) else read_text(root, found, max_bytes=max_bytes)


def require_any(found: Iterator[TextFile | SkippedRecord], message: str) -> Iterator[TextFile | SkippedRecord]:
    """Yield what was found, and raise an error if it was nothing.

    An unmounted disk looks like an empty folder, and must not retract everything.

    Args:
        message: what was expected, and where.

    Raises:
        SourceError: nothing was found.
    """
    found_any = False
    for one in found:
        found_any = found_any or isinstance(one, TextFile) or not one.unreadable
        yield one
    if not found_any:
        raise SourceError(f"{message}; put it there, correct the path in the loop's YAML, or mount the disk again")


def printable(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _ignore_rules(root: Path, folder: str) -> list[_IgnoreRules]:
    """Return the rules that a folder adds: its .gitignore, and for the root .git/info/exclude."""
    names = [".gitignore"]
    if not folder and not (root / ".git").is_symlink() and not (root / ".git/info").is_symlink():
        names.insert(0, ".git/info/exclude")
    rules = []
    for name in names:
        try:
            descriptor = os.open(root / folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                lines = file.read(_IGNORE_FILE_BYTES).decode("utf-8", "surrogateescape").splitlines()
        except OSError:
            continue
        rules.append(_IgnoreRules(folder, GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))))
    return rules


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False  # git skips such a line too
    return True


def _is_git_ignored(path: str, rules: tuple[_IgnoreRules, ...]) -> bool:
    """Return whether git ignores a path: the nearest .gitignore with a matching pattern decides."""
    for one in reversed(rules):
        include = one.spec.check_file(path.removeprefix(one.folder)).include
        if include is not None:
            return include
    return False
