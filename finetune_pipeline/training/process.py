"""The training process and its surroundings: it has its folder alone, and says what memory it took."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetune_pipeline.training.job import CHECKPOINTS, TrainingError

# Weights and data are local; nothing is asked of, or told to, anybody.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait by spinning starve each other on busy cores: seen three times slower, and more, than asleep.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Variables of the environment that a training runs with, unless they are set already."""


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


def threads_each(cores: int, quota: float | None, processes: int) -> int:
    """Threads for each of several processes of one machine, so that all together they do not outnumber its cores.

    More would wait for each other: seen from outside, a container's quota is a share of the time of all cores, and
    torch starts a thread for every core that it sees.

    Args:
        cores: that a process here may run on.
        quota: cores' worth of time that a container allows, if it limits that.
        processes: that compute at the same time.
    """
    usable = cores if quota is None else min(cores, int(quota))
    return max(usable // processes, 1)


def usable_cores() -> int:
    """Cores that this process may run on; of those that two threads share, one."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that this process's control group and those above it allow (Linux); None for no limit.

    Args:
        root: where control groups of version 2 are mounted.
        own: says in which one this process is.
    """
    try:
        group = next(line for line in own.read_text().splitlines() if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):  # not Linux, or version 1 alone
        return None
    quotas = []
    for folder in [root / group, *(root / group).parents]:
        try:
            allowed, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(allowed) / int(period))
        except (OSError, ValueError):  # the topmost group has none, or it is "max"
            continue
    return min(quotas, default=None)


def peak_resident_bytes() -> int:
    """The most main memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
