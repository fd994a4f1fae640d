"""The base model as a GGUF, made once: to beat and to serve while there is no champion, and what adapters go over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, get_or_create, package_versions, version_of
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.manifests import BaseGgufManifest
from finetune_pipeline.settings import LoopSettings


def base_gguf(loop: LoopSettings, tell: Callable[[str], None]) -> Path:
    """Return the file of the loop's base model in the loop's quantization; export it if it is missing or damaged.

    The new file is renamed into place, so a process that has the old one open is not affected.
    """
    artifact = base_gguf_artifact(loop, tell)
    return artifact.path / artifact.manifest.gguf


def base_gguf_artifact(loop: LoopSettings, tell: Callable[[str], None]) -> Artifact[BaseGgufManifest]:
    """Return the same as `base_gguf`, with its manifest."""
    base = resolve_base_model(loop.base_model)
    inputs = {"base_model": base_hash(base)}
    packages = package_versions("llama_cpp_python")
    settings = {"quantization": loop.export.quantization, **packages}

    def make(folder: Path) -> dict[str, Any]:
        exported = export(base, None, folder, loop.export.quantization, tell)
        if exported.full != exported.gguf:
            exported.full.unlink()
        return {
            "inputs": inputs,
            "settings": settings,
            "packages": packages,
            "gguf": exported.gguf.name,
            "quantization": loop.export.quantization,
            "base_hash": inputs["base_model"],
        }

    return get_or_create(BaseGgufManifest, loop.name, version_of(inputs, settings), make)
