"""What a training is told, and what it says of itself. Plain pydantic: read by the caller and by the trainer."""

import math
import shutil
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from finetune_pipeline.artifacts import hash_of, write_text
from finetune_pipeline.records import Record
from finetune_pipeline.settings import TrainingSettings

JOB = "job.json"
RESULT = "result.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
LOG = "training.log"

REFUSED = 2
"""Exit status of a training that cannot be done as asked; the log then ends in REFUSAL and the reason."""
REFUSAL = "TRAINING FAILED: "


class TrainingError(RuntimeError):
    """A training cannot be done as it was asked for; the message says what to change."""


class TrainingFailed(TrainingError):
    """The training process ended without a result; the message says how, what it wrote last, and what to do."""


class JobConfig(Record):
    """One training. Everything that it writes lies under `output`."""

    base_model: Path = Field(description="Folder of the base model: config.json, safetensors, tokenizer files.")
    dataset: Path = Field(description="DatasetDict saved to disk: train, perhaps validation; prompt and completion.")
    preferences: Path | None = Field(
        default=None, description="For dpo and kto, DatasetDict saved to disk: pairs, or labelled answers."
    )
    system_prompt: str = Field(default="", description="Put before every prompt, as in service.")
    output: Path = Field(description="Folder to write to; a training that was killed there goes on from it.")
    settings: TrainingSettings = TrainingSettings()
    initial_adapter: Path | None = Field(default=None, description="Adapter to go on from, instead of a new one.")

    @field_validator("settings")
    @classmethod
    def _the_method_was_chosen(cls, settings: TrainingSettings) -> TrainingSettings:
        if settings.method == "auto":
            raise ValueError("method auto is no method; let training.methods.choose decide by what the dataset holds")
        return settings

    @property
    def key(self) -> str:
        """Hash (16 hex digits) of all that shapes the adapter: only checkpoints of the same key are gone on with."""
        return hash_of(self.model_dump(mode="json", exclude={"output": True, "settings": {"report_to"}}))[:16]


def steps_of(steps: float, total: int) -> int:
    """Return a number of steps that is given as such or, below 1, as a fraction of all `total` steps (rounded up).

    >>> steps_of(0.2, 35), steps_of(0.2, 36), steps_of(500, 35)
    (7, 8, 500)
    """
    return math.ceil(round(steps * total, 6)) if steps < 1 else int(steps)


class Progress(Record):
    """How far a training is, at one moment of it."""

    step: int = Field(description="Updates of the weights done.")
    steps: int = Field(description="Updates that the whole training has.")
    epoch: float
    loss: float = Field(description="Mean training loss since the line before.")
    validation_loss: float | None = Field(default=None, description="Of the last validation, if there was one yet.")
    learning_rate: float
    tokens_per_second: float = Field(description="Tokens of text, without padding, since this process began to train.")
    eta_seconds: float
    micro_batch: int | None = Field(default=None, description="Examples in memory at once, at this moment.")
    elapsed_seconds: float = Field(description="Since this process began to train; a resumed one begins at 0.")
    memory_bytes: int | None = Field(
        description="Of the GPU when trained on one, else resident in main memory; None where a backend does not tell."
    )


class CurvePoint(Record):
    """One point of the loss curve."""

    step: int
    loss: float
    learning_rate: float


class ValidationPoint(Record):
    """The loss on the validation set, measured on the way."""

    step: int
    loss: float


class Rejection(Record):
    """Examples that the base model's chat template rejects, for one reason."""

    split: str = Field(description="train or validation.")
    reason: str
    count: int
    examples: tuple[str, ...] = Field(description="Provenance of the first of them: source, provenance, interaction.")

    def __str__(self) -> str:
        return f"{self.reason} (from {'; '.join(self.examples)}{'; ...' if self.count > len(self.examples) else ''})"


class TrainingResult(Record):
    """What a finished training says of itself; `result.json` is the last file that it writes."""

    job: str = Field(description="JobConfig.key of what was trained.")
    device: str = Field(description="cpu, or the name of the GPU.")
    method: str = Field(description="sft, dpo or kto.")
    adapter: str = Field(description="lora or qlora.")
    bf16: bool = Field(description="Whether bfloat16 autocast was used.")
    steps: int = Field(description="Updates of the weights.")
    resumed_from: int = Field(description="Step from which this process went on; 0 is a whole training.")
    examples: int = Field(description="Examples trained on.")
    too_long: int = Field(description="Examples left out for having more than max_length tokens.")
    rejections: tuple[Rejection, ...] = Field(
        default=(), description="Examples left out because the chat template rejects them."
    )
    loss_before: float = Field(description="Mean loss per completion token on validation (on train if it is empty).")
    loss_after: float
    train_loss: float = Field(description="Mean training loss over the last tenth of the logged points.")
    tokens_per_second: float = Field(description="Tokens of text, without padding, by the time of the training loop.")
    wall_seconds: float = Field(description="From the start of this process to its result, imports included.")
    peak_memory_bytes: int = Field(
        description="Highest use of the scarce memory: of the GPU when trained on one, else resident in main memory."
    )
    micro_batch: int | None = Field(
        default=None,
        description="Micro-batch size at the end, less than per_device_train_batch_size where memory ran out.",
    )
    curve: tuple[CurvePoint, ...]
    validation: tuple[ValidationPoint, ...] = Field(description="Empty where nothing was kept for validation.")
    best_step: int = Field(description="The step whose weights the adapter has: of the lowest validation loss.")
    stopped_early: bool = Field(description="Ended before its last step, since validation no longer got better.")

    @property
    def rejected(self) -> int:
        """Number of training examples that were excluded because the chat template rejects them."""
        return sum(one.count for one in self.rejections if one.split == "train")


def finish(job: JobConfig, result: TrainingResult) -> None:
    """Write the result of a job whose adapter lies there, and then remove its checkpoints, which nobody needs now.

    A kill in between leaves checkpoints too many; the other way round, all would be trained again.
    """
    write_text(job.output / RESULT, result.model_dump_json(indent=2) + "\n")
    shutil.rmtree(job.output / CHECKPOINTS)


def finished(job: JobConfig) -> TrainingResult | None:
    """The result of this very job if it lies in its folder, complete."""
    path = job.output / RESULT
    if not path.is_file() or not (job.output / ADAPTER / "adapter_model.safetensors").is_file():
        return None
    try:
        result = TrainingResult.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
    return result if result.job == job.key else None
