"""The base model as a GGUF, made once: to beat and to serve while there is no champion, and what adapters go over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, check_content, obtain, package_versions, version_of
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.records import BaseGgufManifest
from finetune_pipeline.settings import LoopSettings


def base_gguf(loop: LoopSettings, tell: Callable[[str], None]) -> Path:
    """Return the file of the loop's base model in the loop's quantization; export it if it does not exist.

    Raises:
        ArtifactError: it exists and is damaged.
    """
    artifact = base_gguf_artifact(loop, tell)
    check_base(artifact)
    return artifact.path / artifact.manifest.gguf


def check_base(artifact: Artifact[BaseGgufManifest]) -> None:
    """Refuse a base model's file whose content differs from what was exported.

    Raises:
        ArtifactError: it differs.
    """
    name = artifact.manifest.gguf
    remedy = f"delete {artifact.path}; it is exported again when it is next needed"
    check_content(artifact.path / name, artifact.manifest.files[name].sha256, remedy)


def base_gguf_artifact(loop: LoopSettings, tell: Callable[[str], None]) -> Artifact[BaseGgufManifest]:
    """As `base_gguf`, with its manifest."""
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

    return obtain(BaseGgufManifest, loop.name, version_of(inputs, settings), make)
