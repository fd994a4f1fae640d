"""A job in Axolotl's own words: its axolotl.yaml, and the examples in the form that Axolotl reads.

The keys are those of Axolotl's schema (AxolotlInputConfig); scripts/axolotl_env.sh makes an environment in which a
test holds them against it.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.conversations import (
    Conversation,
    Rejected,
    conversations,
    messages_of,
    provenance,
    rejections,
)
from finetune_pipeline.training.data import labels_of, nothing_left, replayed
from finetune_pipeline.training.job import CHECKPOINTS, JobConfig, Rejection, TrainingError, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "axolotl"
CONFIG = "axolotl.yaml"
PLUGIN = "axolotl_progress"

_MEASURE_SAMPLE = 256  # training examples on which the loss is measured where there is no validation set
_LOG_POINTS = 50
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class Written:
    """What was written for a job.

    Attributes:
        config: path of axolotl.yaml.
        examples: how many train.
        too_long: how many were left out for having more than max_length tokens.
        tokens: mean tokens of a training example.
        rejections: examples that were excluded because the chat template rejects them.
    """

    config: Path
    examples: int
    too_long: int
    tokens: float
    rejections: tuple[Rejection, ...] = ()


def write(job: JobConfig, checkpoint: Path | None, gpu: bool) -> Written:
    """Write a job's data and configuration into its folder `axolotl`, with the plugin beside them.

    Args:
        job: what to train.
        checkpoint: a whole one to go on from.
        gpu: whether the machine has one; Axolotl's kernels need it.

    Raises:
        TrainingError: the dataset is not there, or nothing of it is short enough.
    """
    import yaml
    from transformers import AutoTokenizer

    folder = job.output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name(f"{PLUGIN}.py"), folder / f"{PLUGIN}.py")
    tokenizer = AutoTokenizer.from_pretrained(job.base_model, trust_remote_code=False)
    whole, rejected = _rows(job, "train", tokenizer)
    train = _short_enough(whole, job)
    too_long = len(whole) - len(train)
    if all(example.replayed for example in train):
        raise TrainingError(nothing_left(too_long, len(whole), job.settings.max_length, rejected))
    held_out, rejected_too = _rows(job, "validation", tokenizer)
    validation = _short_enough(held_out, job)
    _write_lines(folder / "train.jsonl", train)
    _write_lines(folder / "measure.jsonl", validation or train[:_MEASURE_SAMPLE])
    config = configuration(job, len(train), checkpoint, gpu)
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    tokens = sum(example.length for example in train) / len(train)
    return Written(folder / CONFIG, len(train), too_long, tokens, rejected + rejected_too)


def configuration(job: JobConfig, examples: int, checkpoint: Path | None, gpu: bool) -> dict[str, Any]:
    """The contents of axolotl.yaml.

    Args:
        job: what to train.
        examples: how many there are.
        checkpoint: a whole one to go on from.
        gpu: whether the machine has one.
    """
    settings = job.settings
    folder = job.output / FOLDER
    updates = math.ceil(
        math.ceil(examples / settings.per_device_train_batch_size) / settings.gradient_accumulation_steps
    )
    steps = max(math.ceil(updates * settings.num_train_epochs), 1)
    kind = _dataset_kind(settings)
    config = {
        "base_model": str(job.base_model),
        "trust_remote_code": False,
        "plugins": [f"{PLUGIN}.ProgressPlugin"],
        "datasets": [{"path": str(folder / "train.jsonl"), **kind}],
        "test_datasets": [{"path": str(folder / "measure.jsonl"), "split": "train", **kind}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(job.output / CHECKPOINTS),
        **_adapter(settings),
        **_method(settings),
        "sequence_len": settings.max_length,
        "excess_length_strategy": "drop",
        "sample_packing": False,  # packed batches would make other steps of the same settings
        "pad_to_sequence_len": False,
        "train_on_inputs": False,
        "micro_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "num_epochs": settings.num_train_epochs,
        "optimizer": "adamw_torch",
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": settings.warmup_steps if settings.warmup_steps < 1 else None,
        "warmup_steps": int(settings.warmup_steps) if settings.warmup_steps >= 1 else None,
        "weight_decay": settings.weight_decay,
        "bf16": "auto" if gpu and settings.bf16 else False,
        "fp16": None if gpu and settings.bf16 else False,
        "seed": settings.seed,
        "logging_steps": math.ceil(steps / _LOG_POINTS),
        "save_steps": steps_of(settings.save_steps, steps),
        "eval_steps": steps_of(settings.save_steps, steps),
        "save_total_limit": 2,
        # Else Axolotl does so unasked for SFT; for DPO and KTO it never does.
        "load_best_model_at_end": settings.method == "sft",
        "early_stopping_patience": settings.early_stopping_patience,
        "resume_from_checkpoint": str(checkpoint) if checkpoint else None,
        **_trackers(settings, job),
        **({} if gpu else dict.fromkeys(_KERNELS, False)),  # they are Triton's
    }
    return {name: value for name, value in config.items() if value is not None}


def _adapter(settings: TrainingSettings) -> dict[str, Any]:
    every = settings.lora_target_modules == "all-linear"
    return {
        "adapter": settings.adapter,
        "load_in_4bit": settings.adapter == "qlora",
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_target_linear": True if every else None,
        "lora_target_modules": None if every else list(settings.lora_target_modules),
        "peft_trainable_token_indices": [i for i in settings.trainable_token_indices if isinstance(i, int)] or None,
    }


def _method(settings: TrainingSettings) -> dict[str, Any]:
    if settings.method == "sft":
        return {"group_by_length": True}
    method: dict[str, Any] = {"rl": settings.method, "rl_beta": settings.beta}
    if settings.method == "kto":
        # Axolotl's KTO trainer is told nothing of unused columns, and its collator needs them all.
        return {**method, "remove_unused_columns": False}
    losses = list(settings.loss_type)
    return {**method, "dpo_loss_type": losses, "dpo_loss_weights": list(settings.loss_weights or [1.0] * len(losses))}


def _dataset_kind(settings: TrainingSettings) -> dict[str, Any]:
    """How Axolotl reads the lines that `_rows` makes."""
    if settings.method == "sft":
        return {}  # tokenized already, which Axolotl detects by the columns
    if settings.method == "dpo":
        return {"type": "passthrough"}
    fields = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
    formats = {"prompt_format": "{prompt}", "completion_format": "{completion}"}
    return {"type": {**fields, **formats}}


def _trackers(settings: TrainingSettings, job: JobConfig) -> dict[str, Any]:
    project = {"wandb_project": "finetune-pipeline"} if "wandb" in settings.report_to else {}
    return {**{f"use_{name}": True for name in settings.report_to}, **project}


@dataclass(frozen=True)
class _Example:
    line: dict[str, Any]  # as Axolotl reads it
    length: int  # tokens, counted as by peft: with the answer that has more of them
    replayed: bool


def _rows(
    job: JobConfig, split: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[_Example], tuple[Rejection, ...]]:
    """Return a split's examples: for sft tokens as with peft, for dpo and kto texts with the template applied."""
    from datasets import load_from_disk

    method = job.settings.method
    folder = job.dataset if method == "sft" else job.preferences
    if folder is None or not (folder / "dataset_dict.json").is_file():
        raise TrainingError(f"{folder} holds no saved DatasetDict for {method}; make the dataset again")
    state = folder / split / "state.json"
    if not state.is_file() or not json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        return [], ()
    rows = list(load_from_disk(str(folder / split)))
    answers = ("chosen", "rejected") if method == "dpo" else ("completion",)
    examples, rejected = [], []
    for row, found in zip(rows, conversations(rows, answers, job.system_prompt, tokenizer), strict=True):
        if isinstance(found, Rejected):
            rejected.append(found)
        elif method == "sft":
            examples.append(_Example(_tokens(found, tokenizer), found.length, replayed(row)))
        elif found.holds_control_tokens:
            why = f"it contains a control token of the model, which axolotl cannot read as text by {method} (peft can)"
            rejected.append(Rejected(why, provenance(row)))
        else:
            line = _texts(row, answers, job, tokenizer) | ({"label": row["label"]} if "label" in row else {})
            examples.append(_Example(line, found.length, replayed(row)))
    return examples, rejections(rejected, len(rows), split)


def _tokens(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the tokens as peft trains on them, up to the answer's end token, as Axolotl learns nothing after it."""
    ids = conversation.answers["completion"]
    while tokenizer.decode(ids[-1:]).isspace():
        ids = ids[:-1]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels_of(conversation.prompt, ids)}


def _texts(
    row: dict[str, Any], answers: Iterable[str], job: JobConfig, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """The prompt, and each answer without it.

    A template may open with more than a finished turn has, as `<think>`; TRL leaves out what they do not share too.
    """
    asked = messages_of(row, job.system_prompt)
    before = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    whole = {
        name: str(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": row[name]}], tokenize=False))
        for name in answers
    }
    prompt = os.path.commonprefix([before, *whole.values()])  # noqa: RUF071  # of texts, by character
    rest = {name: text[len(prompt) :].rstrip() for name, text in whole.items()}
    return {"prompt": _without_start(prompt, tokenizer), **rest}


def _without_start(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Without the start token that the template wrote, where the tokenizer adds one itself."""
    start = tokenizer.bos_token
    adds = start is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(start) if adds else text


def _short_enough(examples: list[_Example], job: JobConfig) -> list[_Example]:
    return [example for example in examples if example.length <= job.settings.max_length]


def _write_lines(path: Path, examples: Iterable[_Example]) -> None:
    write_text(path, "".join(f"{json.dumps(example.line, ensure_ascii=False)}\n" for example in examples))
