"""Axolotl, by its own command in its own environment, which cannot be this one: each pins other versions.

The environment variable FINETUNE_AXOLOTL names the command. The training process writes axolotl.yaml, starts the
command as a child that dies with it, turns what the plugin tells into progress and whole checkpoints, and brings the
adapter into the common layout.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends import axolotl_config as config
from finetune_pipeline.training.backends.base import Availability, Backend, has_nvidia
from finetune_pipeline.training.callbacks import must_be_finite
from finetune_pipeline.training.checkpoints import last_complete, mark_complete, step_of
from finetune_pipeline.training.job import (
    ADAPTER,
    CHECKPOINTS,
    CurvePoint,
    JobConfig,
    Progress,
    TrainingError,
    TrainingResult,
    ValidationPoint,
    finish,
)
from finetune_pipeline.training.memory import ran_out, tells_of_want_of_memory
from finetune_pipeline.training.progress import PROGRESS, append

COMMAND = "FINETUNE_AXOLOTL"
_INSTALL = (
    "install Axolotl in an environment of its own (python -m venv ~/axolotl; ~/axolotl/bin/pip install axolotl) "
    f"and set {COMMAND} to its command (~/axolotl/bin/axolotl), or use peft"
)
_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 1.0
_LOG_LINES = 10
_LINE = re.compile(r"[\r\n]+")


class Axolotl(Backend):
    """The command `axolotl train`."""

    name = "axolotl"

    def check(self) -> Availability:  # noqa: D102
        command = os.environ.get(COMMAND)
        if not command:
            return Availability("axolotl", False, f"{COMMAND} is not set", _INSTALL)
        path = Path(command).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            return Availability("axolotl", False, f"{COMMAND} is {command}, which is no program", _INSTALL)
        speed = "" if has_nvidia() else "; without a GPU it works but is slow, it is meant for tests there"
        return Availability("axolotl", True, f"{_version(path)} at {path}{speed}")

    def cannot(self, settings: TrainingSettings) -> Iterator[str]:  # noqa: D102
        if settings.reward_weighted:
            yield "it cannot draw examples by their reward; set reward_weighted: false, or backend: peft"
        if settings.compute == "ray" or settings.num_processes > 1:
            yield "it trains in one process on this machine; set compute: local and num_processes: 1, or backend: peft"
        if settings.trainable_token_indices == "all":
            yield "it trains embeddings of listed tokens only; list trainable_token_indices, or set backend: peft"
        if settings.mode == "incremental":
            yield "it begins with a new adapter; set mode: full, or backend: peft"
        if settings.early_stopping_patience and settings.method != "sft":
            yield f"it has no early stopping for {settings.method}; unset early_stopping_patience, or set backend: peft"

    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:  # noqa: D102
        checkpoint = last_complete(job.output / CHECKPOINTS, job.key)
        written = config.write(job, checkpoint, has_nvidia())
        follower = _Follower(job, written)
        _run(job, written.config, follower)
        _take_adapter(job)
        result = follower.result(started, step_of(checkpoint) if checkpoint else 0)
        finish(job, result)
        shutil.rmtree(job.output / config.FOLDER)
        return result


def _version(command: Path) -> str:
    """Read from the environment's folder: asking the command itself would load torch."""
    found = next(command.resolve().parents[1].glob("lib/python*/site-packages/axolotl-*.dist-info"), None)
    return f"axolotl {found.name.split('-')[1].removesuffix('.dist')}" if found else "a version that does not tell"


@dataclass
class _Follower:
    """Reads what the plugin tells, and passes it on in the common form."""

    job: JobConfig
    written: config.Written
    began: float = 0.0
    first: int = 0
    told: float = 0.0
    offset: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.job.output / config.FOLDER / "events.jsonl"
        self.path.unlink(missing_ok=True)  # of a process that was killed

    def read(self) -> None:
        """Pass on all that was told since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        for line in whole.splitlines():
            event = json.loads(line)
            getattr(self, f"_{event.pop('event')}")(event)

    def _begun(self, event: dict[str, Any]) -> None:
        self.began, self.first = time.monotonic(), event["step"]
        self.facts |= {"device": event["device"], "bf16": event["bf16"]}

    def _log(self, event: dict[str, Any]) -> None:
        for name in ("loss", "eval_loss"):
            must_be_finite(event.get(name, 0.0), event["step"])
        if "loss" not in event:
            return
        now = time.monotonic()
        if event["step"] == event["steps"] or now - self.told >= _SECONDS_BETWEEN_LINES:
            append(self.job.output / PROGRESS, self._progress(event, now - self.began))
            self.told = now

    def _progress(self, event: dict[str, Any], elapsed: float) -> Progress:
        done = max(event["step"] - self.first, 1)
        return Progress(
            step=event["step"],
            steps=event["steps"],
            epoch=event["epoch"],
            loss=event["loss"],
            learning_rate=event.get("learning_rate", 0.0),
            tokens_per_second=self._tokens(done) / max(elapsed, 1e-9),
            eta_seconds=elapsed / done * (event["steps"] - event["step"]),
            elapsed_seconds=elapsed,
            memory_bytes=None,
            micro_batch=self.job.settings.per_device_train_batch_size,
        )

    def _tokens(self, steps: int) -> float:
        """Tokens of text in so many updates, by the mean length: Axolotl's own count has the padding in it."""
        settings = self.job.settings
        return steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps * self.written.tokens

    def _saved(self, event: dict[str, Any]) -> None:
        if not event["finite"]:
            must_be_finite(math.nan, event["step"])
        checkpoint = self.job.output / CHECKPOINTS / f"checkpoint-{event['step']}"
        try:
            mark_complete(checkpoint, self.job.key)
        except FileNotFoundError:  # Axolotl has removed it already: later ones are there
            return

    def _ended(self, event: dict[str, Any]) -> None:
        self.facts |= event | {"seconds": time.monotonic() - self.began}

    def result(self, started: float, resumed_from: int) -> TrainingResult:
        """What is known of the finished training; the losses are of validations: the first, the adapter's."""
        facts, settings = self.facts, self.job.settings
        history = facts["history"]
        losses = [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
        after = next(loss for step, loss in reversed(losses) if step == facts["best_step"])
        steps = {entry["step"]: entry for entry in history if "loss" in entry}
        curve = tuple(
            CurvePoint(step=step, loss=float(entry["loss"]), learning_rate=float(entry["learning_rate"]))
            for step, entry in sorted(steps.items())
        )
        last = curve[-max(1, len(curve) // 10) :]
        return TrainingResult(
            job=self.job.key,
            device=facts["device"],
            method=settings.method,
            adapter=settings.adapter,
            bf16=facts["bf16"],
            steps=facts["step"],
            resumed_from=resumed_from,
            examples=self.written.examples,
            too_long=self.written.too_long,
            rejections=self.written.rejections,
            loss_before=losses[0][1],
            loss_after=after,
            train_loss=sum(point.loss for point in last) / len(last),
            tokens_per_second=self._tokens(facts["step"] - self.first) / max(facts["seconds"], 1e-9),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=facts["peak_memory"],
            micro_batch=settings.per_device_train_batch_size,
            curve=curve,
            validation=tuple(ValidationPoint(step=step, loss=loss) for step, loss in losses if step),
            best_step=facts["best_step"],
            stopped_early=facts["step"] < facts["steps"],
        )


def _run(job: JobConfig, path: Path, follower: _Follower) -> None:
    """Run the command to its end; it dies with this process, and ends when it has diverged."""
    log = job.output / config.FOLDER / "axolotl.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(path),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                follower.read()
                time.sleep(_POLL_SECONDS)
            follower.read()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in _LINE.split(log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
    print("\n".join(lines), flush=True)
    tells = next((line for line in lines if tells_of_want_of_memory(line)), "")
    if process.returncode == -signal.SIGKILL:
        tells = "it was killed by SIGKILL, most likely for that"
    if process.returncode != 0 and tells:
        raise TrainingError(ran_out(job.settings, job.settings.per_device_train_batch_size, tells.strip()))
    if process.returncode != 0 or "history" not in follower.facts:
        tail = "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
        raise TrainingError(
            f"axolotl ended with status {process.returncode}; after mending the cause, running it again goes on from "
            f"the last checkpoint. Its last lines:\n{tail}"
        )


def _command(path: Path) -> list[str]:
    children = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    # The plugin lies beside the configuration; what this project needs on the path would only be in the way there.
    command = ["env", f"PYTHONPATH={path.parent}", str(Path(os.environ[COMMAND]).expanduser())]
    return [*children, *command, "train", str(path), "--launcher", "python"]


def _environment() -> dict[str, str]:
    folder = Path(os.environ[COMMAND]).expanduser().parent
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "AXOLOTL_DO_NOT_TRACK": "1"}


def _take_adapter(job: JobConfig) -> None:
    """Bring the adapter that Axolotl wrote to where, and in the form in which, every backend leaves it."""
    made, final, temporary = job.output / CHECKPOINTS, job.output / ADAPTER, job.output / f".{ADAPTER}.tmp"
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    settings = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = job.base_model.name  # no path of this machine
    settings["target_modules"] = sorted(settings["target_modules"])
    write_text(temporary / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(made / "adapter_model.safetensors", temporary / "adapter_model.safetensors")
    temporary.replace(final)
