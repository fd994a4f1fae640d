"""Convert a Hugging Face folder to GGUF with llama.cpp's converter, and quantize a GGUF."""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from finetune_pipeline.export.process import ExportError, run, run_step
from finetune_pipeline.export.special_tokens import read_special_tokens
from finetune_pipeline.export.tokenizer import gguf_name, stage

CONVERTER = "convert_hf_to_gguf.py"
_ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
OutType = Literal["f16", "f32", "bf16"]


def converter_folder() -> Path:
    """Return the folder of llama.cpp's converter: `FINETUNE_LLAMA_CPP`, or share/llama.cpp of the virtualenv.

    Raises:
        ExportError: it does not exist, or belongs to another version than the installed llama-cpp-python.
    """
    configured = os.environ.get("FINETUNE_LLAMA_CPP")
    folder = Path(configured).expanduser() if configured else Path(sys.prefix) / "share" / "llama.cpp"
    if not (folder / CONVERTER).is_file():
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
        arguments = [str(base), str(converter_folder() / CONVERTER), str(staged)]
        arguments += ["--outtype", outtype, "--model-name", gguf_name(base)]
        with _complete_file(out_gguf) as file:
            arguments += ["--outfile", str(file)]
            run_step("convert", arguments, f"converting {folder} to GGUF", converter_environment())


def convert_adapter(adapter_folder: Path, base_folder: Path, out_gguf: Path) -> None:
    """Convert a LoRA adapter to a GGUF, to be applied to its base's. The file is complete, or not written at all.

    Raises:
        ExportError: the converter is missing or failed; with its output.
    """
    command = [sys.executable, str(converter_folder() / _ADAPTER_CONVERTER), str(adapter_folder)]
    with _complete_file(out_gguf) as file:
        command += ["--base", str(base_folder), "--outtype", "f16", "--outfile", str(file)]
        run(command, f"converting the adapter {adapter_folder} to GGUF", converter_environment())


def convert_here(base_folder: Path, script: Path, arguments: list[str]) -> None:
    """Run llama.cpp's converter in this process, and declare the base model's special tokens in the GGUF.

    The converter cannot be told of them, so its writer adds them before it writes the metadata.
    """
    import gguf

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def write_header_to_file(self, path: Path | None = None) -> None:
            read_special_tokens(base_folder).declare(self)
            super().write_header_to_file(path)

    gguf.GGUFWriter = Writer
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def converter_environment() -> dict[str, str]:
    """Return the variables with which the converter finds the version of `gguf` that belongs to it."""
    folder = str(converter_folder() / "gguf-py")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}


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
