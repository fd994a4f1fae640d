"""The number of decoding threads: as many as there are cores without other work.

Decoding a token takes hundreds of steps, and the threads wait for each other at the end of each. When another process
uses one of the cores, all threads wait for the one that is not running, and a token takes ten times as long. With one
thread less, every thread has a core. The number of threads does not change the logits.
"""

import os
import time
from contextlib import suppress

import psutil

SMALL_MODEL = 100_000_000
"""Parameters below which one thread is used: with more, waiting for each other costs more than the work."""

SPIN_COUNT = 1000
"""How often a thread polls before it sleeps (GOMP_SPINCOUNT of libgomp).

libgomp's default of 300,000 takes CPU time from the thread that it waits for when there are fewer free cores than
threads. Its PASSIVE sleeps at once, and waking up halves the speed when there are enough.
"""

LOOK_SECONDS = 0.25


def most_threads(n_params: int) -> int:
    """Return 1 for a small model, for others the number of physical cores that this process may use."""
    if n_params < SMALL_MODEL:
        return 1
    return max(1, min(psutil.cpu_count(logical=False) or len(available_cores()), len(available_cores())))


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class BackgroundLoad:
    """Measures how many of the cores that this process may use are used by others.

    Args:
        children: count the children of this process as its own work.
    """

    def __init__(self, *, children: bool = False) -> None:
        self._cores = available_cores()
        self._children = children
        self._before = self._read()

    def since_last(self) -> float:
        """Return the average number of cores that others used since the last call."""
        before, self._before = self._before, self._read()
        wall, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        cores = psutil.cpu_times(percpu=True)
        busy = sum(sum(cores[core]) - _idle(cores[core]) for core in self._cores if core < len(cores))
        return time.monotonic(), busy, time.process_time() + (_children_seconds() if self._children else 0.0)


def _children_seconds() -> float:
    seconds = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended a moment ago
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def _idle(core: object) -> float:
    # `guest` is part of `user` already.
    names = ("idle", "iowait", "guest", "guest_nice")
    return sum(getattr(core, name, 0.0) for name in names)


class Threads:
    """The number of threads to decode with now.

    Args:
        most: the number on a quiet machine.
        fixed: use that number always, as models that are timed side by side need the same conditions.
    """

    def __init__(self, most: int, *, fixed: bool) -> None:
        self.most = most
        self.now = most
        self._adapts = most > 1 and not fixed
        self._others = BackgroundLoad()
        self._looked = time.monotonic()

    def look(self) -> int:
        """Return how many threads to use; measures the other work at most four times a second."""
        if self._adapts and time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            self.now = threads_for(len(available_cores()), self._others.since_last(), self.most)
        return self.now


def threads_for(cores: int, others: float, most: int) -> int:
    """Return how many threads get a core of their own while others use this many cores."""
    return max(1, min(most, round(cores - others)))
