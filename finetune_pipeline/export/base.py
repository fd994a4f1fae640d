"""Where a base model lies, and what it is: the hash of its weights, configuration and tokenizer."""

from pathlib import Path

from finetune_pipeline.artifacts import hash_file_cached, hash_of
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.settings import project_path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer is read from; copied as it is beside merged weights, never saved anew."""

CONFIG_FILES = ("config.json", "generation_config.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def resolve_base_model(name: str, files: tuple[str, ...] = (*_WEIGHTS, *CONFIG_FILES, *TOKENIZER_FILES)) -> Path:
    """The folder of a base model.

    Args:
        name: a folder, absolute or relative to the project; or a Hugging Face id, which is downloaded once into
            Hugging Face's cache (safetensors, JSON and tokenizer files only).
        files: patterns of what is downloaded.

    Raises:
        ExportError: there is no such folder, or the model can neither be found in the cache nor downloaded.
    """
    folder = project_path(name)
    if folder.is_dir():
        return folder
    if _looks_like_a_path(name):
        raise ExportError(f"the base model {name} is not there: {folder} does not exist; correct base_model")
    return _download(name, files)


def _looks_like_a_path(name: str) -> bool:
    # "owner/model" and the old one-word ids ("gpt2") are the hub's, unless the first part is a folder here.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    return "/" in name and project_path(name).parent.is_dir()


def _download(name: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the base model {name!r} is neither a folder ({project_path(name)}), nor in the cache ({HF_HUB_CACHE}), "
            f"nor could it be downloaded from Hugging Face ({type(error).__name__}: {_first_line(error)}). Connect to "
            "the network once and run again, log in with `hf auth login` if the model is gated, or set base_model to "
            "a folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def base_files(folder: Path) -> list[Path]:
    """The files that a base model consists of: weights, configuration, tokenizer; not its README nor data beside it."""
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    others = [folder / name for name in (*CONFIG_FILES, *TOKENIZER_FILES)]
    return sorted({*weights, *(path for path in others if path.is_file())})


def base_hash(folder: Path) -> str:
    """SHA-256 (hex) of what a base model is; a file that has kept its size and time is not read again."""
    files = base_files(folder)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ExportError(f"{folder} has no safetensors weights, so it is no base model; check base_model")
    return hash_of({path.name: hash_file_cached(path) for path in files})
