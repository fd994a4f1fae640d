"""The backends: ways of training one job, behind one interface; chosen by the setting `backend`, or for it.

base.py             what a backend is
peft.py             TRL and PEFT in this environment; runs everywhere
unsloth.py          Unsloth's model in the same trainer; one NVIDIA GPU
axolotl.py          Axolotl's own command, in its own environment
axolotl_config.py   a job as Axolotl reads it: axolotl.yaml and its data
axolotl_progress.py the plugin that Axolotl loads, by which it tells how far it is
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends.axolotl import Axolotl
from finetune_pipeline.training.backends.base import Availability, Backend
from finetune_pipeline.training.backends.peft import Peft, check_qlora
from finetune_pipeline.training.backends.unsloth import Unsloth

__all__ = ["BACKENDS", "Availability", "Backend", "Choice", "available_backends", "choose"]

BACKENDS: tuple[Backend, ...] = (Peft(), Unsloth(), Axolotl())


@dataclass(frozen=True)
class Choice:
    """The backend that trains, and why this one."""

    backend: Backend
    reason: str


def choose(settings: TrainingSettings, backends: Sequence[Backend] = BACKENDS) -> Choice:
    """The backend that the settings name; for auto, unsloth where it can train them, else peft."""
    by_name = {backend.name: backend for backend in backends}
    if settings.backend != "auto":
        return Choice(by_name[settings.backend], "set by backend")
    unsloth = by_name["unsloth"]
    found = unsloth.check()
    if not found.available:
        return Choice(by_name["peft"], f"auto: unsloth cannot run here ({found.why})")
    problems = "; ".join(unsloth.cannot(settings))
    if problems:
        return Choice(by_name["peft"], f"auto: unsloth cannot train this ({problems})")
    return Choice(unsloth, f"auto: {found.why}")


def available_backends() -> list[Availability]:
    """All ways of training, whether this machine has them and why; does not import torch."""
    return [Peft().check(), check_qlora(), Unsloth().check(), Axolotl().check()]
