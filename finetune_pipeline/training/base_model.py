"""Checks that a folder is a base model that can be trained, before anything heavy is loaded."""

import json
from pathlib import Path
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.model import trained_tokens
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline.wording import counted

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights in one file; or the index that names the file of each tensor."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
)  # fmt: skip
"""Files that hold a JSON object, if they exist."""
_LFS_POINTER = b"version https://git-lfs"


def check_base_model(folder: Path) -> None:
    """Raise TrainingError unless `folder` holds a config, complete safetensors weights, a tokenizer and a template.

    Of the weights, only the headers are read: they say which tensors a file holds and how long it is.
    """
    if not folder.is_dir():
        raise TrainingError(
            f"the base model {folder} does not exist; set base_model to a folder with config.json and safetensors "
            "weights, or to a Hugging Face id"
        )
    if not (folder / "config.json").is_file():
        raise TrainingError(f"{folder} has no config.json, so it is not a Hugging Face model folder; check base_model")
    documents = {name: _read_object(folder / name) for name in _OBJECTS if (folder / name).is_file()}
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise TrainingError(f"{folder} has no tokenizer ({' or '.join(_TOKENIZERS)}); copy it from the original model")
    templates = _template_names(folder, documents.get("tokenizer_config.json", {}).get("chat_template"))
    if not templates:
        raise TrainingError(
            f"{folder} has no chat template, which marks where a prompt ends and a completion begins; use an "
            "instruction-tuned model, or put a chat_template.jinja into the folder"
        )
    if "default" not in templates:
        raise TrainingError(
            f"{folder} has only chat templates for special purposes ({', '.join(templates)}), and none with the name "
            "default, which conversations are rendered with; put the one to use into chat_template.jinja in the folder"
        )


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        TrainingError: it cannot be read, or is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(document, dict):
        raise TrainingError(f"{path} holds {short_repr(document)} instead of an object; download the model again")
    return document


def _check_weights(folder: Path) -> None:
    """Raise TrainingError if transformers would not find the weights, or a file of them is damaged or incomplete."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    dangling = [path for path in files if not path.exists()]  # a cache whose files were deleted
    if dangling:
        raise TrainingError(f"{dangling[0]} is a link to a file that does not exist; download the model again")
    if not index.is_file() and not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled and not files:
            raise TrainingError(
                f"{folder} has its weights only as pickle ({', '.join(pickled)}), which can run code when it is read "
                "and is refused; take a safetensors version of the model"
            )
        found = f"has neither {WEIGHTS} nor {INDEX}, only {', '.join(path.name for path in files)}"
        raise TrainingError(
            f"{folder} {found if files else 'has no safetensors weights'}; download the model again, or check "
            "base_model"
        )
    shards: dict[str, set[str]] = {}
    if index.is_file():
        named = _read_object(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise TrainingError(f"{index} has no weight_map, which names the file of each tensor; download it again")
        for tensor, file in named.items():
            shards.setdefault(str(file), set()).add(tensor)
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise TrainingError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
    for path in files:
        lost = sorted(shards.get(path.name, set()) - _tensor_names(path))
        if lost:
            raise TrainingError(
                f"{path} lacks {counted(len(lost), 'tensor')} that {INDEX} says it has, such as {lost[0]}; the files "
                "are of different downloads: download the model again"
            )


def _tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        TrainingError: it is damaged, or shorter or longer than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        if pointer:
            raise TrainingError(
                f"{path} is a pointer of Git LFS instead of the weights; run `git lfs pull` in {path.parent}"
            )
        with safe_open(path, framework="np") as weights:
            return set(weights.keys())
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or incomplete ({error}); download the model again"
        ) from error


def _template_names(folder: Path, configured: Any) -> list[str]:
    """Return the names of a folder's chat templates as transformers resolves them; a single one is the default.

    Args:
        configured: `chat_template` of tokenizer_config.json, which files of their own take precedence over.
    """
    names = ["default"] if (folder / "chat_template.jinja").is_file() else []
    names += sorted(path.stem for path in (folder / "additional_chat_templates").glob("*.jinja"))
    if names:
        return names
    if isinstance(configured, list):
        return [str(one.get("name")) for one in configured if isinstance(one, dict)]
    return ["default"] if configured else []


def check_trained_tokens(folder: Path, settings: TrainingSettings) -> None:
    """Raise TrainingError if a token whose embedding is to be trained is not in the model; reads its config only."""
    config = folder / "config.json"
    known = _read_object(config) if config.is_file() else {}
    vocabulary = {**known, **(known.get("text_config") or {})}.get("vocab_size")
    if vocabulary is not None:
        trained_tokens(settings, vocabulary)


def check_target_modules(folder: Path, settings: TrainingSettings) -> None:
    """Raise TrainingError for LoRA on tied embeddings or their output layer.

    It would be merged into both, and a different model would serve than was trained. Layer names and tying differ by
    architecture, so this builds the model without weights; it loads torch and transformers.
    """
    if settings.lora_target_modules == "all-linear":  # PEFT excludes the output layer
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model.tie_weights()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    tied = [
        target for target in settings.lora_target_modules if any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if tied:
        raise TrainingError(
            f"lora_target_modules names {', '.join(tied)}, but the output layer of the base model is its embeddings "
            "(tie_word_embeddings): LoRA on one would be merged into both, and a different model would serve than was "
            "trained. Leave it out; trainable_token_indices trains the embeddings of single tokens"
        )
