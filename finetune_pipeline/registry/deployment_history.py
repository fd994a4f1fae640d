"""The rows that every move of the champion leaves, and what they mean when replayed."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import deployment_history
from finetune_pipeline.records import Record, UtcDatetime

Action = Literal["promote", "force", "switch", "rollback"]


class Deployment(Record):
    """One move of the champion."""

    id: int
    loop: str
    action: Action
    model_id: str | None
    previous_id: str | None
    actor: str
    reason: str
    comparison_id: str | None
    created_at: UtcDatetime


def history(db: Database, loop: str) -> list[Deployment]:
    """All moves of a loop's champion, the oldest first. `model_id` None is the base model."""
    with db.read() as connection:
        return history_in(connection, loop)


def history_in(connection: sa.Connection, loop: str) -> list[Deployment]:
    """As `history`, within a transaction."""
    rows = connection.execute(
        sa.select(deployment_history).where(deployment_history.c.loop == loop).order_by(deployment_history.c.id)
    )
    return [Deployment(**row._mapping) for row in rows]


def newest_move_in(connection: sa.Connection, loop: str) -> Deployment | None:
    """Return the newest move of a loop's champion; None if it never moved."""
    newest = (
        sa.select(deployment_history)
        .where(deployment_history.c.loop == loop)
        .order_by(deployment_history.c.id.desc())
        .limit(1)
    )
    row = connection.execute(newest).first()
    return Deployment(**row._mapping) if row else None


def promotions_in(connection: sa.Connection, loop: str, model_id: str) -> list[Deployment]:
    """Return every move that promoted or forced a model, oldest first."""
    d = deployment_history.c
    here = (d.loop == loop, d.model_id == model_id, d.action.in_(("promote", "force")))
    rows = connection.execute(sa.select(deployment_history).where(*here).order_by(d.id))
    return [Deployment(**row._mapping) for row in rows]


def record_in(connection: sa.Connection, **values: Any) -> None:
    """Write one move, in the transaction that makes it."""
    connection.execute(sa.insert(deployment_history).values(**values))


def stack_of(moves: Iterable[Deployment]) -> Sequence[str | None]:
    """Who served, the present champion last; the base model (None) is always the first.

    A promotion, force or switch puts a model on top, a rollback takes it off, so that a second rollback goes further
    back and not to and fro.
    """
    stack: list[str | None] = [None]
    for move in moves:
        if move.action == "rollback":
            stack.pop()
        else:
            stack.append(move.model_id)
    return stack
