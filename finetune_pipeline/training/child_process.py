"""Trains in a child process, follows its progress, and says why it failed if it did."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import BinaryIO

from finetune_pipeline.artifacts import disk_full, is_disk_full_message, write_text
from finetune_pipeline.training.backends import choose_backend
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
from finetune_pipeline.training.progress import PROGRESS, LineReader, read_progress
from finetune_pipeline.training.trackers import check_trackers

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_LOG_LINES = 15
_NO_CAUSE = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes logs this in every QLoRA on a CPU


def train(job: JobConfig, on_progress: Callable[[Progress], None] = lambda _: None) -> TrainingResult:
    """Train in a child process and return its result; blocks until it is there.

    Called again with the same job after a failure or a kill, it resumes from the last checkpoint; if the job's result
    exists already, it returns it at once. The process dies with the calling thread, so call it from the main thread.

    Args:
        job: what to train.
        on_progress: called with each new progress, at most about once a second.

    Raises:
        TrainingError: the base model or the settings cannot be trained by this backend here, or a tracker is not
            installed; nothing was started.
        TrainingFailed: the process ended without a result.
    """
    check_base_model(job.base_model)
    check_trackers(job.settings)
    result = finished(job)
    if result is not None:
        shutil.rmtree(job.output / CHECKPOINTS, ignore_errors=True)  # of a process killed right after its result
        return result
    backend, _ = choose_backend(job.settings)
    backend.validate(job.settings)
    job.output.mkdir(parents=True, exist_ok=True)
    write_text(job.output / JOB, job.model_dump_json(indent=2) + "\n")
    lines = LineReader(job.output / PROGRESS)
    with (job.output / LOG).open("ab") as log:
        before = log.tell()  # the output of earlier attempts is in the file too
        process = _start(_command(job), log)
        try:
            running = True
            while running:
                running = process.poll() is None
                for progress in read_progress(lines):
                    on_progress(progress)
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            _stop(process)
    result = finished(job) if process.returncode == 0 else None
    if result is None:
        raise TrainingFailed(_failure(process.returncode, job, before))
    return result


def _command(job: JobConfig) -> list[str]:
    # -u: without buffers, so the last lines are in the log when a signal ends the process.
    module = "finetune_pipeline.training"
    return [sys.executable, "-u", "-m", module, str(job.output / JOB), "--parent", str(os.getpid())]


def _start(command: list[str], log: BinaryIO) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process if it is still running, because the caller was canceled or on_progress raised."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(status: int, job: JobConfig, log_start: int) -> str:
    with (job.output / LOG).open("rb") as file:
        file.seek(log_start)
        lines = [line.decode(errors="replace").rstrip() for line in deque(file, maxlen=_LOG_LINES)]
    if is_disk_full_message("\n".join(lines)):
        return str(disk_full(job.output, lines[-1].strip()))
    if status == REFUSED:
        return "\n".join(lines).rpartition(REFUSAL)[2].strip()
    again = "running it again resumes from the last checkpoint"
    if status == -signal.SIGKILL:
        cause = (
            "the training process was killed (SIGKILL), most likely because memory ran out: use a smaller "
            f"per_device_train_batch_size (with more gradient_accumulation_steps) or max_length; {again}"
        )
    elif status < 0:
        cause = f"the training process was ended by {signal.Signals(-status).name}; {again}"
    else:
        cause = f"the training process ended with status {status} and no result; after fixing the cause, {again}"
    # The terminal shows the first line only.
    last = next((line.strip() for line in reversed(lines) if line.strip() and _NO_CAUSE not in line), "nothing")
    tail = "\n".join(f"  {line}" for line in lines)
    return f"{cause}. Its last output: {last}. The complete log is {job.output / LOG}\nThe last lines:\n{tail}"
