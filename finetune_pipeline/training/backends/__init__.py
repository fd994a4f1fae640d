"""Training backends: libraries that train one job behind one interface, chosen by the setting `backend`.

base.py             the interface
peft.py             TRL and PEFT in this environment; works everywhere
unsloth.py          Unsloth's model in the same trainer; one NVIDIA GPU
axolotl.py          Axolotl's command in its own environment
axolotl_config.py   a job as Axolotl reads it: axolotl.yaml and its data
axolotl_progress.py the plugin that Axolotl loads, which reports progress
"""

from collections.abc import Sequence

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends.axolotl import Axolotl
from finetune_pipeline.training.backends.base import Availability, TrainingBackend
from finetune_pipeline.training.backends.peft import Peft, check_qlora
from finetune_pipeline.training.backends.unsloth import Unsloth

__all__ = ["BACKENDS", "Availability", "TrainingBackend", "available_backends", "choose_backend"]

BACKENDS: tuple[TrainingBackend, ...] = (Peft(), Unsloth(), Axolotl())


def choose_backend(
    settings: TrainingSettings, backends: Sequence[TrainingBackend] = BACKENDS
) -> tuple[TrainingBackend, str]:
    """Return the backend that the settings name or, for auto, unsloth where it can train, else peft; and the reason."""
    by_name = {backend.name: backend for backend in backends}
    if settings.backend != "auto":
        return by_name[settings.backend], "set by backend"
    unsloth = by_name["unsloth"]
    found = unsloth.check()
    if not found.available:
        return by_name["peft"], f"auto: unsloth cannot run here ({found.why})"
    problems = "; ".join(unsloth.unsupported(settings))
    if problems:
        return by_name["peft"], f"auto: unsloth cannot train this ({problems})"
    return unsloth, f"auto: {found.why}"


def available_backends() -> list[Availability]:
    """Return all backends, whether each can run on this machine, and why; does not import torch."""
    return [Peft().check(), check_qlora(), Unsloth().check(), Axolotl().check()]
