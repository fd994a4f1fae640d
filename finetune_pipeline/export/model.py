"""Export a base model, with or without an adapter, to GGUF files."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.export.gguf import convert, convert_adapter, quantize
from finetune_pipeline.export.merge import merge
from finetune_pipeline.export.reference import ReferencePrompts

F16 = "F16"
ADAPTER = "adapter.gguf"


@dataclass(frozen=True)
class ExportedModel:
    """The files of one export."""

    gguf: Path  # serves; with `adapter`, the base's
    f16: Path  # from which `gguf` was quantized; equal to `gguf` if it was not quantized here
    adapter: Path | None = None  # the LoRA adapter to apply to `gguf`
    reference: tuple[str, ...] = ()  # the answers of the base with its unmerged adapter, in transformers


def export(
    base_folder: Path,
    adapter_folder: Path | None,
    out_folder: Path,
    quantization: str,
    on_step: Callable[[str], None] = lambda _: None,
    prompts: ReferencePrompts | None = None,
) -> ExportedModel:
    """Merge, convert and quantize; every step runs in a child process.

    Args:
        base_folder: the base model, in Hugging Face's layout.
        adapter_folder: the trained adapter; None exports the base model itself.
        out_folder: gets `model-F16.gguf` and `model-<quantization>.gguf`.
        quantization: a type of ExportSettings.quantization.
        on_step: called with the name of each step before it begins: merge, convert, quantize.
        prompts: prompts for the base with its unmerged adapter; they give `reference`.

    Raises:
        ExportError: a step failed; no incomplete file is left.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    merged = out_folder / ".merged"
    reference: list[str] = []
    f16, gguf = out_folder / f"model-{F16}.gguf", out_folder / f"model-{quantization}.gguf"
    try:
        if adapter_folder is not None:
            on_step("merge")
            reference = merge(base_folder, adapter_folder, merged, prompts)
        on_step("convert")
        convert(merged if adapter_folder is not None else base_folder, f16, "f16", base_folder)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    if quantization != F16:
        on_step("quantize")
        quantize(f16, gguf, quantization)
    return ExportedModel(gguf, f16, reference=tuple(reference))


def export_adapter(
    base_folder: Path,
    adapter_folder: Path,
    base_gguf: Path,
    out_folder: Path,
    on_step: Callable[[str], None],
    prompts: ReferencePrompts,
) -> ExportedModel:
    """Convert the adapter alone, without merging.

    Args:
        base_gguf: the base model's GGUF, to which the adapter will be applied.
        out_folder: gets `adapter.gguf`.
        on_step: called with a description of each step before it begins.
        prompts: prompts for the base with its adapter; they give `reference`.

    Raises:
        ExportError: a step failed; no incomplete file is left.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    on_step("generate reference answers")
    reference = merge(base_folder, adapter_folder, None, prompts)
    on_step("convert the adapter")
    convert_adapter(adapter_folder, base_folder, out_folder / ADAPTER)
    return ExportedModel(base_gguf, base_gguf, out_folder / ADAPTER, tuple(reference))
