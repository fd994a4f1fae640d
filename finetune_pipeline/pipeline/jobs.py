"""Training jobs: create, watch, cancel, pause and resume them, over Dagster's runs.

Dagster is the one scheduler. The run's own steps write what they do into the job's row (`job_of_run`, `note_*`); what
only Dagster knows, such as a killed or queued run, is read from it by `sync`. A job is launched at most once at a time:
every run has the job's id as a tag, so a server that was killed between the row and the launch finds the run again.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import ValidationError

from finetune_pipeline.artifacts import hash_of, stage_folder
from finetune_pipeline.database import Database
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.orchestrator import Orchestrator, OrchestratorDown, OrchestratorError
from finetune_pipeline.registry.training_jobs import (
    ENDED,
    UNFINISHED,
    JobError,
    Origin,
    Status,
    TrainingJob,
    add_event,
    add_run,
    create_job,
    find_job,
    find_job_of_run,
    new_job_id,
    runs_of,
    update_job,
)
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import error_messages

JOB_TAG, LOOP_TAG = "finetune/job", "finetune/loop"
"""Tags of a run: the id of its job, and its loop."""

LAUNCH_AGAIN = timedelta(seconds=30)
"""A pending job without a run for so long is launched again; Dagster lists a launched run at once."""

_STATUS: dict[str, Status] = {
    "NOT_STARTED": "pending",
    "MANAGED": "pending",
    "QUEUED": "pending",
    "STARTING": "pending",
    "STARTED": "running",
    "SUCCESS": "completed",
    "FAILURE": "failed",
}


class InvalidJobSettings(JobError):
    """Settings of a job are unknown or out of range; the message names each."""


def loop_of_job(loop: LoopSettings, settings: Mapping[str, Any]) -> LoopSettings:
    """Return the loop with the settings of one job.

    Args:
        settings: `training` (settings by name) and `base_model`, each optional.

    Raises:
        InvalidJobSettings: a setting is unknown or out of range.
    """
    given = loop.model_dump(exclude_unset=True)
    unknown = sorted(settings.keys() - {"training", "base_model"})
    if unknown:
        raise InvalidJobSettings(
            f"{', '.join(unknown)}: a job can only have settings of training, and a base_model; change the loop's YAML"
        )
    if "base_model" in settings:
        given["base_model"] = settings["base_model"]
    given["training"] = {**given.get("training", {}), **settings.get("training", {})}
    try:
        return LoopSettings.model_validate(given)
    except ValidationError as error:
        raise InvalidJobSettings("; ".join(error_messages(error))) from error


def create(
    db: Database,
    orchestrator: Orchestrator,
    loop: LoopSettings,
    settings: Mapping[str, Any],
    *,
    origin: Origin,
    created_by: str,
    dataset: str | None = None,
    suffix: str | None = None,
    metadata: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
) -> TrainingJob:
    """Create a training job and launch its run: it trains, exports and evaluates, and never promotes.

    Args:
        settings: see `loop_of_job`.
        dataset: version of an existing dataset of the loop; None builds one from the logs first.
        idempotency_key: a second call with the same key and arguments returns the same job.

    Raises:
        InvalidJobSettings: a setting is unknown or out of range.
        JobError: the loop has no such dataset, the key was used for another request, or another job is in progress.
        OrchestratorDown: Dagster does not answer; no job was created.
        OrchestratorError: Dagster rejects the run; the job has failed.
    """
    loop_of_job(loop, settings)
    if dataset is not None and not (stage_folder(loop.name, DatasetManifest.stage) / dataset).is_dir():
        raise JobError(f"loop {loop.name} has no dataset {dataset!r}; `finetune dataset list` shows them")
    orchestrator.runs({LOOP_TAG: loop.name, JOB_TAG: "none"})  # answers before a row exists
    asked = {"settings": dict(settings), "dataset": dataset, "suffix": suffix, "metadata": dict(metadata or {})}
    job = TrainingJob(
        id=new_job_id(),
        loop=loop.name,
        origin=origin,
        created_by=created_by,
        idempotency_key=idempotency_key,
        request_sha256=hash_of(asked) if idempotency_key is not None else None,
        created_at=datetime.now(UTC),
        **asked,
    )
    known = create_job(db, job)
    if known.id == job.id:
        _launch(db, orchestrator, loop, job)
    return find_job(db, known.id)


def _launch(db: Database, orchestrator: Orchestrator, loop: LoopSettings, job: TrainingJob) -> None:
    """Launch a run of a job, unless Dagster has an unfinished one."""
    running = [run for run in orchestrator.runs({JOB_TAG: job.id}) if not run.finished]
    if running:
        add_run(db, job.id, running[0].id)
        return
    stages = [AdapterManifest.stage, GgufManifest.stage, ReportManifest.stage]
    if job.dataset is None:
        stages = [RawLogsManifest.stage, DatasetManifest.stage, *stages]
    try:
        run_id = orchestrator.launch(
            loop.job_name, [[*loop.prefix, stage] for stage in stages], {}, {JOB_TAG: job.id, LOOP_TAG: loop.name}
        )
    except OrchestratorDown:
        return  # it may have been launched; `sync` finds out
    except OrchestratorError as error:
        _end(db, job.id, "failed", str(error))
        raise
    add_run(db, job.id, run_id)
    add_event(db, job.id, f"launched as run {run_id} of Dagster")


def sync(db: Database, orchestrator: Orchestrator, loop: LoopSettings, job: TrainingJob) -> TrainingJob:
    """Return a job with the status of its Dagster run, and finish what a killed server left half done.

    Raises:
        OrchestratorDown: Dagster does not answer; the row has what the run itself wrote last.
    """
    if job.status in ENDED or job.status == "paused":
        return job
    known = runs_of(db, job.id)
    found = orchestrator.runs({JOB_TAG: job.id}) or [run for id in known[-1:] if (run := orchestrator.run(id))]
    if not found:
        since = datetime.now(UTC) - job.created_at
        if job.wanted is not None:
            _end_as_wanted(db, job)
        elif known:
            _end(db, job.id, "failed", f"Dagster has no run {known[-1]}; it was deleted. Create the job again")
        elif since > LAUNCH_AGAIN:
            _launch(db, orchestrator, loop, job)
        return find_job(db, job.id)
    run = found[0]
    if run.id not in known:
        add_run(db, job.id, run.id)
    if run.finished and run.id in known[:-1]:
        return job  # the run before a resumption that is not launched yet
    if job.wanted is not None and not run.finished:
        orchestrator.terminate(run.id)
    elif run.status == "CANCELED" or (job.wanted is not None and run.status == "FAILURE"):
        _end_as_wanted(db, job)
    elif run.status == "FAILURE":
        _end(db, job.id, "failed", job.error or f"the run {run.id} failed; its log in Dagster says why")
    elif run.status == "SUCCESS":
        _end(db, job.id, "completed", "")
    elif _STATUS.get(run.status) == "running" and job.status == "pending":
        note_started(db, job.id)
    return find_job(db, job.id)


def cancel(db: Database, orchestrator: Orchestrator, loop: LoopSettings, id: str) -> TrainingJob:
    """Cancel a job: its run is terminated, its training process ends, and the last checkpoint is kept.

    Raises:
        JobError: it has ended.
        OrchestratorDown: Dagster does not answer; the run is terminated when it does.
    """
    job = find_job(db, id)
    if job.status == "paused":
        _end(db, id, "canceled", "")
        return find_job(db, id)
    return _interrupt(db, orchestrator, loop, job, "cancel")


def pause(db: Database, orchestrator: Orchestrator, loop: LoopSettings, id: str) -> TrainingJob:
    """Pause a job: its run is terminated, and the training continues from its last checkpoint when it is resumed.

    Raises:
        JobError: it is not in progress.
        OrchestratorDown: Dagster does not answer; the run is terminated when it does.
    """
    return _interrupt(db, orchestrator, loop, find_job(db, id), "pause")


def _interrupt(
    db: Database, orchestrator: Orchestrator, loop: LoopSettings, job: TrainingJob, wanted: Literal["pause", "cancel"]
) -> TrainingJob:
    event = f"{wanted} was requested"
    if not update_job(db, job.id, {"wanted": wanted}, if_status=("pending", "running"), event=event):
        past = {"pause": "paused", "cancel": "canceled"}[wanted]
        raise JobError(f"the job {job.id} is {find_job(db, job.id).status}; it cannot be {past} now")
    return sync(db, orchestrator, loop, find_job(db, job.id))


def resume(db: Database, orchestrator: Orchestrator, loop: LoopSettings, id: str) -> TrainingJob:
    """Resume a paused job with another run, which continues from the last checkpoint.

    Raises:
        JobError: it is not paused, or another job of the loop is in progress.
        OrchestratorDown: Dagster does not answer; the job stays paused.
    """
    job = find_job(db, id)
    orchestrator.runs({JOB_TAG: job.id})  # answers before the row changes
    if not update_job(db, id, {"status": "pending", "wanted": None}, if_status=("paused",), event="resumed"):
        raise JobError(f"the job {id} is {job.status}; only a paused job can be resumed")
    _launch(db, orchestrator, loop, job)
    return find_job(db, id)


def job_of_run(db: Database, loop: str, run_id: str, tags: Mapping[str, str]) -> TrainingJob:
    """Return the job that a run works on; a run that nobody created a job for gets one.

    Args:
        run_id: Dagster's run.
        tags: of the run.
    """
    if JOB_TAG in tags:
        add_run(db, tags[JOB_TAG], run_id)
        return find_job(db, tags[JOB_TAG])
    known = find_job_of_run(db, run_id)
    if known is not None:
        return known
    origin: Origin = "ui"
    if "dagster/sensor_name" in tags:
        origin = "sensor"
    elif "dagster/schedule_name" in tags:
        origin = "schedule"
    elif "finetune/command" in tags:
        origin = "cli"
    job = TrainingJob(
        id=f"ftjob-{hash_of(run_id)[:24]}",  # a repeated call makes the same one
        loop=loop,
        origin=origin,
        created_by=tags.get("user", "dagster"),
        created_at=datetime.now(UTC),
    )
    create_job(db, job, exclusive=False)
    add_run(db, job.id, run_id)
    return job


def note_started(db: Database, id: str) -> None:
    """Record that the run of a job works; a resumed job keeps the time of its first start."""
    changes = {"status": "running", "started_at": find_job(db, id).started_at or datetime.now(UTC)}
    update_job(db, id, changes, if_status=("pending",), event="started")


def note_progress(db: Database, id: str, progress: Mapping[str, Any], message: str) -> None:
    """Record how far the training is, as the row's newest progress and as an event."""
    if update_job(db, id, {"progress": dict(progress)}, if_status=UNFINISHED):
        add_event(db, id, message, kind="metrics", data=dict(progress))


def note_made(db: Database, id: str, event: str, **made: str | None) -> None:
    """Record what a step made: dataset, adapter, model_sha256 or report."""
    update_job(db, id, made, if_status=UNFINISHED, event=event)


def note_failed(db: Database, id: str, error: str) -> None:
    """Record that a step of a job failed."""
    _end(db, id, "failed", error)


def note_completed(db: Database, id: str) -> None:
    """Record that the last step of a job succeeded."""
    _end(db, id, "completed", "")


def _end_as_wanted(db: Database, job: TrainingJob) -> None:
    if job.wanted == "pause":
        update_job(db, job.id, {"status": "paused", "wanted": None}, if_status=("pending", "running"), event="paused")
    else:
        _end(db, job.id, "canceled", "")


def _end(db: Database, id: str, status: Status, error: str) -> None:
    changes = {"status": status, "error": error, "wanted": None, "finished_at": datetime.now(UTC)}
    update_job(db, id, changes, if_status=UNFINISHED, event=f"{status}: {error}" if error else status)
