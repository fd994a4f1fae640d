"""The base model as a GGUF, made once: the model to beat, and to serve, while there is no champion. No Dagster here."""

from collections.abc import Callable
from pathlib import Path

from finetune_pipeline.artifacts import draft, find, package_versions, publish, version_of
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.records import BaseGgufManifest
from finetune_pipeline.settings import LoopSettings


def base_gguf(loop: LoopSettings, tell: Callable[[str], None]) -> Path:
    """The file of the loop's base model in the loop's quantisation, made if it is not there yet."""
    base = resolve_base_model(loop.base_model)
    inputs = {"base_model": base_hash(base)}
    packages = package_versions("llama_cpp_python")
    settings = {"quantization": loop.export.quantization, **packages}
    version = version_of(inputs, settings)
    artifact = find(BaseGgufManifest, loop.name, version)
    if artifact is None:
        with draft(loop.name, BaseGgufManifest.stage, version) as folder:
            exported = export(base, None, folder, loop.export.quantization, tell)
            if exported.full != exported.gguf:
                exported.full.unlink()
            fields = {
                "loop": loop.name,
                "version": version,
                "inputs": inputs,
                "settings": settings,
                "packages": packages,
                "gguf": exported.gguf.name,
                "quantization": loop.export.quantization,
                "base_hash": inputs["base_model"],
            }
            artifact = publish(folder, BaseGgufManifest, fields)
    return artifact.path / artifact.manifest.gguf
