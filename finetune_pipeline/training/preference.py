"""DPO and KTO by TRL's trainers over a PEFT LoRA adapter.

The reference is the model as it is before the training: the base without its adapter, or, where an adapter is gone on
from, the base with a copy of that one, which TRL names "ref".

DPO (Rafailov et al. 2023, "Direct Preference Optimization") learns from pairs of a corrected and the model's own
answer, KTO (Ethayarajh et al. 2024, "Model Alignment as Prospect Theoretic Optimization") from answers found good and
bad. Neither uses dropout: noise in the policy alone would be taken for its distance from the reference.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.conversations import Conversation, Rejected, conversations, rejections
from finetune_pipeline.training.data import Data, tell_not_validated
from finetune_pipeline.training.job import JobConfig, Rejection, TrainingError
from finetune_pipeline.training.model import with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import DPOTrainer, KTOTrainer

_ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}


def load_preferences(job: JobConfig, data: Data, tokens: "PreTrainedTokenizerBase") -> Data:
    """The pairs (dpo) or labelled answers (kto) of a job to train on, with what `data` measures the loss on.

    Raises:
        TrainingError: they are not there, every one is too long, or KTO's are all good or all bad.
    """
    from datasets import Dataset

    folder, method = job.preferences, job.settings.method
    if folder is None or not (folder / "train").is_dir():
        raise TrainingError(
            f"method {method} needs {folder or 'preferences'}, which is not there; curate the data again"
        )
    train = _read(folder, "train", job, tokens)
    kept = train.kept
    if not kept:
        rejected = "".join(f"; {one.count} of {train.rows} rows are rejected: {one}" for one in train.rejections)
        raise TrainingError(
            f"nothing is left to train on by {method}: of {train.rows} rows of {folder / 'train'} {train.too_long} "
            f"have more than {job.settings.max_length} tokens{rejected}; raise max_length, add examples, or set method "
            "to sft"
        )
    if method == "kto":
        _must_have_both([row["label"] for row in kept], folder)
        random.Random(job.settings.seed).shuffle(kept)  # KTO reads in the order given: each with its neighbours
    held_out = _read(folder, "validation", job, tokens)
    if method == "kto" and len(held_out.kept) == 1:  # it compares each with another one
        held_out = replace(held_out, rows=0, kept=[])
    if not held_out.kept and (held_out.rows or job.settings.early_stopping_patience):
        tell_not_validated(job.settings, held_out.rows)
    return replace(
        data,
        train=Dataset.from_list(kept),
        too_long=train.too_long,
        preferred=Dataset.from_list(held_out.kept) if held_out.kept else None,
        rejections=train.rejections + held_out.rejections,
    )


def preference_trainer(
    job: JobConfig,
    data: Data,
    tokens: "PreTrainedTokenizerBase",
    arguments: dict[str, Any],
    base: Any,
    callbacks: "list[TrainerCallback]",
) -> "DPOTrainer | KTOTrainer":
    """TRL's trainer of the job's method.

    Args:
        data: from `load_preferences`.
        arguments: transformers' TrainingArguments that every method shares.
        base: the model to train.
        callbacks: told how the training goes.
    """
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    shared = {**arguments, "max_length": None, "beta": job.settings.beta}
    if job.settings.method == "dpo":
        kind, config = DPOTrainer, DPOConfig(**shared, **_dpo(job.settings))
    else:
        kind, config = KTOTrainer, KTOConfig(**shared, **_kto(job.settings, arguments, data.train["label"]))
    trainer = _of_tokens(kind)(
        **with_adapter(base, job),
        args=config,
        train_dataset=data.train,
        eval_dataset=data.preferred,
        processing_class=tokens,
        callbacks=callbacks,
    )
    _complete_reference(trainer.model)
    # A checkpoint with the reference beside the adapter would resume with the reference alone (transformers 5.17 looks
    # into subfolders only, if there are any). It is made anew from the initial adapter instead.
    trainer.model.save_pretrained = partial(trainer.model.save_pretrained, selected_adapters=["default"])
    return trainer


def _of_tokens(kind: "type[DPOTrainer] | type[KTOTrainer]") -> Any:
    """Return TRL's trainer for tokenized rows: its own tokenization would parse control tokens in text."""

    class OfTokens(kind):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: "Dataset", _tokens: Any, args: Any, _name: str) -> "Dataset":
            if "completion_ids" not in dataset.column_names:
                return dataset
            return dataset.map(_with_other_answers, batched=True, batch_size=args.per_device_train_batch_size)

    return OfTokens


def _with_other_answers(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Pair each prompt of a KTO batch with the answer to the one before, by which TRL estimates the KL divergence."""
    answers = batch["completion_ids"]
    return {**batch, "KL_completion_ids": [answers[-1], *answers[:-1]]}


def _complete_reference(model: Any) -> None:
    """Copy the embeddings of single tokens too: TRL 1.14 copies only what has ".default." within its name."""
    if "ref" in model.peft_config:
        for name, values in model.named_parameters():
            if name.endswith(".default"):
                model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(values.data)


def validation_loss(trainer: "DPOTrainer | KTOTrainer") -> float:
    """Mean loss of the method itself on the held-out preferences: it is this one that the training lowers.

    With several processes each takes a part, and all of them get the same figure.
    """
    import torch

    model = trainer.model.eval()
    total = torch.zeros(2, device=trainer.args.device)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in trainer.get_eval_dataloader():
            inputs = trainer._prepare_inputs(batch)
            size = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
            total += torch.stack([trainer.compute_loss(model, inputs).detach().float() * size, torch.tensor(size)])
    model.train()
    trainer._metrics["eval"].clear()  # kept for an evaluation of TRL's own, which there is none of
    summed, count = trainer.accelerator.reduce(total, "sum").tolist()
    return float(summed / count)


def mean_loss(trainer: "DPOTrainer | KTOTrainer", dataset: "Dataset") -> float:
    """Mean loss per completion token of the answers to learn: the figure that SFT is measured by too."""
    import torch

    model = trainer.model.to(trainer.args.device).eval()
    total, tokens = 0.0, 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in _batches(trainer, dataset):
            counted = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch, use_cache=False).loss) * counted
            tokens += counted
    model.train()
    return total / max(tokens, 1)


def _batches(trainer: "DPOTrainer | KTOTrainer", dataset: "Dataset") -> Iterator[dict[str, Any]]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokens, size = trainer.processing_class, trainer.args.per_device_eval_batch_size
    collate = DataCollatorForLanguageModeling(pad_token_id=tokens.pad_token_id)
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in dataset]
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        yield {name: values.to(trainer.args.device) for name, values in batch.items()}


@dataclass(frozen=True)
class _Split:
    rows: int
    kept: list[dict[str, Any]]  # neither rejected nor too long, in the form of TRL's collators
    too_long: int
    rejections: tuple[Rejection, ...]


def _read(folder: Path, split: str, job: JobConfig, tokens: "PreTrainedTokenizerBase") -> _Split:
    from datasets import load_from_disk

    rows = list(load_from_disk(str(folder / split))) if (folder / split).is_dir() else []
    answers = _ANSWERS[job.settings.method]
    found = conversations(rows, answers, job.system_prompt, tokens)
    accepted = [(row, one) for row, one in zip(rows, found, strict=True) if not isinstance(one, Rejected)]
    rejected = rejections([one for one in found if isinstance(one, Rejected)], len(rows), split)
    kept = [_in_tokens(row, one) for row, one in accepted if one.length <= job.settings.max_length]
    return _Split(len(rows), kept, len(accepted) - len(kept), rejected)


def _in_tokens(row: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    """Return a tokenized row in TRL's form: an answer begins where it differs from the prompt."""
    start = conversation.shared()
    answers = {f"{name}_ids": ids[start:] for name, ids in conversation.answers.items()}
    label = {"label": row["label"]} if "label" in row else {}
    return {"prompt_ids": conversation.prompt[:start], **answers, **label, "length": conversation.length}


def _must_have_both(labels: list[bool], folder: Path) -> None:
    good = sum(labels)
    if not 0 < good < len(labels):
        raise TrainingError(
            f"kto learns from answers found good and bad, and {folder} has {good} good and {len(labels) - good} bad "
            "ones to train on; set method to sft, or wait for more feedback"
        )


def _dpo(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "loss_type": list(settings.loss_type),
        "loss_weights": list(settings.loss_weights or [1.0] * len(settings.loss_type)),
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,  # it would remove the lengths
    }


def check_batch(settings: TrainingSettings, size: int) -> None:
    """Raise TrainingError if `size` examples at a time, on each device, are too few for the method."""
    if settings.method == "kto" and size < 2:
        given = settings.per_device_train_batch_size
        fewer = f" (of {given}: memory or num_processes allows no more)" if given > 1 else ""
        raise TrainingError(
            f"kto compares the completions of a batch and needs 2 or more on each device, not {size}{fewer}; raise "
            "per_device_train_batch_size, or set a smaller max_length, a smaller num_processes, or method: sft"
        )


def _kto(settings: TrainingSettings, arguments: dict[str, Any], labels: list[bool]) -> dict[str, Any]:
    """Good and bad answers weigh the same in all, whichever are more (Eq. 8 of the KTO paper)."""
    check_batch(settings, arguments["per_device_train_batch_size"])
    good, bad = sum(labels), len(labels) - sum(labels)
    return {
        "desirable_weight": max(1.0, bad / good),
        "undesirable_weight": max(1.0, good / bad),
        "train_sampling_strategy": "sequential",
    }
