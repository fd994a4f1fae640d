"""Training and export processes that are forked from one that has imported their libraries already.

Importing torch, transformers, TRL and PEFT takes longer than a small training or export itself. A test marked
`real_processes` starts them as the product does; so do the tests of the command line and of the whole loop.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from finetune_pipeline.export import process as export_process
from finetune_pipeline.training import child_process

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["finetune_pipeline_tests.imported"])
START_TRAINING: Callable[..., Any] = child_process._start
START_EXPORT: Callable[..., Any] = export_process._start


class WarmProcess:
    """A forked process with the interface of `subprocess.Popen`, as far as it is used here.

    Args:
        command: `python -u -m MODULE ARGUMENTS` or `python SCRIPT ARGUMENTS`.
        output: the file to which it appends its output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self._output = output
        arguments = [str(argument) for argument in command[1:]]
        self._process = CONTEXT.Process(target=_main, args=(arguments, dict(environment), str(Path.cwd()), str(output)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode

    def communicate(self) -> tuple[str, None]:
        self.wait()
        return self._output.read_text(errors="replace"), None


def _main(arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """Run a module or script as python does, with its output in a file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[:2] == ["-u", "-m"]:
        if "--parent" in arguments:  # its parent is the process that forked it
            arguments[arguments.index("--parent") + 1] = str(os.getppid())
        sys.argv = arguments[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _can_fork(command: Sequence[str]) -> bool:
    modules = (["-u", "-m", "finetune_pipeline.training"], ["-u", "-m", "finetune_pipeline.export"])
    return command[0] == sys.executable and (list(command[1:4]) in modules or str(command[1]).endswith("_to_gguf.py"))


@contextmanager
def forked_training_and_export(folder: Path) -> Iterator[None]:
    """Fork the processes of training and export.

    Args:
        folder: for the output of export steps.
    """

    def training(command: list[str], log: BinaryIO) -> Any:
        return WarmProcess(command, os.environ, Path(log.name)) if _can_fork(command) else START_TRAINING(command, log)

    def export(command: Sequence[str], environment: dict[str, str]) -> Any:
        if not _can_fork(command):
            return START_EXPORT(command, environment)
        number, output = tempfile.mkstemp(dir=folder)
        os.close(number)
        return WarmProcess(command, environment, Path(output))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "_start", training)
        patch.setattr(export_process, "_start", export)
        yield
