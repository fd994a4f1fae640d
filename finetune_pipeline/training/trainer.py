"""The training itself: TRL's SFTTrainer over a PEFT LoRA adapter, on the completion only. Only this file loads torch.

Same job, same weights: on a CPU the seed fixes them, and a training that was killed and resumed ends with the weights
of an unbroken one.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.records import Turn, chat
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.checkpoints import last_complete, mark_complete, step_of
from finetune_pipeline.training.job import (
    ADAPTER,
    CHECKPOINTS,
    RESULT,
    CurvePoint,
    Progress,
    TrainingError,
    TrainingJob,
    TrainingResult,
)
from finetune_pipeline.training.process import peak_resident_bytes
from finetune_pipeline.training.progress import PROGRESS, append

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer

_COLUMNS = ("prompt", "history", "completion")
_CURVE_POINTS = 50
_SECONDS_BETWEEN_LINES = 1.0
_LOSS_SAMPLE = 256  # examples on which the loss is measured where there is no validation set
_SMALL_BATCH = 16  # below it, bfloat16 autocast gains nothing on a CPU


@dataclass(frozen=True)
class _Data:
    train: "Dataset"
    measure: "Dataset"  # on which the loss before and after is measured
    too_long: int


def run_training(job: TrainingJob, started: float) -> TrainingResult:
    """Train the adapter of a job, from its last whole checkpoint if there is one.

    Args:
        job: what to train.
        started: time.monotonic() at which the process began.

    Raises:
        TrainingError: the dataset, the base model or the loss makes it impossible.
    """
    import torch
    from transformers import set_seed

    settings = job.settings
    set_seed(settings.seed)
    tokenizer = _tokenizer(job.base_model)
    data = _load(job, tokenizer)
    bfloat16 = settings.bfloat16 and _bfloat16_is_faster(settings.batch_size)
    steps = _steps(len(data.train), settings)
    trainer = _trainer(job, data, tokenizer, steps, bfloat16)
    before = _mean_loss(trainer, data.measure)
    checkpoint = last_complete(job.output / CHECKPOINTS, job.key)
    seconds = _train(trainer, checkpoint)
    after = _mean_loss(trainer, data.measure)
    _must_be_finite(after, trainer.state.global_step)
    _save_adapter(trainer, job)
    shutil.rmtree(job.output / CHECKPOINTS)
    curve = _curve(trainer)
    result = TrainingResult(
        job=job.key,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        method=settings.method,
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
        peak_memory_bytes=_peak_memory(),
        curve=tuple(curve),
    )
    write_text(job.output / RESULT, result.model_dump_json(indent=2) + "\n")
    return result


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load(job: TrainingJob, tokenizer: "PreTrainedTokenizerBase") -> _Data:
    from datasets import Dataset

    rows = _split(job.dataset, "train")
    train, too_long = _short_enough(rows, job, tokenizer)
    if not train:
        raise TrainingError(
            f"nothing is left to train on: {too_long} of {len(rows)} examples have more than "
            f"{job.settings.max_length} tokens; raise max_length, or add examples"
        )
    validation, _ = _short_enough(_split(job.dataset, "validation"), job, tokenizer)
    measure = validation or train[:_LOSS_SAMPLE]
    return _Data(Dataset.from_list(train), Dataset.from_list(measure), too_long)


def _split(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a saved split; a missing one has none, and an empty one neither (datasets cannot read that back)."""
    from datasets import load_from_disk

    if not (folder / "dataset_dict.json").is_file():
        raise TrainingError(f"{folder} holds no saved DatasetDict; make the dataset again")
    state = folder / name / "state.json"
    if not state.is_file() or not json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        return []
    rows = load_from_disk(str(folder / name))
    missing = set(_COLUMNS) - set(rows.column_names)
    if missing:
        raise TrainingError(f"{folder / name} lacks the column {' and '.join(sorted(missing))}; make the dataset again")
    return list(rows.select_columns(list(_COLUMNS)))


def _short_enough(
    rows: list[dict[str, Any]], job: TrainingJob, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[dict[str, Any]], int]:
    """TRL's conversational form of the rows that have at most max_length tokens, and the number of the others."""
    examples: list[dict[str, Any]] = [
        {
            "prompt": chat(job.system_prompt, row["prompt"], [Turn.model_validate(turn) for turn in row["history"]]),
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    if not examples:
        return [], 0
    texts = tokenizer.apply_chat_template([e["prompt"] + e["completion"] for e in examples], tokenize=False)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = [e for e, ids in zip(examples, tokens, strict=True) if len(ids) <= job.settings.max_length]
    return kept, len(examples) - len(kept)


def _bfloat16_is_faster(batch_size: int) -> bool:
    """On a GPU that has it; on a CPU with instructions for it, once the batch is large enough to pay for the casts."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if batch_size < _SMALL_BATCH or not Path("/proc/cpuinfo").exists():
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def _steps(examples: int, settings: TrainingSettings) -> int:
    """Updates of the weights in the whole training, counted as transformers' Trainer counts them."""
    batches = math.ceil(examples / settings.batch_size)
    updates = max(math.ceil(batches / settings.gradient_accumulation), 1)
    return math.ceil(updates * settings.epochs)


def _trainer(
    job: TrainingJob, data: _Data, tokenizer: "PreTrainedTokenizerBase", steps: int, bfloat16: bool
) -> "SFTTrainer":
    from transformers import PrinterCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=_model(job, bfloat16),
        args=_config(job, steps, bfloat16),
        train_dataset=data.train,
        processing_class=tokenizer,
        peft_config=_lora(job.settings),
        callbacks=[_reporter(job)],
    )
    # It would write a model card with every checkpoint, which nobody reads.
    trainer.create_model_card = lambda *_, **__: None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _model(job: TrainingJob, bfloat16: bool) -> Any:
    """The base model's weights: full precision on a CPU, bfloat16 on a GPU, 4-bit with qlora."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if gpu and bfloat16 else torch.float32
    arguments: dict[str, Any] = {"dtype": kind, "use_safetensors": True, "trust_remote_code": False}
    if job.settings.method == "lora":
        return AutoModelForCausalLM.from_pretrained(job.base_model, **arguments)
    from peft import prepare_model_for_kbit_training

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    device = {"": 0} if gpu else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        job.base_model, quantization_config=four_bits, device_map=device, **arguments
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.settings.gradient_checkpointing)


def _lora(settings: TrainingSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _config(job: TrainingJob, steps: int, bfloat16: bool) -> "SFTConfig":
    import torch
    from trl import SFTConfig

    settings = job.settings
    return SFTConfig(
        output_dir=str(job.output / CHECKPOINTS),
        completion_only_loss=True,
        max_length=None,  # longer examples were left out: cut ones would teach answers without an end
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(settings.batch_size, 16),
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


def _reporter(job: TrainingJob) -> "TrainerCallback":
    """The callback that writes progress, refuses a loss that is no number, and declares checkpoints whole."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.began = self.written = 0.0
            self.first = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            _must_be_finite(logs["loss"], state.global_step)
            now = time.monotonic()
            last = state.global_step + args.logging_steps > state.max_steps
            if last or now - self.written >= _SECONDS_BETWEEN_LINES:
                append(job.output / PROGRESS, _progress(state, logs, now - self.began, self.first))
                self.written = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", job.key)

    return Reporter()


def _progress(state: Any, logs: dict[str, float], elapsed: float, first: int) -> Progress:
    done = max(state.global_step - first, 1)
    return Progress(
        step=state.global_step,
        steps=state.max_steps,
        epoch=state.epoch,
        loss=logs["loss"],
        learning_rate=logs["learning_rate"],
        tokens_per_second=logs.get("num_tokens", 0) / max(elapsed, 1e-9),
        eta_seconds=elapsed / done * (state.max_steps - state.global_step),
        elapsed_seconds=elapsed,
    )


def _must_be_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: the training diverged and its weights are useless; lower "
            "learning_rate (a tenth of it is a good try), or set bfloat16 to false"
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


def _save_adapter(trainer: "SFTTrainer", job: TrainingJob) -> None:
    """Write the adapter without the tokenizer (it is the base's, as it is) and without this machine's paths."""
    final, temporary = job.output / ADAPTER, job.output / f".{ADAPTER}.tmp"
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    config = trainer.model.peft_config["default"]
    config.base_model_name_or_path = job.base_model.name
    config.target_modules = sorted(config.target_modules)  # a set, whose order would differ from run to run
    trainer.model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)  # a model card of blanks
    temporary.replace(final)


def _curve(trainer: "SFTTrainer") -> list[CurvePoint]:
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    return [
        CurvePoint(step=step, loss=entry["loss"], learning_rate=entry["learning_rate"])
        for step, entry in sorted(history.items())
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _peak_memory() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()
