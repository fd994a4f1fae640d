"""Files of releases in a folder that a server or a person reads: complete and of a known content, or absent."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_pipeline.artifacts import flush, hash_file, hash_file_cached
from finetune_pipeline.deployment.target import TargetError, TargetRefused

PART = ".part"
"""End of the name of a file that is not complete; its name begins with a dot."""

_NUMBERS = 10


def put_file(source: Path, sha256: str, folder: Path, stem: str, suffix: str) -> Path:
    """Return a file in a folder with the content of `source`, made if none has it.

    A file that exists is never written to, since a server may have it open: if `stem` + `suffix` has another content,
    the new file is `stem-2`, and so on. The source is linked if both are on one disk, else copied.

    Raises:
        TargetRefused: the source has not the expected content; nothing was written.
        TargetError: the folder cannot be written, or its disk is full.
    """
    free = None
    names = (f"{stem}{f'-{number}' if number > 1 else ''}{suffix}" for number in range(1, _NUMBERS))
    for path in (folder / name for name in names):
        if not path.exists():
            free = free or path
        elif path.is_file() and hash_file_cached(path) == sha256:
            return path
    path = free or folder / f"{stem}-{sha256[:12]}{suffix}"
    part = folder / f".{path.name}.{os.getpid()}{PART}"
    with writing(folder):
        try:
            link_or_copy(source, part)
            found = hash_file(part)
            if found != sha256:
                raise TargetRefused(
                    f"{source} is damaged or was replaced: its SHA-256 is {found[:16]}..., expected {sha256[:16]}... "
                    "of the evaluated file; nothing was deployed. Restore it, or train again"
                )
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        flush(folder)
    return path


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name, or copy it if that is not possible; a copy is flushed to the disk."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another disk, or a file system without hard links
        os.link(source.resolve(), path)
        return
    shutil.copyfile(source, path)
    flush(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create a folder, and turn the errors of writing in it into a TargetError.

    Raises:
        TargetError: the folder cannot be written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(folder).free / 1e6
            raise TargetError(
                f"the disk of {folder} is full ({free:.1f} MB free); nothing was changed there. Free some space, or "
                "lower the target's keep"
            ) from error
        raise TargetError(f"{folder} cannot be written ({error}); correct the target's folder or its rights") from error
