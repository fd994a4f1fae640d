"""Checks that a folder is a base model that can be trained, before anything heavy is loaded."""

import json
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.model import trained_tokens

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def check_base_model(folder: Path) -> None:
    """Raise TrainingError unless `folder` holds a config, safetensors weights, a tokenizer and a chat template."""
    if not folder.is_dir():
        raise TrainingError(
            f"the base model {folder} does not exist; set base_model to a folder with config.json and safetensors "
            "weights, or to a Hugging Face id"
        )
    if not (folder / "config.json").is_file():
        raise TrainingError(f"{folder} has no config.json, so it is not a Hugging Face model folder; check base_model")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise TrainingError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
    elif not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            raise TrainingError(
                f"{folder} has its weights only as pickle ({', '.join(pickled)}), which can run code when it is read "
                "and is refused; take a safetensors version of the model"
            )
        raise TrainingError(f"{folder} has no safetensors weights; download the model again")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise TrainingError(f"{folder} has no tokenizer ({' or '.join(_TOKENIZERS)}); copy it from the original model")
    config = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    )
    if not has_template:
        raise TrainingError(
            f"{folder} has no chat template, which marks where a prompt ends and a completion begins; use an "
            "instruction-tuned model, or put a chat_template.jinja into the folder"
        )


def check_trained_tokens(folder: Path, settings: TrainingSettings) -> None:
    """Raise TrainingError if a token whose embedding is to be trained is not in the model; reads its config only."""
    config = folder / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    vocabulary = {**known, **known.get("text_config", {})}.get("vocab_size")
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
