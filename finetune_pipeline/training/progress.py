"""Progress as JSON lines, appended and flushed: one file that the caller, the API and the terminal all follow.

The file only grows. After a resumption the steps since the last checkpoint stand in it twice, and the last line of a
step is the one that counts.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from finetune_pipeline.training.job import Progress

PROGRESS = "progress.jsonl"


def append(path: Path, progress: Progress) -> None:
    """Add one line, in one write, so that a kill leaves no half of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (progress.model_dump_json() + "\n").encode())
    finally:
        os.close(descriptor)


class Follower:
    """Reads the lines that are added to a progress file after the follower was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[Progress]:
        """The whole lines added since the last call; what cannot be read is passed over."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole, _, _ = added.rpartition(b"\n")
        self._offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            try:
                yield Progress.model_validate_json(line)
            except ValidationError:
                continue
