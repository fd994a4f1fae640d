"""Trains in several processes of this machine: one per GPU, or several on the CPU.

This does for a function what Accelerate's launcher does for a script: PyTorch's elastic launcher starts the processes,
and the Trainer's Accelerate joins them by NCCL (GPUs) or Gloo (CPU).
"""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from finetune_pipeline.subprocess_lifetime import die_with_parent
from finetune_pipeline.training import distributed
from finetune_pipeline.training.job import JobConfig, TrainingError
from finetune_pipeline.training.memory import RankOutOfMemory

_START_METHOD = "spawn"


def train(job: JobConfig, started: float) -> None:
    """Train in settings.num_processes processes, which end with this one.

    Raises:
        TrainingError: the job is impossible, or there are fewer GPUs than processes.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = job.settings.num_processes
    distributed.split_batch(job.settings, processes)  # raises if it cannot be split
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise TrainingError(
            f"num_processes is {processes}, but this machine has {gpus} GPU(s); set num_processes to {gpus}"
        )
    with tempfile.TemporaryDirectory(prefix="finetune-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=job.key,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,  # what fails on this machine would fail again; the next run resumes from the checkpoint
            start_method=_START_METHOD,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            refusals = elastic_launch(config, _rank)(os.getpid(), job.model_dump_json(), started)
        except ChildFailedError as error:
            raise TrainingError(_failure(error, Path(folder))) from error
    if reason := next(filter(None, refusals.values()), ""):
        raise TrainingError(reason)


def _rank(parent: int, job: str, started: float) -> str:
    import torch

    from finetune_pipeline.training.trainer import train_rank

    die_with_parent(parent)
    if not torch.cuda.is_available():  # Accelerate would number the device, and no checkpoint loads to "cpu:0"
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return train_rank(JobConfig.model_validate_json(job), started)


def _failure(error: "Exception", folder: Path) -> str:
    """Return why the ranks ended.

    A rank whose memory ran out ends the others too, and one of them may end first: their connection is closed. So the
    exceptions are read from the folder to which each rank writes its own before it ends.
    """
    prefix = f"{RankOutOfMemory.__name__}: "
    for path in sorted(folder.rglob("error.json")):
        with suppress(ValueError, KeyError, TypeError):  # a signal leaves a plain text, or half a file
            message = json.loads(path.read_text(encoding="utf-8"))["message"]["message"]
            if message.startswith(prefix):
                return str(message.removeprefix(prefix))
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    how, cause = f"status {failure.exitcode}", ""
    if failure.exitcode < 0:
        how = failure.signal_name()
    if "KILL" in how:
        cause = ", most likely because memory ran out: use a smaller per_device_train_batch_size or max_length"
    return f"rank {rank} ended with {how}{cause}; running it again resumes from the last checkpoint"
