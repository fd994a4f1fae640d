"""Which ways of training this machine has, found out without loading any of them."""

import importlib.util
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Backend:
    """One way of training.

    Attributes:
        name: peft (LoRA), qlora (LoRA over 4-bit weights) or unsloth.
        available: whether a training can use it here.
        why: what was found.
        remedy: what to do to have it; empty when it is available.
    """

    name: str
    available: bool
    why: str
    remedy: str = ""


def available_backends() -> list[Backend]:
    """All ways of training, whether this machine has them and why; does not import torch."""
    return [_peft(), _qlora(), _unsloth()]


def _peft() -> Backend:
    missing = _missing("torch", "transformers", "trl", "peft", "datasets")
    if missing:
        return Backend("peft", False, f"not installed: {', '.join(missing)}", 'run "make setup"')
    device = "a GPU" if _has_nvidia() else "the CPU"
    return Backend("peft", True, f"{_versions('torch', 'transformers', 'trl', 'peft')}; trains on {device}")


def _qlora() -> Backend:
    peft = _peft()
    if not peft.available:
        return Backend("qlora", False, peft.why, peft.remedy)
    if _missing("bitsandbytes"):
        return Backend("qlora", False, "not installed: bitsandbytes", "pip install bitsandbytes (not for macOS)")
    speed = "" if _has_nvidia() else "; without a GPU it works but is slow, it is meant for tests there"
    return Backend("qlora", True, f"{_versions('bitsandbytes')}{speed}")


def _unsloth() -> Backend:
    if platform.system() != "Linux":
        return Backend("unsloth", False, f"runs on Linux only, this is {platform.system()}", "use peft")
    if not _has_nvidia():
        return Backend("unsloth", False, "no NVIDIA GPU was found (no nvidia-smi)", "use peft, or a machine with a GPU")
    if _missing("unsloth"):
        return Backend("unsloth", False, "not installed", 'pip install "finetune-pipeline[unsloth]"')
    why = f"{_versions('unsloth')} is installed, but no trainer here uses it yet"
    return Backend("unsloth", False, why, "use peft")


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None
