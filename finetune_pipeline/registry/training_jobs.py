"""The trainings that ended: one row for each adapter, which outlives its files. Progress is Dagster's."""

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import training_jobs
from finetune_pipeline.records import Record, UtcDatetime


class TrainingJob(Record):
    """One training, and what came of it."""

    id: str = Field(description="Version of the adapter.")
    loop: str
    run_id: str = Field(description="Dagster's run, which knows the progress.")
    dataset: str = Field(description="Version of the dataset.")
    initial_adapter: str | None = Field(default=None, description="Version of the adapter that it went on from.")
    method: str
    mode: str
    device: str
    examples: int
    steps: int
    loss_before: float = Field(description="Mean loss on the validation set before training.")
    loss_after: float
    tokens_per_second: float
    wall_seconds: float
    peak_memory_bytes: int
    watermark: int = Field(ge=0, description="The data that was trained on ends at this ingest_offset.")
    created_at: UtcDatetime


def record_training_job(db: Database, training: TrainingJob) -> None:
    """Keep a training; one that is kept already (same loop and id) stays as it is."""
    with db.write() as connection:
        insert_if_absent(connection, training_jobs, training.model_dump())


def find_training_job(db: Database, loop: str, id: str) -> TrainingJob | None:
    """The training that made the adapter of this version."""
    here = sa.select(training_jobs).where(training_jobs.c.loop == loop, training_jobs.c.id == id)
    with db.read() as connection:
        row = connection.execute(here).first()
    return TrainingJob(**row._mapping) if row else None
