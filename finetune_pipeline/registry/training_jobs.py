"""Training jobs: one row for each, from the moment it is created, with its Dagster runs and its events.

A job is started by the API, the CLI, the sensor, a schedule or Dagster's UI. `pipeline.jobs` changes its status.
"""

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import training_job_events, training_job_runs, training_jobs
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.champion import lock_loop_in

Origin = Literal["api", "openai", "console", "cli", "sensor", "schedule", "ui"]
Status = Literal["pending", "running", "paused", "completed", "failed", "canceled"]
IN_PROGRESS: tuple[Status, ...] = ("pending", "running")
UNFINISHED: tuple[Status, ...] = (*IN_PROGRESS, "paused")
ENDED: tuple[Status, ...] = ("completed", "failed", "canceled")


class JobError(RuntimeError):
    """A training job cannot be created or changed as asked; the message says why and what to do."""


class UnknownJobError(JobError):
    """There is no job with this id."""


class JobBusyError(JobError):
    """Another job of the loop is in progress.

    Attributes:
        running_id: id of that job.
    """

    def __init__(self, message: str, running_id: str) -> None:
        super().__init__(message)
        self.running_id = running_id


class IdempotencyError(JobError):
    """The idempotency key was used for another request."""


class TrainingJob(Record):
    """One training job."""

    id: str = Field(pattern="^ftjob-[0-9a-f]{24}$")
    loop: str
    origin: Origin
    created_by: str = Field(description="Name of the API key, or of the OS user.")
    idempotency_key: str | None = None
    request_sha256: str | None = Field(default=None, description="Of the request with that key.")
    settings: dict[str, Any] = Field(default={}, description="Settings of this job that differ from the loop's.")
    dataset: str | None = Field(default=None, description="Version of the dataset; None until it is built.")
    suffix: str | None = None
    metadata: dict[str, str] = Field(default={}, description="The client's own facts.")
    request: dict[str, Any] | None = Field(default=None, description="The client's request, which answers repeat.")
    status: Status = "pending"
    wanted: Literal["launch", "pause", "cancel"] | None = Field(
        default=None, description="What was asked for and is not done yet: a run, or the end of its run."
    )
    error: str = ""
    progress: dict[str, Any] = Field(default={}, description="Newest Progress of the training; empty before it.")
    adapter: str | None = Field(default=None, description="Version of the trained adapter.")
    model_sha256: str | None = None
    report: str | None = Field(default=None, description="Version of the report that judges it.")
    created_at: UtcDatetime
    started_at: UtcDatetime | None = None
    finished_at: UtcDatetime | None = None


class JobEvent(Record):
    """One event of a job, in the order of its number."""

    job_id: str
    number: int = Field(ge=1)
    created_at: UtcDatetime
    kind: Literal["message", "metrics"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    message: str
    data: dict[str, Any] = Field(default={}, description="Progress of the training, for metrics.")


def new_job_id() -> str:
    """Return the id of a new job."""
    return f"ftjob-{secrets.token_hex(12)}"


def create_job(db: Database, job: TrainingJob, *, exclusive: bool = True) -> TrainingJob:
    """Record a new job, or return the one that the same request or run created before.

    Args:
        exclusive: refuse it while another job of the loop is in progress. A run that a person started in Dagster's UI
            is never refused: it waits for the other one's training, as before there was a job.

    Raises:
        IdempotencyError: another request used the key.
        JobBusyError: another job of the loop is pending or running.
    """
    with db.write() as connection:
        lock_loop_in(connection, job.loop)  # so that two requests at once do not both find the loop idle
        if job.idempotency_key is not None:
            j = training_jobs.c
            query = sa.select(training_jobs).where(j.loop == job.loop, j.idempotency_key == job.idempotency_key)
            row = connection.execute(query).first()
            if row is not None:
                known = _job(row)
                if known.request_sha256 != job.request_sha256:
                    raise IdempotencyError(
                        f"the idempotency key {job.idempotency_key!r} was used for another request, which created "
                        f"{known.id}; send that request again, or choose another key"
                    )
                return known
        if exclusive:
            _check_not_busy(connection, job)
        elif connection.execute(sa.select(training_jobs.c.id).where(training_jobs.c.id == job.id)).first():
            return job
        connection.execute(sa.insert(training_jobs).values(**job.model_dump()))
        add_event_in(connection, job.id, f"created by {job.created_by} ({job.origin})")
    return job


def _check_not_busy(connection: sa.Connection, job: TrainingJob) -> None:
    j = training_jobs.c
    query = sa.select(j.id, j.status).where(j.loop == job.loop, j.status.in_(IN_PROGRESS), j.id != job.id)
    busy = connection.execute(query.limit(1)).first()
    if busy is not None:
        raise JobBusyError(
            f"the job {busy.id} of loop {job.loop} is {busy.status}; wait for it, or cancel it: "
            f"`finetune train cancel {busy.id}`",
            busy.id,
        )


def find_job(db: Database, id: str) -> TrainingJob:
    """Return a job.

    Raises:
        UnknownJobError: there is none with this id.
    """
    with db.read() as connection:
        row = connection.execute(sa.select(training_jobs).where(training_jobs.c.id == id)).first()
    if row is None:
        raise UnknownJobError(f"there is no training job {id[:100]!r}; `finetune train list` shows them")
    return _job(row)


def find_job_of_run(db: Database, run_id: str) -> TrainingJob | None:
    """Return the job that a Dagster run works on; None if it is not recorded."""
    query = (
        sa.select(training_jobs)
        .join(training_job_runs, training_job_runs.c.job_id == training_jobs.c.id)
        .where(training_job_runs.c.run_id == run_id)
    )
    with db.read() as connection:
        row = connection.execute(query).first()
    return _job(row) if row else None


def list_jobs(
    db: Database,
    loop: str | None = None,
    statuses: Sequence[Status] = (),
    *,
    after: TrainingJob | None = None,
    limit: int | None = None,
) -> list[TrainingJob]:
    """Return jobs, newest first.

    Args:
        loop: of this loop; None for all.
        statuses: with one of these; empty for all.
        after: only older ones than this job.
        limit: at most so many.
    """
    j = training_jobs.c
    query = sa.select(training_jobs).order_by(j.created_at.desc(), j.id.desc())
    if loop is not None:
        query = query.where(j.loop == loop)
    if statuses:
        query = query.where(j.status.in_(statuses))
    if after is not None:
        query = query.where(sa.tuple_(j.created_at, j.id) < sa.tuple_(after.created_at, after.id))
    with db.read() as connection:
        return [_job(row) for row in connection.execute(query.limit(limit))]


def update_job(
    db: Database,
    id: str,
    changes: Mapping[str, Any],
    *,
    if_status: Sequence[Status] = (),
    unless_wanted: bool = False,
    event: str = "",
) -> bool:
    """Change columns of a job in one transaction with an event about it, and return whether it was changed.

    Args:
        changes: column -> value.
        if_status: change it only if its status is one of these; empty: whatever it is. So a run that reports late does
            not overwrite the end of a job.
        unless_wanted: change it only if `wanted` is None, so that nothing was asked for meanwhile.
        event: text of the event; empty for none.

    Raises:
        JobBusyError: it would become pending while another job of its loop is in progress.
    """
    with db.write() as connection:
        if changes.get("status") == "pending":
            lock_loop_in(connection, find_job(db, id).loop)
        row = _locked(connection, id)
        if row is None or (if_status and row.status not in if_status) or (unless_wanted and row.wanted):
            return False
        if changes.get("status") == "pending":
            _check_not_busy(connection, _job(row))
        if changes:
            connection.execute(sa.update(training_jobs).where(training_jobs.c.id == id).values(**changes))
        if event:
            level = "error" if changes.get("status") == "failed" else "info"
            add_event_in(connection, id, event, level=level)
    return True


def add_run(db: Database, job_id: str, run_id: str) -> bool:
    """Record that a Dagster run works on a job, and return whether it does: a job has one run at a time.

    A run that is recorded works on it, and another one if the job waits for a run.
    """
    r = training_job_runs.c
    with db.write() as connection:
        job = _locked(connection, job_id)
        if job is None:
            return False
        known = list(connection.execute(sa.select(r.run_id).where(r.job_id == job_id)).scalars())
        if run_id in known:
            return True
        if job.status != "pending" or job.wanted in {"pause", "cancel"} or (known and job.wanted != "launch"):
            return False
        row = {"run_id": run_id, "job_id": job_id, "number": len(known) + 1, "created_at": datetime.now(UTC)}
        connection.execute(sa.insert(training_job_runs).values(**row))
        connection.execute(sa.update(training_jobs).where(training_jobs.c.id == job_id).values(wanted=None))
        add_event_in(connection, job_id, f"run {run_id} of Dagster works on it")
    return True


def claim_launch(db: Database, id: str, idle: timedelta) -> bool:
    """Return whether the caller is to launch a run of a job, which waits for one and had no event for some time.

    An event is written with it, so that of several callers at once one gets True.
    """
    e = training_job_events.c
    with db.write() as connection:
        job = _locked(connection, id)
        if job is None or job.status != "pending" or job.wanted != "launch":
            return False
        events = sa.select(training_job_events).where(e.job_id == id).order_by(e.number.desc())
        newest = JobEvent(**connection.execute(events.limit(1)).one()._mapping)
        if datetime.now(UTC) - newest.created_at < idle:
            return False
        add_event_in(connection, id, "no run was found; it is launched again")
    return True


def runs_of(db: Database, job_id: str) -> list[str]:
    """Return the ids of a job's Dagster runs, oldest first."""
    r = training_job_runs.c
    query = sa.select(r.run_id).where(r.job_id == job_id).order_by(r.number)
    with db.read() as connection:
        return list(connection.execute(query).scalars())


def add_event(db: Database, job_id: str, message: str, **fields: Any) -> None:
    """Append an event to a job; `fields` are those of JobEvent."""
    with db.write() as connection:
        _locked(connection, job_id)
        add_event_in(connection, job_id, message, **fields)


def add_event_in(connection: sa.Connection, job_id: str, message: str, **fields: Any) -> None:
    """Append an event within a transaction that holds the job's row."""
    e = training_job_events.c
    newest = sa.select(sa.func.coalesce(sa.func.max(e.number), 0)).where(e.job_id == job_id)
    number = connection.execute(newest).scalar_one() + 1
    event = JobEvent(job_id=job_id, number=number, created_at=datetime.now(UTC), message=message, **fields)
    connection.execute(sa.insert(training_job_events).values(**event.model_dump()))


def events_of(db: Database, job_id: str, after: int = 0, limit: int | None = None) -> list[JobEvent]:
    """Return the events of a job with numbers above `after`, in their order."""
    e = training_job_events.c
    query = sa.select(training_job_events).where(e.job_id == job_id, e.number > after).order_by(e.number).limit(limit)
    with db.read() as connection:
        return [JobEvent(**row._mapping) for row in connection.execute(query)]


def _locked(connection: sa.Connection, id: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(training_jobs).where(training_jobs.c.id == id).with_for_update()).first()


def _job(row: sa.Row[Any]) -> TrainingJob:
    return TrainingJob(**row._mapping)
