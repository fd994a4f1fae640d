"""The training process and its surroundings: it has its folder alone, and says what memory it took."""

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


def peak_resident_bytes() -> int:
    """The most main memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
