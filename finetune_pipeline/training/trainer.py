"""The training itself: TRL's SFTTrainer over a PEFT LoRA adapter, on the completion only.

Same job, same weights: on a CPU the seed fixes them, and a training that was killed and resumed ends with the weights
of an unbroken one.
"""

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.callbacks import must_be_finite, reporter
from finetune_pipeline.training.checkpoints import last_complete, step_of
from finetune_pipeline.training.data import Data, load, tokenizer
from finetune_pipeline.training.job import CHECKPOINTS, RESULT, CurvePoint, TrainingJob, TrainingResult
from finetune_pipeline.training.memory import check_memory, memory_may_run_out, with_micro_batch
from finetune_pipeline.training.model import bfloat16_is_faster, load_model, lora, peak_memory, save_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

_CURVE_POINTS = 50


def run_training(job: TrainingJob, started: float, micro_batch: int | None = None) -> TrainingResult:
    """Train the adapter of a job, from its last whole checkpoint if there is one.

    Args:
        job: what to train.
        started: time.monotonic() at which the process began.
        micro_batch: examples in memory at once, where batch_size was too many.

    Raises:
        MemoryRanOut: a new process is to go on with fewer examples at a time.
        TrainingError: the dataset, the base model or the loss makes it impossible.
    """
    import torch

    settings = job.settings
    running = with_micro_batch(settings, micro_batch)
    tokens = tokenizer(job.base_model)
    data = load(job, tokens)
    bfloat16 = settings.bfloat16 and bfloat16_is_faster(settings.batch_size)
    check_memory(job.base_model, running, longest=data.longest, bfloat16=bfloat16)
    with memory_may_run_out(running):
        trainer, checkpoint, before, after, seconds = _trained(job, running, data, tokens, bfloat16)
    save_adapter(trainer.model, job)
    shutil.rmtree(job.output / CHECKPOINTS)
    curve = _curve(trainer)
    result = TrainingResult(
        job=job.key,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        method=settings.method,
        adapter=settings.adapter,
        bfloat16=bfloat16,
        steps=trainer.state.global_step,
        resumed_from=step_of(checkpoint) if checkpoint else 0,
        examples=len(data.train),
        too_long=data.too_long,
        loss_before=before,
        loss_after=after,
        train_loss=_mean([point.loss for point in curve[-max(1, len(curve) // 10) :]]),
        tokens_per_second=trainer._total_train_tokens / max(seconds, 1e-9),
        wall_seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        micro_batch=running.batch_size,
        curve=tuple(curve),
    )
    write_text(job.output / RESULT, result.model_dump_json(indent=2) + "\n")
    return result


def _trained(
    job: TrainingJob, running: TrainingSettings, data: Data, tokens: "PreTrainedTokenizerBase", bfloat16: bool
) -> tuple["SFTTrainer", Path | None, float, float, float]:
    """The trainer after training, its checkpoint if it went on from one, the loss before and after, and the seconds.

    `running` are the job's settings with the micro-batch that memory allows; the job's key is of those asked for.
    """
    from transformers import set_seed

    set_seed(running.seed)
    trainer = _trainer(job, running, data, tokens, _steps(len(data.train), running), bfloat16)
    before = _mean_loss(trainer, data.measure)
    checkpoint = last_complete(job.output / CHECKPOINTS, job.key)
    seconds = _train(trainer, checkpoint)
    after = _mean_loss(trainer, data.measure)
    must_be_finite(after, trainer.state.global_step)
    return trainer, checkpoint, before, after, seconds


def _steps(examples: int, settings: TrainingSettings) -> int:
    """Updates of the weights in the whole training, counted as transformers' Trainer counts them."""
    batches = math.ceil(examples / settings.batch_size)
    updates = max(math.ceil(batches / settings.gradient_accumulation), 1)
    return math.ceil(updates * settings.epochs)


def _trainer(
    job: TrainingJob,
    running: TrainingSettings,
    data: Data,
    tokens: "PreTrainedTokenizerBase",
    steps: int,
    bfloat16: bool,
) -> "SFTTrainer":
    from transformers import PrinterCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=load_model(job, bfloat16),
        args=_config(job, running, steps, bfloat16),
        train_dataset=data.train,
        processing_class=tokens,
        peft_config=lora(job.settings),
        callbacks=[reporter(job)],
    )
    # It would write a model card with every checkpoint, which nobody reads.
    trainer.create_model_card = lambda *_, **__: None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _config(job: TrainingJob, settings: TrainingSettings, steps: int, bfloat16: bool) -> "SFTConfig":
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(job.output / CHECKPOINTS),
        completion_only_loss=True,
        max_length=None,  # longer examples were left out: cut ones would teach answers without an end
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,  # more would need memory that training does not
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps * settings.warmup_share),
        weight_decay=settings.weight_decay,
        bf16=bfloat16,
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=math.ceil(steps / _CURVE_POINTS),
        logging_nan_inf_filter=False,  # it would report the mean of the losses before instead of a NaN
        save_strategy="steps",
        save_steps=math.ceil(steps / settings.checkpoints),
        save_total_limit=2,
        train_sampling_strategy="group_by_length",  # batches of like lengths: little of the work is padding
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def _train(trainer: "SFTTrainer", checkpoint: Path | None) -> float:
    """Train, and return the seconds that it took."""
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return time.monotonic() - began


def _mean_loss(trainer: "SFTTrainer", dataset: "Dataset") -> float:
    """Mean loss per completion token, whatever the batches are (the Trainer's own is a mean of means)."""
    import torch

    prepared = trainer._prepare_dataset(dataset, trainer.processing_class, trainer.args, False, None, "measured")
    model = trainer.model.to(trainer.args.device).eval()
    total, tokens = 0.0, 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in trainer.get_eval_dataloader(prepared):
            counted = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch, use_cache=False).loss) * counted
            tokens += counted
    model.train()
    return total / max(tokens, 1)


def _curve(trainer: "SFTTrainer") -> list[CurvePoint]:
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    return [
        CurvePoint(step=step, loss=entry["loss"], learning_rate=entry["learning_rate"])
        for step, entry in sorted(history.items())
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
