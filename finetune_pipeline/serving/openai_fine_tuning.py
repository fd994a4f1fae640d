"""OpenAI's paths for files and fine-tuning jobs, so that its official client trains a loop on this machine.

A job trains, exports and evaluates, and never promotes; the result answers as `loop@HASH`, whatever the verdict.
"""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response

from finetune_pipeline.pipeline import jobs, uploaded_files
from finetune_pipeline.pipeline.uploaded_files import UploadedFile
from finetune_pipeline.registry import training_jobs
from finetune_pipeline.registry.training_jobs import TrainingJob
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
    receive_form,
    synced,
)
from finetune_pipeline.serving.fine_tuning_schema import (
    Checkpoint,
    CheckpointList,
    DeletedFile,
    EventList,
    FileList,
    FileObject,
    FineTuningEvent,
    FineTuningJob,
    FineTuningJobRequest,
    Hyperparameters,
    JobFailure,
    JobList,
)
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import get_gateway, json_body
from finetune_pipeline.settings import LoopSettings

UPLOAD_PATH, JOBS_PATH = "/v1/files", "/v1/fine_tuning/jobs"

UPLOAD_BODY = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["fine-tune"]}},
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
"""The form of an upload."""

_STATUS: dict[str, Any] = {
    "pending": "queued",
    "running": "running",
    "paused": "paused",
    "completed": "succeeded",
    "failed": "failed",
    "canceled": "cancelled",
}

router = APIRouter()


# --- Files ------------------------------------------------------------------------------------------------------------


@router.post(UPLOAD_PATH)
async def create_file(request: Request, caller: Admin) -> FileObject:
    """Upload a JSON Lines file to train on, of at most 512 MiB; its lines are checked when a job is created."""
    with uploaded_files.new_file() as file:
        fields = await receive_form(request, file, ("purpose",))
        if fields.get("purpose") != "fine-tune":
            found = repr(fields["purpose"]) if "purpose" in fields else "nothing"
            raise BadRequest(f"purpose: found {found}, expected 'fine-tune'.", param="purpose")
        return _file_object(await asyncio.to_thread(file.publish, fields["filename"], caller.name))


@router.get(UPLOAD_PATH)
async def list_files(
    _: Admin,
    purpose: Annotated[str | None, Query(max_length=100)] = None,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """List the uploaded files."""
    files = await asyncio.to_thread(uploaded_files.list_files)
    found = [_file_object(file) for file in (files if order == "asc" else files[::-1])]
    if purpose not in (None, "fine-tune"):
        found = []
    page, has_more = page_of(found, after, limit)
    ids = [file.id for file in page]
    return FileList(data=page, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


@router.get(UPLOAD_PATH + "/{file_id}")
async def retrieve_file(_: Admin, file_id: str) -> FileObject:
    """Return the facts of a file."""
    return _file_object(await _find_file(file_id))


@router.get(UPLOAD_PATH + "/{file_id}/content", response_class=Response)
async def file_content(_: Admin, file_id: str) -> Response:
    """Return a file as it was uploaded."""
    file = await _find_file(file_id)
    return FileResponse(file.path, media_type="application/octet-stream")


@router.delete(UPLOAD_PATH + "/{file_id}")
async def delete_file(_: Admin, file_id: str) -> DeletedFile:
    """Delete a file; datasets that were made from it stay."""
    with client_errors():
        await asyncio.to_thread(uploaded_files.delete_file, file_id)
    return DeletedFile(id=file_id)


# --- Jobs -------------------------------------------------------------------------------------------------------------


@router.post(JOBS_PATH)
async def create_job(
    request: Request, caller: Admin, body: Annotated[FineTuningJobRequest, Depends(json_body(FineTuningJobRequest))]
) -> FineTuningJob:
    """Create a job: the file becomes a dataset of the loop, and the job trains, exports and evaluates.

    A repeated request with the same header `Idempotency-Key` returns the job of the first one.
    """
    gateway = get_gateway(request)
    loop = _loop_of(gateway, body.model)
    if body.hyperparameters is not None and body.method is not None:
        raise BadRequest("hyperparameters: give them in method instead, not in both.", param="hyperparameters")

    def create() -> FineTuningJob:
        job = fine_tuning.create_job(
            gateway,
            loop,
            _settings_of(loop, body),
            training_file=body.training_file,
            validation_file=body.validation_file,
            method="dpo" if body.method is not None and body.method.type == "dpo" else "supervised",
            settings_param="method",
            origin="openai",
            created_by=caller.name,
            suffix=body.suffix,
            metadata=body.metadata,
            request=body.model_dump(mode="json"),
            idempotency_key=idempotency_key(request),
        )
        return _job_object(gateway, job)

    return await asyncio.to_thread(create)


@router.get(JOBS_PATH)
async def list_jobs(
    request: Request,
    _: Reader,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """List the jobs that were created here, newest first; the query `metadata[key]=value` selects by metadata."""
    gateway = get_gateway(request)
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[")
    }

    def read() -> tuple[list[TrainingJob], bool]:
        found = [
            job
            for job in training_jobs.list_jobs(gateway.database)
            if job.origin == "openai" and job.loop in gateway.loops and wanted.items() <= job.metadata.items()
        ]
        page, has_more = page_of(found, after, limit)
        return [synced(gateway, job) for job in page], has_more

    page, has_more = await asyncio.to_thread(read)
    return JobList(data=[_job_object(gateway, job) for job in page], has_more=has_more)


@router.get(JOBS_PATH + "/{job_id}")
async def retrieve_job(request: Request, _: Reader, job_id: str) -> FineTuningJob:
    """Return a job."""
    gateway = get_gateway(request)
    return await asyncio.to_thread(lambda: _job_object(gateway, synced(gateway, _find_job(gateway, job_id))))


@router.post(JOBS_PATH + "/{job_id}/cancel")
async def cancel_job(request: Request, _: Admin, job_id: str) -> FineTuningJob:
    """Cancel a job; its training ends, and its last checkpoint is kept."""
    return await _change(get_gateway(request), job_id, jobs.cancel)


@router.post(JOBS_PATH + "/{job_id}/pause")
async def pause_job(request: Request, _: Admin, job_id: str) -> FineTuningJob:
    """Pause a job; its training ends, and continues from the last checkpoint when the job is resumed."""
    return await _change(get_gateway(request), job_id, jobs.pause)


@router.post(JOBS_PATH + "/{job_id}/resume")
async def resume_job(request: Request, _: Admin, job_id: str) -> FineTuningJob:
    """Resume a paused job."""
    return await _change(get_gateway(request), job_id, jobs.resume)


@router.get(JOBS_PATH + "/{job_id}/events")
async def list_events(
    request: Request,
    _: Reader,
    job_id: str,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> EventList:
    """List the events of a job, newest first."""
    gateway = get_gateway(request)

    def read() -> EventList:
        job = synced(gateway, _find_job(gateway, job_id))
        events = [
            FineTuningEvent(
                id=f"ftevent-{job.id.removeprefix('ftjob-')}-{event.number}",
                created_at=int(event.created_at.timestamp()),
                level=event.level,
                message=event.message,
                type=event.kind,
                data=event.data,
            )
            for event in reversed(training_jobs.events_of(gateway.database, job.id))
        ]
        page, has_more = page_of(events, after, limit)
        return EventList(data=page, has_more=has_more)

    return await asyncio.to_thread(read)


@router.get(JOBS_PATH + "/{job_id}/checkpoints")
async def list_checkpoints(
    request: Request,
    _: Reader,
    job_id: str,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> CheckpointList:
    """List the models of a job that answer: the result, once the job has exported it."""
    gateway = get_gateway(request)
    job = await asyncio.to_thread(lambda: synced(gateway, _find_job(gateway, job_id)))
    name, progress = model_name(job), job.progress
    found = []
    if name is not None:
        metrics = {"step": progress.get("step"), "train_loss": progress.get("loss")}
        metrics |= {"full_valid_loss": progress.get("validation_loss")}
        found.append(
            Checkpoint(
                id=f"ftckpt-{job.id.removeprefix('ftjob-')}",
                created_at=int((job.finished_at or job.created_at).timestamp()),
                fine_tuned_model_checkpoint=name,
                fine_tuning_job_id=job.id,
                step_number=progress.get("step", 0),
                metrics={name: value for name, value in metrics.items() if value is not None},
            )
        )
    page, _more = page_of(found, after, limit)
    ids = [checkpoint.id for checkpoint in page]
    return CheckpointList(data=page, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


# --- Requests ---------------------------------------------------------------------------------------------------------


def _loop_of(gateway: Gateway, model: str) -> LoopSettings:
    """Return the loop with this name or alias, or the only one with this base model."""
    if model in gateway.names:
        return gateway.loops[gateway.names[model]]
    found = [loop for loop in gateway.loops.values() if loop.base_model == model]
    if len(found) == 1:
        return found[0]
    names = ", ".join(loop.name for loop in found or gateway.loops.values())
    reason = "is the base of several loops" if found else "is neither a loop nor the base of one"
    raise BadRequest(f"model: {model[:100]!r} {reason}; name one of the loops: {names}.", param="model")


def _settings_of(loop: LoopSettings, body: FineTuningJobRequest) -> dict[str, Any]:
    """Return the settings of the job that differ from the loop's."""
    training: dict[str, Any] = {"method": "dpo" if body.method and body.method.type == "dpo" else "sft"}
    given = _hyperparameters(body).model_dump()
    if given["n_epochs"] != "auto":
        training["num_train_epochs"] = given["n_epochs"]
    if given["batch_size"] != "auto":
        training |= {"per_device_train_batch_size": given["batch_size"], "gradient_accumulation_steps": 1}
    if given["learning_rate_multiplier"] != "auto":
        training["learning_rate"] = loop.training.learning_rate * given["learning_rate_multiplier"]
    if given.get("beta", "auto") != "auto":
        training["beta"] = given["beta"]
    if body.seed is not None:
        training["seed"] = body.seed
    return {"training": training}


def _hyperparameters(body: FineTuningJobRequest) -> Hyperparameters:
    """Return the hyperparameters of the method."""
    if body.method is None:
        return body.hyperparameters or Hyperparameters()
    options = body.method.supervised if body.method.type == "supervised" else body.method.dpo
    return (options.hyperparameters if options else None) or Hyperparameters()


async def _find_file(id: str) -> UploadedFile:
    with client_errors():
        return await asyncio.to_thread(uploaded_files.find_file, id)


def _find_job(gateway: Gateway, id: str) -> TrainingJob:
    """Return a job that was created here."""
    with client_errors():
        job = training_jobs.find_job(gateway.database, id.replace("\x00", ""))
    if job.loop not in gateway.loops:
        raise NotFound(f"The job {id[:100]} is of the loop {job.loop}, which this gateway does not serve.")
    if job.origin != "openai":
        raise NotFound(f"The job {id[:100]} was not created here, but by {job.origin}; `finetune train show {id}`.")
    return job


async def _change(gateway: Gateway, id: str, change: Change) -> FineTuningJob:
    return await asyncio.to_thread(lambda: _job_object(gateway, change_job(gateway, _find_job(gateway, id), change)))


# --- Responses --------------------------------------------------------------------------------------------------------


def _file_object(file: UploadedFile) -> FileObject:
    return FileObject(id=file.id, bytes=file.bytes, created_at=int(file.created_at.timestamp()), filename=file.filename)


def _job_object(gateway: Gateway, job: TrainingJob) -> FineTuningJob:
    body = FineTuningJobRequest.model_validate(job.request)
    method = "supervised" if body.method is None else body.method.type
    hyperparameters = _hyperparameters(body).model_dump()
    training = job.settings.get("training", {})
    seconds_left = job.progress.get("seconds_left") if job.status == "running" else None
    return FineTuningJob(
        id=job.id,
        model=body.model,
        loop=job.loop,
        status=_STATUS[job.status],
        created_at=int(job.created_at.timestamp()),
        finished_at=int(job.finished_at.timestamp()) if job.finished_at else None,
        estimated_finish=None if seconds_left is None else int(time.time() + seconds_left),
        fine_tuned_model=model_name(job),
        training_file=body.training_file,
        validation_file=body.validation_file,
        method={"type": method, method: {"hyperparameters": hyperparameters}},
        hyperparameters=hyperparameters,
        seed=training.get("seed", gateway.loops[job.loop].training.seed),
        user_provided_suffix=job.suffix,
        metadata=job.metadata or None,
        error=JobFailure(code="job_failed", message=job.error or "see the job's events")
        if job.status == "failed"
        else None,
    )
