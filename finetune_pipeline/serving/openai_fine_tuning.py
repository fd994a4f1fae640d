"""OpenAI's paths for files and fine-tuning jobs, so that its official client trains a loop on this machine.

A job trains, exports and evaluates, and never promotes; the result answers as `loop@HASH`, whatever the verdict.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response

from finetune_pipeline.database import Database
from finetune_pipeline.orchestrator import Orchestrator, OrchestratorError, dagster_url
from finetune_pipeline.pipeline import jobs, uploaded_files
from finetune_pipeline.pipeline.datasets import Method, UploadError, dataset_from_file
from finetune_pipeline.pipeline.uploaded_files import FileTooLargeError, UnknownFileError, UploadedFile
from finetune_pipeline.registry import training_jobs
from finetune_pipeline.registry.training_jobs import TrainingJob
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.errors import BadRequest, Conflict, NotFound, TooLarge, Unavailable, UnknownModel
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
from finetune_pipeline.serving.http import get_gateway, json_body, require_scope
from finetune_pipeline.serving.multipart import boundary_of, form_parts
from finetune_pipeline.settings import LoopSettings, home

UPLOAD_PATH, JOBS_PATH = "/v1/files", "/v1/fine_tuning/jobs"

UPLOAD_BODY = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["fine-tune"]}},
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
"""The form of an upload."""

_REQUEST = "finetune.request"
"""Key of a job's metadata under which the client's request is kept, as JSON."""

_STATUS: dict[str, Any] = {
    "pending": "queued",
    "running": "running",
    "paused": "paused",
    "completed": "succeeded",
    "failed": "failed",
    "canceled": "cancelled",
}

router = APIRouter()
Reader = Annotated[Caller, Depends(require_scope("infer"))]
Admin = Annotated[Caller, Depends(require_scope("admin"))]
"""Files hold training data, and jobs use the machine for hours, so both need the scope admin."""

T = TypeVar("T")


# --- Files ------------------------------------------------------------------------------------------------------------


@router.post(UPLOAD_PATH)
async def create_file(request: Request, caller: Admin) -> FileObject:
    """Upload a JSON Lines file to train on, of at most 512 MiB; its lines are checked when a job is created."""
    boundary = boundary_of(request.headers.get("content-type", ""))
    fields: dict[str, str] = {}
    filename: str | None = None
    with uploaded_files.new_file() as file:
        async for part in form_parts(boundary, request.stream()):
            if part.name == "file":
                filename = part.filename or filename or ""
                try:
                    await asyncio.to_thread(file.write, part.data)
                except FileTooLargeError as error:
                    raise TooLarge(f"{error}.", param="file") from error
            elif part.name == "purpose":
                fields["purpose"] = (fields.get("purpose", "") + part.data.decode("utf-8", "replace"))[:100]
            else:
                raise BadRequest(f"{part.name[:100]}: is not supported; send file and purpose.", param=part.name[:100])
        if fields.get("purpose") != "fine-tune":
            found = repr(fields["purpose"]) if "purpose" in fields else "nothing"
            raise BadRequest(f"purpose: found {found}, expected 'fine-tune'.", param="purpose")
        if filename is None:
            raise BadRequest("file: is missing; send it as a part of the form.", param="file")
        name = "".join(letter for letter in PurePath(filename).name[:200] if letter.isprintable()) or "upload.jsonl"
        return _file_object(await asyncio.to_thread(file.publish, name, caller.name))


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
    page, has_more = _page(found, after, limit)
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
    with _client_errors():
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
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 200:
        raise BadRequest("The header Idempotency-Key has 1 to 200 characters.", param="Idempotency-Key")
    if body.hyperparameters is not None and body.method is not None:
        raise BadRequest("hyperparameters: give them in method instead, not in both.", param="hyperparameters")
    if body.metadata and _REQUEST in body.metadata:
        raise BadRequest(f"metadata: the key {_REQUEST} is reserved; choose another one.", param="metadata")
    settings = _settings_of(loop, body)
    method: Method = "dpo" if body.method is not None and body.method.type == "dpo" else "supervised"

    def create() -> FineTuningJob:
        with _client_errors():
            jobs.loop_of_job(loop, settings)
        training = _file_of(body.training_file, "training_file")
        validation = _file_of(body.validation_file, "validation_file") if body.validation_file else None
        orchestrator = _orchestrator()
        with _client_errors():
            orchestrator.runs({jobs.JOB_TAG: "none"})  # before a large file is read
            dataset = dataset_from_file(
                loop, gateway.database, training.path, method, validation.path if validation else None
            )
            job = jobs.create(
                gateway.database,
                orchestrator,
                loop,
                settings,
                origin="openai",
                created_by=caller.name,
                dataset=dataset.manifest.version,
                suffix=body.suffix,
                metadata={**(body.metadata or {}), _REQUEST: body.model_dump_json(exclude={"metadata"})},
                idempotency_key=key,
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
        page, has_more = _page(found, after, limit)
        return [_synced(gateway, job) for job in page], has_more

    page, has_more = await asyncio.to_thread(read)
    return JobList(data=[_job_object(gateway, job) for job in page], has_more=has_more)


@router.get(JOBS_PATH + "/{job_id}")
async def retrieve_job(request: Request, _: Reader, job_id: str) -> FineTuningJob:
    """Return a job."""
    gateway = get_gateway(request)
    return await asyncio.to_thread(lambda: _job_object(gateway, _synced(gateway, _find_job(gateway, job_id))))


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
        job = _synced(gateway, _find_job(gateway, job_id))
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
        page, has_more = _page(events, after, limit)
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
    job = await asyncio.to_thread(lambda: _synced(gateway, _find_job(gateway, job_id)))
    name, progress = _model_name(job), job.progress
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
    page, _more = _page(found, after, limit)
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
    raise UnknownModel(f"model: {model[:100]!r} {reason}; name one of the loops: {names}.", param="model")


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


def _orchestrator() -> Orchestrator:
    return Orchestrator(dagster_url(home()))


async def _find_file(id: str) -> UploadedFile:
    with _client_errors():
        return await asyncio.to_thread(uploaded_files.find_file, id)


def _file_of(id: str, param: str) -> UploadedFile:
    with _client_errors(param):
        return uploaded_files.find_file(id)


def _find_job(gateway: Gateway, id: str) -> TrainingJob:
    """Return a job that was created here."""
    with _client_errors():
        job = training_jobs.find_job(gateway.database, id.replace("\x00", ""))
    if job.origin != "openai" or job.loop not in gateway.loops:
        raise NotFound(f"The job {id[:100]} was not created here, but by {job.origin}; `finetune train show {id}`.")
    return job


def _synced(gateway: Gateway, job: TrainingJob) -> TrainingJob:
    """Return a job with the state of its run; without Dagster, what the run itself wrote last."""
    try:
        return jobs.sync(gateway.database, _orchestrator(), gateway.loops[job.loop], job)
    except OrchestratorError:
        return job


Change = Callable[[Database, Orchestrator, LoopSettings, str], TrainingJob]


async def _change(gateway: Gateway, id: str, change: Change) -> FineTuningJob:
    def apply() -> FineTuningJob:
        job = _synced(gateway, _find_job(gateway, id))
        with _client_errors():
            changed = change(gateway.database, _orchestrator(), gateway.loops[job.loop], job.id)
        return _job_object(gateway, changed)

    return await asyncio.to_thread(apply)


@contextmanager
def _client_errors(param: str | None = None) -> Iterator[None]:
    """Turn errors of files, datasets, jobs and Dagster into responses."""
    try:
        yield
    except UnknownFileError as error:
        raise NotFound(f"{error}.", param=param or "file_id") from error
    except UploadError as error:
        name = "validation_file" if error.validation else "training_file"
        raise BadRequest(f"{name}: {error}.", param=name) from error
    except jobs.InvalidJobSettings as error:
        raise BadRequest(f"method: {error}.", param="method") from error
    except training_jobs.UnknownJobError as error:
        raise NotFound(f"{error}.", param="fine_tuning_job_id") from error
    except training_jobs.JobError as error:  # busy, or not in a state that allows it
        raise Conflict(f"{error}.") from error
    except OrchestratorError as error:
        raise Unavailable(f"{error}.", retry_after=30) from error


# --- Responses --------------------------------------------------------------------------------------------------------


def _file_object(file: UploadedFile) -> FileObject:
    return FileObject(id=file.id, bytes=file.bytes, created_at=int(file.created_at.timestamp()), filename=file.filename)


def _model_name(job: TrainingJob) -> str | None:
    """Return the name under which the result of a job answers, once the job has ended."""
    exported = job.status == "completed" and job.model_sha256 is not None
    return f"{job.loop}@{job.model_sha256[:16]}" if exported and job.model_sha256 else None


def _job_object(gateway: Gateway, job: TrainingJob) -> FineTuningJob:
    body = FineTuningJobRequest.model_validate_json(job.metadata[_REQUEST])
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
        fine_tuned_model=_model_name(job),
        training_file=body.training_file,
        validation_file=body.validation_file,
        method={"type": method, method: {"hyperparameters": hyperparameters}},
        hyperparameters=hyperparameters,
        seed=training.get("seed", gateway.loops[job.loop].training.seed),
        user_provided_suffix=job.suffix,
        metadata={key: value for key, value in job.metadata.items() if key != _REQUEST} or None,
        error=JobFailure(code="job_failed", message=job.error or "see the job's events")
        if job.status == "failed"
        else None,
    )


def _page(found: list[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """Return the objects after the one with an id, at most `limit`, and whether there are more."""
    if after is not None:
        ids = [str(getattr(one, "id", "")) for one in found]
        if after not in ids:
            raise NotFound(f"after: there is no {after[:100]!r} in this list.", param="after")
        found = found[ids.index(after) + 1 :]
    return found[:limit], len(found) > limit
