"""Progress as JSON lines, which the caller, the API and the terminal follow in one file.

The file only grows. After a resume, the steps since the checkpoint are in it twice; the last line of a step counts.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from finetune_pipeline.training.job import Progress, TrainingError

PROGRESS = "progress.jsonl"
VALIDATION_LOSS = "validation_loss"
"""Key of the validation loss in the Trainer's log history."""


def append_progress(path: Path, progress: Progress) -> None:
    """Append a line in a single write, so that a kill leaves no half of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (progress.model_dump_json() + "\n").encode())
    finally:
        os.close(descriptor)


class LineReader:
    """Reads complete lines that are appended to a file after the reader was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[bytes]:
        """Return the complete lines since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(lines) + len(newline)
        return lines.split(b"\n") if newline else []


def read_progress(lines: LineReader) -> Iterator[Progress]:
    """Yield the progress since the last call; skip lines that are not valid."""
    for line in lines.read():
        try:
            yield Progress.model_validate_json(line)
        except ValidationError:
            continue


def check_finite(loss: float, step: int) -> None:
    """Raise TrainingError if a loss is NaN or infinite: the training has diverged."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: the training diverged and its weights are useless; lower "
            "learning_rate (a tenth of it is a good try), or set bf16 to false"
        )
