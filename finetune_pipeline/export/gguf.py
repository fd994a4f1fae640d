"""Convert a Hugging Face folder to GGUF with llama.cpp's converter, and quantize a GGUF."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Return the folder of llama.cpp's converter: `FINETUNE_LLAMA_CPP`, or share/llama.cpp of the virtualenv.

    Raises:
        ExportError: it does not exist, or belongs to another version than the installed llama-cpp-python.
    """
    configured = os.environ.get("FINETUNE_LLAMA_CPP")
    folder = Path(configured).expanduser() if configured else Path(sys.prefix) / "share" / "llama.cpp"
    if not (folder / _CONVERTER).is_file():
        raise ExportError(f'llama.cpp\'s converter is not in {folder}; run "make setup", or set FINETUNE_LLAMA_CPP')
    version = folder / "VERSION"  # the user's own converter has none
    installed = metadata.version("llama-cpp-python")
    if version.is_file() and version.read_text().strip() != installed:
        raise ExportError(
            f"the converter in {folder} belongs to llama-cpp-python {version.read_text().strip()}, but {installed} is "
            'installed and may not read its files; run "make setup" again'
        )
    return folder


def convert(folder: Path, out_gguf: Path, outtype: OutType = "f16", base_folder: Path | None = None) -> None:
    """Convert a Hugging Face folder to a GGUF. The file is complete, or not written at all.

    Args:
        folder: the model in Hugging Face's layout.
        out_gguf: the file to write.
        outtype: type of the weights.
        base_folder: the base model, for chat template and name; default the folder itself.

    Raises:
        ExportError: the converter is missing or failed; with its output.
    """
    base = base_folder or folder
    out_gguf.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=out_gguf.parent) as temporary:
        staged = Path(temporary) / "model"
        stage(folder, base, staged)
        arguments = [str(staged), "--outtype", outtype, "--model-name", gguf_name(base)]
        _convert(_CONVERTER, arguments, out_gguf, f"converting {folder} to GGUF")


def convert_adapter(adapter_folder: Path, base_folder: Path, out_gguf: Path) -> None:
    """Convert a LoRA adapter to a GGUF, to be applied to its base's. The file is complete, or not written at all.

    Raises:
        ExportError: the converter is missing or failed; with its output.
    """
    arguments = [str(adapter_folder), "--base", str(base_folder), "--outtype", "f16"]
    _convert(_ADAPTER_CONVERTER, arguments, out_gguf, f"converting the adapter {adapter_folder} to GGUF")


def _convert(script: str, arguments: list[str], out_gguf: Path, what: str) -> None:
    converter = converter_folder()
    path = os.pathsep.join(filter(None, [str(converter / "gguf-py"), os.environ.get("PYTHONPATH")]))
    with _complete_file(out_gguf) as temporary:
        command = [sys.executable, str(converter / script), *arguments, "--outfile", str(temporary)]
        run(command, what, {"PYTHONPATH": path})


def quantize(in_gguf: Path, out_gguf: Path, kind: str) -> None:
    """Quantize a GGUF to a type of ExportSettings.quantization. The file is complete, or not written at all.

    llama.cpp keeps rows in a larger type if their length is not a multiple of the type's block: 256 for the K types,
    32 for the others.

    Raises:
        ExportError: llama.cpp failed or crashed.
    """
    with _complete_file(out_gguf) as temporary:
        run_step("quantize", [str(in_gguf), str(temporary), kind], f"quantizing {in_gguf} to {kind}")


def quantize_here(source: Path, out: Path, kind: str) -> int:
    """Quantize in this process and return llama.cpp's status; 0 is success."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = os.cpu_count() or 1
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), parameters))


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that is renamed to `path` at the end, and deleted after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.gguf")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
