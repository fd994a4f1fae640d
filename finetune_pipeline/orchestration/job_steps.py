"""What the steps of a run tell the training job that they belong to."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from sqlalchemy.exc import OperationalError

from finetune_pipeline.database import DatabaseError, connect
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.pipeline.jobs import (
    JOB_TAG,
    PROCESS_TAG,
    job_of_run,
    loop_of_job,
    note_completed,
    note_failed,
    note_made,
    note_progress,
    note_started,
    this_process,
)
from finetune_pipeline.registry.training_jobs import find_job_of_run
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import without_values

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobStep:
    """The training job of a step, and the loop with the job's settings.

    Attributes:
        job_id: None if the run trains nothing, so that it is no training job.
        dataset: version of the dataset that the job names; None for that of the run.
        training: training settings of the job, which win over those of the launchpad.
    """

    loop: LoopSettings
    job_id: str | None = None
    dataset: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def made(self, event: str, **made: str | None) -> None:
        """Record what the step made: dataset, adapter, model_sha256 or report."""
        if self.job_id:
            with _best_effort():
                note_made(connect(), self.job_id, event, **made)

    def progress(self, progress: dict[str, Any], message: str) -> None:
        """Record how far the training is."""
        if self.job_id:
            with _best_effort():
                note_progress(connect(), self.job_id, progress, message)

    def completed(self) -> None:
        """Record that the job has done all it does."""
        if self.job_id:
            with _best_effort():
                note_completed(connect(), self.job_id)


@contextmanager
def job_step(loop: LoopSettings, context: dg.AssetExecutionContext) -> Iterator[JobStep]:
    """Yield the job of a step; an error that the step raises ends the job as failed.

    A run that is canceled or killed raises no error that counts here: `pipeline.jobs.sync` reads that from Dagster.
    """
    run, adapter = context.run, dg.AssetKey([*loop.prefix, AdapterManifest.stage])
    trains = run.asset_selection is None or adapter in run.asset_selection
    if JOB_TAG not in run.tags and not trains:
        yield JobStep(loop)
        return
    job = job_of_run(connect(), loop.name, run.run_id, run.tags)
    if job.loop != loop.name:  # a run of several loops is the job of the first
        yield JobStep(loop)
        return
    if job.status in ("paused", "canceled") or job.wanted in ("pause", "cancel"):
        raise dg.Failure(f"the job {job.id} is to end: {job.wanted or job.status}", allow_retries=False)
    with _best_effort(unusable=OperationalError):  # Dagster's own database
        context.instance.add_run_tags(run.run_id, {PROCESS_TAG: this_process()})
    with _best_effort():
        note_started(connect(), job.id)
    try:
        yield JobStep(loop_of_job(loop, job.settings), job.id, job.dataset, job.settings.get("training", {}))
    except Exception as error:
        with _best_effort():
            note_failed(connect(), job.id, f"{context.asset_key.path[-1]}: {without_values(str(error))}")
        raise


@contextmanager
def _best_effort(unusable: type[Exception] = DatabaseError) -> Iterator[None]:
    """Log a database that is locked or full; what a step does, and why it fails, matters more than the job's row."""
    try:
        yield
    except unusable as error:
        _log.warning("the training job could not be updated: %s", error)


def note_checks(run_id: str, results: Sequence[dg.AssetCheckResult]) -> None:
    """End the job of a run as failed if a blocking check failed, with the reasons."""
    reasons = [
        f"check {result.check_name}: {result.description or 'failed'}"
        for result in results
        if not result.passed and result.severity == dg.AssetCheckSeverity.ERROR
    ]
    job = find_job_of_run(connect(), run_id) if reasons else None
    if job is not None:
        note_failed(connect(), job.id, "; ".join(reasons))
