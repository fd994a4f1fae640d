"""Helpers for training in several processes: which rank this is, and what ranks do together.

elastic_launch.py (one machine) or ray_cluster.py (several) starts the processes and sets RANK and WORLD_SIZE, by which
Hugging Face's Trainer and Accelerate find each other too. A single process is rank 0 of 1.
"""

import os
from collections.abc import Callable
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.memory import with_micro_batch


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero() -> bool:
    """Return whether this process writes progress, checkpoints and the result."""
    return int(os.environ.get("RANK", 0)) == 0


def local_rank() -> int:
    """Return the index of this process's GPU on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def decided_by_rank_zero(decide: Callable[[], bool]) -> bool:
    """Return to every rank what rank 0 decides."""
    decision = [is_rank_zero() and decide()]
    if world_size() > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def rank_zero_first(action: Callable[[], Path | None]) -> Path | None:
    """Run an action that may remove files on rank 0, and afterwards on the other ranks."""
    if not is_rank_zero():
        barrier()
    result = action()
    if is_rank_zero():
        barrier()
    return result


def split_batch(settings: TrainingSettings, processes: int) -> TrainingSettings:
    """Split the global batch across ranks, so that an update has the same examples whatever their number.

    The global batch is per_device_train_batch_size x gradient_accumulation_steps. No device gets more at once than
    per_device_train_batch_size, the micro-batch that fits its memory.

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
