"""Our own paths for training jobs: create, list, read, pause, resume and cancel them, and follow their events.

The settings of a job have the names of the loop's YAML. `openai_fine_tuning.py` has OpenAI's paths for the same jobs.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, WithJsonSchema

from finetune_pipeline.orchestrator import OrchestratorError
from finetune_pipeline.pipeline import jobs
from finetune_pipeline.records import Text
from finetune_pipeline.registry import training_jobs
from finetune_pipeline.registry.training_jobs import ENDED, JobEvent, Origin, Status, TrainingJob
from finetune_pipeline.serving import fine_tuning
from finetune_pipeline.serving.errors import BadRequest, NotFound
from finetune_pipeline.serving.fine_tuning import (
    Admin,
    Change,
    Reader,
    change_job,
    client_errors,
    idempotency_key,
    model_name,
    page_of,
)
from finetune_pipeline.serving.fine_tuning_schema import FileId, Metadata, StrictRequest, Suffix
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import EventStream, get_gateway, json_body
from finetune_pipeline.settings import TrainingSettings

JOBS_PATH = "/v1/fine-tuning/jobs"

POLL_SECONDS, KEEP_ALIVE_SECONDS = 1.0, 15.0
"""Interval at which a stream of events reads new ones, and at which it sends a comment while there are none."""

router = APIRouter()


# --- Schemas ----------------------------------------------------------------------------------------------------------


def _training_schema() -> dict[str, Any]:
    """Return the JSON Schema of the loop's settings under `training`, each of which may be left out."""
    schema = TrainingSettings.model_json_schema()
    for one in schema["properties"].values():
        one.pop("default", None)  # it is the loop's
    return {**schema, "description": "Settings of `training` that differ from the loop's, by the names of its YAML."}


class JobRequest(StrictRequest):
    """A request for a training job: it trains, exports and evaluates, and never promotes.

    Without `dataset` and `training_file`, the job builds a dataset from the loop's logs first.
    """

    loop: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Name of the loop; null: the only one."
    )
    base_model: Annotated[Text, Field(min_length=1, max_length=500)] | None = Field(
        default=None, description="A Hugging Face id, or a folder of the project; null: the loop's."
    )
    training: Annotated[dict[str, Any], WithJsonSchema(_training_schema())] = Field(default_factory=dict)
    dataset: Annotated[Text, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Version of a dataset of the loop."
    )
    training_file: FileId | None = Field(
        default=None, description="Id of an uploaded file, which becomes a dataset; not together with `dataset`."
    )
    validation_file: FileId | None = Field(
        default=None, description="Id of an uploaded file; only with `training_file`."
    )
    suffix: Suffix | None = Field(default=None, description="Ends the model's name, which is loop@HASH:SUFFIX.")
    metadata: Metadata | None = Field(default=None, description="Facts of the client, by which it finds the job.")


class JobProgress(BaseModel):
    """How far the training of a job is."""

    step: int = Field(description="Optimizer steps done.")
    steps: int = Field(description="Optimizer steps of the whole training.")
    epoch: float
    percent: float = Field(description="Of the steps.")
    loss: float
    validation_loss: float | None
    learning_rate: float
    tokens_per_second: float
    memory_bytes: int | None = Field(description="Of the GPU, or of the process.")
    seconds_left: float | None = Field(description="Estimated; null unless it trains now.")
    ends_at: datetime | None = Field(description="Estimated end of the training; null unless it trains now.")


class Job(BaseModel):
    """A training job, however it was started."""

    id: str
    loop: str
    origin: Origin
    created_by: str = Field(description="Name of the API key, or of the OS user.")
    status: Status
    waits_for: str | None = Field(
        description="launch, pause or cancel: what was asked for and is not done yet; null if nothing is."
    )
    orchestrator_error: str | None = Field(
        description="Why Dagster could not be asked, so that this is what the run itself wrote last; null if it was."
    )
    error: str = Field(description="Why it failed; empty if it did not.")
    base_model: str | None = Field(description="Null: the loop's.")
    training: dict[str, Any] = Field(description="Settings of the training that differ from the loop's.")
    dataset: str | None = Field(description="Version of the dataset; null until it is built.")
    suffix: str | None
    metadata: dict[str, str]
    progress: JobProgress | None = Field(description="Null before the training.")
    adapter: str | None = Field(description="Version of the trained adapter.")
    model: str | None = Field(description="Name under which the result answers, once the job is completed.")
    report: str | None = Field(description="Version of the evaluation report.")
    runs: list[str] = Field(description="Runs of Dagster, oldest first; each resumption has one of its own.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Jobs(BaseModel):
    """Training jobs, newest first."""

    data: list[Job]
    has_more: bool


_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Number of the event; the event `end` has none."},
        "event": {"enum": ["message", "metrics", "end"]},
        "data": {"type": "string", "description": "A JSON object: created_at, level, message and data; or status."},
    },
    "required": ["event", "data"],
}
"""The schema of one server-sent event."""


# --- Routes -----------------------------------------------------------------------------------------------------------


@router.post(JOBS_PATH)
async def create_training_job(
    request: Request, caller: Admin, body: Annotated[JobRequest, Depends(json_body(JobRequest))]
) -> Job:
    """Create a training job and launch its run.

    A repeated request with the same header `Idempotency-Key` returns the job of the first one.
    """
    gateway = get_gateway(request)
    loop = gateway.loop_named(body.loop)
    if body.dataset is not None and body.training_file is not None:
        raise BadRequest("training_file: give it or dataset, not both.", param="training_file")
    if body.validation_file is not None and body.training_file is None:
        raise BadRequest("validation_file: give the training_file too.", param="validation_file")
    settings: dict[str, Any] = {"training": body.training} if body.training else {}
    if body.base_model is not None:
        _check_stays_inside(gateway, body.base_model)
        settings["base_model"] = body.base_model
    with client_errors():
        method = jobs.loop_of_job(loop, settings).training.method

    def create() -> Job:
        job = fine_tuning.create_job(
            gateway,
            loop,
            settings,
            training_file=body.training_file,
            validation_file=body.validation_file,
            method="dpo" if method == "dpo" else "supervised",
            dataset=body.dataset,
            origin="api",
            created_by=caller.name,
            suffix=body.suffix,
            metadata=body.metadata,
            request=body.model_dump(mode="json", exclude_unset=True),
            idempotency_key=idempotency_key(request),
        )
        return _described(gateway, job)

    return await asyncio.to_thread(create)


@router.get(JOBS_PATH)
async def list_training_jobs(
    request: Request,
    _: Reader,
    loop: Annotated[str | None, Query(max_length=200)] = None,
    status: Annotated[list[Status] | None, Query(max_length=6)] = None,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Jobs:
    """List the training jobs of all loops or one, however they were started, newest first."""
    gateway = get_gateway(request)
    name = gateway.loop_named(loop).name if loop is not None else None

    def read() -> Jobs:
        found = training_jobs.list_jobs(gateway.database, name, status or ())
        page, has_more = page_of([job for job in found if job.loop in gateway.loops], after, limit)
        return Jobs(data=[_synced(gateway, job) for job in page], has_more=has_more)

    return await asyncio.to_thread(read)


@router.get(JOBS_PATH + "/{job_id}")
async def retrieve_training_job(request: Request, _: Reader, job_id: str) -> Job:
    """Return a training job with its progress."""
    gateway = get_gateway(request)
    return await asyncio.to_thread(lambda: _synced(gateway, _find_job(gateway, job_id)))


@router.post(JOBS_PATH + "/{job_id}/cancel")
async def cancel_training_job(request: Request, _: Admin, job_id: str) -> Job:
    """Cancel a job: its run and its training process end within seconds, and the last checkpoint is kept."""
    return await _change(get_gateway(request), job_id, jobs.cancel)


@router.post(JOBS_PATH + "/{job_id}/pause")
async def pause_training_job(request: Request, _: Admin, job_id: str) -> Job:
    """Pause a job: its run ends within seconds, and its last checkpoint is kept until it is resumed."""
    return await _change(get_gateway(request), job_id, jobs.pause)


@router.post(JOBS_PATH + "/{job_id}/resume")
async def resume_training_job(request: Request, _: Admin, job_id: str) -> Job:
    """Resume a paused job from its last checkpoint, with another run of Dagster."""
    return await _change(get_gateway(request), job_id, jobs.resume)


@router.get(
    JOBS_PATH + "/{job_id}/events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "The events."},
        204: {"description": "The job has ended, and the client has all events; it need not connect again."},
    },
)
async def follow_training_job(
    request: Request,
    _: Reader,
    job_id: str,
    last_event_id: Annotated[
        int, Header(alias="Last-Event-ID", ge=0, lt=2**31, description="Number of the last event that the client has.")
    ] = 0,
) -> Response:
    """Send the events of a job as server-sent events, old ones first, until it ends.

    The id of an event is its number; a client that connects again with it gets the events after that one. The data is
    a JSON object with created_at, kind (message or metrics), level, message and data (the progress). When the job has
    ended, the event `end` has its status.
    """
    gateway = get_gateway(request)
    job = await asyncio.to_thread(_find_job, gateway, job_id)
    now, missed = await asyncio.to_thread(_read_events, gateway, job.id, last_event_id)
    if now.status in ENDED and not missed and last_event_id:
        return Response(status_code=204)
    return EventStream(_events(gateway, job.id, last_event_id), {})


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _check_stays_inside(gateway: Gateway, base_model: str) -> None:
    """Reject a base model that is a path out of the project, unless a loop's YAML names it.

    Raises:
        BadRequest: it is such a path.
    """
    path = PurePath(base_model)
    outside = path.is_absolute() or base_model.startswith("~") or ".." in path.parts
    if outside and all(base_model != loop.base_model for loop in gateway.loops.values()):
        raise BadRequest(
            "base_model: is a path out of the project; give a Hugging Face id, a folder of the project, or what a "
            "loop has as its base_model.",
            param="base_model",
        )


def _find_job(gateway: Gateway, id: str) -> TrainingJob:
    """Return a job of a loop that is served here.

    Raises:
        NotFound: there is none with this id.
    """
    with client_errors():
        job = training_jobs.find_job(gateway.database, id.replace("\x00", ""))
    if job.loop not in gateway.loops:
        raise NotFound(f"The job {job.id} is of the loop {job.loop}, which is not served here.", param="job_id")
    return job


def _synced(gateway: Gateway, job: TrainingJob) -> Job:
    """Return a job with the state of its run; without Dagster, what the run itself wrote last, and why."""
    try:
        return _described(gateway, jobs.sync(gateway.database, gateway.orchestrator(), gateway.loops[job.loop], job))
    except OrchestratorError as error:
        return _described(gateway, training_jobs.find_job(gateway.database, job.id), f"{error}.")


async def _change(gateway: Gateway, id: str, change: Change) -> Job:
    return await asyncio.to_thread(lambda: _described(gateway, change_job(gateway, _find_job(gateway, id), change)))


def _described(gateway: Gateway, job: TrainingJob, orchestrator_error: str | None = None) -> Job:
    shown = jobs.describe_job(gateway.database, job)
    left = shown["seconds_left"]
    progress = JobProgress(
        **{**job.progress, "percent": shown["percent"], "seconds_left": left,
           "ends_at": None if left is None else datetime.now(UTC) + timedelta(seconds=left)}
    ) if job.progress else None  # fmt: skip
    return Job(
        **{name: shown[name] for name in Job.model_fields.keys() & shown.keys() - {"progress"}},
        waits_for=job.wanted,
        orchestrator_error=orchestrator_error,
        base_model=job.settings.get("base_model"),
        training=job.settings.get("training", {}),
        progress=progress,
        model=model_name(job),
    )


def _read_events(gateway: Gateway, id: str, after: int) -> tuple[TrainingJob, list[JobEvent]]:
    """Return a job and its events after one; the job is read first, so that with an ended one all events are there."""
    job = training_jobs.find_job(gateway.database, id)
    return job, training_jobs.events_of(gateway.database, id, after)


async def _events(gateway: Gateway, id: str, after: int) -> AsyncGenerator[str, None]:
    sent_at = time.monotonic()
    while True:
        job, found = await asyncio.to_thread(_read_events, gateway, id, after)
        for event in found:
            data = event.model_dump(mode="json", exclude={"job_id", "number"})
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n"
            after, sent_at = event.number, time.monotonic()
        if job.status in ENDED:
            yield f"event: end\ndata: {json.dumps({'status': job.status})}\n\n"
            return
        if time.monotonic() - sent_at >= KEEP_ALIVE_SECONDS:
            yield ": the job is in progress\n\n"
            sent_at = time.monotonic()
        await asyncio.sleep(POLL_SECONDS)
