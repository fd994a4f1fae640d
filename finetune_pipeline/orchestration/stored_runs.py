"""Runs as Dagster's storage has them, for commands that need no webserver."""

from collections.abc import Mapping
from datetime import UTC, datetime

import dagster as dg

from finetune_pipeline.database import Database, DatabaseError
from finetune_pipeline.orchestration.storage import storage_errors
from finetune_pipeline.orchestrator import DagsterRun
from finetune_pipeline.pipeline.jobs import refresh
from finetune_pipeline.registry.training_jobs import TrainingJob


class StoredRuns:
    """Finds runs in the storage of a Dagster instance, as `Orchestrator` does through the webserver."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance

    def runs(self, tags: Mapping[str, str]) -> list[DagsterRun]:
        """Return the runs with these tags, newest first."""
        return self._runs(dg.RunsFilter(tags=dict(tags)))

    def run(self, id: str) -> DagsterRun | None:
        """Return a run; None if Dagster has none with this id."""
        found = self._runs(dg.RunsFilter(run_ids=[id]))
        return found[0] if found else None

    def _runs(self, filter: dg.RunsFilter) -> list[DagsterRun]:
        return [
            DagsterRun(
                id=record.dagster_run.run_id,
                status=record.dagster_run.status.value,
                created_at=record.create_timestamp.replace(tzinfo=UTC),
                started_at=_time(record.start_time),
                ended_at=_time(record.end_time),
                tags=record.dagster_run.tags,
                assets=None
                if record.dagster_run.asset_selection is None
                else frozenset(tuple(key.path) for key in record.dagster_run.asset_selection),
                config=record.dagster_run.run_config,
            )
            for record in self._instance.get_run_records(filter)
        ]


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def refresh_jobs(db: Database, dagster_home: str, jobs: list[TrainingJob]) -> list[TrainingJob]:
    """Return jobs with the statuses of their runs in a Dagster home; a read-only one shows what was written last."""
    with storage_errors(dagster_home), dg.DagsterInstance.from_config(dagster_home) as instance:
        try:
            return [refresh(db, StoredRuns(instance), job) for job in jobs]
        except DatabaseError:
            return jobs
