"""Training by TRL's trainers over a LoRA adapter; SFT has a completion-only loss.

The same job gives the same weights: on a CPU the seed determines them, and a run that was killed and resumed ends
with the weights of an uninterrupted one.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import distributed, padding_free
from finetune_pipeline.training.callbacks import (
    ExampleOrderCallback,
    NoStepsLeft,
    ProgressCallback,
    ResumeCallback,
    ValidationCallback,
)
from finetune_pipeline.training.checkpoints import last_complete, step_of
from finetune_pipeline.training.hardware import bf16_is_faster
from finetune_pipeline.training.job import (
    CHECKPOINTS,
    JobConfig,
    TrainingError,
    TrainingResult,
    ValidationPoint,
    curve_of,
    finish,
    steps_of,
)
from finetune_pipeline.training.memory import (
    RankOutOfMemory,
    catch_out_of_memory,
    check_memory,
    is_out_of_memory,
    out_of_memory_advice,
    with_micro_batch,
)
from finetune_pipeline.training.model import (
    adapter_arguments,
    cast_adapter_to_float32,
    gather_trained_weights,
    load_model,
    must_shard,
    peak_memory,
    reshard,
    save_adapter,
)
from finetune_pipeline.training.preference import load_preferences, preference_loss, preference_trainer
from finetune_pipeline.training.progress import VALIDATION_LOSS, check_finite
from finetune_pipeline.training.tokenized_data import TrainingData, load_data
from finetune_pipeline.wording import error_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTTrainer

LoadModel = Callable[[JobConfig, bool], Any]
"""Loads the base model of a job, for bfloat16 or not; a model that has an adapter already gets no other."""
OnCheckpoint = Callable[[Path], None]
"""Called on every rank with the folder of each complete checkpoint."""


def run_training(
    job: JobConfig,
    started: float,
    micro_batch: int | None = None,
    load_model: LoadModel = load_model,
    on_checkpoint: OnCheckpoint = lambda _: None,
) -> TrainingResult:
    """Train the adapter of a job, from its last complete checkpoint if there is one; see `TrainingBackend.run`.

    Raises:
        MemoryRanOut: a fresh process should resume with a smaller micro-batch.
        TrainingError: the dataset, the base model, the settings or the loss make it impossible.
    """
    from transformers import set_seed

    settings, ranks = job.settings, distributed.world_size()
    running = distributed.split_batch(settings, ranks)
    if ranks > 1 and distributed.is_rank_zero():
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
        print(
            " x ".join(f"{name} {getattr(settings, name)}" for name in sizes)
            + f" is the batch of the whole run, split across {ranks} processes; TRL would multiply it by {ranks}",
            file=sys.stderr,
            flush=True,
        )
    if micro_batch is not None:
        examples = running.per_device_train_batch_size * running.gradient_accumulation_steps
        running = with_micro_batch(running, micro_batch, examples)
    if distributed.is_rank_zero():
        print("loading the model and tokenizing", file=sys.stderr, flush=True)
    tokenizer = load_tokenizer(job.base_model)
    data = load_data(job, tokenizer)
    if settings.method != "sft":
        data = load_preferences(job, data, tokenizer)
    # Decided by the batch size that was set, so that a smaller micro-batch does not change the precision.
    bf16 = settings.bf16 and bf16_is_faster(settings.per_device_train_batch_size)
    shards = ranks if must_shard(job, bf16) else 1
    check_memory(job.base_model, running, longest=data.longest, bf16=bf16, shards=shards)
    # One of several ranks cannot resume alone with a smaller micro-batch.
    with nullcontext() if ranks > 1 else catch_out_of_memory(running):
        set_seed(running.seed)
        # The micro-batch does not change the number of optimizer steps; on several ranks the whole run's counts.
        steps = count_steps(len(data.train), settings if ranks > 1 else running)
        trainer = make_trainer(job, running, data, tokenizer, steps, bf16, load_model, on_checkpoint)
        result = _train(trainer, job, running, data, bf16, started)
    weights = gather_trained_weights(trainer.model)
    if distributed.is_rank_zero():
        save_adapter(trainer.model, job, weights)
        finish(job, result)
    distributed.barrier()
    return result


def train_rank(job: JobConfig, started: float, on_checkpoint: OnCheckpoint = lambda _: None) -> str:
    """Train as one of several ranks.

    Returns:
        Why the job cannot be trained as asked, which every rank finds; empty when it is done.

    Raises:
        RankOutOfMemory: on this rank, maybe on no other; the message says what to do.
    """
    try:
        run_training(job, started, on_checkpoint=on_checkpoint)
    except TrainingError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        micro_batch = distributed.split_batch(job.settings, distributed.world_size()).per_device_train_batch_size
        message = error_line(error)
        raise RankOutOfMemory(out_of_memory_advice(job.settings, micro_batch, message)) from error
    return ""


def _train(
    trainer: "Trainer", job: JobConfig, running: TrainingSettings, data: TrainingData, bf16: bool, started: float
) -> TrainingResult:
    """Train from the last complete checkpoint, load the best weights, and return the result."""
    import torch

    settings, patience = job.settings, job.settings.early_stopping_patience
    alone = distributed.world_size() == 1  # of several ranks, one may fail because another one did
    with _settings_named(settings, lambda: alone):
        loss_before = mean_loss(trainer, data.validation)
    # Validation measures the loss that the method lowers, and decides which weights are kept.
    if data.preference_validation is not None:
        trainer.add_callback(ValidationCallback(lambda: preference_loss(trainer), patience))
    elif settings.method == "sft" and data.has_validation:
        trainer.add_callback(ValidationCallback(lambda: mean_loss(trainer, data.validation), patience))
    trainer.add_callback(ResumeCallback(patience))
    checkpoint = distributed.rank_zero_first(lambda: last_complete(job.output / CHECKPOINTS, job.key))
    began = time.monotonic()
    reshard(trainer.model)
    first = step_of(checkpoint) if checkpoint else 0
    with _settings_named(settings, lambda: alone and trainer.state.global_step <= first), suppress(NoStepsLeft):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - began
    best_step = _load_best(trainer) if settings.load_best_model_at_end else trainer.state.global_step
    loss_after = mean_loss(trainer, data.validation)
    state = trainer.state
    check_finite(loss_after, state.global_step)
    validated = {entry["step"]: entry[VALIDATION_LOSS] for entry in state.log_history if VALIDATION_LOSS in entry}
    return TrainingResult(
        job=job.key,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        method=settings.method,
        adapter=settings.adapter,
        bf16=bf16,
        steps=state.global_step,
        resumed_from=first,
        examples=len(data.train),
        too_long=data.too_long,
        rejections=data.rejections,
        loss_before=loss_before,
        loss_after=loss_after,
        tokens_per_second=trainer._total_train_tokens / max(seconds, 1e-9),
        wall_seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        micro_batch=running.per_device_train_batch_size,
        validation=tuple(ValidationPoint(step=step, loss=loss) for step, loss in sorted(validated.items())),
        best_step=best_step,
        stopped_early=state.global_step < state.max_steps,
        **curve_of(state.log_history),
    )


_LIBRARY_SETTINGS = ("lr_scheduler_type", "optim", "loss_type", "trainer_config", "lora_config")
"""Settings whose values TRL, PEFT and transformers check only when they use them."""


@contextmanager
def _settings_named(settings: TrainingSettings, unstarted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raise a library's error as a TrainingError that names the settings which may have caused it.

    They can be the cause only until the first step is done: `unstarted` returns whether it is not.
    """
    try:
        yield
    except (TrainingError, NoStepsLeft):
        raise
    except ImportError as error:  # an optimizer of another package
        raise TrainingError(f"training needs a package that is not installed: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        default = TrainingSettings()
        given = [name for name in _LIBRARY_SETTINGS if getattr(settings, name) != getattr(default, name)]
        if not given or is_out_of_memory(error) or not unstarted():
            raise
        named = ", ".join(f"{name} {getattr(settings, name)}" for name in given)
        raise TrainingError(
            f"training cannot start with {named}: {type(error).__name__}: {error}; change or remove what it names"
        ) from error


def _load_best(trainer: "Trainer") -> int:
    """Load the weights with the lowest validation loss if later ones had a higher loss; return their step."""
    state = trainer.state
    best = state.best_global_step or state.global_step
    if best != state.global_step:
        reshard(trainer.model)
        trainer._load_best_model()
    return int(best)


def count_steps(examples: int, settings: TrainingSettings) -> int:
    """Return the optimizer steps of a run, counted as transformers' Trainer counts them."""
    if (max_steps := settings.trainer_config.get("max_steps", -1)) > 0:
        return int(max_steps)
    batches = math.ceil(examples / settings.per_device_train_batch_size)
    updates = max(math.ceil(batches / settings.gradient_accumulation_steps), 1)
    return math.ceil(updates * settings.num_train_epochs)


def make_trainer(
    job: JobConfig,
    running: TrainingSettings,
    data: TrainingData,
    tokenizer: "PreTrainedTokenizerBase",
    steps: int,
    bf16: bool,
    load_model: LoadModel = load_model,
    on_checkpoint: OnCheckpoint = lambda _: None,
) -> "Trainer":
    """Return TRL's trainer of a job; `running` has the micro-batch and accumulation steps of this rank.

    Raises:
        TrainingError: TRL or transformers rejects the settings.
    """
    import torch
    from transformers import PrinterCallback

    gpu = torch.cuda.is_available()
    warmup = running.warmup_steps
    arguments = {
        "output_dir": str(job.output / CHECKPOINTS),
        "num_train_epochs": running.num_train_epochs,
        "per_device_train_batch_size": running.per_device_train_batch_size,
        "per_device_eval_batch_size": running.per_device_train_batch_size,  # a larger one could run out of memory
        "gradient_accumulation_steps": running.gradient_accumulation_steps,
        "gradient_checkpointing": running.gradient_checkpointing,
        "learning_rate": running.learning_rate,
        "lr_scheduler_type": running.lr_scheduler_type,
        # Rounded down, so that a run of a few steps has none: the first warmup step has a learning rate of 0.
        "warmup_steps": int(steps * warmup) if warmup < 1 else int(warmup),
        "optim": running.optim,
        "weight_decay": running.weight_decay,
        "bf16": bf16,
        "seed": running.seed,
        "logging_strategy": "steps",
        "logging_steps": steps_of(running.logging_steps, steps),
        "logging_nan_inf_filter": False,  # it would report the mean of earlier losses instead of a NaN
        "save_strategy": "steps",
        "save_steps": steps_of(running.save_steps, steps),
        "save_total_limit": 3,  # the best, the newest, and the one before it while the newest is incomplete
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "report_to": list(running.report_to) or "none",
        "run_name": job.key,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # every weight of the adapter is used in every step
    }
    if distributed.world_size() > 1 and must_shard(job, bf16):
        # FSDP wraps each layer; checkpoints hold full weights.
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    base, callbacks = load_model(job, bf16), [ProgressCallback(job, on_checkpoint)]
    with _settings_named(job.settings):
        if job.settings.method == "sft":
            trainer = _sft_trainer(job, data, tokenizer, arguments, base, callbacks)
        else:
            trainer = preference_trainer(job, data, tokenizer, arguments, base, callbacks)
    trainer.create_model_card = lambda *_, **__: None  # every checkpoint would get one, which nobody reads
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ExampleOrderCallback())
    trainer.accelerator.rng_types = ["torch"]  # all ranks have to draw the same order of examples
    if job.settings.adapter == "qlora":
        cast_adapter_to_float32(trainer.model, job)
    if trainer.is_fsdp_enabled:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        # Sharded before anything is computed, since one GPU could not hold the weights. The Trainer does the same when
        # training starts, and leaves a model alone that is sharded already.
        trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)
    return trainer


def _sft_trainer(
    job: JobConfig,
    data: TrainingData,
    tokenizer: "PreTrainedTokenizerBase",
    arguments: dict[str, Any],
    base: Any,
    callbacks: list[Any],
) -> "SFTTrainer":
    from trl import SFTConfig, SFTTrainer

    settings = job.settings
    # NEFTune scales its noise by the length of a row, so packed examples would get too little; pad_to_multiple_of is
    # about the padding of each row.
    padded = any(
        settings.trainer_config.get(name) is not None for name in ("neftune_noise_alpha", "pad_to_multiple_of")
    )
    packed = padding_free.supports(base.config) and settings.attn_implementation is None and not padded
    if packed:
        base.set_attn_implementation(padding_free.register_attention())
    # TRL's default loss reads the weights of a bare output layer; trained tied embeddings wrap it.
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    wrapped_output = tied and bool(settings.trainable_token_indices)
    own = {
        "completion_only_loss": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # the examples are tokenized
        "remove_unused_columns": False,
        "max_length": None,  # longer examples are left out: cut ones would teach completions without an end
        # Padded batches of similar lengths have less padding.
        "train_sampling_strategy": "random" if packed else "group_by_length",
        "loss_type": "nll" if not packed and wrapped_output else None,
    }
    return (padding_free.trainer_class() if packed else SFTTrainer)(
        **adapter_arguments(base, job),
        args=SFTConfig(**{**arguments, **own, **settings.trainer_config}),
        train_dataset=data.train,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def mean_loss(trainer: "Trainer", dataset: "Dataset") -> float:
    """Return the mean loss per completion token, the same for every method and independent of the batches.

    The Trainer's own evaluation returns a mean of means.
    """
    import torch
    from torch.utils.data import DataLoader
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    sft = isinstance(trainer, SFTTrainer)
    collate = trainer.data_collator
    if not sft:  # the collators of DPO and KTO take preferences
        collate = DataCollatorForLanguageModeling(pad_token_id=trainer.processing_class.pad_token_id)
        dataset = dataset.select_columns(["input_ids", "labels"])
    model = (trainer.model if trainer.is_fsdp_enabled else trainer.model.to(trainer.args.device)).eval()
    total, tokens = 0.0, 0
    with torch.no_grad(), trainer.accelerator.autocast() if sft else nullcontext():
        # Every rank measures all examples: the Trainer's loader would split them, and repeat some to pad batches.
        for examples in DataLoader(dataset, trainer.args.per_device_eval_batch_size, collate_fn=collate):
            batch = trainer._prepare_inputs(examples)
            counted = padding_free.completion_tokens(batch)
            loss = trainer.compute_loss(model, batch) if sft else model(**batch, use_cache=False).loss
            total += float(loss) * counted
            tokens += counted
    model.train()
    return total / max(tokens, 1)
