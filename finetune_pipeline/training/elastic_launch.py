"""Several processes of one machine train together: one for each GPU, or several on the CPU.

What Accelerate's own launcher does for a script, done here for a function: PyTorch's elastic launcher starts the
processes, and the Trainer's Accelerate joins them by NCCL (GPUs) or Gloo (CPU).
"""

import os

from finetune_pipeline.subprocess_lifetime import die_with_parent
from finetune_pipeline.training import distributed
from finetune_pipeline.training.job import JobConfig, TrainingError


def train(job: JobConfig, started: float) -> None:
    """Train in settings.num_processes processes, which end with this one.

    Args:
        job: what to train.
        started: time.monotonic() at which this process began.

    Raises:
        TrainingError: the job is impossible, or there are fewer GPUs than processes.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = job.settings.num_processes
    distributed.split_batch(job.settings, processes)
    _check_devices(processes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=job.key,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # a process that failed on this machine fails again; the next run goes on from the checkpoint
        start_method="spawn",
    )
    try:
        refusals = elastic_launch(config, _member)(os.getpid(), job.model_dump_json(), started)
    except ChildFailedError as error:
        raise TrainingError(_failure(error)) from error
    if reason := next(filter(None, refusals.values()), ""):
        raise TrainingError(reason)


def _member(parent: int, job: str, started: float) -> str:
    import torch

    die_with_parent(parent)
    if not torch.cuda.is_available():  # Accelerate would number it, and no checkpoint can be loaded to "cpu:0"
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return distributed.take_part(JobConfig.model_validate_json(job), started)


def _check_devices(processes: int) -> None:
    import torch

    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        raise TrainingError(
            f"num_processes is {processes}, but this machine has {devices} GPU(s); set num_processes to {devices}"
        )


def _failure(error: "Exception") -> str:
    # An exception leaves what it said; a signal leaves a plain text. Others may fail because the first one did.
    failures = error.failures.values()  # type: ignore[attr-defined]  # torch is untyped here
    said = [failure.message["message"] for failure in failures if isinstance(failure.message, dict)]
    mark = f"{distributed.MemoryRanOutHere.__name__}: "
    if ran_out := next((words for words in said if words.startswith(mark)), ""):
        return str(ran_out.removeprefix(mark))
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    how = failure.signal_name() if failure.exitcode < 0 else f"status {failure.exitcode}"
    cause = (
        ", most likely because memory ran out: use a smaller per_device_train_batch_size or max_length"
        if "KILL" in how
        else ""
    )
    return f"worker {rank} ended with {how}{cause}; running it again goes on from the last checkpoint"
