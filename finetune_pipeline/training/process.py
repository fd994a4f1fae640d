"""The training process: its environment variables, and the lock on its output folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetune_pipeline.training.job import CHECKPOINTS, TrainingError

# Weights and data are local; nothing is downloaded or reported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait starve each other on busy cores: three times slower was measured.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables of a training, unless they are set already."""


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Lock a training's output folder; the lock ends with the process, and its file goes with the checkpoints.

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
