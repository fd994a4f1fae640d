"""Which checkpoints are whole. A kill can come at any time, also in the middle of writing or of removing one.

A checkpoint counts from the moment when `complete.json` lies in it, written and renamed after everything else. It
names the job and the size of each file, so that a truncated file, or a checkpoint of other settings, is not used.
"""

import json
import shutil
from pathlib import Path

from finetune_pipeline.artifacts import flush, write_text

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path, job: str) -> None:
    """Flush a checkpoint's files and declare it whole."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in files:
        flush(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_text(checkpoint / COMPLETE, json.dumps({"job": job, "files": sizes}, indent=2) + "\n")


def is_complete(checkpoint: Path, job: str) -> bool:
    """Whether a checkpoint is whole and of this job."""
    try:
        marker = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return bool(marker["job"] == job) and all(
            (checkpoint / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def last_complete(folder: Path, job: str) -> Path | None:
    """The checkpoint with the most steps among the whole ones of this job; the others are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if is_complete(checkpoint, job):
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
