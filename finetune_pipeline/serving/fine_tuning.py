"""What OpenAI's paths for fine-tuning and our own share: access, uploads, jobs with the state of their runs, errors."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import PurePath
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from finetune_pipeline.artifacts import ArtifactBusyError, ArtifactError
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.orchestrator import Orchestrator, OrchestratorError
from finetune_pipeline.pipeline import jobs, uploaded_files
from finetune_pipeline.pipeline.dataset_export import UnknownDatasetError
from finetune_pipeline.pipeline.datasets import Method, UploadError, dataset_from_file
from finetune_pipeline.pipeline.uploaded_files import FileTooLargeError, NewFile, UnknownFileError, UploadedFile
from finetune_pipeline.registry import training_jobs
from finetune_pipeline.registry.training_jobs import Origin, TrainingJob
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.errors import BadRequest, Conflict, NotFound, TooLarge, Unavailable
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import require_scope
from finetune_pipeline.serving.multipart import boundary_of, form_parts
from finetune_pipeline.settings import LoopSettings, SettingsError

Reader = Annotated[Caller, Depends(require_scope("infer"))]
Admin = Annotated[Caller, Depends(require_scope("admin"))]
Voter = Annotated[Caller, Depends(require_scope("feedback"))]
"""Files and answers hold data of people, and jobs and comparisons use the machine for long, so they need admin."""

BUSY_SECONDS = 30.0
"""How long a request waits while another one makes the same dataset."""

Change = Callable[[Database, Orchestrator, LoopSettings, str], TrainingJob]
"""`jobs.cancel`, `jobs.pause` or `jobs.resume`."""

T = TypeVar("T")


@contextmanager
def client_errors(param: str | None = None) -> Iterator[None]:
    """Turn errors of files, datasets, jobs and Dagster into responses.

    Args:
        param: the field that names the file or holds the settings, where it is not the one that the error names.
    """
    try:
        yield
    except UnknownFileError as error:
        raise NotFound(f"{error}.", param=param or "file_id") from error
    except UploadError as error:
        name = "validation_file" if error.validation else "training_file"
        raise BadRequest(f"{name}: {error}.", param=name) from error
    except jobs.InvalidJobSettings as error:
        found = f"{param}: {error}" if param else str(error)
        raise BadRequest(f"{found}.", param=param or error.field) from error
    except training_jobs.UnknownJobError as error:
        raise NotFound(f"{error}.", param="job_id") from error
    except training_jobs.JobError as error:  # busy, or not in a state that allows it
        raise Conflict(f"{error}.") from error
    except (BenchmarkError, CurationError, SettingsError) as error:  # in the loop's files, or in an older dataset
        raise Conflict("The loop's files do not allow it", detail=error) from error
    except UnknownDatasetError as error:
        raise NotFound(f"{error}.", param="dataset") from error
    except ArtifactBusyError as error:
        raise Unavailable("The same file is being read by another request; send this one again", detail=error,
                          retry_after=5) from error  # fmt: skip
    except ArtifactError as error:
        raise Unavailable("The dataset cannot be read or written", detail=error, retry_after=30) from error
    except OrchestratorError as error:
        raise Unavailable(f"{error}.", retry_after=30) from error


async def receive_form(request: Request, file: NewFile, names: Collection[str]) -> dict[str, str]:
    """Write the part `file` of a form to a file piece by piece, and return the other fields with the `filename`.

    Args:
        names: the other fields that the form may have.

    Raises:
        TooLarge: the file is larger than MAX_FILE_BYTES.
        BadRequest: the form has no file, or another field.
    """
    boundary = boundary_of(request.headers.get("content-type", ""))
    fields: dict[str, str] = {}
    filename: str | None = None
    async for part in form_parts(boundary, request.stream()):
        if part.name == "file":
            filename = part.filename or filename or ""
            try:
                await asyncio.to_thread(file.write, part.data)
            except FileTooLargeError as error:
                raise TooLarge(f"{error}.", param="file") from error
        elif part.name in names:
            fields[part.name] = (fields.get(part.name, "") + part.data.decode("utf-8", "replace"))[:200]
        else:
            expected = ", ".join(["file", *names])
            raise BadRequest(f"{part.name[:100]}: is not supported; send {expected}.", param=part.name[:100])
    if filename is None:
        raise BadRequest("file: is missing; send it as a part of the form.", param="file")
    name = "".join(letter for letter in PurePath(filename).name[:200] if letter.isprintable()) or "upload.jsonl"
    return {**fields, "filename": name}


def file_of(id: str, param: str) -> UploadedFile:
    """Return an uploaded file that a request names in a field.

    Raises:
        NotFound: there is none with this id.
    """
    with client_errors(param):
        return uploaded_files.find_file(id)


def idempotency_key(request: Request) -> str | None:
    """Return the header by which a repeated request is recognized.

    Raises:
        BadRequest: it is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 200:
        raise BadRequest("The header Idempotency-Key has 1 to 200 characters.", param="Idempotency-Key")
    return key


def create_job(
    gateway: Gateway,
    loop: LoopSettings,
    settings: dict[str, Any],
    *,
    training_file: str | None,
    validation_file: str | None,
    method: Method,
    dataset: str | None = None,
    settings_param: str | None = None,
    origin: Origin,
    **fields: Any,
) -> TrainingJob:
    """Create a job, and the dataset of an uploaded file for it.

    Args:
        training_file, validation_file: ids of uploaded files.
        dataset: version of a dataset; None: of the file, or else built from the logs by the job.
        settings_param: the field that holds the settings, if errors of settings do not name the request's own fields.
        fields: further arguments of `jobs.create`.
    """
    with client_errors(settings_param):
        jobs.loop_of_job(loop, settings)
    training = file_of(training_file, "training_file") if training_file else None
    validation = file_of(validation_file, "validation_file") if validation_file else None
    orchestrator = gateway.orchestrator()
    with client_errors():
        if training is not None:
            orchestrator.check(loop.job_name)  # before a large file is read
            dataset = _dataset_of(gateway, loop, training, method, validation)
        return jobs.create(gateway.database, orchestrator, loop, settings, dataset=dataset, origin=origin, **fields)


def _dataset_of(
    gateway: Gateway, loop: LoopSettings, training: UploadedFile, method: Method, validation: UploadedFile | None
) -> str:
    """Return the version of the dataset of a file; a request that was sent twice waits for the first one."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            made = dataset_from_file(
                loop, gateway.database, training.path, method, validation.path if validation else None
            )
            return made.manifest.version
        except ArtifactBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def synced(gateway: Gateway, job: TrainingJob) -> TrainingJob:
    """Return a job with the state of its run; without Dagster, what the run itself wrote last."""
    try:
        return jobs.sync(gateway.database, gateway.orchestrator(), gateway.loops[job.loop], job)
    except OrchestratorError:
        return job


def change_job(gateway: Gateway, job: TrainingJob, change: Change) -> TrainingJob:
    """Cancel, pause or resume a job."""
    job = synced(gateway, job)
    with client_errors():
        return change(gateway.database, gateway.orchestrator(), gateway.loops[job.loop], job.id)


def model_name(job: TrainingJob) -> str | None:
    """Return the name under which the result of a job answers, once the job has ended: loop@HASH, or loop@HASH:SUFFIX.

    The suffix is for people; the hash alone decides which model it is.
    """
    if job.status != "completed" or job.model_sha256 is None:
        return None
    return f"{job.loop}@{job.model_sha256[:16]}" + (f":{job.suffix}" if job.suffix else "")


def page_of(
    found: list[T], after: str | int | None, limit: int, id_of: Callable[[T], object] = attrgetter("id")
) -> tuple[list[T], bool]:
    """Return the objects after the one with an id, at most `limit`, and whether there are more.

    Raises:
        NotFound: none has this id.
    """
    if after is not None:
        ids = [id_of(one) for one in found]
        if after not in ids:
            raise NotFound(f"after: there is no {str(after)[:100]!r} in this list.", param="after")
        found = found[ids.index(after) + 1 :]
    return found[:limit], len(found) > limit
