"""The base model as a GGUF, made once. It serves without a champion, and adapters are applied to it.

If `base_model` is a GGUF, that file itself is used, without a copy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, get_or_create, package_versions, version_of
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.export.special_tokens import FORM
from finetune_pipeline.manifests import BaseGgufManifest
from finetune_pipeline.settings import LoopSettings, project_path


def base_gguf(loop: LoopSettings, log: Callable[[str], None]) -> Path:
    """Return the GGUF of the loop's base model in the loop's quantization; export it if it is missing or damaged.

    The new file is renamed into place, so a process that has the old one open is not affected.
    """
    artifact = base_gguf_artifact(loop, log)
    return artifact.path / artifact.manifest.gguf


def base_gguf_artifact(loop: LoopSettings, log: Callable[[str], None]) -> Artifact[BaseGgufManifest]:
    """Return the same as `base_gguf`, with its manifest."""
    base = resolve_base_model(loop.base_model)
    inputs = {"base_model": base_hash(base)}
    packages = package_versions("llama_cpp_python")
    quantization = loop.base_quantization
    settings = {"quantization": quantization, "special_tokens": FORM, **packages}

    def make(folder: Path) -> dict[str, Any]:
        given = project_path(loop.base_model)
        if given.is_file():
            gguf = folder / "base.gguf"
            gguf.symlink_to(given.resolve())
        else:
            messages = {
                "convert": "convert the base model to GGUF",
                "quantize": f"quantize the base model to {quantization}",
            }
            exported = export(base, None, folder, quantization, lambda step: log(messages[step]))
            gguf = exported.gguf
            if exported.f16 != gguf:
                exported.f16.unlink()
        return {
            "inputs": inputs,
            "settings": settings,
            "packages": packages,
            "gguf": gguf.name,
            "quantization": quantization,
            "base_hash": inputs["base_model"],
        }

    return get_or_create(BaseGgufManifest, loop.name, version_of(inputs, settings), make)
