"""The deployment history: one row for each change of the champion, and for each decision about a model.

Only rows with an action of DEPLOYING change the champion; the others are for people, and `list_history` shows them too.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import deployment_history
from finetune_pipeline.records import Record, UtcDatetime

Deploying = Literal["promote", "approve", "force", "switch", "rollback"]
"""What changes the champion. promote: the gate accepted it; approve: a person did so too; force: a person overruled the
gate; switch and rollback: a person chose an earlier version."""

Noted = Literal["reject", "archive", "unarchive"]
"""What a person or garbage collection decided about a model without a change of the champion."""

Action = Deploying | Noted

PROMOTING = ("promote", "approve", "force")
"""Actions after which a model has a version."""


class Deployment(Record):
    """One row of a loop's history.

    Attributes:
        model_id: None is the base model. A rejected challenger has an id too, and no version.
        previous_id: the champion before; None is the base model, and that the champion did not change.
        config: `deployment_config`, with which the deployment was made: settings of the servers; None without any.
        requested_config: the part of it that came with the request. It stays in effect over `deploy.config` until the
            loop's next deployment.
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
    requested_config: dict[str, Any] | None = None


def list_history(db: Database, loop: str, after: int = 0) -> list[Deployment]:
    """Return all rows of a loop's history with an id higher than `after`, oldest first."""
    d = deployment_history.c
    with db.read() as connection:
        rows = connection.execute(sa.select(deployment_history).where(d.loop == loop, d.id > after).order_by(d.id))
        return [Deployment(**row._mapping) for row in rows]


def list_deployments(db: Database, loop: str) -> list[Deployment]:
    """Return all changes of a loop's champion, oldest first."""
    with db.read() as connection:
        return deployments_in(connection, loop)


def deployments_in(connection: sa.Connection, loop: str) -> list[Deployment]:
    """Return all changes of a loop's champion, oldest first, within a transaction."""
    query = sa.select(deployment_history).where(*_deployments_of(loop)).order_by(deployment_history.c.id)
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def newest_deployment_in(connection: sa.Connection, loop: str) -> Deployment | None:
    """Return the newest deployment of a loop; None if its champion never changed."""
    query = (
        sa.select(deployment_history).where(*_deployments_of(loop)).order_by(deployment_history.c.id.desc()).limit(1)
    )
    row = connection.execute(query).first()
    return Deployment(**row._mapping) if row else None


def promotions_in(connection: sa.Connection, loop: str, model_id: str) -> list[Deployment]:
    """Return the deployments that promoted a model for the first time or again, oldest first."""
    d = deployment_history.c
    here = (d.loop == loop, d.model_id == model_id, d.action.in_(PROMOTING))
    rows = connection.execute(sa.select(deployment_history).where(*here).order_by(d.id))
    return [Deployment(**row._mapping) for row in rows]


def record_deployment_in(connection: sa.Connection, **values: Any) -> None:
    """Record a deployment in the transaction that changes the champion."""
    connection.execute(sa.insert(deployment_history).values(**values))


def record_note_in(
    connection: sa.Connection,
    loop: str,
    action: Noted,
    model_id: str,
    actor: str,
    reason: str,
    now: datetime,
    comparison_id: str | None = None,
) -> None:
    """Record a decision about a model that does not change the champion."""
    record_deployment_in(
        connection,
        loop=loop,
        action=action,
        model_id=model_id,
        actor=actor,
        reason=reason,
        comparison_id=comparison_id,
        created_at=now,
    )


def deployment_stack(deployments: Iterable[Deployment]) -> Sequence[str | None]:
    """Return the stack of champions, the current one last. The base model (None) is always first.

    A promotion or switch pushes a model; a rollback pops one. A second rollback therefore goes one more step
    back, instead of returning to the model that the first one left.
    """
    return [one.model_id if one else None for one in stacked_deployments(deployments)]


def stacked_deployments(deployments: Iterable[Deployment]) -> Sequence[Deployment | None]:
    """Return the deployments that made the champions of `deployment_stack`; None is the base model at the start."""
    stack: list[Deployment | None] = [None]
    for deployment in deployments:
        if deployment.action == "rollback":
            stack.pop()
        else:
            stack.append(deployment)
    return stack


def _deployments_of(loop: str) -> tuple[sa.ColumnElement[bool], ...]:
    d = deployment_history.c
    return (d.loop == loop, d.action.in_(get_args(Deploying)))
