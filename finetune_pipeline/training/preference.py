"""DPO and KTO by TRL's trainers over a LoRA adapter.

The reference model is the model before training: the base without its adapter or, with a warm start, the base with
a copy of the initial adapter, which TRL names "ref".

DPO (Rafailov et al. 2023, "Direct Preference Optimization") learns from preference pairs, KTO (Ethayarajh et al. 2024,
"Model Alignment as Prospect Theoretic Optimization") from desirable and undesirable completions. Neither uses dropout:
noise in the policy alone would count as distance from the reference.
"""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.conversations import TokenizedRow
from finetune_pipeline.training.job import JobConfig, Rejection, TrainingError
from finetune_pipeline.training.model import adapter_arguments
from finetune_pipeline.training.tokenized_data import TrainingData, short_enough, tokenize_split, warn_not_validated

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import DPOTrainer, KTOTrainer


def load_preferences(job: JobConfig, data: TrainingData, tokenizer: "PreTrainedTokenizerBase") -> TrainingData:
    """Load the preference dataset of a job as tokens, to train on instead of `data.train`.

    Raises:
        TrainingError: it is missing, every example is too long, or KTO's are all desirable or all undesirable.
    """
    folder, settings = job.preferences, job.settings
    if folder is None or not (folder / "train").is_dir():
        raise TrainingError(
            f"method {settings.method} needs {folder or 'preferences'}, which is missing; curate the data again"
        )
    accepted, rejected = _tokenize_preferences(job, folder, "train", tokenizer)
    train = short_enough(accepted, settings.max_length)
    if not len(train):
        rows = len(accepted) + sum(one.count for one in rejected)
        reasons = "".join(f"; {one.count} of {rows} rows are rejected: {one}" for one in rejected)
        raise TrainingError(
            f"nothing is left to train on by {settings.method}: of {rows} rows of {folder / 'train'} {len(accepted)} "
            f"have more than {settings.max_length} tokens{reasons}; raise max_length, add examples, or set method: sft"
        )
    validation_rows, rejected_validation = _tokenize_preferences(job, folder, "validation", tokenizer)
    validation = short_enough(validation_rows, settings.max_length)
    validation_count = len(validation_rows) + sum(one.count for one in rejected_validation)
    if settings.method == "kto":
        desirable = sum(train["label"])
        if not 0 < desirable < len(train):
            raise TrainingError(
                f"kto needs desirable and undesirable completions, and {folder} has {desirable} desirable and "
                f"{len(train) - desirable} undesirable ones to train on; set method: sft, or wait for more feedback"
            )
        # TRL's KTO reads sequentially; without shuffling, every batch would hold neighbors of the dataset.
        order = list(range(len(train)))
        random.Random(settings.seed).shuffle(order)
        train = train.select(order)
        if len(validation) == 1:  # KTO compares each example with another one
            validation, validation_count = validation.select([]), 0
    if not len(validation) and (validation_count or settings.early_stopping_patience):
        warn_not_validated(settings, validation_count)
    return replace(
        data,
        train=train,
        too_long=len(accepted) - len(train),
        preference_validation=validation if len(validation) else None,
        rejections=rejected + rejected_validation,
    )


def preference_trainer(
    job: JobConfig,
    data: TrainingData,
    tokenizer: "PreTrainedTokenizerBase",
    arguments: dict[str, Any],
    base: Any,
    callbacks: "list[TrainerCallback]",
) -> "DPOTrainer | KTOTrainer":
    """Return TRL's trainer of the job's method, with the `arguments` that all methods have."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    settings = job.settings
    shared = {**arguments, "max_length": None, "beta": settings.beta}
    if settings.method == "dpo":
        kind, config = DPOTrainer, DPOConfig
        own: dict[str, Any] = {
            "loss_type": list(settings.losses),
            "loss_weights": list(settings.loss_weights or [1.0] * len(settings.losses)),
            "train_sampling_strategy": "group_by_length",
            "length_column_name": "length",
            "remove_unused_columns": False,  # it would remove the lengths
        }
    else:
        kind, config = KTOTrainer, KTOConfig
        check_micro_batch(settings, arguments["per_device_train_batch_size"])
        desirable = sum(data.train["label"])
        undesirable = len(data.train) - desirable
        own = {  # both kinds weigh the same in total, whichever has more examples (Eq. 8 of the KTO paper)
            "desirable_weight": max(1.0, undesirable / desirable),
            "undesirable_weight": max(1.0, desirable / undesirable),
            "loss_type": settings.losses[0],
            "train_sampling_strategy": "sequential",
        }
    trainer = _for_tokenized_rows(kind)(
        **adapter_arguments(base, job),
        args=config(**{**shared, **own, **settings.trainer_config}),
        train_dataset=data.train,
        eval_dataset=data.preference_validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    model = trainer.model
    if "ref" in model.peft_config:
        # TRL 1.14 copies only parameters with ".default." inside their names, not trained token embeddings.
        for name, values in model.named_parameters():
            if name.endswith(".default"):
                model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(values.data)
    # A checkpoint with the reference in a subfolder would resume with the reference alone: transformers 5.17 looks
    # into subfolders only, if there are any. The reference is made from the initial adapter again instead.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    return trainer


def check_micro_batch(settings: TrainingSettings, micro_batch: int) -> None:
    """Raise TrainingError if a device's micro-batch is too small for the method."""
    if settings.method == "kto" and micro_batch < 2:
        given = settings.per_device_train_batch_size
        fewer = f" (of {given}: memory or num_processes allows no more)" if given > 1 else ""
        remedy = "raise per_device_train_batch_size, or set " if given < 2 else "set a smaller max_length, or "
        remedy += "a smaller num_processes, or " if given > 1 and settings.num_processes > 1 else ""
        raise TrainingError(
            f"kto compares the completions of a batch and needs 2 or more on each device, not {micro_batch}{fewer}; "
            f"{remedy}method: sft"
        )


def preference_loss(trainer: "DPOTrainer | KTOTrainer") -> float:
    """Return the mean loss of the method itself on its validation set; every rank gets the same value."""
    import torch

    model = trainer.model.eval()
    total = torch.zeros(2, device=trainer.args.device)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in trainer.get_eval_dataloader():
            inputs = trainer._prepare_inputs(batch)
            size = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
            total += torch.stack([trainer.compute_loss(model, inputs).detach().float() * size, torch.tensor(size)])
    model.train()
    trainer._metrics["eval"].clear()  # TRL keeps them for its own evaluation, which never runs
    summed, count = trainer.accelerator.reduce(total, "sum").tolist()
    return float(summed / count)


def _for_tokenized_rows(kind: "type[DPOTrainer] | type[KTOTrainer]") -> Any:
    """Return TRL's trainer without its tokenization, which would parse control tokens in text."""

    class TokenizedRowsTrainer(kind):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: "Dataset", _tokenizer: Any, args: Any, name: str) -> "Dataset":
            if "completion_ids" not in dataset.column_names:
                return dataset
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            # TRL estimates KTO's KL divergence by pairing each prompt with the completion before it.
            return dataset.map(
                lambda batch: {"KL_completion_ids": [batch["completion_ids"][-1], *batch["completion_ids"][:-1]]},
                batched=True,
                batch_size=args.per_device_train_batch_size,
                cache_file_name=f"{args.output_dir}/kl-{name}.arrow",  # removed with the checkpoints
                load_from_cache_file=False,
            )

    return TokenizedRowsTrainer


def _tokenize_preferences(
    job: JobConfig, folder: Path, split: str, tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[Dataset, tuple[Rejection, ...]]":
    """Tokenize a split in the form of TRL's collators."""
    from datasets import List, Value

    names = ("chosen", "rejected") if job.settings.method == "dpo" else ("completion",)

    def columns_of(row: dict[str, Any], tokens: TokenizedRow) -> dict[str, Any]:
        start = tokens.shared()  # a completion begins where it differs from the prompt
        completions = {f"{name}_ids": ids[start:] for name, ids in tokens.conversations.items()}
        label = {"label": row["label"]} if "label" in row else {}
        return {"prompt_ids": tokens.prompt[:start], **completions, **label}

    features = {name: List(Value("int32")) for name in ("prompt_ids", *(f"{name}_ids" for name in names))}
    if job.settings.method == "kto":
        features["label"] = Value("bool")
    return tokenize_split(folder, split, names, job, tokenizer, features, columns_of)
