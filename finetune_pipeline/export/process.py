"""Run one step of an export in a child process, so that its memory is freed and its crash is an error."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from finetune_pipeline.artifacts import disk_full, is_disk_full_message
from finetune_pipeline.settings import home

_LOG_LINES = 15
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # torch's threads sleep while they wait: spinning starves busy cores


class ExportError(RuntimeError):
    """A model cannot be exported; the message names the step, the reason and the remedy."""


def run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output.

    Args:
        command: program and arguments.
        what: description of the step for the error, such as "merging the adapter".
        environment: variables in addition to those of this process.

    Raises:
        ExportError: it failed; with the signal or the exit status, and the last lines of its output.
    """
    process = _start(command, {**_ENVIRONMENT, **os.environ, **(environment or {})})
    try:
        output, _ = process.communicate()
    except BaseException:  # a canceled run leaves no process behind
        process.kill()
        process.wait()
        raise
    status = process.returncode
    if status == 0:
        return output
    if is_disk_full_message(output):
        last_line = output.strip().rpartition("\n")[2]
        raise ExportError(f"{what} failed: {disk_full(home(), last_line)}")
    if status == -signal.SIGKILL:
        how = "was killed (SIGKILL), most likely because memory ran out: close other programs, or use a smaller model"
    elif status in {-signal.SIGSEGV, -signal.SIGILL, -signal.SIGBUS}:
        how = (
            f"crashed with {signal.Signals(-status).name} in native code: build llama-cpp-python with "
            'CMAKE_ARGS="-DGGML_NATIVE=OFF" ("make setup" does)'
        )
    elif status < 0:  # llama.cpp aborts if a model contradicts itself
        how = f"was ended by {signal.Signals(-status).name}; if nobody ended it, use another base model"
    else:
        how = f"failed with exit status {status}"
    lines = [line.rstrip() for line in output.split("\n") if line.strip()]
    if not lines:
        raise ExportError(f"{what} {how}, without any output")
    tail = "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
    # The terminal shows the first line only.
    raise ExportError(f"{what} {how}. Its last output: {lines[-1].strip()}\nThe last lines:\n{tail}")


def _start(command: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    # The child must die with this process: it would write into the folder of the next run.
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    )


def run_step(step: str, arguments: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a step of `python -m finetune_pipeline.export`; see `run`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-u", "-m", "finetune_pipeline.export", step, *arguments]
    return run(command, what, {**offline, **(environment or {})})
