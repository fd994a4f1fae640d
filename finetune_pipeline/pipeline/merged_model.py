"""The merged weights of a model in Hugging Face's format, for servers that read safetensors; made on demand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import get_or_create, package_versions, read, version_of
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.export.merge import merge
from finetune_pipeline.manifests import AdapterManifest, MergedManifest
from finetune_pipeline.settings import LoopSettings

FOLDER = "model"


def merged_model(loop: LoopSettings, base: Path, adapter: Path, log: Callable[[str], None]) -> Path:
    """Return the folder of a base model with an adapter merged into it; merge it if it is missing or damaged.

    Args:
        base: folder of the base model.
        adapter: folder of the lora_adapter artifact.

    Raises:
        ExportError: the merge failed.
        ArtifactError: the disk is full.
    """
    manifest = read(AdapterManifest, adapter).manifest
    inputs = {AdapterManifest.stage: manifest.version, "base_model": base_hash(base)}
    packages = package_versions("transformers", "peft")

    def make(folder: Path) -> dict[str, Any]:
        log("merge the adapter into the base model")
        merge(base, adapter / "adapter", folder / FOLDER)
        return {
            "inputs": inputs,
            "settings": {},
            "packages": packages,
            "base_hash": inputs["base_model"],
            "adapter_version": manifest.version,
        }

    return get_or_create(MergedManifest, loop.name, version_of(inputs, {}), make).path / FOLDER
