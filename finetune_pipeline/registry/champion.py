"""The champion: one pointer for each loop, moved in one transaction that also writes history.

SQLite's write transaction and PostgreSQL's lock on the loop's row of `champions` let one move at a time through; each
reads the pointer again under that lock (compare-and-swap). A kill in the middle leaves the old champion.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import champions, model_versions
from finetune_pipeline.registry.comparisons import comparison_in
from finetune_pipeline.registry.deployment_history import (
    Action,
    history_in,
    newest_move_in,
    promotions_in,
    record_in,
    stack_of,
)
from finetune_pipeline.registry.model_versions import (
    Candidate,
    ModelVersion,
    RegistryError,
    check_file,
    check_kept,
    check_there,
    model_in,
    register_in,
    version_in,
)

BASE = "base"
_NOTHING_BACK = "{loop} serves its base model and nothing was there before it; there is nothing to roll back to"


class ChampionMoved(RegistryError):
    """Another champion serves than the one that was compared with; the message says which."""


def champion(db: Database, loop: str) -> ModelVersion | None:
    """The model that serves; None is the loop's base model."""
    with db.read() as connection:
        return _champion_in(connection, loop)


@dataclass(frozen=True)
class Served:
    """The model that serves, and the id of the champion's newest move.

    Attributes:
        model: the champion; None for the base model.
        move: id of the champion's newest move; 0 if it never moved.
    """

    model: ModelVersion | None
    move: int


def serving(db: Database, loop: str) -> Served:
    """Return the champion and its newest move from one transaction, for a comparison."""
    with db.read() as connection:
        newest = newest_move_in(connection, loop)
        return Served(_champion_in(connection, loop), newest.id if newest else 0)


def champion_ids(db: Database) -> dict[str, str | None]:
    """The registry's id of every loop's champion, None for the base model; loops that never moved are not in it."""
    with db.read() as connection:
        return {row.loop: row.model_id for row in connection.execute(sa.select(champions.c.loop, champions.c.model_id))}


def resolve(db: Database, name: str, loop: str) -> ModelVersion | None:
    """The model that a name stands for; None is the loop's base model.

    Args:
        name: "v1.2.0", "champion", "previous" (what a rollback would bring) or "base", with or without "loop@".
        loop: the loop, where the name does not say it.

    Raises:
        UnknownVersion: no model has this version; the message lists those that there are.
        RegistryError: "previous", and there is nothing to roll back to.
    """
    named, _, version = name.rpartition("@")
    with db.read() as connection:
        return _resolve_in(connection, version, named or loop)


def promote(
    db: Database,
    candidate: Candidate,
    expected_champion_id: str | None,
    actor: str,
    reason: str,
    comparison_id: str | None,
    action: Literal["promote", "force"] = "promote",
) -> ModelVersion:
    """Register a candidate and make it the champion, in one transaction.

    Asked again while the candidate serves (a retried step), it changes nothing and returns the same version.

    A comparison justifies one promotion, and only until the champion's next move. After a person's rollback or switch
    the champion may be the one that was compared with, but the old comparison must not overrule that person.

    Args:
        candidate: the GGUF that was measured; its file is hashed again.
        expected_champion_id: the champion that it was compared with; None is the base model.
        actor: who or what promotes.
        reason: the verdict's sentence; for "force", why the rule is passed over.
        comparison_id: the recorded comparison that says so; "force" may do without.
        action: "force" passes over the gate's verdict, never over the champion.

    Raises:
        ChampionMoved: the champion moved since the comparison; nothing was changed.
        RegistryError: the file is not what was measured, the comparison is not about it or does not say to promote it,
            or actor, reason or comparison is missing.
    """
    _check_signed(action, actor, reason)
    if action == "promote" and not comparison_id:
        raise RegistryError("a promotion needs the comparison that it rests on; evaluate first, or force with a reason")
    check_file(candidate)
    with moving(db, candidate.loop) as move:
        if move.current_id != candidate.id and move.current_id != expected_champion_id:
            raise _moved(move.connection, candidate.loop, expected_champion_id)
        if action == "promote" and move.current_id != candidate.id:
            _check_justified(move.connection, candidate, comparison_id or "")
        check_there(candidate)  # it may have been deleted while this waited for its turn
        model = register_in(move.connection, candidate, move.now)
        return move.to(model.id, action, actor, reason, comparison_id) or model


def switch(db: Database, loop: str, version: str, actor: str, reason: str) -> ModelVersion | None:
    """Make an earlier version the champion; "base" is the base model. To the one that serves it changes nothing.

    Raises:
        UnknownVersion: no model has this version; the message lists those that there are.
        RegistryError: it was never promoted, was deleted, its file is gone or differs, or actor or reason is missing.
    """
    _check_signed("switch", actor, reason)
    if version.rpartition("@")[0] not in {"", loop}:
        raise RegistryError(f"{version} is a model of another loop; {loop} cannot serve it")
    target = resolve(db, version, loop)
    if target is not None:
        check_file(target, again=False)  # before the transaction: nobody should wait while gigabytes are hashed
    with moving(db, loop) as move:
        return move.to(target.id if target else None, "switch", actor, reason)


def rollback(db: Database, loop: str, actor: str, reason: str) -> ModelVersion | None:
    """Bring back the champion that was there before this one came; a second rollback goes further back.

    Raises:
        RegistryError: there is nothing to roll back to, the earlier model was deleted (nothing is skipped), its file is
            gone or differs, or actor or reason is missing.
        ChampionMoved: somebody moved the champion in the same moment; nothing was changed.
    """
    _check_signed("rollback", actor, reason)
    before = champion(db, loop)
    target = resolve(db, "previous", loop)
    if target is not None:
        check_file(target, again=False)
    with moving(db, loop) as move:
        here, there = (model.id if model else None for model in (before, target))
        if move.current_id != here or _previous_id(move.connection, loop) != there:
            raise _moved(move.connection, loop, here)
        return move.to(there, "rollback", actor, reason)


@dataclass(frozen=True)
class Move:
    """The loop's pointer while this transaction holds it."""

    connection: sa.Connection
    loop: str
    current_id: str | None
    now: datetime

    def to(
        self, model_id: str | None, action: Action, actor: str, reason: str, comparison_id: str | None = None
    ) -> ModelVersion | None:
        """Point to another model, mark what begins and what ceases to serve, and write history.

        Returns what serves now. Pointing to the same changes nothing, except that a rollback is always written, since
        it goes one step back in history.

        Raises:
            RegistryError: the model was deleted, or a switch or rollback leads to one that was never promoted.
        """
        target = model_in(self.connection, self.loop, model_id) if model_id else None
        if model_id and (target is None or target.id != model_id):
            raise RegistryError(
                f"no model of {self.loop} in the registry has the id {model_id}; choose another version"
            )
        if target is not None:
            check_kept(target)  # asked under the lock: until here it could be deleted
        if target is not None and action in {"switch", "rollback"}:
            _check_promoted(self.connection, target)
        if model_id == self.current_id and action != "rollback":
            return target
        here = champions.c.loop == self.loop
        self.connection.execute(sa.update(champions).where(here).values(model_id=model_id, updated_at=self.now))
        self._mark(self.current_id, retired_at=self.now)
        self._mark(model_id, deployed_at=self.now, retired_at=None)
        record_in(
            self.connection,
            loop=self.loop,
            action=action,
            model_id=model_id,
            previous_id=self.current_id,
            actor=actor,
            reason=reason,
            comparison_id=comparison_id,
            created_at=self.now,
        )
        return model_in(self.connection, self.loop, model_id) if model_id else None

    def _mark(self, model_id: str | None, **moments: datetime | None) -> None:
        here = (model_versions.c.loop == self.loop, model_versions.c.id == model_id)
        self.connection.execute(sa.update(model_versions).where(*here).values(**moments))


@contextmanager
def moving(db: Database, loop: str) -> Iterator[Move]:
    """The loop's row of `champions`, locked until the transaction ends."""
    with db.write() as connection:
        # A row that is not there cannot be locked, so the first move of a loop makes it.
        insert_if_absent(connection, champions, {"loop": loop, "model_id": None, "updated_at": datetime.now(UTC)})
        pointer = sa.select(champions.c.model_id).where(champions.c.loop == loop).with_for_update()
        current_id = connection.execute(pointer).scalar_one()
        yield Move(connection, loop, current_id, datetime.now(UTC))


def _champion_in(connection: sa.Connection, loop: str) -> ModelVersion | None:
    model_id = connection.execute(sa.select(champions.c.model_id).where(champions.c.loop == loop)).scalar()
    return model_in(connection, loop, model_id) if model_id else None


def _previous_id(connection: sa.Connection, loop: str) -> str | None:
    stack = stack_of(history_in(connection, loop))
    if len(stack) < 2:
        raise RegistryError(_NOTHING_BACK.format(loop=loop))
    return stack[-2]


def _resolve_in(connection: sa.Connection, version: str, loop: str) -> ModelVersion | None:
    if version == BASE:
        return None
    if version == "champion":
        return _champion_in(connection, loop)
    if version == "previous":
        model_id = _previous_id(connection, loop)
        return model_in(connection, loop, model_id) if model_id else None
    return version_in(connection, loop, version)


def _check_justified(connection: sa.Connection, candidate: Candidate, comparison_id: str) -> None:
    """Refuse a promotion that its comparison does not justify, or no longer justifies."""
    found = comparison_in(connection, candidate.loop, comparison_id)
    if found is None:
        raise RegistryError(f"the comparison {comparison_id} is not in the database; materialize eval_report again")
    if not found.promote or found.challenger_sha256 != candidate.sha256:
        said = "says to reject its challenger" if not found.promote else "is about another model"
        raise RegistryError(
            f"the comparison {comparison_id} {said} ({found.reason}), so it does not justify this promotion; evaluate "
            "this model"
        )
    newest = newest_move_in(connection, candidate.loop)
    if found.after_deployment != (newest.id if newest else 0):
        how = f" ({newest.action} by {newest.actor}, {newest.created_at:%Y-%m-%d %H:%M} UTC)" if newest else ""
        raise ChampionMoved(
            f"the champion moved{how} since comparison {comparison_id} was made. A comparison justifies one promotion, "
            "and none after the champion's next move; nothing was changed. Materialize eval_report again"
        )


def _check_promoted(connection: sa.Connection, model: ModelVersion) -> None:
    """Refuse a version that was never promoted, or whose row names another file than was promoted."""
    promotions = promotions_in(connection, model.loop, model.id)
    compared = [comparison_in(connection, model.loop, one.comparison_id) for one in promotions if one.comparison_id]
    known = {found.challenger_sha256 for found in compared if found is not None}
    if not promotions or (known and model.sha256 not in known):
        raise RegistryError(
            f"{model.name} cannot serve: the history of {model.loop} has no promotion of this model (SHA-256 "
            f"{model.sha256[:16]}...); `finetune model history` shows what was promoted. Promote it by a run first"
        )


def _moved(connection: sa.Connection, loop: str, expected_id: str | None) -> ChampionMoved:
    now = _champion_in(connection, loop)
    expected = model_in(connection, loop, expected_id) if expected_id else None
    was = expected.name if expected else (expected_id or f"{loop}'s base model")
    return ChampionMoved(
        f"the champion moved: it was {was}, and is {now.name if now else 'the base model'} now; nothing was changed. "
        "Evaluate again, against the champion that serves"
    )


def _check_signed(action: Action, actor: str, reason: str) -> None:
    missing = [name for name, value in (("actor", actor), ("reason", reason)) if not value.strip()]
    if missing:
        raise RegistryError(f"{action} needs {' and '.join(missing)}: history has to say who did it and why")
