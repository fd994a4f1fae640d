"""Looks at the sealed benchmark: the scores of promoted models on it and on the open benchmark, without answers."""

from datetime import datetime

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import sealed_looks
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.deployment_history import PROMOTING, deployments_in, promotions_in

QuestionScores = dict[str, tuple[int, int, str | None]]
"""Id of a question -> correct, total and cluster."""


class SealedScores(Record):
    """One model's scores on both benchmarks, and what they depend on."""

    sealed_sha256: str
    benchmark_sha256: str
    settings_sha256: str
    sealed_scores: QuestionScores
    open_scores: QuestionScores


class SealedLook(SealedScores):
    """The scores of a model that was promoted; `deployment_id` is the promotion."""

    loop: str
    deployment_id: int
    model_id: str
    created_at: UtcDatetime


def record_look_in(connection: sa.Connection, loop: str, model_id: str, scores: SealedScores, now: datetime) -> None:
    """Record the scores of a new champion, in the transaction of its promotion, after that."""
    promotion = promotions_in(connection, loop, model_id)[-1]
    row = {**scores.model_dump(), "loop": loop, "model_id": model_id, "created_at": now}
    connection.execute(sealed_looks.insert().values(deployment_id=promotion.id, **row))


def list_looks(db: Database, loop: str) -> list[SealedLook]:
    """Return the looks of a loop, oldest first."""
    s = sealed_looks.c
    with db.read() as connection:
        rows = connection.execute(sa.select(sealed_looks).where(s.loop == loop).order_by(s.deployment_id))
        return [SealedLook(**row._mapping) for row in rows]


def promotions_since_look(db: Database, loop: str) -> int | None:
    """Return how many promotions followed the last look; None if there was no look yet."""
    newest = sa.select(sa.func.max(sealed_looks.c.deployment_id)).where(sealed_looks.c.loop == loop)
    with db.read() as connection:
        last: int | None = connection.execute(newest).scalar()
        if last is None:
            return None
        deployments = deployments_in(connection, loop)
    return sum(one.id > last and one.action in PROMOTING for one in deployments)
