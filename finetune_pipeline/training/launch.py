"""Start a training as a child process, follow it, and say in words why it failed if it did."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from finetune_pipeline.artifacts import disk_full, is_disk_full_message, write_text
from finetune_pipeline.training.backends import choose
from finetune_pipeline.training.base_model import check_base_model
from finetune_pipeline.training.job import (
    CHECKPOINTS,
    JOB,
    LOG,
    REFUSAL,
    REFUSED,
    JobConfig,
    Progress,
    TrainingFailed,
    TrainingResult,
    finished,
)
from finetune_pipeline.training.progress import PROGRESS, Follower
from finetune_pipeline.training.trackers import check_trackers

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_LOG_LINES = 15
_NO_CAUSE = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes says so in every QLoRA on a CPU, and goes on


def train(job: JobConfig, on_progress: Callable[[Progress], None] = lambda _: None) -> TrainingResult:
    """Train in a process of its own and return its result; blocks until it is there.

    Run again with the same job after a failure or a kill, it goes on from the last checkpoint; a job whose result lies
    there already returns it at once. The process dies with the calling thread: call it from the main one.

    Args:
        job: what to train.
        on_progress: called with each new line of progress, about once a second at most.

    Raises:
        TrainingError: the base model cannot be trained, not by this backend here, or a tracker is not installed;
            nothing was started.
        TrainingFailed: the process ended without a result.
    """
    check_base_model(job.base_model)
    check_trackers(job.settings)
    result = finished(job)
    if result is not None:
        shutil.rmtree(job.output / CHECKPOINTS, ignore_errors=True)  # of one that was killed after it had its result
        return result
    choose(job.settings).backend.validate(job.settings)
    job.output.mkdir(parents=True, exist_ok=True)
    write_text(job.output / JOB, job.model_dump_json(indent=2) + "\n")
    follower = Follower(job.output / PROGRESS)
    with (job.output / LOG).open("ab") as log:
        before = log.tell()  # what earlier attempts said lies there too
        process = subprocess.Popen(_command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            _follow(process, follower, on_progress)
        finally:
            _stop(process)
    result = finished(job) if process.returncode == 0 else None
    if result is None:
        raise TrainingFailed(_failure(process.returncode, job, before))
    return result


def _command(job: JobConfig) -> list[str]:
    # -u: the log's last lines must be there when a signal ends the process.
    module = "finetune_pipeline.training"
    return [sys.executable, "-u", "-m", module, str(job.output / JOB), "--parent", str(os.getpid())]


def _follow(process: "subprocess.Popen[bytes]", follower: Follower, on_progress: Callable[[Progress], None]) -> None:
    while process.poll() is None:
        for progress in follower.read():
            on_progress(progress)
        time.sleep(_POLL_SECONDS)
    for progress in follower.read():
        on_progress(progress)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process if it still runs: the caller was cancelled, or on_progress raised."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(status: int, job: JobConfig, before: int) -> str:
    lines = _last_lines(job.output / LOG, before)
    if is_disk_full_message("\n".join(lines)):
        return str(disk_full(job.output, lines[-1].strip()))
    if status == REFUSED:
        text = "\n".join(lines)
        return text.rpartition(REFUSAL)[2].strip()
    log = "\n".join(f"  {line}" for line in lines)
    # The terminal shows the first line alone.
    last = next((line.strip() for line in reversed(lines) if line.strip() and _NO_CAUSE not in line), "nothing")
    return f"{_cause(status)}. It said last: {last}. Its whole log is in {job.output / LOG}\nThe last lines:\n{log}"


def _cause(status: int) -> str:
    again = "running it again goes on from the last checkpoint"
    if status == -signal.SIGKILL:
        return (
            "the training was killed (SIGKILL), most likely because memory ran out: use a smaller "
            f"per_device_train_batch_size (with more gradient_accumulation_steps) or max_length; {again}"
        )
    if status < 0:
        return f"the training was ended by {signal.Signals(-status).name}; {again}"
    return f"the training ended with status {status} and no result; after mending the cause, {again}"


def _last_lines(path: Path, start: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(start)
        return [line.decode(errors="replace").rstrip() for line in deque(file, maxlen=_LOG_LINES)]
