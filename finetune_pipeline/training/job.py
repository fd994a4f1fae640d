"""The input of a training run (JobConfig) and its output (Progress, TrainingResult)."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from finetune_pipeline.artifacts import hash_of, write_text
from finetune_pipeline.manifests import ADAPTER_WEIGHTS
from finetune_pipeline.records import Record
from finetune_pipeline.settings import TrainingSettings

# Files and folders of a job's output folder.
JOB = "job.json"
RESULT = "result.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
LOG = "training.log"

REFUSED = 2
"""Exit status of a run that cannot be done as asked; the log then ends in REFUSAL and the reason."""
REFUSAL = "TRAINING FAILED: "

# Weights and data are local; nothing is downloaded or reported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait starve each other on busy cores: three times slower was measured.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables of a training process, unless they are set already."""


class TrainingError(RuntimeError):
    """The job cannot be trained as asked; the message says what to change."""


class TrainingFailed(TrainingError):
    """The training process ended without a result; the message has its last output and what to do next."""


class JobConfig(Record):
    """One training run. Everything that it writes lies under `output`."""

    base_model: Path = Field(description="Folder of the base model: config.json, safetensors, tokenizer files.")
    dataset: Path = Field(description="DatasetDict saved to disk, in prompt-completion form: train and validation.")
    preferences: Path | None = Field(
        default=None, description="For dpo and kto: DatasetDict saved to disk, in (unpaired) preference form."
    )
    system_prompt: str = Field(default="", description="System prompt of every conversation, as in service.")
    output: Path = Field(description="Output folder; a killed run resumes from the checkpoints in it.")
    settings: TrainingSettings = TrainingSettings()
    initial_adapter: Path | None = Field(default=None, description="Adapter to warm-start from.")

    @field_validator("settings")
    @classmethod
    def _the_method_was_chosen(cls, settings: TrainingSettings) -> TrainingSettings:
        if settings.method == "auto":
            raise ValueError("method: auto has to be resolved first, by training.method_choice.choose_method")
        return settings

    @property
    def key(self) -> str:
        """Hash (16 hex digits) of everything that shapes the adapter; only checkpoints of this key are resumed."""
        return hash_of(self.model_dump(mode="json", exclude={"output": True, "settings": {"report_to"}}))[:16]


def steps_of(steps: float, total: int) -> int:
    """Return a number of steps that is given as such or, below 1, as a fraction of all `total` steps (rounded up).

    >>> steps_of(0.2, 35), steps_of(0.2, 36), steps_of(500, 35)
    (7, 8, 500)
    """
    return math.ceil(round(steps * total, 6)) if steps < 1 else int(steps)


class Progress(Record):
    """The state of a training run at one step."""

    step: int = Field(description="Optimizer steps done.")
    steps: int = Field(description="Optimizer steps of the whole run.")
    epoch: float
    loss: float = Field(description="Mean training loss since the line before.")
    validation_loss: float | None = Field(default=None, description="Of the last validation, if there was one.")
    learning_rate: float
    tokens_per_second: float = Field(description="Tokens without padding since this process started training.")
    seconds_left: float
    micro_batch: int | None = Field(default=None, description="Current micro-batch size.")
    elapsed_seconds: float = Field(description="Since this process started training; a resumed run starts at 0.")
    memory_bytes: int | None = Field(
        description="GPU memory when trained on a GPU, else resident memory; None if the backend does not report it."
    )


class CurvePoint(Record):
    """A point of the training loss curve."""

    step: int
    loss: float
    learning_rate: float


class ValidationPoint(Record):
    """The validation loss at a step."""

    step: int
    loss: float


class Rejection(Record):
    """Examples that the base model's chat template rejects, for one reason."""

    split: str = Field(description="train or validation.")
    reason: str
    count: int
    examples: tuple[str, ...] = Field(
        description="Where the first of them come from: source, place in it, interaction."
    )

    def __str__(self) -> str:
        return f"{self.reason} (from {'; '.join(self.examples)}{'; ...' if self.count > len(self.examples) else ''})"


class TrainingResult(Record):
    """Metrics of a finished run; `result.json` is the last file that it writes."""

    job: str = Field(description="JobConfig.key of the job.")
    device: str = Field(description="cpu, or the name of the GPU.")
    method: str = Field(description="sft, dpo or kto.")
    adapter: str = Field(description="lora or qlora.")
    bf16: bool = Field(description="Whether bfloat16 autocast was used.")
    steps: int = Field(description="Optimizer steps.")
    resumed_from: int = Field(description="Step of the checkpoint that this process resumed from; 0 for none.")
    examples: int = Field(description="Examples trained on.")
    too_long: int = Field(description="Examples left out for having more than max_length tokens.")
    rejections: tuple[Rejection, ...] = Field(
        default=(), description="Examples left out because the chat template rejects them."
    )
    loss_before: float = Field(
        description="Mean loss per completion token on the validation set (on train if it is empty)."
    )
    loss_after: float
    train_loss: float = Field(description="Mean training loss over the last tenth of the logged points.")
    tokens_per_second: float = Field(description="Tokens without padding per second of the training loop.")
    wall_seconds: float = Field(description="From the start of this process to its result, including imports.")
    peak_memory_bytes: int = Field(description="Peak GPU memory when trained on a GPU, else peak resident memory.")
    micro_batch: int | None = Field(
        default=None,
        description="Micro-batch size at the end, less than per_device_train_batch_size where memory ran out.",
    )
    curve: tuple[CurvePoint, ...]
    validation: tuple[ValidationPoint, ...] = Field(description="Empty without a validation set.")
    best_step: int = Field(description="Step of the adapter's weights: the one with the lowest validation loss.")
    stopped_early: bool = Field(description="Ended before its last step because the validation loss no longer fell.")

    @property
    def rejected(self) -> int:
        """Number of training examples left out because the chat template rejects them."""
        return sum(one.count for one in self.rejections if one.split == "train")


def curve_of(history: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return `curve` and `train_loss` of a TrainingResult from the Trainer's log history."""
    logged = {entry["step"]: entry for entry in history if "loss" in entry}  # a resumed run may log a step again
    curve = tuple(
        CurvePoint(step=step, loss=float(entry["loss"]), learning_rate=float(entry["learning_rate"]))
        for step, entry in sorted(logged.items())
    )
    last = [point.loss for point in curve[-max(1, len(curve) // 10) :]]
    return {"curve": curve, "train_loss": sum(last) / max(len(last), 1)}


def finish(job: JobConfig, result: TrainingResult) -> None:
    """Write the result of a job whose adapter is written, then remove its checkpoints.

    A kill in between leaves checkpoints behind; in the other order, all steps would be trained again.
    """
    write_text(job.output / RESULT, result.model_dump_json(indent=2) + "\n")
    shutil.rmtree(job.output / CHECKPOINTS)


def finished(job: JobConfig) -> TrainingResult | None:
    """Return the result in the job's output folder if it is complete and of this job."""
    path = job.output / RESULT
    if not path.is_file() or not (job.output / ADAPTER / ADAPTER_WEIGHTS).is_file():
        return None
    try:
        result = TrainingResult.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
    return result if result.job == job.key else None
