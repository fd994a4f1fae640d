"""The table of deployment targets: what each should serve, what it serves, and who works on it now.

One process at a time works on a target. It holds a lease in the target's row and renews it while it works; the lease of
a killed process ends by itself. All changes of a row require the lease, so a process that was suspended for longer
cannot overwrite what its successor wrote.
"""

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database, DatabaseError
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import deployment_targets
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.settings import UpstreamSettings

LEASE_SECONDS = 60.0
"""How long a lease holds without being renewed, and so how long others wait after a `kill -9`."""

State = Literal["pending", "active", "failed", "rejected", "drifted"]


class LeaseLostError(RuntimeError):
    """Another process has taken the lease, because this one did not renew its lease in time."""


class ActiveRelease(Record):
    """The release that was activated last on a target that answers requests, for a gateway that asks it.

    Attributes:
        label: of the release.
        upstream: where it answers.
        vocabulary: a GGUF with the tokenizer, if the server reads control tokens in messages and takes token ids
            instead.
    """

    label: str
    upstream: UpstreamSettings
    vocabulary: str | None = None


class TargetState(Record):
    """Where a target stands.

    Attributes:
        wanted: label of the release that it should serve; empty before the first attempt.
        wanted_sha256: of that model.
        observed: label that it served when it was last asked; None for nothing, or something else.
        digest: its own identity of what it served.
        state: pending (nothing tried yet), active, failed (tried again later), rejected (not tried again before the
            release or the settings change), or drifted (somebody changed what it serves; it is brought back).
        tries: failed attempts to bring it to the wanted release.
        next_try_at: not before this time; None at once.
        facts: results of the comparison with the judged model, and further facts.
        observed_at: when it was last asked.
        locked_by: process that holds the lease.
        locked_until: when the lease ends unless it is renewed.
    """

    loop: str
    target: str
    wanted: str = ""
    wanted_sha256: str = ""
    observed: str | None = None
    digest: str = ""
    state: State = "pending"
    tries: int = 0
    next_try_at: UtcDatetime | None = None
    last_error: str = ""
    facts: dict[str, Any] = Field(default={})
    observed_at: UtcDatetime | None = None
    locked_by: str | None = None
    locked_until: UtcDatetime | None = None

    @property
    def active(self) -> ActiveRelease | None:
        """The release that was activated last; None if there is none, or the target answers no requests."""
        found = self.facts.get("active")
        return None if found is None else ActiveRelease.model_validate(found)

    @property
    def summary(self) -> str:
        """The target's name and state, such as "ollama has failed"."""
        return f"{self.target} {'has' if self.state in {'failed', 'drifted'} else 'is'} {self.state}"

    def is_locked(self, now: datetime) -> bool:
        """Return whether a process works on the target."""
        return self.locked_until is not None and self.locked_until >= now


def target_states(db: Database, loop: str) -> dict[str, TargetState]:
    """Return the rows of a loop's targets by name; a target that was never worked on has none."""
    query = sa.select(deployment_targets).where(deployment_targets.c.loop == loop)
    with db.read() as connection:
        return {row.target: TargetState(**row._mapping) for row in connection.execute(query)}


class Lease:
    """The right to work on a target, and the only way to change its row.

    Attributes:
        state: the row as this process knows it.
    """

    def __init__(self, db: Database, state: TargetState, owner: str) -> None:
        self.state = state
        self._db = db
        self._owner = owner

    def update(self, **values: Any) -> None:
        """Write columns of the row.

        Raises:
            LeaseLostError: another process has taken the lease; nothing was written.
        """
        self.renew(**values)
        self.state = self.state.model_copy(update=values)

    def renew(self, **values: Any) -> None:
        """Write columns like `update`, by default none, but leave `state` as it is: for use in another thread.

        Raises:
            LeaseLostError: another process has taken the lease; nothing was written.
        """
        columns = deployment_targets.c
        own = (columns.loop == self.state.loop, columns.target == self.state.target, columns.locked_by == self._owner)
        values = {"locked_by": self._owner, **values}
        with self._db.write() as connection:
            if not connection.execute(sa.update(deployment_targets).where(*own).values(**values)).rowcount:
                raise LeaseLostError(f"another process works on the target {self.state.target} now")


@contextmanager
def take_lease(db: Database, loop: str, target: str, seconds: float | None = None) -> Iterator[Lease | None]:
    """Hold the lease of a target, renewing it from a thread; yield None if another process holds it.

    Args:
        seconds: how long the lease holds without being renewed; default LEASE_SECONDS.
    """
    seconds = LEASE_SECONDS if seconds is None else seconds
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    columns = deployment_targets.c
    here = (columns.loop == loop, columns.target == target)

    def until() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=seconds)

    with db.write() as connection:
        empty = TargetState(loop=loop, target=target)
        insert_if_absent(connection, deployment_targets, empty.model_dump())
        free = sa.or_(columns.locked_until.is_(None), columns.locked_until < datetime.now(UTC))
        taken = sa.update(deployment_targets).where(*here, free).values(locked_by=owner, locked_until=until())
        if not connection.execute(taken).rowcount:
            lease = None
        else:
            row = connection.execute(sa.select(deployment_targets).where(*here)).one()
            lease = Lease(db, TargetState(**row._mapping), owner)
    if lease is None:
        yield None
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(seconds / 3):
            try:
                lease.renew(locked_until=until())
            except LeaseLostError:
                return
            except DatabaseError:  # perhaps locked for a moment; the lease still holds for a while
                continue

    thread = threading.Thread(target=renew, name=f"lease-{target}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        with suppress(LeaseLostError):
            lease.update(locked_by=None, locked_until=None)
