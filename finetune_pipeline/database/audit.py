"""The audit log: one row for each action of a person in the console."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import sqlalchemy as sa

from finetune_pipeline.database.connection import Database
from finetune_pipeline.database.tables import audit_log
from finetune_pipeline.records import Record, UtcDatetime


class AuditRow(Record):
    """One action.

    Attributes:
        outcome: empty if it succeeded, else the error; None while it runs, or if its process was killed.
    """

    id: int
    created_at: UtcDatetime
    loop: str
    actor: str
    action: str
    subject: str
    detail: str
    outcome: str | None


@contextmanager
def audited(database: Database, loop: str, actor: str, action: str, subject: str, detail: str = "") -> Iterator[None]:
    """Record the action that the block performs: before it, so that no action is without a row, and how it ended."""
    row = {
        "created_at": datetime.now(UTC),
        "loop": loop,
        "actor": actor[:200],
        "action": action,
        "subject": subject[:200],
        "detail": detail,
    }
    with database.write() as connection:
        [id] = connection.execute(sa.insert(audit_log).values(row)).inserted_primary_key or [None]
    outcome = ""
    try:
        yield
    except BaseException as error:
        outcome = str(error) or type(error).__name__
        raise
    finally:
        with database.write() as connection:
            connection.execute(sa.update(audit_log).where(audit_log.c.id == id).values(outcome=outcome))


def list_audit(database: Database, loop: str, limit: int) -> list[AuditRow]:
    """Return the newest actions on a loop, newest first."""
    query = sa.select(audit_log).where(audit_log.c.loop == loop).order_by(audit_log.c.id.desc()).limit(limit)
    with database.read() as connection:
        return [AuditRow(**row._mapping) for row in connection.execute(query)]
