"""What a backend is: something that trains a job, and says beforehand whether it can."""

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
    """Whether one way of training can be used on this machine.

    Attributes:
        name: peft, qlora (peft over 4-bit weights), unsloth or axolotl.
        available: whether a training can use it here.
        why: what was found.
        remedy: what to do to have it; empty when it is available.
    """

    name: str
    available: bool
    why: str
    remedy: str = ""


class Backend(ABC):
    """One way of training; its name is what the setting `backend` says.

    All of them write the same things into a job's folder, so that whoever follows, cancels, resumes or exports a
    training needs not know which one it is: progress.jsonl on the way, checkpoints/ with a complete.json in each whole
    one, adapter/ in PEFT's form, result.json last.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self) -> Availability:
        """Whether it can run on this machine; imports nothing heavy."""

    @abstractmethod
    def cannot(self, settings: TrainingSettings) -> Iterator[str]:
        """What of these settings it cannot do, each as a sentence that says what to change."""

    @abstractmethod
    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:
        """Train in this process, which is the job's own, from the last whole checkpoint if there is one.

        Args:
            job: what to train, validated.
            started: time.monotonic() at which the process began.
            micro_batch: examples in memory at once, where per_device_train_batch_size was too many.

        Raises:
            TrainingError: the job cannot be done; the message says what to change.
        """

    def validate(self, settings: TrainingSettings) -> None:
        """Raise TrainingError, before anything starts, if this backend cannot train with these settings here."""
        found = self.check()
        if not found.available:
            raise TrainingError(f"the backend {self.name} cannot run here: {found.why}; {found.remedy}")
        problems = list(self.cannot(settings))
        if problems:
            raise TrainingError(f"the backend {self.name} cannot train this: {'; '.join(problems)}")


def missing(*names: str) -> list[str]:
    """Those of these packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def versions(*names: str) -> str:
    """`name version` of each installed package."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def has_nvidia() -> bool:
    """Whether this machine has NVIDIA's driver; says nothing of whether torch can use it."""
    return shutil.which("nvidia-smi") is not None
