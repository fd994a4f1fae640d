"""Complete checkpoints. A kill can come at any time, also while one is being written or removed.

A checkpoint is complete once it has a `complete.json`, which is written and renamed after everything else. It names the
job and the size of each file, so a truncated file, or a checkpoint of other settings, is not used.
"""

import json
import shutil
from pathlib import Path

from finetune_pipeline.artifacts import flush, write_text

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path, job: str) -> None:
    """Flush a checkpoint's files to disk, then write its `complete.json`."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in files:
        flush(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_text(checkpoint / COMPLETE, json.dumps({"job": job, "files": sizes}, indent=2) + "\n")


def is_complete(checkpoint: Path, job: str) -> bool:
    """Return whether a checkpoint is complete and of this job."""
    try:
        marker = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return bool(marker["job"] == job) and all(
            (checkpoint / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def last_complete(folder: Path, job: str) -> Path | None:
    """Return the latest complete checkpoint of this job; remove those that are incomplete or of another job."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if is_complete(checkpoint, job):
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
