"""One training in several processes: which of them this one is, and what each does for the others.

The processes are started by accelerated.py (one machine) or ray_cluster.py (many), which set RANK and WORLD_SIZE as
PyTorch wants them; Hugging Face's Trainer and Accelerate find each other by the same. A process alone is a team of one.
"""

import os
from collections.abc import Callable
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import JobConfig, TrainingError
from finetune_pipeline.training.memory import out_of_memory, ran_out, with_micro_batch

_keepers: list[Callable[[Path], None]] = []


def size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes progress, checkpoints and the result."""
    return int(os.environ.get("RANK", 0)) == 0


def device_index() -> int:
    """Which of this machine's GPUs is this process's own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def wait() -> None:
    """Return when every process of the team has come here."""
    if size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def first_says(decide: Callable[[], bool]) -> bool:
    """What the first process decides, told to every process of the team."""
    answer = [is_first() and decide()]
    if size() > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def first_then_others(action: Callable[[], Path | None]) -> Path | None:
    """Run an action that may remove files in the first process, and then, when it has, in the others."""
    if not is_first():
        wait()
    found = action()
    if is_first():
        wait()
    return found


def split_batch(settings: TrainingSettings, processes: int) -> TrainingSettings:
    """Split the global batch across ranks, so that an update has the same examples whatever their number.

    The global batch is per_device_train_batch_size x gradient_accumulation_steps. No device gets more at once than
    per_device_train_batch_size, the micro-batch that fits its memory.

    Args:
        settings: of the whole training.
        processes: number of ranks.

    Returns:
        The settings with the batch size and accumulation steps of one rank.

    Raises:
        TrainingError: the global batch cannot be split evenly.
    """
    examples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    each, left = divmod(examples, processes)
    if left or not each:
        divisors = ", ".join(str(n) for n in range(1, examples + 1) if examples % n == 0)
        raise TrainingError(
            f"a batch of per_device_train_batch_size {settings.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {settings.gradient_accumulation_steps} = {examples} examples cannot be split "
            f"evenly across {processes} processes; set num_processes to one of {divisors}, or change "
            "gradient_accumulation_steps"
        )
    micro_batch = max(n for n in range(1, settings.per_device_train_batch_size + 1) if each % n == 0)
    return with_micro_batch(settings, micro_batch, each)


def keep_checkpoints(keeper: Callable[[Path], None]) -> None:
    """Have each whole checkpoint of this process brought to a safe place: `keeper` gets its folder."""
    _keepers.append(keeper)


def checkpoint_is_whole(folder: Path) -> None:
    """Tell who keeps checkpoints that one is written, in every process of the team."""
    for keeper in _keepers:
        keeper(folder)


class MemoryRanOutHere(Exception):
    """One process of the team has too little memory. It has to end by this: the others wait for it."""


def take_part(job: JobConfig, started: float) -> str:
    """Do this process's part of a training.

    Returns:
        Why the training cannot be done as it was asked for, as every process of the team finds; empty when it is done.

    Raises:
        MemoryRanOutHere: in this process, perhaps in no other; the message says what to do.
    """
    from finetune_pipeline.training.trainer import run_training

    try:
        run_training(job, started)
    except TrainingError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or ["MemoryError"])[0]
        micro_batch = split_batch(job.settings, size()).per_device_train_batch_size
        raise MemoryRanOutHere(ran_out(job.settings, micro_batch, said)) from error
    return ""
