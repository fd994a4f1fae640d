"""The targets by their kind in the settings."""

from importlib import import_module
from typing import cast

from finetune_pipeline.deployment.target import Target
from finetune_pipeline.settings import Follower

_CLASSES = {
    "ollama": ("ollama", "Ollama"),
    "vllm": ("vllm", "Vllm"),
    "llama_server": ("llama_server", "open_llama_server"),
    "folder": ("folder", "Folder"),
    "modelfiles": ("modelfiles", "Modelfiles"),
}
"""kind -> module of this package, and what opens the target; imported when a loop declares one."""


def open_target(settings: Follower, loop: str) -> Target:
    """Return the target that settings declare; nothing is sent to it yet."""
    module, name = _CLASSES[settings.kind]
    return cast(Target, getattr(import_module(f"{__package__}.{module}"), name)(settings, loop))
