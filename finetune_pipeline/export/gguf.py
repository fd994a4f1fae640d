"""Hugging Face folder to GGUF by llama.cpp's own converter, and GGUF to a smaller type by its own quantizer."""

import os
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from finetune_pipeline.export.process import ExportError, run, run_step
from finetune_pipeline.export.tokenizer import gguf_name, stage

_CONVERTER = "convert_hf_to_gguf.py"
_ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
OutType = Literal["f16", "f32", "bf16"]


def converter_folder() -> Path:
    """The folder of llama.cpp's converter: `FINETUNE_LLAMA_CPP`, by default share/llama.cpp of the virtualenv.

    Raises:
        ExportError: it is not there, or belongs to another version than the installed llama-cpp-python.
    """
    given = os.environ.get("FINETUNE_LLAMA_CPP")
    folder = Path(given).expanduser() if given else Path(sys.prefix) / "share" / "llama.cpp"
    if not (folder / _CONVERTER).is_file():
        raise ExportError(f'llama.cpp\'s converter is not in {folder}; run "make setup", or set FINETUNE_LLAMA_CPP')
    version = folder / "VERSION"
    installed = metadata.version("llama-cpp-python")
    if version.is_file() and version.read_text().strip() != installed:  # one of one's own has no VERSION
        raise ExportError(
            f"the converter in {folder} is of llama-cpp-python {version.read_text().strip()}, but {installed} is "
            'installed, and may not read what it writes; run "make setup" again'
        )
    return folder


def convert(folder: Path, out_gguf: Path, outtype: OutType = "f16", base_folder: Path | None = None) -> None:
    """Convert a Hugging Face folder to a GGUF, which is there complete or not at all.

    Args:
        folder: the model in Hugging Face's layout.
        out_gguf: the file to write.
        outtype: type of its weights.
        base_folder: the base model, from which the GGUF gets its chat template and name; default the folder itself.

    Raises:
        ExportError: the converter is missing or refuses the model; with what it said.
    """
    base = base_folder or folder
    out_gguf.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=out_gguf.parent) as temporary:
        staged = Path(temporary) / "model"
        stage(folder, base, staged)
        arguments = [str(staged), "--outtype", outtype, "--model-name", gguf_name(base)]
        _convert(_CONVERTER, arguments, out_gguf, f"converting {folder} to GGUF")


def convert_adapter(adapter_folder: Path, base_folder: Path, out_gguf: Path, outtype: OutType = "f16") -> None:
    """Convert a LoRA adapter to a GGUF that is applied over its base's, and is there complete or not at all.

    Raises:
        ExportError: the converter is missing or refuses the adapter; with what it said.
    """
    arguments = [str(adapter_folder), "--base", str(base_folder), "--outtype", outtype]
    _convert(_ADAPTER_CONVERTER, arguments, out_gguf, f"converting the adapter {adapter_folder} to GGUF")


def _convert(script: str, arguments: list[str], out_gguf: Path, what: str) -> None:
    converter = converter_folder()
    temporary = _temporary(out_gguf)
    command = [sys.executable, str(converter / script), *arguments, "--outfile", str(temporary)]
    path = os.pathsep.join(filter(None, [str(converter / "gguf-py"), os.environ.get("PYTHONPATH")]))
    try:
        run(command, what, {"PYTHONPATH": path})
        temporary.replace(out_gguf)
    finally:
        temporary.unlink(missing_ok=True)


def quantize(in_gguf: Path, out_gguf: Path, kind: str) -> None:
    """Quantise a GGUF to a type of ExportSettings.quantization; the file is there complete or not at all.

    Rows whose length is no multiple of the type's block (256 for the K types, 32 for the others) are kept in a larger
    type by llama.cpp; `tensor_types` counts what became of them.

    Raises:
        ExportError: llama.cpp refuses or crashes.
    """
    temporary = _temporary(out_gguf)
    try:
        run_step("quantize", [str(in_gguf), str(temporary), kind], f"quantizing {in_gguf} to {kind}")
        temporary.replace(out_gguf)
    finally:
        temporary.unlink(missing_ok=True)


def quantize_here(source: Path, out: Path, kind: str) -> int:
    """The quantization itself, in this process; llama.cpp's own status, 0 when it was done."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = os.cpu_count() or 1
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), parameters))


def tensor_types(gguf: Path) -> dict[str, int]:
    """How many tensors of two or more dimensions have which type: {"Q4_K": 25, "Q6_K": 4}."""
    from gguf import GGUFReader

    tensors = GGUFReader(gguf).tensors
    return dict(Counter(tensor.tensor_type.name for tensor in tensors if sum(n > 1 for n in tensor.shape) > 1))


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp.gguf")
