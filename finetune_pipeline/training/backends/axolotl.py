"""Axolotl as a command in a separate environment, since it pins other versions of the same packages.

The environment variable FINETUNE_AXOLOTL names the command. The training process writes axolotl.yaml, starts the
command as a child that dies with it, turns the plugin's events into progress and complete checkpoints, and moves the
adapter to where every backend leaves it.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.manifests import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends import axolotl_config as config
from finetune_pipeline.training.backends.base import Availability, TrainingBackend, has_nvidia
from finetune_pipeline.training.checkpoints import last_complete, mark_complete, step_of
from finetune_pipeline.training.job import (
    ADAPTER,
    CHECKPOINTS,
    JobConfig,
    Progress,
    TrainingError,
    TrainingResult,
    ValidationPoint,
    curve_of,
    finish,
)
from finetune_pipeline.training.memory import is_out_of_memory_message, out_of_memory_advice
from finetune_pipeline.training.progress import PROGRESS, LineReader, append_progress, check_finite

COMMAND = "FINETUNE_AXOLOTL"
_INSTALL = (
    "install Axolotl in a separate environment (python -m venv ~/axolotl; ~/axolotl/bin/pip install axolotl) "
    f"and set {COMMAND} to its command (~/axolotl/bin/axolotl), or use peft"
)
_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 1.0
_LOG_LINES = 10


class Axolotl(TrainingBackend):
    """The command `axolotl train`."""

    name = "axolotl"

    def check(self) -> Availability:  # noqa: D102
        command = os.environ.get(COMMAND)
        if not command:
            return Availability("axolotl", False, f"{COMMAND} is not set", _INSTALL)
        path = Path(command).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            return Availability("axolotl", False, f"{COMMAND} is {command}, which is not a program", _INSTALL)
        # The version is read from the environment's folder: asking the command would load torch.
        found = next(path.resolve().parents[1].glob("lib/python*/site-packages/axolotl-*.dist-info"), None)
        version = f"axolotl {found.name.split('-')[1].removesuffix('.dist')}" if found else "axolotl, version unknown"
        speed = "" if has_nvidia() else "; without a GPU it works but is slow, for tests only"
        return Availability("axolotl", True, f"{version} at {path}{speed}")

    def unsupported(self, settings: TrainingSettings) -> Iterator[str]:  # noqa: D102
        if settings.reward_weighted:
            yield "it cannot sample examples by their reward; set reward_weighted: false, or backend: peft"
        if settings.compute == "ray" or settings.num_processes > 1:
            yield "it trains in one process on this machine; set compute: local and num_processes: 1, or backend: peft"
        if settings.trainable_token_indices == "all":
            yield "it trains embeddings of listed tokens only; list trainable_token_indices, or set backend: peft"
        if settings.mode == "incremental":
            yield "it starts with a new adapter; set mode: full, or backend: peft"
        if settings.early_stopping_patience and settings.method != "sft":
            yield f"it has no early stopping for {settings.method}; unset early_stopping_patience, or set backend: peft"
        if settings.method == "kto" and settings.losses != ("kto",):
            yield f"it has no loss_type {settings.losses[0]} for kto; leave it out, or set backend: peft"
        if settings.attn_implementation == "eager":
            yield "it has no attn_implementation: eager; leave it out, or set backend: peft"
        for name, known in (("trainer_config", config.TRAINER_FIELDS), ("lora_config", config.LORA_FIELDS)):
            if unknown := sorted(getattr(settings, name).keys() - known):
                yield f"it does not take {name} {', '.join(unknown)}; leave it out, or set backend: peft"

    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:  # noqa: D102
        checkpoint = last_complete(job.output / CHECKPOINTS, job.key)
        written = config.write(job, checkpoint, has_nvidia())
        events = EventReader(job, written)
        _run(job, job.output / config.FOLDER / config.CONFIG, events)
        _take_adapter(job)
        result = events.result(started, step_of(checkpoint) if checkpoint else 0)
        finish(job, result)
        shutil.rmtree(job.output / config.FOLDER)
        return result


@dataclass
class EventReader:
    """Reads the plugin's events and turns them into progress, complete checkpoints and a result."""

    job: JobConfig
    written: config.WrittenSplit
    began: float = 0.0
    first_step: int = 0
    last_progress: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # of the events train_begin and train_end

    def __post_init__(self) -> None:
        self.path = self.job.output / config.FOLDER / "events.jsonl"
        self.path.unlink(missing_ok=True)  # of a killed process
        self._lines = LineReader(self.path)

    def read(self) -> None:
        """Handle all events since the last call."""
        for line in self._lines.read():
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "train_begin":
                self.began, self.first_step = time.monotonic(), event["step"]
                self.facts |= {"device": event["device"], "bf16": event["bf16"]}
            elif kind == "log":
                self._log(event)
            elif kind == "save":
                if not event["finite"]:
                    check_finite(math.nan, event["step"])
                with suppress(FileNotFoundError):  # Axolotl may have removed it already, since there are later ones
                    mark_complete(self.job.output / CHECKPOINTS / f"checkpoint-{event['step']}", self.job.key)
            elif kind == "train_end":
                self.facts |= event | {"seconds": time.monotonic() - self.began}

    def _log(self, event: dict[str, Any]) -> None:
        for name in ("loss", "eval_loss"):
            check_finite(event.get(name, 0.0), event["step"])
        now = time.monotonic()
        last = event["step"] == event["steps"]
        if "loss" not in event or not (last or now - self.last_progress >= _SECONDS_BETWEEN_LINES):
            return
        elapsed, done = now - self.began, max(event["step"] - self.first_step, 1)
        progress = Progress(
            step=event["step"],
            steps=event["steps"],
            epoch=event["epoch"],
            loss=event["loss"],
            learning_rate=event.get("learning_rate", 0.0),
            tokens_per_second=self._tokens(done) / max(elapsed, 1e-9),
            seconds_left=elapsed / done * (event["steps"] - event["step"]),
            elapsed_seconds=elapsed,
            memory_bytes=None,
            micro_batch=self.job.settings.per_device_train_batch_size,
        )
        append_progress(self.job.output / PROGRESS, progress)
        self.last_progress = now

    def _tokens(self, steps: int) -> float:
        """Estimate the tokens without padding of some steps by the mean length; Axolotl's count includes padding."""
        settings = self.job.settings
        examples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return steps * examples * self.written.tokens / self.written.examples

    def result(self, started: float, resumed_from: int) -> TrainingResult:
        """Return the result of the finished run; its losses are those of the first and the best validation."""
        facts, settings = self.facts, self.job.settings
        history = facts["history"]
        losses = [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
        after = next(loss for step, loss in reversed(losses) if step == facts["best_step"])
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
            tokens_per_second=self._tokens(facts["step"] - self.first_step) / max(facts["seconds"], 1e-9),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=facts["peak_memory"],
            micro_batch=settings.per_device_train_batch_size,
            **curve_of(history),
            validation=tuple(ValidationPoint(step=step, loss=loss) for step, loss in losses if step),
            best_step=facts["best_step"],
            stopped_early=facts["step"] < facts["steps"],
        )


def _run(job: JobConfig, config_file: Path, events: EventReader) -> None:
    """Run the command to its end; it dies with this process, and is ended when training has diverged."""
    program = Path(os.environ[COMMAND]).expanduser()
    dies_with_parent = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    # Axolotl finds the plugin beside the configuration; this project's PYTHONPATH could shadow its packages.
    command = ["env", f"PYTHONPATH={config_file.parent}", str(program), "train", str(config_file)]
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    log = job.output / config.FOLDER / "axolotl.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*dies_with_parent, *command, "--launcher", "python"],
            env={**os.environ, "PATH": path, "AXOLOTL_DO_NOT_TRACK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                events.read()
                time.sleep(_POLL_SECONDS)
            events.read()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    print("\n".join(lines), flush=True)
    message = next((line for line in lines if is_out_of_memory_message(line)), "")
    if process.returncode == -signal.SIGKILL:
        message = "it was killed by SIGKILL, most likely because memory ran out"
    if process.returncode != 0 and message:
        settings = job.settings
        advice = out_of_memory_advice(settings, settings.per_device_train_batch_size, message.strip())
        raise TrainingError(advice)
    if process.returncode != 0 or "history" not in events.facts:
        tail = "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
        last = lines[-1].strip() if lines else "nothing"
        raise TrainingError(
            f"axolotl ended with status {process.returncode}; after fixing the cause, running it again resumes from "
            f"the last checkpoint. Its last output: {last}\nThe last lines:\n{tail}"
        )


def _take_adapter(job: JobConfig) -> None:
    """Move Axolotl's adapter to where, and in the form in which, every backend leaves it."""
    source, final, temporary = job.output / CHECKPOINTS, job.output / ADAPTER, job.output / f".{ADAPTER}.tmp"
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = job.base_model.name  # not a path of this machine
    settings["target_modules"] = sorted(settings["target_modules"])
    write_text(temporary / ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(source / ADAPTER_WEIGHTS, temporary / ADAPTER_WEIGHTS)
    temporary.replace(final)
