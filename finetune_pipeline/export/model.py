"""A base model and, perhaps, an adapter become the GGUF that serves."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_pipeline.export.gguf import convert, quantise, tensor_types
from finetune_pipeline.export.merge import merge

F16 = "F16"


@dataclass(frozen=True)
class ExportedModel:
    """The files of one export, in one folder.

    Attributes:
        gguf: the file that serves.
        full: the same model at F16, with which `gguf` is compared; the same file when the quantization is F16.
        quantization: llama.cpp's type that was asked for.
        tensor_types: number of tensors of each type in `gguf`; more types than one where rows do not fit the blocks.
        seconds: wall time of each step.
    """

    gguf: Path
    full: Path
    quantization: str
    tensor_types: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)


def export(
    base_folder: Path,
    adapter_folder: Path | None,
    out_folder: Path,
    quantization: str = "Q4_K_M",
    on_step: Callable[[str], None] = lambda _: None,
) -> ExportedModel:
    """Merge, convert and quantise; every step in a process of its own.

    Args:
        base_folder: the base model, as Hugging Face lays it out.
        adapter_folder: the trained adapter; None exports the base itself, the baseline.
        out_folder: gets `model-F16.gguf` and `model-<quantization>.gguf`.
        quantization: a type of ExportSettings.quantization.
        on_step: called with the name of each step before it begins: merge, convert, quantise.

    Raises:
        ExportError: a step failed; nothing half-written is left.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], None]) -> None:
        on_step(name)
        began = time.monotonic()
        work()
        seconds[name] = time.monotonic() - began

    merged = out_folder / ".merged"
    full, gguf = out_folder / f"model-{F16}.gguf", out_folder / f"model-{quantization}.gguf"
    try:
        if adapter_folder is not None:
            adapter = adapter_folder
            step("merge", lambda: merge(base_folder, adapter, merged))
        step("convert", lambda: convert(merged if adapter_folder is not None else base_folder, full))
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    if quantization != F16:
        step("quantise", lambda: quantise(full, gguf, quantization))
    return ExportedModel(gguf, full, quantization, tensor_types(gguf), seconds)
