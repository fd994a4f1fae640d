"""How many threads decode: as many as there are cores that nobody else uses.

Decoding is hundreds of steps a token, and at the end of each step the threads wait for each other. When another process
has one of the cores, all of them wait for the one that does not run, and a token takes ten times as long; one thread
less takes what is left instead. The number of threads does not change the logits.
"""

import os
import time
from contextlib import suppress

import psutil

SMALL_MODEL = 100_000_000
"""Parameters below which one thread is used: waiting for each other costs the threads more than their work."""

SPIN_COUNT = 1000
"""How often a thread looks whether the others are done before it sleeps (GOMP_SPINCOUNT of libgomp).

libgomp's default looks 300,000 times, which takes the time from the very thread that it waits for when cores are short;
its PASSIVE sleeps at once, and waking up halves the speed when they are not.
"""

LOOK_SECONDS = 0.25


def most_threads(n_params: int) -> int:
    """One thread for a small model, all physical cores that this process may use for others."""
    if n_params < SMALL_MODEL:
        return 1
    return max(1, min(psutil.cpu_count(logical=False) or len(allowed_cores()), len(allowed_cores())))


def allowed_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class OtherWork:
    """How many of the cores that this process may use are used by others, since it was last asked.

    Args:
        children: this process's children are none of the others.
    """

    def __init__(self, *, children: bool = False) -> None:
        self._cores = allowed_cores()
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
        most: on a quiet machine.
        steady: always that many: what is timed side by side has to be timed under the same conditions.
    """

    def __init__(self, most: int, *, steady: bool) -> None:
        self.most = most
        self.now = most
        self._adapts = most > 1 and not steady
        self._others = OtherWork()
        self._looked = time.monotonic()

    def look(self) -> int:
        """Return how many threads to use; looks at the machine four times a second."""
        if self._adapts and time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            self.now = threads_for(len(allowed_cores()), self._others.since_last(), self.most)
        return self.now


def threads_for(cores: int, others: float, most: int) -> int:
    """Return how many threads find a core of their own while others use so many."""
    return max(1, min(most, round(cores - others)))
