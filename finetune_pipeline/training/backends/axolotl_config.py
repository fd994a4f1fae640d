"""A job as Axolotl reads it: its axolotl.yaml, and the examples in Axolotl's formats.

The keys are those of Axolotl's schema (AxolotlInputConfig); scripts/axolotl_env.sh makes an environment in which a test
checks them against it.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import new_file, write_text
from finetune_pipeline.inference.chat_template import NO_REASONING
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.training.conversations import (
    RejectedRow,
    TokenizedRow,
    count_rejections,
    messages_of,
    provenance_of,
    tokenize_rows,
)
from finetune_pipeline.training.job import CHECKPOINTS, JobConfig, Rejection, TrainingError, steps_of
from finetune_pipeline.training.tokenized_data import LOSS_SAMPLE, data_files, is_replayed, nothing_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "axolotl"
CONFIG = "axolotl.yaml"  # in FOLDER
PLUGIN = "axolotl_progress"

TRAINER_FIELDS = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "lr_scheduler_kwargs", "max_grad_norm", "max_steps", "neftune_noise_alpha",
    "optim_args", "torch_compile",
}  # fmt: skip
"""Fields of `trainer_config` that Axolotl takes, under the same keys."""
LORA_FIELDS = {
    "init_lora_weights": "peft_init_lora_weights",
    "layers_pattern": "peft_layers_pattern",
    "layers_to_transform": "peft_layers_to_transform",
}
"""Fields of `lora_config` that Axolotl takes, with its keys."""

_ROWS_PER_BATCH = 1000
_TRITON_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass
class WrittenSplit:
    """Numbers of examples of a split."""

    examples: int = 0  # written
    replayed: int = 0  # of those, replay data
    too_long: int = 0  # left out for having more than max_length tokens
    tokens: int = 0  # of the written examples
    rejections: tuple[Rejection, ...] = ()  # left out because the chat template rejects them


def write(job: JobConfig, checkpoint: Path | None, gpu: bool) -> WrittenSplit:
    """Write a job's examples and configuration into its folder `axolotl`, with the plugin beside them.

    Args:
        job: what to train.
        checkpoint: a complete one to resume from.
        gpu: whether the machine has one; Axolotl's kernels need it.

    Returns:
        The training split, with the rejections of both splits.

    Raises:
        TrainingError: the dataset is missing, or nothing of it can be trained on.
    """
    import yaml

    folder = job.output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name(f"{PLUGIN}.py"), folder / f"{PLUGIN}.py")
    tokenizer = load_tokenizer(job.base_model)
    train = _write_split(folder / "train.jsonl", job, "train", tokenizer)
    if train.replayed == train.examples:
        accepted = train.examples + train.too_long
        raise TrainingError(nothing_left(train.too_long, accepted, job.settings.max_length, train.rejections))
    validation = _write_split(folder / "validation.jsonl", job, "validation", tokenizer)
    if not validation.examples:
        with (folder / "train.jsonl").open(encoding="utf-8") as lines:
            write_text(folder / "validation.jsonl", "".join(islice(lines, LOSS_SAMPLE)))
    config = configuration(job, train.examples, checkpoint, gpu)
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    train.rejections += validation.rejections
    return train


def configuration(job: JobConfig, examples: int, checkpoint: Path | None, gpu: bool) -> dict[str, Any]:
    """Return the contents of axolotl.yaml for a number of training examples; the rest as for `write`."""
    settings, folder = job.settings, job.output / FOLDER
    batches = math.ceil(examples / settings.per_device_train_batch_size)
    updates = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = settings.trainer_config.get("max_steps") or max(math.ceil(updates * settings.num_train_epochs), 1)
    every = settings.lora_target_modules == "all-linear"
    dataset: dict[str, Any] = {}  # sft: tokenized already, which Axolotl detects by the columns
    method: dict[str, Any] = {"group_by_length": True}
    if settings.method != "sft":
        method = {"rl": settings.method, "rl_beta": settings.beta}
    if settings.method == "dpo":
        dataset = {"type": "passthrough"}
        losses = list(settings.losses)
        method |= {"dpo_loss_type": losses, "dpo_loss_weights": list(settings.loss_weights or [1.0] * len(losses))}
    if settings.method == "kto":
        fields = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
        dataset = {"type": {**fields, "prompt_format": "{prompt}", "completion_format": "{completion}"}}
        # Axolotl does not tell its KTO trainer about unused columns, and the collator needs all of them.
        method["remove_unused_columns"] = False
    config = {
        "base_model": str(job.base_model),
        "trust_remote_code": False,
        "plugins": [f"{PLUGIN}.ProgressPlugin"],
        "datasets": [{"path": str(folder / "train.jsonl"), **dataset}],
        "test_datasets": [{"path": str(folder / "validation.jsonl"), "split": "train", **dataset}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(job.output / CHECKPOINTS),
        "adapter": settings.adapter,
        "load_in_4bit": settings.adapter == "qlora",
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_target_linear": True if every else None,
        "lora_target_modules": None if every else list(settings.lora_target_modules),
        "peft_use_rslora": settings.use_rslora or None,
        "peft_use_dora": settings.use_dora or None,
        "peft_trainable_token_indices": [i for i in settings.trainable_token_indices if isinstance(i, int)] or None,
        **{LORA_FIELDS[name]: value for name, value in settings.lora_config.items()},
        **method,
        "sdp_attention": True if settings.attn_implementation == "sdpa" else None,
        "flash_attention": True if settings.attn_implementation == "flash_attention_2" else None,
        "sequence_len": settings.max_length,
        "excess_length_strategy": "drop",
        "sample_packing": False,  # packed batches would make other steps of the same settings
        "pad_to_sequence_len": False,
        "train_on_inputs": False,
        "micro_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "num_epochs": settings.num_train_epochs,
        "optimizer": settings.optim,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.lr_scheduler_type,
        "warmup_ratio": settings.warmup_steps if settings.warmup_steps < 1 else None,
        "warmup_steps": int(settings.warmup_steps) if settings.warmup_steps >= 1 else None,
        "weight_decay": settings.weight_decay,
        "bf16": "auto" if gpu and settings.bf16 else False,
        "fp16": None if gpu and settings.bf16 else False,
        "seed": settings.seed,
        "logging_steps": steps_of(settings.logging_steps, steps),
        "save_steps": steps_of(settings.save_steps, steps),
        "eval_steps": steps_of(settings.save_steps, steps),
        "save_total_limit": 2,
        # Axolotl's default for SFT; for DPO and KTO it cannot.
        "load_best_model_at_end": settings.method == "sft" and settings.load_best_model_at_end,
        "early_stopping_patience": settings.early_stopping_patience,
        "resume_from_checkpoint": str(checkpoint) if checkpoint else None,
        **{f"use_{name}": True for name in settings.report_to},
        "wandb_project": "finetune-pipeline" if "wandb" in settings.report_to else None,
        **({} if gpu else dict.fromkeys(_TRITON_KERNELS, False)),
        **settings.trainer_config,
    }
    return {name: value for name, value in config.items() if value is not None}


def _write_split(path: Path, job: JobConfig, split: str, tokenizer: "PreTrainedTokenizerBase") -> WrittenSplit:
    """Write a split's examples as JSON lines, batch by batch."""
    counts, rejected, rows = WrittenSplit(), [], 0
    with new_file(path, force=True) as file:
        for row, tokenized in _tokenized_rows(job, split, tokenizer):
            rows += 1
            if isinstance(tokenized, RejectedRow):
                rejected.append(tokenized)
            elif job.settings.method != "sft" and tokenized.holds_control_tokens:
                why = "it contains a control token of the model, which axolotl cannot read as text by "
                rejected.append(RejectedRow(f"{why}{job.settings.method} (peft can)", provenance_of(row)))
            elif tokenized.length > job.settings.max_length:
                counts.too_long += 1
            else:
                sft = job.settings.method == "sft"
                line = _tokens(tokenized, tokenizer) if sft else _texts(row, [*tokenized.conversations], job, tokenizer)
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
                counts.examples += 1
                counts.replayed += is_replayed(row)
                counts.tokens += tokenized.length
    counts.rejections = count_rejections(rejected, rows, split)
    return counts


def _tokenized_rows(
    job: JobConfig, split: str, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[dict[str, Any], TokenizedRow | RejectedRow]]:
    from datasets import load_from_disk

    method = job.settings.method
    folder = job.dataset if method == "sft" else job.preferences
    if folder is None or not (folder / "dataset_dict.json").is_file():
        raise TrainingError(f"{folder} holds no saved DatasetDict for {method}; rebuild the dataset")
    if not data_files(folder / split):
        return
    completions = ("chosen", "rejected") if method == "dpo" else ("completion",)
    for batch in load_from_disk(str(folder / split)).iter(batch_size=_ROWS_PER_BATCH):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield from zip(rows, tokenize_rows(rows, completions, job.system_prompt, tokenizer), strict=True)


def _tokens(row: TokenizedRow, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the token ids as peft trains on them, up to the end token: Axolotl computes no loss after it."""
    ids = row.conversations["completion"]
    while tokenizer.decode(ids[-1:]).isspace():
        ids = ids[:-1]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row.labels()[: len(ids)]}


def _texts(
    row: dict[str, Any], completions: list[str], job: JobConfig, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return the prompt, and each completion without it, with the template applied.

    A generation prompt may have more than a finished turn has, such as `<think>`; what they do not share is left out,
    as TRL does.
    """
    messages = messages_of(row, job.system_prompt)
    render = partial(tokenizer.apply_chat_template, tokenize=False, **NO_REASONING)
    start = str(render(messages, add_generation_prompt=True))
    finished = {name: str(render([*messages, {"role": "assistant", "content": row[name]}])) for name in completions}
    prompt = os.path.commonprefix([start, *finished.values()])  # noqa: RUF071  # of texts, by character
    rest = {name: text[len(prompt) :].rstrip() for name, text in finished.items()}
    bos = tokenizer.bos_token
    if bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(bos)  # the tokenizer adds one itself
    label = {"label": row["label"]} if "label" in row else {}
    return {"prompt": prompt, **rest, **label}
