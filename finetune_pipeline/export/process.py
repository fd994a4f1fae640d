"""Run one step of an export as a child process: its memory is given back, and its crash is an error with a name."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from finetune_pipeline.artifacts import disk_full, is_disk_full_message
from finetune_pipeline.settings import home

_LOG_LINES = 15
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # torch's threads wait asleep: by spinning they starve on busy cores


class ExportError(RuntimeError):
    """A model cannot be exported; the message says at which step, why, and what to do."""


def run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return what it wrote.

    Args:
        command: program and arguments.
        what: what it does, for the error: "merging the adapter".
        environment: variables besides those of this process.

    Raises:
        ExportError: it failed; with the signal's name or the status, and the last lines that it wrote.
    """
    process = subprocess.Popen(
        # A step that outlived a killed run would write into the folder of the next one.
        [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**_ENVIRONMENT, **os.environ, **(environment or {})},
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate()
    except BaseException:  # a cancelled run leaves no process behind
        process.kill()
        process.wait()
        raise
    if process.returncode and is_disk_full_message(output):
        raise ExportError(f"{what} failed: {disk_full(home(), output.strip().splitlines()[-1])}")
    if process.returncode:
        raise ExportError(f"{what} {_how(process.returncode)}. Its last lines:\n{_tail(output)}")
    return output


def run_step(step: str, arguments: Sequence[str], what: str) -> str:
    """Run a step of `python -m finetune_pipeline.export` as `run` does."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return run([sys.executable, "-u", "-m", "finetune_pipeline.export", step, *arguments], what, offline)


def _how(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL), most likely because memory ran out: close other programs, or use a smaller model"
    if status < 0:
        return (
            f"crashed with {signal.Signals(-status).name} in native code: build llama-cpp-python with "
            'CMAKE_ARGS="-DGGML_NATIVE=OFF" ("make setup" does)'
        )
    return f"failed with status {status}"


def _tail(output: str) -> str:
    return "\n".join(f"  {line}" for line in output.splitlines()[-_LOG_LINES:]) or "  (it wrote nothing)"
