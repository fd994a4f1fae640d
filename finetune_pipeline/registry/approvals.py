"""Approvals: one row for each challenger that the gate accepted and a person has to approve (`approval: required`).

A row belongs to one comparison and to the hashes of everything that the person looks at. Every change of a row locks
the loop's champion, so that a decision, a newer challenger and a promotion cannot overtake each other.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import approvals, deployment_history
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.deployment_history import PROMOTING, newest_deployment_in
from finetune_pipeline.registry.model_versions import RegistryError

Decision = Literal["approved", "rejected"]


class ApprovalError(RegistryError):
    """A challenger cannot be approved or rejected; the message says why and what to do."""


class Approval(Record):
    """The request that a person approves a challenger, and the decision.

    Attributes:
        hashes: what the approval is for: dataset, adapter, gguf, report, settings, benchmark -> hash.
        actor: who approved or rejected it.
        reason: of the decision, or why the request is void.
    """

    loop: str
    comparison_id: str
    challenger_sha256: str
    gguf_version: str = Field(description="Version of gguf_model.")
    hashes: dict[str, str]
    state: Literal["waiting", "approved", "rejected", "void"]
    actor: str | None = None
    reason: str = ""
    requested_at: UtcDatetime
    expires_at: UtcDatetime | None = None
    decided_at: UtcDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Return whether it can no longer promote because of its age."""
        return self.expires_at is not None and self.expires_at <= now


def approval_in(connection: sa.Connection, loop: str, comparison_id: str) -> Approval | None:
    """Return the request for a comparison's challenger, within a transaction; None if nobody asked."""
    a = approvals.c
    row = connection.execute(sa.select(approvals).where(a.loop == loop, a.comparison_id == comparison_id)).first()
    return Approval(**row._mapping) if row else None


def find_approval(db: Database, loop: str, comparison_id: str) -> Approval | None:
    """Return the request for a comparison's challenger; None if nobody asked."""
    with db.read() as connection:
        return approval_in(connection, loop, comparison_id)


def newest_approval(db: Database, loop: str) -> Approval | None:
    """Return the loop's newest request; None if there was none."""
    a = approvals.c
    query = sa.select(approvals).where(a.loop == loop).order_by(a.requested_at.desc()).limit(1)
    with db.read() as connection:
        row = connection.execute(query).first()
    return Approval(**row._mapping) if row else None


def open_approvals_in(connection: sa.Connection, loop: str) -> list[Approval]:
    """Return the requests that may still promote, within a transaction: waiting ones, and approved ones not yet used.

    Those that are void and not marked so yet are among them.
    """
    a, d = approvals.c, deployment_history.c
    used = sa.select(d.comparison_id).where(d.loop == loop, d.action.in_(PROMOTING), d.comparison_id.is_not(None))
    here = (a.loop == loop, a.state.in_(("waiting", "approved")), a.comparison_id.not_in(used))
    return [Approval(**row._mapping) for row in connection.execute(sa.select(approvals).where(*here))]


def request_in(connection: sa.Connection, approval: Approval) -> None:
    """Record a request, which makes the loop's other open requests void: a newer challenger replaces an older one.

    Call it only while the loop's champion is locked.
    """
    for other in open_approvals_in(connection, approval.loop):
        reason = f"replaced by the newer challenger {approval.loop}@{approval.challenger_sha256[:16]}"
        void_in(connection, other, reason, approval.requested_at)
    connection.execute(sa.insert(approvals).values(approval.model_dump()))


def void_in(connection: sa.Connection, approval: Approval, reason: str, now: datetime) -> None:
    """Mark a request as void."""
    _update(connection, approval, {"state": "void", "reason": reason, "decided_at": now})


def decide_in(
    connection: sa.Connection, approval: Approval, decision: Decision, actor: str, reason: str, now: datetime
) -> None:
    """Record a person's decision on a request that waits; call it only while the loop's champion is locked."""
    _update(connection, approval, {"state": decision, "actor": actor, "reason": reason, "decided_at": now})


def obstacle_in(
    connection: sa.Connection, approval: Approval, after_deployment: int | None, now: datetime
) -> str | None:
    """Return why a request can no longer lead to a promotion, as far as the database knows; None if it can.

    Args:
        after_deployment: the newest deployment at the time of the comparison.
    """
    if approval.state == "void":
        return approval.reason
    if approval.expired(now):
        return f"it expired on {approval.expires_at:%Y-%m-%d %H:%M} UTC"
    newest = newest_deployment_in(connection, approval.loop)
    if newest is not None and newest.id != after_deployment:
        return f"the champion changed ({newest.action} by {newest.actor}, {newest.created_at:%Y-%m-%d %H:%M} UTC)"
    return None


def check_approved_in(
    connection: sa.Connection, loop: str, comparison_id: str, after_deployment: int | None, now: datetime
) -> None:
    """Raise an error unless a person approved a comparison's challenger and nothing made that void.

    Call it only while the loop's champion is locked.

    Raises:
        ApprovalError: nobody approved it, or the approval is void.
    """
    found = approval_in(connection, loop, comparison_id)
    if found is None or found.state not in {"approved", "void"}:
        raise ApprovalError(f"nobody approved the challenger of comparison {comparison_id}; nothing was changed")
    problem = obstacle_in(connection, found, after_deployment, now)
    if problem:
        raise ApprovalError(f"the approval of comparison {comparison_id} is void: {problem}; nothing was changed")


def _update(connection: sa.Connection, approval: Approval, values: Mapping[str, object]) -> None:
    here = (approvals.c.loop == approval.loop, approvals.c.comparison_id == approval.comparison_id)
    connection.execute(sa.update(approvals).where(*here).values(**values))
