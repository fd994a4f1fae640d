"""Finished trainings: one row for each adapter, which outlives its files."""

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import trainings
from finetune_pipeline.records import Record, UtcDatetime


class Training(Record):
    """One finished training and its result."""

    id: str = Field(description="Version of the adapter.")
    loop: str
    run_id: str = Field(description="Dagster's run.")
    dataset: str = Field(description="Version of the dataset.")
    initial_adapter: str | None = Field(default=None, description="Version of the adapter it was warm-started from.")
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
    watermark: int = Field(ge=0, description="Last ingest offset of the training data.")
    created_at: UtcDatetime


def record_training(db: Database, job: Training) -> None:
    """Record a training, unless one of the same loop and id is recorded."""
    with db.write() as connection:
        insert_if_absent(connection, trainings, job.model_dump())


def find_training(db: Database, loop: str, id: str) -> Training | None:
    """Return the training that made this version of the adapter."""
    query = sa.select(trainings).where(trainings.c.loop == loop, trainings.c.id == id)
    with db.read() as connection:
        row = connection.execute(query).first()
    return Training(**row._mapping) if row else None


def count_trainings(db: Database, loop: str) -> int:
    """Return how many adapters were trained for a loop, whether or not they still exist."""
    query = sa.select(sa.func.count()).select_from(trainings).where(trainings.c.loop == loop)
    with db.read() as connection:
        return int(connection.execute(query).scalar_one())


def list_trainings(db: Database, loop: str) -> list[Training]:
    """Return the trainings of a loop, newest first."""
    query = sa.select(trainings).where(trainings.c.loop == loop).order_by(trainings.c.created_at.desc())
    with db.read() as connection:
        return [Training(**row._mapping) for row in connection.execute(query)]
