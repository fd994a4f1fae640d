"""Export a base model, with or without an adapter, to GGUF files."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune_pipeline.export.gguf import convert, convert_adapter, quantize, tensor_types
from finetune_pipeline.export.merge import merge
from finetune_pipeline.export.reference import ReferencePrompts

F16 = "F16"
ADAPTER = "adapter.gguf"


@dataclass(frozen=True)
class ExportedModel:
    """The files of one export.

    Attributes:
        gguf: the GGUF that serves; with `adapter`, the base's.
        f16: the F16 file from which `gguf` was quantized; equal to `gguf` if it was not quantized here.
        quantization: the requested llama.cpp type.
        tensor_types: number of tensors of each type in `gguf`; several types if rows do not fit the blocks.
        seconds: wall time of each step.
        adapter: the LoRA adapter to apply to `gguf`.
        reference: the answers of the base with its unmerged adapter, in transformers.
    """

    gguf: Path
    f16: Path
    quantization: str
    tensor_types: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    adapter: Path | None = None
    reference: tuple[str, ...] = ()


def export(
    base_folder: Path,
    adapter_folder: Path | None,
    out_folder: Path,
    quantization: str = "Q4_K_M",
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
    seconds: dict[str, float] = {}
    merged = out_folder / ".merged"
    reference: list[str] = []
    f16, gguf = out_folder / f"model-{F16}.gguf", out_folder / f"model-{quantization}.gguf"
    try:
        if adapter_folder is not None:
            with _step("merge", seconds, on_step):
                reference = merge(base_folder, adapter_folder, merged, prompts)
        with _step("convert", seconds, on_step):
            convert(merged if adapter_folder is not None else base_folder, f16, "f16", base_folder)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    if quantization != F16:
        with _step("quantize", seconds, on_step):
            quantize(f16, gguf, quantization)
    return ExportedModel(gguf, f16, quantization, tensor_types(gguf), seconds, reference=tuple(reference))


def export_adapter(
    base_folder: Path,
    adapter_folder: Path,
    base_gguf: Path,
    out_folder: Path,
    quantization: str = "Q4_K_M",
    on_step: Callable[[str], None] = lambda _: None,
    prompts: ReferencePrompts | None = None,
) -> ExportedModel:
    """Convert the adapter alone, without merging.

    Args:
        base_gguf: the base model's GGUF, of type `quantization`, to which the adapter will be applied.
        out_folder: gets `adapter.gguf`.
        prompts: prompts for the base with its adapter; they give `reference`.

    Raises:
        ExportError: a step failed; no incomplete file is left.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    reference: list[str] = []
    if prompts is not None:
        with _step("generate reference answers", seconds, on_step):
            reference = merge(base_folder, adapter_folder, None, prompts)
    adapter = out_folder / ADAPTER
    with _step("convert the adapter", seconds, on_step):
        convert_adapter(adapter_folder, base_folder, adapter)
    types = tensor_types(base_gguf)
    return ExportedModel(base_gguf, base_gguf, quantization, types, seconds, adapter, tuple(reference))


@contextmanager
def _step(name: str, seconds: dict[str, float], on_step: Callable[[str], None]) -> Iterator[None]:
    on_step(name)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
