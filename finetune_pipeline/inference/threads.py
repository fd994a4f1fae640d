"""How many threads decode, how they wait for each other, and what else uses the cores.

Decoding is hundreds of steps a token, and after each step the threads wait for each other. When another process has one
of the cores, the others wait for the thread that does not run: spinning, they take the time from that very thread.
"""

import os
import time
from contextlib import suppress

import psutil

SMALL_MODEL = 100_000_000
"""Parameters below which one thread is used: waiting for each other costs the threads more than their work."""

SPIN_COUNT = 700
"""How often a thread looks whether the others are done before it sleeps (GOMP_SPINCOUNT of libgomp).

libgomp's default is 300,000: a token takes ten times as long on busy cores. With OMP_WAIT_POLICY=PASSIVE it is 0, and
waking up costs more than half of the speed on quiet ones.
"""


def choose_threads(n_params: int) -> int:
    """Return one thread for a small model, for others one for each physical core that this process may use."""
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
