"""The schemas of OpenAI's Files API and fine-tuning API, as far as a loop can honor them.

Requests are strict: a field that cannot be honored is rejected by its name, because a training run that ignores a
setting costs hours.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune_pipeline.records import Text
from finetune_pipeline.serving.api import Whole
from finetune_pipeline.serving.routing import SUFFIX

Auto = Literal["auto"]


class StrictRequest(BaseModel):
    """Base class of requests: without unknown fields, and without conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Hyperparameters(StrictRequest):
    """Settings of the training; auto leaves the loop's own."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50), Whole] = Field(
        default="auto", description="Passes over the training examples: training.num_train_epochs."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256), Whole] = Field(
        default="auto", description="Examples of an update: training.per_device_train_batch_size, without accumulation."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(ge=1e-6, le=100)] = Field(
        default="auto", description="Factor of the loop's training.learning_rate."
    )


class DpoHyperparameters(Hyperparameters):
    """Settings of DPO."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = Field(default="auto", description="training.beta.")


class Supervised(StrictRequest):
    """Configuration of the supervised method."""

    hyperparameters: Hyperparameters | None = None


class Dpo(StrictRequest):
    """Configuration of DPO."""

    hyperparameters: DpoHyperparameters | None = None


class SupervisedMethod(StrictRequest):
    """Supervised fine-tuning."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class DpoMethod(StrictRequest):
    """Direct preference optimization."""

    type: Literal["dpo"]
    dpo: Dpo | None = None


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
]
Suffix = Annotated[str, Field(pattern=f"^{SUFFIX}$")]
FileId = Annotated[Text, Field(min_length=1, max_length=200)]


class FineTuningJobRequest(StrictRequest):
    """A request for a fine-tuning job, as OpenAI's clients send it."""

    model: Annotated[Text, Field(min_length=1, max_length=500)] = Field(
        description="A loop, or a base model that exactly one loop has."
    )
    training_file: FileId = Field(description="Id of an uploaded file.")
    validation_file: FileId | None = Field(
        default=None, description="Id of an uploaded file; null: the hash of a prompt decides its split."
    )
    method: Annotated[SupervisedMethod | DpoMethod, Field(discriminator="type")] | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Older form of method.supervised.hyperparameters; not together with method."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), Whole] | None = None
    suffix: Suffix | None = Field(default=None, description="Ends the model's name, which is loop@HASH:SUFFIX.")
    metadata: Metadata | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        default=None, description="None are supported; see the loop's training.report_to."
    )


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None


class FileList(BaseModel):
    """Uploaded files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(BaseModel):
    """The id of a file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobFailure(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """A fine-tuning job, as OpenAI describes it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str = Field(description="The model of the request.")
    loop: str = Field(description="The loop that trains; OpenAI has no such field.")
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None = Field(description="Name under which the result answers, once there is one.")
    training_file: str
    validation_file: str | None
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    seed: int
    user_provided_suffix: str | None
    metadata: dict[str, str] | None
    error: JobFailure | None
    result_files: list[str] = []
    integrations: list[Any] = []
    trained_tokens: int | None = None
    organization_id: str = "local"


class JobList(BaseModel):
    """Fine-tuning jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(BaseModel):
    """An event of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(BaseModel):
    """Events of a job, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class Checkpoint(BaseModel):
    """A model of a job that answers."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class CheckpointList(BaseModel):
    """Checkpoints of a job."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: Literal[False] = False
    first_id: str | None
    last_id: str | None
