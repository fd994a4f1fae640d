"""The regression suite: corrections that a promotion fixed, as questions that later challengers are asked.

A question stands as long as its example does, with the same prompt and target. So one whose interaction was erased,
retracted or rejected in review, or was corrected differently since, is not asked. An erasure deletes its text too.
"""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import upsert
from finetune_pipeline.database.tables import examples, regression_questions
from finetune_pipeline.records import Record, Turn

_SAME_EXAMPLE = sa.and_(
    examples.c.interaction_id == regression_questions.c.interaction_id,
    examples.c.loop == regression_questions.c.loop,
    examples.c.content_hash == regression_questions.c.content_hash,
)
_ACCEPTED = sa.or_(examples.c.review.is_(None), examples.c.review != "reject")


class RegressionQuestion(Record):
    """A correction: the prompt, and the answer that a person expects. The texts are redacted."""

    interaction_id: str
    content_hash: str
    prompt: str
    history: tuple[Turn, ...] = ()
    expected: str


def record_questions_in(
    connection: sa.Connection, loop: str, model_id: str, questions: Sequence[RegressionQuestion], now: datetime
) -> None:
    """Record the corrections that a model fixed, in the transaction that makes it the champion."""
    for one in questions:
        row = {**one.model_dump(), "loop": loop, "model_id": model_id, "created_at": now}
        upsert(connection, regression_questions, row)  # an older row is of an earlier correction


def questions_of_model(db: Database, loop: str, model_id: str) -> int:
    """Return how many questions a model's promotion added that are still stored."""
    q = regression_questions.c
    query = sa.select(sa.func.count()).where(q.loop == loop, q.model_id == model_id)
    with db.read() as connection:
        return int(connection.execute(query).scalar_one())


def other_corrections(db: Database, loop: str) -> dict[str, tuple[int, str]]:
    """Return the corrections that no question stands for: interaction id -> ingest offset and content hash."""
    q, e = regression_questions.c, examples.c
    query = (
        sa.select(e.interaction_id, e.ingest_offset, e.content_hash)
        .outerjoin(regression_questions, _SAME_EXAMPLE)
        .where(e.loop == loop, e.corrected, _ACCEPTED, q.interaction_id.is_(None))
    )
    with db.read() as connection:
        return {row.interaction_id: (row.ingest_offset, row.content_hash) for row in connection.execute(query)}


def standing_questions(db: Database, loop: str) -> list[RegressionQuestion]:
    """Return the questions of a loop that still stand, by interaction id."""
    q = regression_questions.c
    columns = [q[name] for name in RegressionQuestion.model_fields]
    query = (
        sa.select(*columns).join(examples, _SAME_EXAMPLE).where(q.loop == loop, _ACCEPTED).order_by(q.interaction_id)
    )
    with db.read() as connection:
        return [RegressionQuestion(**row._mapping) for row in connection.execute(query)]
