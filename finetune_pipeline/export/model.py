"""A base model and, perhaps, an adapter become what serves: one GGUF, or the base's with the adapter's beside it."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_pipeline.export.gguf import convert, convert_adapter, quantize, tensor_types
from finetune_pipeline.export.merge import merge
from finetune_pipeline.export.reference import Questions

F16 = "F16"
ADAPTER = "adapter.gguf"


@dataclass(frozen=True)
class ExportedModel:
    """The files of one export, in one folder; of a pair, the base's GGUF lies elsewhere.

    Attributes:
        gguf: the file that serves; with an adapter, the base's.
        full: the F16 file from which `gguf` was quantized; `gguf` itself if it was not quantized here.
        quantization: llama.cpp's type that was asked for.
        tensor_types: number of tensors of each type in `gguf`; more types than one where rows do not fit the blocks.
        seconds: wall time of each step.
        adapter: the LoRA adapter that serves over `gguf`.
        reference: the answers of the base with its adapter, unmerged, in transformers.
    """

    gguf: Path
    full: Path
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
    questions: Questions | None = None,
) -> ExportedModel:
    """Merge, convert and quantize; every step in a process of its own.

    Args:
        base_folder: the base model, as Hugging Face lays it out.
        adapter_folder: the trained adapter; None exports the base itself, the baseline.
        out_folder: gets `model-F16.gguf` and `model-<quantization>.gguf`.
        quantization: a type of ExportSettings.quantization.
        on_step: called with the name of each step before it begins: merge, convert, quantize.
        questions: for the base with its adapter, before they are merged; gives `reference`.

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
    reference: list[str] = []
    full, gguf = out_folder / f"model-{F16}.gguf", out_folder / f"model-{quantization}.gguf"
    try:
        if adapter_folder is not None:
            adapter = adapter_folder
            step("merge", lambda: reference.extend(merge(base_folder, adapter, merged, questions)))
        step(
            "convert", lambda: convert(merged if adapter_folder is not None else base_folder, full, "f16", base_folder)
        )
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    if quantization != F16:
        step("quantize", lambda: quantize(full, gguf, quantization))
    return ExportedModel(gguf, full, quantization, tensor_types(gguf), seconds, reference=tuple(reference))


def export_adapter(
    base_folder: Path,
    adapter_folder: Path,
    base_gguf: Path,
    out_folder: Path,
    quantization: str = "Q4_K_M",
    on_step: Callable[[str], None] = lambda _: None,
    questions: Questions | None = None,
) -> ExportedModel:
    """Convert the adapter alone; nothing is merged.

    Args:
        base_gguf: the base model's GGUF, of type `quantization`, over which the adapter will serve.
        out_folder: gets `adapter.gguf`.
        questions: for the base with its adapter; gives `reference`.

    Raises:
        ExportError: a step failed; nothing half-written is left.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    reference: list[str] = []
    if questions is not None:
        on_step("ask")
        began = time.monotonic()
        reference = merge(base_folder, adapter_folder, None, questions)
        seconds["ask"] = time.monotonic() - began
    on_step("convert the adapter")
    began = time.monotonic()
    convert_adapter(adapter_folder, base_folder, out_folder / ADAPTER)
    seconds["convert the adapter"] = time.monotonic() - began
    return ExportedModel(
        base_gguf, base_gguf, quantization, tensor_types(base_gguf), seconds, out_folder / ADAPTER, tuple(reference)
    )
