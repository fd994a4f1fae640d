"""Child processes that do not outlive their parent: training, export steps, and every model that runs.

`python -m finetune_pipeline.subprocess_lifetime PARENT COMMAND ...` runs any command so (on Linux).
"""

import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Make this process end when the one that started it ends, however that happens.

    On Linux the kernel sees to it, and the signal belongs to the parent's *thread*: start children from a thread that
    lives as long. Elsewhere a thread looks once a second.

    Args:
        parent: process id of the parent, which may be gone already: then this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it had gone before the kernel was asked
        raise SystemExit(f"the process {parent} that started this one is gone")


def die_with_run() -> None:
    """Make a step's process end with the run that started it; a step in the run's own process stays as it is.

    Dagster's step processes outlive a run that is killed, and with them the training that they watch. Their parent may
    be a fork server, which is no help: it waits for the steps that it made before it ends with the run.
    """
    run = multiprocessing.parent_process()
    if run is not None:
        threading.Thread(target=_end_with, args=(run,), daemon=True).start()
        die_with_parent(os.getppid())


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # the kernel keeps the tie
