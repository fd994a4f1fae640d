"""The training process and its surroundings: it dies with its parent, and has its folder alone."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetune_pipeline.training.job import CHECKPOINTS, TrainingError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Make this process end when the one that started it ends, however that happens.

    On Linux the kernel sees to it, and the signal belongs to the parent's *thread*: start trainings from a thread that
    lives as long. Elsewhere a thread looks once a second.

    Args:
        parent: process id of the parent, which may be gone already: then this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it had gone before the kernel was asked
        raise SystemExit(f"the process {parent} that started this training is gone")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def folder_alone(output: Path) -> Iterator[None]:
    """Hold a training's folder; the lock goes with the process, and its file with the checkpoints.

    Raises:
        TrainingError: another training writes there.
    """
    folder = output / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "training.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(f"another training is writing to {output} now; wait until it has finished") from None
    try:
        yield
    finally:
        lock.release()


def peak_resident_bytes() -> int:
    """The most main memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
