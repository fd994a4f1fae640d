"""The training itself: TRL's trainers over a PEFT LoRA adapter; by SFT on the completion only.

Same job, same weights: on a CPU the seed fixes them, and a training that was killed and resumed ends with the weights
of an unbroken one.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import distributed, padding_free
from finetune_pipeline.training.callbacks import (
    VALIDATION_LOSS,
    NothingLeft,
    must_be_finite,
    orderer,
    reporter,
    resumer,
    validator,
)
from finetune_pipeline.training.checkpoints import last_complete, step_of
from finetune_pipeline.training.data import Data, load, tokenizer
from finetune_pipeline.training.job import (
    CHECKPOINTS,
    CurvePoint,
    JobConfig,
    TrainingResult,
    ValidationPoint,
    finish,
    steps_of,
)
from finetune_pipeline.training.memory import check_memory, memory_may_run_out, with_micro_batch
from finetune_pipeline.training.model import (
    bfloat16_is_faster,
    deal_out_again,
    load_model,
    must_shard,
    peak_memory,
    save_adapter,
    shard,
    sharding,
    train_in_float32,
    whole_weights,
    with_adapter,
)
from finetune_pipeline.training.preference import load_preferences, mean_loss, preference_trainer, validation_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTTrainer

_CURVE_POINTS = 50

LoadModel = Callable[[JobConfig, bool], Any]
"""Gives the base model of a job, for bfloat16 or not; a backend's own may have its adapter on it already."""


@dataclass(frozen=True)
class _Trained:
    trainer: "Trainer"
    checkpoint: Path | None  # that it went on from
    before: float  # the loss that is measured
    after: float
    best_step: int
    seconds: float


def run_training(
    job: JobConfig, started: float, micro_batch: int | None = None, load_model: LoadModel = load_model
) -> TrainingResult:
    """Train the adapter of a job, from its last whole checkpoint if there is one.

    Args:
        job: what to train.
        started: time.monotonic() at which the process began.
        load_model: gives the base model of a job, in bfloat16 or not; one that has its adapter already gets no other.
        micro_batch: examples in memory at once, where per_device_train_batch_size was too many.

    Raises:
        MemoryRanOut: a new process is to go on with fewer examples at a time.
        TrainingError: the dataset, the base model or the loss makes it impossible.
    """
    settings = job.settings
    running = distributed.split_batch(settings, distributed.size())
    if micro_batch is not None:
        batch = running.per_device_train_batch_size * running.gradient_accumulation_steps
        running = with_micro_batch(running, micro_batch, batch)
    tokens = tokenizer(job.base_model)
    data = load(job, tokens)
    if settings.method != "sft":
        data = load_preferences(job, data, tokens)
    bf16 = settings.bf16 and bfloat16_is_faster(
        settings.per_device_train_batch_size
    )  # also where memory allows fewer at a time
    check_memory(job.base_model, running, longest=data.longest, bf16=bf16, shards=_cards(job, bf16))
    with (
        nullcontext() if distributed.size() > 1 else memory_may_run_out(running)
    ):  # alone no process of a team can go back
        done = _trained(job, running, data, tokens, bf16, load_model)
    trainer = done.trainer
    result = _result(job, running, data, done, bf16, started)
    weights = whole_weights(trainer.model)
    if distributed.is_first():
        save_adapter(trainer.model, job, weights)
        finish(job, result)
    distributed.wait()
    return result


def _result(
    job: JobConfig, running: TrainingSettings, data: Data, done: _Trained, bf16: bool, started: float
) -> TrainingResult:
    import torch

    trainer, curve = done.trainer, _curve(done.trainer)
    return TrainingResult(
        job=job.key,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        method=job.settings.method,
        adapter=job.settings.adapter,
        bf16=bf16,
        steps=trainer.state.global_step,
        resumed_from=step_of(done.checkpoint) if done.checkpoint else 0,
        examples=len(data.train),
        too_long=data.too_long,
        rejections=data.rejections,
        loss_before=done.before,
        loss_after=done.after,
        train_loss=_mean([point.loss for point in curve[-max(1, len(curve) // 10) :]]),
        tokens_per_second=trainer._total_train_tokens / max(done.seconds, 1e-9),
        wall_seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        micro_batch=running.per_device_train_batch_size,
        curve=tuple(curve),
        validation=tuple(_validations(trainer)),
        best_step=done.best_step,
        stopped_early=trainer.state.global_step < trainer.state.max_steps,
    )


def _cards(job: JobConfig, bf16: bool) -> int:
    """How many the base's weights are dealt out to."""
    return distributed.size() if must_shard(job, bf16) else 1


def _trained(
    job: JobConfig,
    running: TrainingSettings,
    data: Data,
    tokens: "PreTrainedTokenizerBase",
    bf16: bool,
    load_model: LoadModel,
) -> _Trained:
    """Train once. `running` are the job's settings with the micro-batch that memory allows."""
    from transformers import set_seed

    set_seed(running.seed)
    trainer = _trainer(
        job,
        running,
        data,
        tokens,
        _steps(len(data.train), job.settings if distributed.size() > 1 else running),
        bf16,
        load_model,
    )
    before = _mean_loss(trainer, data.measure)
    measure = _validation(trainer, data)
    if measure is not None:
        trainer.add_callback(validator(measure, running.early_stopping_patience))
    trainer.add_callback(resumer(running.early_stopping_patience))
    checkpoint = distributed.first_then_others(lambda: last_complete(job.output / CHECKPOINTS, job.key))
    seconds = _train(trainer, checkpoint)
    best = _take_best(trainer)
    after = _mean_loss(trainer, data.measure)
    must_be_finite(after, trainer.state.global_step)
    return _Trained(trainer, checkpoint, before, after, best, seconds)


def _validation(trainer: "Trainer", data: Data) -> Callable[[], float] | None:
    """What measures by which weights to stay: the loss that the method lowers, on what was held out of it."""
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        return None if data.preferred is None else lambda: validation_loss(trainer)
    return (lambda: _mean_loss(trainer, data.measure)) if data.validates else None


def _steps(examples: int, settings: TrainingSettings) -> int:
    """Updates of the weights in the whole training, counted as transformers' Trainer counts them."""
    batches = math.ceil(examples / settings.per_device_train_batch_size)
    updates = max(math.ceil(batches / settings.gradient_accumulation_steps), 1)
    return math.ceil(updates * settings.num_train_epochs)


def _trainer(
    job: JobConfig,
    running: TrainingSettings,
    data: Data,
    tokens: "PreTrainedTokenizerBase",
    steps: int,
    bf16: bool,
    load_model: LoadModel = load_model,
) -> "Trainer":
    from transformers import PrinterCallback

    arguments = _arguments(job, running, steps, bf16)
    if job.settings.method == "sft":
        trainer = _sft_trainer(job, data, tokens, arguments, load_model(job, bf16))
    else:
        trainer = preference_trainer(job, data, tokens, arguments, load_model(job, bf16), [reporter(job)])
    # It would write a model card with every checkpoint, which nobody reads.
    trainer.create_model_card = lambda *_, **__: None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(orderer())
    trainer.accelerator.rng_types = ["torch"]  # all processes must draw the same order of examples
    if job.settings.adapter == "qlora":
        train_in_float32(trainer.model, job)
    if trainer.is_fsdp_enabled:
        shard(trainer)
    return trainer


def _sft_trainer(
    job: JobConfig, data: Data, tokens: "PreTrainedTokenizerBase", arguments: dict[str, Any], base: Any
) -> "SFTTrainer":
    from trl import SFTConfig, SFTTrainer

    shared_rows = padding_free.fits(base.config)
    if shared_rows:
        base.set_attn_implementation(padding_free.register_attention())
    config = SFTConfig(
        **arguments,
        completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens already
        remove_unused_columns=False,
        max_length=None,  # longer examples were left out: cut ones would teach answers without an end
        # Where rows are filled up, batches of like lengths have less to fill.
        train_sampling_strategy="random" if shared_rows else "group_by_length",
        loss_type="nll" if not shared_rows and _trains_output_layer(job, base) else None,
    )
    return (padding_free.trainer_class() if shared_rows else SFTTrainer)(
        **with_adapter(base, job),
        args=config,
        train_dataset=data.train,
        processing_class=tokens,
        callbacks=[reporter(job)],
    )


def _trains_output_layer(job: JobConfig, base: Any) -> bool:
    """Whether the adapter wraps the output layer: TRL's own loss reads the weights of a bare one."""
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    return tied and bool(job.settings.trainable_token_indices)


def _arguments(job: JobConfig, settings: TrainingSettings, steps: int, bf16: bool) -> dict[str, Any]:
    """What TRL's trainers of every method are told."""
    import torch

    return {
        "output_dir": str(job.output / CHECKPOINTS),
        "num_train_epochs": settings.num_train_epochs,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_train_batch_size,  # a larger one could run out
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(steps * settings.warmup_steps)
        if settings.warmup_steps < 1
        else int(settings.warmup_steps),  # its first step learns nothing: none of a few
        "weight_decay": settings.weight_decay,
        "bf16": bf16,
        "seed": settings.seed,
        "logging_strategy": "steps",
        "logging_steps": math.ceil(steps / _CURVE_POINTS),
        "logging_nan_inf_filter": False,  # it would report the mean of the losses before instead of a NaN
        "save_strategy": "steps",
        "save_steps": steps_of(settings.save_steps, steps),
        "save_total_limit": 3,  # the best, the newest, and the one before it while the newest is not whole yet
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": list(settings.report_to) or "none",
        "run_name": job.key,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # every weight of the adapter takes part in every step
        **(sharding() if _cards(job, bf16) > 1 else {}),
    }


def _train(trainer: "Trainer", checkpoint: Path | None) -> float:
    """Train, and return the seconds that it took."""
    began = time.monotonic()
    deal_out_again(trainer.model)
    with suppress(NothingLeft):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return time.monotonic() - began


def _take_best(trainer: "Trainer") -> int:
    """Go back to the weights with the lowest validation loss, if later ones had a higher; returns their step."""
    state = trainer.state
    best = state.best_global_step or state.global_step
    if best != state.global_step:
        deal_out_again(trainer.model)
        trainer._load_best_model()
    return int(best)


def _mean_loss(trainer: "Trainer", dataset: "Dataset") -> float:
    """Mean loss per completion token, whatever the batches are (the Trainer's own is a mean of means)."""
    import torch
    from torch.utils.data import DataLoader
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        return mean_loss(trainer, dataset)
    model = (trainer.model if trainer.is_fsdp_enabled else trainer.model.to(trainer.args.device)).eval()
    total, tokens = 0.0, 0
    with torch.no_grad(), trainer.accelerator.autocast():
        # Every process measures all: the Trainer's own loader would deal the examples out, and repeat some to fill up.
        for examples in DataLoader(dataset, trainer.args.eval_batch_size, collate_fn=trainer.data_collator):
            batch = trainer._prepare_inputs(examples)
            counted = padding_free.answers(batch)
            total += float(trainer.compute_loss(model, batch)) * counted
            tokens += counted
    model.train()
    return total / max(tokens, 1)


def _curve(trainer: "Trainer") -> list[CurvePoint]:
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    return [
        CurvePoint(step=step, loss=entry["loss"], learning_rate=entry["learning_rate"])
        for step, entry in sorted(history.items())
    ]


def _validations(trainer: "Trainer") -> list[ValidationPoint]:
    losses = {entry["step"]: entry[VALIDATION_LOSS] for entry in trainer.state.log_history if VALIDATION_LOSS in entry}
    return [ValidationPoint(step=step, loss=loss) for step, loss in sorted(losses.items())]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
