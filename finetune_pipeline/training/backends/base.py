"""The interface of a training backend."""

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import JobConfig, TrainingError, TrainingResult


@dataclass(frozen=True)
class Availability:
    """The availability of a backend on this machine."""

    name: str  # peft, qlora (peft over 4-bit weights), unsloth or axolotl
    available: bool
    why: str  # what was found
    remedy: str = ""  # how to make it available; empty if it is


class TrainingBackend(ABC):
    """A library that trains a job; its name is a value of the setting `backend`.

    All backends write the same files into a job's folder, so following, canceling, resuming and exporting a run do
    not depend on the backend: progress.jsonl during training, checkpoints/ with a complete.json in each complete
    one, adapter/ in PEFT's format, and result.json last.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self) -> Availability:
        """Return whether it can run on this machine; imports nothing heavy."""

    @abstractmethod
    def unsupported(self, settings: TrainingSettings) -> Iterator[str]:
        """Yield what of these settings it does not support, each as a sentence that says what to change."""

    @abstractmethod
    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:
        """Train in this process, which does nothing else, from the last complete checkpoint if there is one.

        Args:
            job: what to train, validated.
            started: time.monotonic() at which the process began.
            micro_batch: its size, if memory ran out with per_device_train_batch_size.

        Raises:
            TrainingError: the job cannot be done; the message says what to change.
        """

    def validate(self, settings: TrainingSettings) -> None:
        """Raise TrainingError, before anything starts, if this backend cannot train with these settings here."""
        found = self.check()
        if not found.available:
            raise TrainingError(f"the backend {self.name} cannot run here: {found.why}; {found.remedy}")
        problems = list(self.unsupported(settings))
        if problems:
            raise TrainingError(f"the backend {self.name} cannot train this: {'; '.join(problems)}")


def missing(*names: str) -> list[str]:
    """Return those of these packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def versions(*names: str) -> str:
    """Return `name version` of each installed package."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def has_nvidia() -> bool:
    """Return whether this machine has NVIDIA's driver; torch may still be unable to use it."""
    return shutil.which("nvidia-smi") is not None
