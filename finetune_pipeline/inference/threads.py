"""The number of decoding threads: one for each core that no other process uses.

Decoding a token takes hundreds of steps, and the threads wait for each other after each step. When another process uses
one of the cores, all threads wait for the one that does not run, and a token takes ten times as long. With one thread
less, every thread has a core. The number of threads does not change the logits.
"""

import os
import time
from contextlib import suppress

import psutil

SMALL_MODEL = 100_000_000
"""Models with fewer parameters compute a single token with one thread: synchronization would cost more than the
computation. Several tokens, of a prompt or of several requests, are worth it for them too."""

MEASURE_SECONDS = 0.25


def most_threads() -> int:
    """Return the number of physical cores that this process may use."""
    return max(1, min(psutil.cpu_count(logical=False) or len(available_cores()), len(available_cores())))


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class BackgroundLoad:
    """Measures how many of the available cores other processes use.

    Args:
        children: do not count the children of this process as others.
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
        not_busy = ("idle", "iowait", "guest", "guest_nice")  # guest time is also counted as user time
        busy = sum(
            sum(cores[core]) - sum(getattr(cores[core], name, 0.0) for name in not_busy)
            for core in self._cores
            if core < len(cores)
        )
        own = time.process_time()
        for child in psutil.Process().children(recursive=True) if self._children else []:
            with suppress(psutil.Error):  # it has just ended
                times = child.cpu_times()
                own += times.user + times.system
        return time.monotonic(), busy, own


class Threads:
    """The current number of decoding threads.

    Args:
        most: the number on an idle machine.
        fixed: always use that number, as models that are timed against each other need equal conditions.
    """

    def __init__(self, most: int, *, fixed: bool) -> None:
        self.most = most
        self.now = most
        self._adapts = most > 1 and not fixed
        self._load = BackgroundLoad()
        self._measured = time.monotonic()

    def update(self) -> int:
        """Return how many threads to use; measures the background load at most four times a second."""
        if self._adapts and time.monotonic() >= self._measured + MEASURE_SECONDS:
            self._measured = time.monotonic()
            self.now = threads_for(len(available_cores()), self._load.since_last(), self.most)
        return self.now


def threads_for(cores: int, used_by_others: float, most: int) -> int:
    """Return how many threads get their own core."""
    return max(1, min(most, round(cores - used_by_others)))
