"""The folder of a base model, and the hash of its weights, configuration and tokenizer."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_file_cached, hash_of
from finetune_pipeline.export.gguf_base import cached_folder, dequantized, is_gguf
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.manifests import TOKENIZER_FILES
from finetune_pipeline.settings import project_path
from finetune_pipeline.wording import first_line

CONFIG_FILES = ("config.json", "generation_config.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_METADATA_BYTES = 100_000
_QUANTIZED_NAME = re.compile(r"[-_.](bnb[-_.]?[48]bit|[48]bit|gptq|awq|int[48])(?=$|[-_.])", re.IGNORECASE)
_ORIGINAL = (
    "set base_model to the model that it was made from (its name without that ending), and training.adapter: qlora to "
    "train with its weights in 4 bits"
)


def resolve_base_model(name: str, files: tuple[str, ...] = (*_WEIGHTS, *CONFIG_FILES, *TOKENIZER_FILES)) -> Path:
    """Return the folder of a base model.

    Args:
        name: a folder, absolute or relative to the project; a GGUF, which is dequantized once into a folder of the
            cache; or a Hugging Face id, which is downloaded once into Hugging Face's cache (safetensors, JSON and
            tokenizer files only).
        files: patterns of the files to download.

    Raises:
        ExportError: the folder does not exist, the GGUF cannot be used, the weights are quantized, or the model is not
            in the cache and cannot be downloaded.
    """
    folder = project_path(name)
    if folder.is_dir():
        _refuse_quantized(name, folder)
        return folder
    if is_gguf(folder):
        return dequantized(folder)
    _check_is_id(name, folder)
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            # The configuration alone, which says whether the weights can be used, before gigabytes of them.
            _refuse_quantized(name, Path(huggingface_hub.snapshot_download(name, allow_patterns=[*CONFIG_FILES])))
        downloaded = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"{type(error).__name__}: {first_line(str(error))}"
        raise ExportError(
            f"the base model {name!r} is neither a folder ({folder}), nor in the cache ({HF_HUB_CACHE}), nor could it "
            f"be downloaded from Hugging Face ({reason}). Connect to the network once and "
            "run again, log in with `hf auth login` if the model is gated, or set base_model to a folder"
        ) from error
    _refuse_quantized(name, downloaded)
    return downloaded


def _check_is_id(name: str, folder: Path) -> None:
    if folder.is_file():
        raise ExportError(f"base_model: {folder} is not a GGUF; name a GGUF, a folder or a Hugging Face id")
    # "owner/model" and the old one-word ids ("gpt2") are Hugging Face ids, unless "owner" is a folder here.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir())
    if is_path or name.endswith(".gguf"):
        what = "file" if name.endswith(".gguf") else "folder"
        raise ExportError(f"base_model: the {what} {folder} does not exist; correct it")
    quantized = _QUANTIZED_NAME.search(name)
    if quantized:
        raise ExportError(
            f"base_model: {name} has quantized weights by its name ({quantized[0].lstrip('-_.')}), and nothing was "
            f"downloaded. An adapter has to be merged into full precision: {_ORIGINAL}"
        )


def _refuse_quantized(name: str, folder: Path) -> None:
    """Raise an error if the weights in a folder are quantized, by its config.json."""
    config = folder / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") if config.is_file() else None
    except (OSError, ValueError, AttributeError):  # `check_base_model` says what is wrong with the file
        return
    if isinstance(found, dict):
        method = found.get("quant_method") or "an unnamed method"
        bits = "4-bit " if found.get("load_in_4bit") else "8-bit " if found.get("load_in_8bit") else ""
        raise ExportError(
            f"base_model: the weights of {name} are quantized ({bits}{method}, by {config}). An adapter has to be "
            f"merged into full precision: {_ORIGINAL}"
        )


def check_base_name(name: str) -> None:
    """Check the name of a base model, as far as that is possible without downloading or dequantizing anything.

    Raises:
        ExportError: it is neither the folder or GGUF of a model nor the form of a Hugging Face id, or its weights are
            quantized.
    """
    folder = project_path(name)
    if is_gguf(folder):
        return
    if not folder.is_dir():
        _check_is_id(name, folder)
    elif not (folder / "config.json").is_file():
        raise ExportError(f"base_model: the folder {folder} has no config.json, so it is no base model; correct it")
    else:
        _refuse_quantized(name, folder)


def dequantized_base(name: str) -> str:
    """Return the folder of a GGUF's model, see `dequantized`; any other name of a base model unchanged."""
    path = project_path(name)
    return str(dequantized(path)) if is_gguf(path) else name


def local_tokenizer(name: str) -> Path | None:
    """Return the folder of a base model, or of its files in a cache; None if there is no tokenizer in it.

    Nothing is downloaded, and no GGUF is dequantized.
    """
    folder = project_path(name)
    if is_gguf(folder):
        folder = cached_folder(folder)
    elif not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")) else None


def base_stamp(name: str) -> dict[str, Any]:
    """Return what identifies a base model without reading its weights: small files by hash, weights by size.

    Of a GGUF, its first bytes are hashed, which are the metadata. A Hugging Face id stands for itself; nothing is
    downloaded.
    """
    folder = project_path(name)
    if is_gguf(folder):
        with folder.open("rb") as file:
            metadata = hashlib.sha256(file.read(_METADATA_BYTES)).hexdigest()
        return {"name": name, "size": folder.stat().st_size, "metadata": metadata}
    weights = {path.name: path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern)}
    small = [folder / file for file in (*CONFIG_FILES, *TOKENIZER_FILES) if (folder / file).is_file()]
    return {"name": name, **weights, **{path.name: hash_file_cached(path) for path in small}}


def base_hash(folder: Path) -> str:
    """Return the SHA-256 (hex) of a base model's weights, configuration and tokenizer files.

    A file with unchanged size and time is not read again.
    """
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in weights):
        raise ExportError(f"{folder} has no safetensors weights, so it is not a base model; correct base_model")
    others = [folder / name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (folder / name).is_file()]
    return hash_of({path.name: hash_file_cached(path) for path in (*weights, *others)})


def hub_id(folder: Path) -> str | None:
    """Return the Hugging Face id of a base model in Hugging Face's cache; None for any other folder.

    >>> hub_id(Path("/cache/models--owner--name/snapshots/0123"))
    'owner/name'
    """
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else None
