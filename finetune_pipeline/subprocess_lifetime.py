"""Child processes that end with their parent: training, export steps, and model processes.

`python -m finetune_pipeline.subprocess_lifetime PARENT_PID COMMAND ...` runs any command that way (on Linux).
"""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """End this process when its parent ends, even if the parent is killed.

    On Linux the kernel sends the signal when the parent's *thread* ends, so start children from a thread that lives as
    long as they should. On other systems a thread checks the parent once a second.

    Args:
        parent: process id of the parent. If the parent has already ended, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before prctl was called
        raise SystemExit(f"the parent process {parent} has ended")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # the parent-death signal survives exec
