"""Training jobs: create, watch, cancel, pause and resume them, over Dagster's runs.

Dagster is the one scheduler. The run's own steps write what they do into the job's row (`job_of_run`, `note_*`); what
only Dagster knows, such as a killed or queued run, is read from it by `refresh` and `sync`. A job has at most one run
at a time: every run has the job's id as a tag, so a server that was killed between the row and the launch finds the run
again, and a run that is one too many does not begin (`add_run`).
"""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import ValidationError

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.database import Database
from finetune_pipeline.export.base import check_base_name
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    PromotionManifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.orchestrator import DagsterRun, Orchestrator, OrchestratorDown, OrchestratorError, RunReader
from finetune_pipeline.pipeline.dataset_export import find_dataset
from finetune_pipeline.registry.training_jobs import (
    IN_PROGRESS,
    UNFINISHED,
    JobBusyError,
    JobError,
    Origin,
    Status,
    TrainingJob,
    UnknownJobError,
    add_event,
    add_run,
    claim_launch,
    create_job,
    events_of,
    find_job,
    find_job_of_run,
    list_jobs,
    new_job_id,
    runs_of,
    update_job,
)
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import error_messages, first_field

JOB_TAG, LOOP_TAG, PROCESS_TAG = "finetune/job", "finetune/loop", "finetune/process"
"""Tags of a run: the id of its job, its loop, and its process (see `this_process`)."""

PARENT_TAG = "dagster/parent_run_id"
"""Tag that Dagster gives to a run that executes another one again, with that one's tags."""

LAUNCH_AGAIN = timedelta(seconds=60)
"""A job that waits for a run and had no event for so long is launched again. It is longer than Dagster's webserver may
take to answer, and Dagster lists a launched run at once."""

CLIENTS: tuple[Origin, ...] = ("api", "openai", "console")
"""Origins of jobs that `create` makes: they train, export and evaluate, and never promote."""

LOST = timedelta(hours=1)
"""A job that Dagster has no run of, and that had no event for so long, has failed."""


class InvalidJobSettings(JobError):
    """Settings of a job are unknown or out of range; the message names each.

    Attributes:
        field: the first one, such as training.lora_r.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


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
            f"{', '.join(unknown)}: a job can only have settings of training, and a base_model; change the loop's YAML",
            unknown[0],
        )
    if "base_model" in settings:
        given["base_model"] = settings["base_model"]
    given["training"] = {**given.get("training", {}), **settings.get("training", {})}
    try:
        return LoopSettings.model_validate(given)
    except ValidationError as error:
        raise InvalidJobSettings("; ".join(error_messages(error)), first_field(error)) from error


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
    request: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> TrainingJob:
    """Create a training job and launch its run: it trains, exports and evaluates, and never promotes.

    Args:
        settings: see `loop_of_job`.
        dataset: version of an existing dataset of the loop; None builds one from the logs first.
        request: what the client sent, which the job keeps for its answers.
        idempotency_key: a second call with the same key and arguments returns the same job.

    Raises:
        InvalidJobSettings: a setting is unknown or out of range.
        UnknownDatasetError: the loop has no such dataset.
        JobError: the key was used for another request, or another job is in progress.
        OrchestratorDown: Dagster or its code server does not answer; no job was created.
        OrchestratorError: Dagster rejects the run; the job has failed.
    """
    loop_of_job(loop, settings)
    if "base_model" in settings:
        try:
            check_base_name(settings["base_model"])
        except ExportError as error:
            raise InvalidJobSettings(str(error), "base_model") from error
    if dataset is not None:
        find_dataset(loop, dataset)
    orchestrator.check(loop.job_name)  # before a row exists
    asked = {"settings": dict(settings), "dataset": dataset, "suffix": suffix, "metadata": dict(metadata or {}),
             "request": None if request is None else dict(request)}  # fmt: skip
    job = TrainingJob(
        id=new_job_id(),
        loop=loop.name,
        origin=origin,
        created_by=created_by,
        idempotency_key=idempotency_key,
        request_sha256=hash_of(asked) if idempotency_key is not None else None,
        wanted="launch",
        created_at=datetime.now(UTC),
        **asked,
    )
    try:
        known = create_job(db, job)
    except JobBusyError as busy:  # unless its run has ended meanwhile
        if sync(db, orchestrator, loop, find_job(db, busy.running_id)).status in IN_PROGRESS:
            raise
        known = create_job(db, job)
    if known.id == job.id:
        with suppress(OrchestratorDown):  # it waits
            _launch(db, orchestrator, loop, job)
    return find_job(db, known.id)


def _launch(db: Database, orchestrator: Orchestrator, loop: LoopSettings, job: TrainingJob) -> None:
    """Launch the run that a job waits for, unless Dagster has it.

    Raises:
        OrchestratorDown: Dagster or its code server does not answer; the job still waits, and `sync` launches it later.
        OrchestratorError: Dagster rejects the run; the job has failed.
    """
    known = runs_of(db, job.id)
    if any(add_run(db, job.id, run.id) for run in _runs(orchestrator, job, known) if run.id not in known):
        return
    stages = [RawLogsManifest.stage, DatasetManifest.stage, AdapterManifest.stage, GgufManifest.stage]
    stages += [ReportManifest.stage, PromotionManifest.stage]
    config: Mapping[str, Any] = {}
    first = orchestrator.run(known[0]) if known else None
    if first is not None:  # the same steps, with what was set in the launchpad
        config = first.config.get("ops", {})
        stages = [stage for stage in stages if first.assets is None or (*loop.prefix, stage) in first.assets]
    elif job.origin in CLIENTS:
        stages.remove(PromotionManifest.stage)
    if job.dataset is not None:
        stages = [stage for stage in stages if stage not in (RawLogsManifest.stage, DatasetManifest.stage)]
    steps = {"__".join([*loop.prefix, stage]) for stage in stages}
    config = {"ops": {step: config[step] for step in config.keys() & steps}}
    tags = {JOB_TAG: job.id, LOOP_TAG: loop.name}
    try:
        run_id = orchestrator.launch(loop.job_name, [[*loop.prefix, stage] for stage in stages], config, tags)
    except OrchestratorDown as error:  # it may have been launched; `sync` finds out
        add_event(db, job.id, f"waits for Dagster: {error}", level="warn")
        raise
    except OrchestratorError as error:
        _end(db, job.id, "failed", str(error))
        raise
    if not add_run(db, job.id, run_id):  # the job was canceled or paused meanwhile
        orchestrator.terminate(run_id)


def _runs(runs: RunReader, job: TrainingJob, known: Sequence[str]) -> list[DagsterRun]:
    """Return the runs of a job that Dagster has, oldest first."""
    found = {run.id: run for run in runs.runs({JOB_TAG: job.id}) if PARENT_TAG not in run.tags or run.id in known}
    if known and known[-1] not in found and (run := runs.run(known[-1])):  # it was not launched for the job
        found[run.id] = run
    return sorted(found.values(), key=lambda run: run.created_at)


def refresh(db: Database, runs: RunReader, job: TrainingJob) -> TrainingJob:
    """Return a job with the status of its Dagster run; launch and terminate nothing.

    Raises:
        OrchestratorDown: Dagster does not answer; the row has what the run itself wrote last.
    """
    job = find_job(db, job.id)  # as it is now: what was read before a pause must not end the paused job
    if job.status not in IN_PROGRESS:
        return job
    known = runs_of(db, job.id)
    found = _runs(runs, job, known)
    run = next((run for run in found if run.id in known[-1:]), None)
    lost = datetime.now(UTC) - events_of(db, job.id)[-1].created_at > LOST
    if known and run is None and job.wanted != "launch" and not lost:
        return job  # another Dagster may have its run
    if job.wanted in ("pause", "cancel"):
        if any(not run.finished and not _is_dead(runs, run) for run in found):
            return job
        if found and found[-1].status == "SUCCESS":
            _end(db, job.id, "completed", "")
        else:
            _end_as_wanted(db, job)
        return find_job(db, job.id)
    new = [run for run in found if run.id not in known]
    if job.wanted == "launch" and not new:
        return job
    if new and add_run(db, job.id, new[0].id):
        run = new[0]
    if run is None:
        if lost:
            what = f"the run {known[-1]}; it was deleted" if known else "a run of it"
            _end(db, job.id, "failed", f"Dagster does not have {what}. Create the job again", unless_wanted=True)
    elif run.status == "SUCCESS":
        _end(db, job.id, "completed", "")
    elif run.status == "CANCELED":
        _end(db, job.id, "canceled", "", unless_wanted=True)
    elif run.status == "FAILURE":
        _end(db, job.id, "failed", f"the run {run.id} failed; its log in Dagster says why", unless_wanted=True)
    elif _is_dead(runs, run):
        _end(db, job.id, "failed", f"the process of the run {run.id} was killed", unless_wanted=True)
    elif run.status == "STARTED" and job.status == "pending":
        note_started(db, job.id)
    return find_job(db, job.id)


def this_process() -> str:
    """Return what tells this process from all others, on this machine and others, for PROCESS_TAG."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time()}"


def _is_dead(runs: RunReader, run: DagsterRun) -> bool:
    """Return whether the process of an unfinished run was killed, which Dagster does not notice."""
    import psutil

    host, _, process = run.tags.get(PROCESS_TAG, "").partition(":")
    if host != socket.gethostname():
        return False
    id, _, created = process.partition(":")
    try:
        one = psutil.Process(int(id))
        if one.create_time() == float(created) and one.status() != psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        pass
    now = runs.run(run.id)  # it may have ended in between, and wrote that before its process ended
    return now is not None and not now.finished


def sync(db: Database, orchestrator: Orchestrator, loop: LoopSettings | None, job: TrainingJob) -> TrainingJob:
    """Return a job with the status of its Dagster run, and finish what a killed server left half done.

    Args:
        loop: of the job; None if it no longer exists.

    Raises:
        OrchestratorDown: Dagster or its code server does not answer; the row has what the run itself wrote last.
    """
    job = refresh(db, orchestrator, job)
    if job.status not in IN_PROGRESS:
        return job
    if job.wanted in ("pause", "cancel"):
        unfinished = [run for run in _runs(orchestrator, job, runs_of(db, job.id)) if not run.finished]
        for run in unfinished:
            if run.status != "CANCELING":
                orchestrator.terminate(run.id)
        if unfinished:
            refresh(db, orchestrator, job)
        else:  # the run was deleted
            _end_as_wanted(db, job)
    elif job.wanted == "launch" and loop is None:
        _end(db, job.id, "failed", f"there is no loop {job.loop} any more")
    elif job.wanted == "launch" and loop is not None:
        orchestrator.check(loop.job_name)
        if claim_launch(db, job.id, LAUNCH_AGAIN):
            _launch(db, orchestrator, loop, job)
    return find_job(db, job.id)


def sync_all(db: Database, orchestrator: Orchestrator, loops: Mapping[str, LoopSettings]) -> None:
    """Bring the jobs that clients created up to date, and finish what a killed server left half done.

    Others are of whoever started their runs, which may be in another Dagster.
    """
    for job in list_jobs(db, statuses=IN_PROGRESS):
        if job.origin in CLIENTS and job.loop in loops:
            with suppress(OrchestratorError):  # whoever reads the job is told
                sync(db, orchestrator, loops[job.loop], job)


def cancel(db: Database, orchestrator: Orchestrator, loop: LoopSettings | None, id: str) -> TrainingJob:
    """Cancel a job: its run is terminated, its training process ends, and the last checkpoint is kept.

    The job is canceled when its run has ended, which takes seconds; until then `wanted` is cancel.

    Args:
        loop: of the job; None if it no longer exists.

    Raises:
        JobError: it has ended.
        OrchestratorDown: Dagster does not answer; the run is terminated when it does.
    """
    job = _job_of(db, loop, id)
    changes = {"status": "canceled", "finished_at": datetime.now(UTC)}
    if update_job(db, id, changes, if_status=("paused",), event="canceled"):
        return find_job(db, id)
    return _interrupt(db, orchestrator, loop, job, "cancel")


def pause(db: Database, orchestrator: Orchestrator, loop: LoopSettings | None, id: str) -> TrainingJob:
    """Pause a job: its run is terminated, and the training continues from its last checkpoint when it is resumed.

    The job is paused when its run has ended, which takes seconds; until then `wanted` is pause.

    Args:
        loop: of the job; None if it no longer exists.

    Raises:
        JobError: it is not in progress.
        OrchestratorDown: Dagster does not answer; the run is terminated when it does.
    """
    return _interrupt(db, orchestrator, loop, _job_of(db, loop, id), "pause")


def _interrupt(
    db: Database,
    orchestrator: Orchestrator,
    loop: LoopSettings | None,
    job: TrainingJob,
    wanted: Literal["pause", "cancel"],
) -> TrainingJob:
    event = f"{wanted} was requested"
    if not update_job(db, job.id, {"wanted": wanted}, if_status=IN_PROGRESS, event=event):
        past = {"pause": "paused", "cancel": "canceled"}[wanted]
        raise JobError(f"the job {job.id} is {find_job(db, job.id).status}; it cannot be {past} now")
    return sync(db, orchestrator, loop, find_job(db, job.id))


def resume(db: Database, orchestrator: Orchestrator, loop: LoopSettings, id: str) -> TrainingJob:
    """Resume a paused job with another run, which continues from the last checkpoint.

    Raises:
        JobError: it is not paused, or another job of the loop is in progress.
        OrchestratorDown: Dagster or its code server does not answer; the job stays paused.
    """
    job = _job_of(db, loop, id)
    orchestrator.check(loop.job_name)  # before the row changes
    changes = {"status": "pending", "wanted": "launch"}
    try:
        resumed = update_job(db, id, changes, if_status=("paused",), event="resumed")
    except JobBusyError as busy:  # unless its run has ended meanwhile
        if sync(db, orchestrator, loop, find_job(db, busy.running_id)).status in IN_PROGRESS:
            raise
        resumed = update_job(db, id, changes, if_status=("paused",), event="resumed")
    if not resumed:
        raise JobError(f"the job {id} is {find_job(db, id).status}; only a paused job can be resumed")
    with suppress(OrchestratorDown):  # it waits
        _launch(db, orchestrator, loop, job)
    return find_job(db, id)


def _job_of(db: Database, loop: LoopSettings | None, id: str) -> TrainingJob:
    job = find_job(db, id)
    if loop is not None and job.loop != loop.name:
        raise UnknownJobError(f"the job {id} belongs to the loop {job.loop}, not to {loop.name}")
    return job


def describe_job(db: Database, job: TrainingJob) -> dict[str, Any]:
    """Return what the API and `finetune train show` say about a job: its row, its runs and how far the training is.

    `percent` is of the training's steps, `seconds_left` is None unless it trains, and the figures of the training, such
    as epoch, step, loss, validation_loss, learning_rate and memory_bytes, are in `progress`.
    """
    steps = job.progress.get("steps")
    percent = round(100 * job.progress["step"] / steps, 1) if steps else None
    left = job.progress.get("seconds_left") if job.status == "running" and job.adapter is None else None
    shown = job.model_dump(exclude={"request", "request_sha256"})
    return {**shown, "percent": percent, "seconds_left": left, "runs": runs_of(db, job.id)}


def job_id_of(started_by: str) -> str:
    """Return the id of the job of something that starts at most one, such as a run or a sensor's run key."""
    return f"ftjob-{hash_of(started_by)[:24]}"


def job_of_run(db: Database, loop: str, run_id: str, tags: Mapping[str, str]) -> TrainingJob:
    """Return the job that a run works on; a run that nobody created a job for gets one.

    Args:
        run_id: Dagster's run.
        tags: of the run.

    Raises:
        JobError: the run was launched for a job that does not wait for one, so that it must not begin.
    """
    known = find_job_of_run(db, run_id)
    if known is not None:
        return known
    again = {}
    if JOB_TAG in tags:
        try:
            job = find_job(db, tags[JOB_TAG])
        except UnknownJobError:  # of another database
            pass
        else:
            if add_run(db, job.id, run_id):
                return find_job(db, job.id)
            if PARENT_TAG not in tags:
                now = find_job(db, job.id)
                asked = f", and {now.wanted} was requested" if now.wanted else ""
                raise JobError(f"the job {job.id} waits for no run: it is {now.status}{asked}")
            again = job.model_dump(include={"settings", "dataset", "suffix", "metadata", "request"})
    job = TrainingJob(
        id=job_id_of(run_id), loop=loop, origin="ui", created_by=tags.get("user", "dagster"),
        created_at=datetime.now(UTC), **again,
    )  # fmt: skip
    create_job(db, job, exclusive=False)
    add_run(db, job.id, run_id)
    return find_job(db, job.id)


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


def note_canceling(db: Database, id: str) -> None:
    """Record that the run of a job is being canceled by whoever started it."""
    update_job(db, id, {"wanted": "cancel"}, if_status=IN_PROGRESS, event="the run is being canceled")


def note_failed(db: Database, id: str, error: str) -> None:
    """Record that a step of a job failed, unless it was interrupted on request."""
    _end(db, id, "failed", error, unless_wanted=True)


def note_completed(db: Database, id: str) -> None:
    """Record that the last step of a job succeeded."""
    _end(db, id, "completed", "")


def _end_as_wanted(db: Database, job: TrainingJob) -> None:
    if job.wanted == "pause":
        update_job(db, job.id, {"status": "paused", "wanted": None}, if_status=IN_PROGRESS, event="paused")
    else:
        _end(db, job.id, "canceled", "")


def _end(db: Database, id: str, status: Status, error: str, *, unless_wanted: bool = False) -> None:
    changes = {"status": status, "error": error, "wanted": None, "finished_at": datetime.now(UTC)}
    event = f"{status}: {error}" if error else status
    update_job(db, id, changes, if_status=IN_PROGRESS, unless_wanted=unless_wanted, event=event)
