"""The deployment history: one row for each change of the champion."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import deployment_history
from finetune_pipeline.records import Record, UtcDatetime

Action = Literal["promote", "force", "switch", "rollback"]


class Deployment(Record):
    """One change of a loop's champion.

    Attributes:
        model_id: None is the base model.
        config: `deployment_config`, with which the deployment was made: settings of the servers; None without any.
    """

    id: int
    loop: str
    action: Action
    model_id: str | None
    previous_id: str | None
    actor: str
    reason: str
    comparison_id: str | None
    created_at: UtcDatetime
    config: dict[str, Any] | None = None


def list_deployments(db: Database, loop: str) -> list[Deployment]:
    """Return all deployments of a loop, oldest first."""
    with db.read() as connection:
        return deployments_in(connection, loop)


def deployments_in(connection: sa.Connection, loop: str) -> list[Deployment]:
    """Return all deployments of a loop, oldest first, within a transaction."""
    query = sa.select(deployment_history).where(deployment_history.c.loop == loop).order_by(deployment_history.c.id)
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def newest_deployment_in(connection: sa.Connection, loop: str) -> Deployment | None:
    """Return the newest deployment of a loop; None if its champion never changed."""
    d = deployment_history.c
    query = sa.select(deployment_history).where(d.loop == loop).order_by(d.id.desc()).limit(1)
    row = connection.execute(query).first()
    return Deployment(**row._mapping) if row else None


def promotions_in(connection: sa.Connection, loop: str, model_id: str) -> list[Deployment]:
    """Return the deployments that promoted or forced a model, oldest first."""
    d = deployment_history.c
    here = (d.loop == loop, d.model_id == model_id, d.action.in_(("promote", "force")))
    rows = connection.execute(sa.select(deployment_history).where(*here).order_by(d.id))
    return [Deployment(**row._mapping) for row in rows]


def record_deployment_in(connection: sa.Connection, **values: Any) -> None:
    """Record a deployment in the transaction that changes the champion."""
    connection.execute(sa.insert(deployment_history).values(**values))


def deployment_stack(deployments: Iterable[Deployment]) -> Sequence[str | None]:
    """Return the stack of champions, the current one last. The base model (None) is always first.

    A promotion, force or switch pushes a model; a rollback pops one. A second rollback therefore goes one more step
    back, instead of returning to the model that the first one left.
    """
    stack: list[str | None] = [None]
    for deployment in deployments:
        if deployment.action == "rollback":
            stack.pop()
        else:
            stack.append(deployment.model_id)
    return stack
