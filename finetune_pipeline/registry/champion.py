"""The champion: one pointer for each loop, changed in one transaction that also writes the deployment history.

SQLite's write transaction, or PostgreSQL's lock on the loop's row of `champions`, admits one change at a time. Each
change reads the pointer again under that lock (compare-and-swap). A kill in the middle leaves the old champion.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import champions, model_versions
from finetune_pipeline.registry.approvals import check_approved_in
from finetune_pipeline.registry.comparisons import ComparisonRecord, comparison_in
from finetune_pipeline.registry.deployment_history import (
    Action,
    Deploying,
    deployment_stack,
    deployments_in,
    newest_deployment_in,
    promotions_in,
    record_deployment_in,
    record_note_in,
    stacked_deployments,
)
from finetune_pipeline.registry.model_versions import (
    CandidateModel,
    ModelVersion,
    RegistryError,
    check_files,
    check_files_exist,
    check_not_deleted,
    model_in,
    register_in,
    version_in,
)
from finetune_pipeline.registry.regression_questions import RegressionQuestion, record_questions_in
from finetune_pipeline.registry.sealed_looks import SealedScores, record_look_in

BASE = "base"

Config = Mapping[str, Any] | None
"""`deployment_config`: settings of the servers by their own names."""


class ChampionChangedError(RegistryError):
    """The champion is not the one that a change expected; the message names both."""


@dataclass(frozen=True)
class CurrentDeployment:
    """The champion and the deployment that made it champion, read in one transaction.

    Attributes:
        model: the champion; None for the base model.
        deployment_id: id of the loop's newest deployment; 0 if its champion never changed.
    """

    model: ModelVersion | None
    deployment_id: int


def champion(db: Database, loop: str) -> ModelVersion | None:
    """Return the loop's champion; None if the base model serves."""
    with db.read() as connection:
        return _champion_in(connection, loop)


def current_deployment(db: Database, loop: str) -> CurrentDeployment:
    """Return the champion and the id of the newest deployment, which a comparison records."""
    with db.read() as connection:
        newest = newest_deployment_in(connection, loop)
        return CurrentDeployment(_champion_in(connection, loop), newest.id if newest else 0)


def champion_ids(db: Database) -> dict[str, str | None]:
    """Return the model id of every loop's champion, None for the base model; loops never deployed are missing."""
    with db.read() as connection:
        return {row.loop: row.model_id for row in connection.execute(sa.select(champions.c.loop, champions.c.model_id))}


def resolve(db: Database, name: str, loop: str) -> ModelVersion | None:
    """Return the model version that a name refers to; None is the loop's base model.

    Args:
        name: "v1.2.0", "champion", "previous" (the target of a rollback) or "base", with or without "loop@".
        loop: the loop, if the name does not contain one.

    Raises:
        UnknownVersionError: no model has this version; the message lists the known ones.
        RegistryError: the name is "previous" and there is nothing to roll back to.
    """
    named, _, version = name.rpartition("@")
    loop = named or loop
    with db.read() as connection:
        if version == BASE:
            return None
        if version == "champion":
            return _champion_in(connection, loop)
        if version == "previous":
            model_id = _previous_id(connection, loop)
            return model_in(connection, loop, model_id) if model_id else None
        return version_in(connection, loop, version)


def promote(
    db: Database,
    candidate: CandidateModel,
    expected_champion_id: str | None,
    actor: str,
    reason: str,
    comparison_id: str | None,
    action: Literal["promote", "approve", "force"] = "promote",
    config: Config = None,
    fixed: Sequence[RegressionQuestion] = (),
    sealed: SealedScores | None = None,
    requested: Config = None,
) -> ModelVersion:
    """Register a candidate and make it the champion, in one transaction.

    If the candidate is the champion already (a retried step), nothing changes and the same version is returned.

    A comparison justifies one promotion, and only until the champion's next change: after a rollback or switch by a
    person, the champion may again be the one that was compared, but the old comparison must not overrule that person.

    Args:
        candidate: the GGUF that was evaluated; its files are hashed again.
        expected_champion_id: the champion that it was compared with; None is the base model.
        actor: who promotes.
        reason: the verdict's reason; for "approve" and "force", that of the person.
        comparison_id: the recorded comparison that justifies the promotion; optional for "force".
        action: "approve" requires a person's approval of the comparison too. "force" overrules the gate, but still
            requires the expected champion.
        config: `deploy.config`, for the history.
        requested: `deployment_config` of the request, which stays in effect over it until the next deployment.
        fixed: corrections that the candidate answers correctly, for the regression suite.
        sealed: its scores on the sealed benchmark, if this promotion asks it.

    Raises:
        ChampionChangedError: the champion changed since the comparison; nothing was changed.
        ApprovalError: nobody approved the challenger, or the approval is void.
        RegistryError: the file differs from the evaluated one, the comparison is about another model or rejects it, or
            actor, reason or comparison is missing.
    """
    _check_actor_and_reason(action, actor, reason)
    if action != "force" and not comparison_id:
        raise RegistryError("a promotion needs the comparison that it rests on; evaluate first, or force with a reason")
    check_files(candidate)
    with lock_champion(db, candidate.loop) as locked:
        if locked.current_id != candidate.id and locked.current_id != expected_champion_id:
            raise _changed(locked.connection, candidate.loop, expected_champion_id)
        if action != "force" and locked.current_id != candidate.id:
            compared = _check_justified(locked.connection, candidate, comparison_id or "")
            if action == "approve":
                check_approved_in(locked.connection, candidate.loop, compared.id, compared.after_deployment, locked.now)
        check_files_exist(candidate)  # they may have been deleted while this waited for the lock
        model = register_in(locked.connection, candidate, locked.now)
        record_questions_in(locked.connection, candidate.loop, model.id, fixed, locked.now)
        model = locked.deploy(model.id, action, actor, reason, comparison_id, config, requested) or model
        if sealed and locked.current_id != model.id:
            record_look_in(locked.connection, candidate.loop, model.id, sealed, locked.now)
        return model


def switch(
    db: Database,
    loop: str,
    version: str,
    actor: str,
    reason: str,
    config: Config = None,
    requested: Config = None,
) -> ModelVersion | None:
    """Make an earlier version, or the base model ("base"), the champion; `config` and `requested` are as in `promote`.

    A switch to the champion changes nothing, unless `requested` differs from what is in effect.

    Raises:
        UnknownVersionError: no model has this version; the message lists the known ones.
        RegistryError: it was never promoted, its files were deleted or differ, or actor or reason is missing.
    """
    _check_actor_and_reason("switch", actor, reason)
    if version.rpartition("@")[0] not in {"", loop}:
        raise RegistryError(f"{version} is a model of another loop; {loop} cannot serve it")
    target = resolve(db, version, loop)
    if target is not None:
        check_files(target, again=False)  # before the transaction: nothing should wait while gigabytes are hashed
    with lock_champion(db, loop) as locked:
        return locked.deploy(target.id if target else None, "switch", actor, reason, None, config, requested)


def rollback(
    db: Database, loop: str, actor: str, reason: str, config: Config = None, expected: str | None = None
) -> ModelVersion | None:
    """Restore the previous champion; a second rollback goes one more step back. `config` is as in `promote`.

    The `deployment_config` that was requested for the restored deployment is in effect again.

    Args:
        expected: name of the champion whose deployment is undone, so that two people who roll back at once go one step
            back together; None: whatever serves.

    Raises:
        RegistryError: there is nothing to roll back to, the files of the previous champion were deleted or differ
            (no version is skipped), or actor or reason is missing.
        ChampionChangedError: somebody changed the champion at the same time; nothing was changed.
    """
    _check_actor_and_reason("rollback", actor, reason)
    before = champion(db, loop)
    if expected not in {None, before.name if before else f"{loop}@{BASE}"}:
        raise ChampionChangedError(
            f"{expected} does not serve, but {before.name if before else f'{loop}@{BASE}'}; nothing was changed. Roll "
            "back the model that serves, or deploy the one that should"
        )
    target = resolve(db, "previous", loop)
    if target is not None:
        check_files(target, again=False)
    before_id, target_id = (model.id if model else None for model in (before, target))
    with lock_champion(db, loop) as locked:
        if locked.current_id != before_id or _previous_id(locked.connection, loop) != target_id:
            raise _changed(locked.connection, loop, before_id)
        restored = stacked_deployments(deployments_in(locked.connection, loop))[-2]
        requested = restored.requested_config if restored else None
        return locked.deploy(target_id, "rollback", actor, reason, None, config, requested)


def archive(db: Database, loop: str, version: str, actor: str, reason: str) -> ModelVersion:
    """Hide a version from lists; its files and history stay, and it can still be used by its name.

    Raises:
        UnknownVersionError: no model has this version; the message lists the known ones.
        RegistryError: it is the champion, the target of a rollback or archived already, or actor or reason is missing.
    """
    _check_actor_and_reason("archive", actor, reason)
    with lock_champion(db, loop) as locked:
        model = _version_to_archive(locked, version)
        if model.archived_at is not None:
            raise RegistryError(f"{model.name} is archived already; `finetune model list --all` shows it")
        if model.id == locked.current_id:
            raise RegistryError(f"{model.name} serves as champion; switch to another version before you archive it")
        stack = deployment_stack(deployments_in(locked.connection, loop))
        if len(stack) > 1 and model.id == stack[-2]:
            raise RegistryError(
                f"{model.name} is what a rollback would restore; archive it after the next promotion or switch"
            )
        locked.archive(model.id, actor, reason)
        return _version_to_archive(locked, version)


def unarchive(db: Database, loop: str, version: str, actor: str, reason: str) -> ModelVersion:
    """Show an archived version in lists again.

    Raises:
        UnknownVersionError: no model has this version; the message lists the known ones.
        RegistryError: it is not archived, its files were deleted, or actor or reason is missing.
    """
    _check_actor_and_reason("unarchive", actor, reason)
    with lock_champion(db, loop) as locked:
        model = _version_to_archive(locked, version)
        check_not_deleted(model)
        if model.archived_at is None:
            raise RegistryError(f"{model.name} is not archived")
        locked.update_model(model.id, archived_at=None)
        record_note_in(locked.connection, loop, "unarchive", model.id, actor, reason, locked.now)
        return _version_to_archive(locked, version)


def _version_to_archive(locked: "LockedChampion", version: str) -> ModelVersion:
    named, _, number = version.rpartition("@")
    if named not in {"", locked.loop}:
        raise RegistryError(f"{version} is a model of another loop than {locked.loop}")
    return version_in(locked.connection, locked.loop, number)


@dataclass(frozen=True)
class LockedChampion:
    """A loop's champion pointer, locked by the current transaction."""

    connection: sa.Connection
    loop: str
    current_id: str | None
    now: datetime

    def deploy(
        self,
        model_id: str | None,
        action: Deploying,
        actor: str,
        reason: str,
        comparison_id: str | None = None,
        config: Config = None,
        requested: Config = None,
    ) -> ModelVersion | None:
        """Make a model the champion, update the times of both models, and record the deployment.

        Deploying the current champion again changes nothing, except for a rollback, which always goes one step back in
        the history, and for a switch with another requested config.

        Returns:
            The new champion; None for the base model.

        Raises:
            RegistryError: the model was deleted, or a switch or rollback leads to one that was never promoted.
        """
        target = model_in(self.connection, self.loop, model_id) if model_id else None
        if model_id and (target is None or target.id != model_id):
            raise RegistryError(
                f"no model of {self.loop} in the registry has the id {model_id}; choose another version"
            )
        if target is not None:
            check_not_deleted(target)  # again, under the lock
        if target is not None and action in {"switch", "rollback"}:
            _check_promoted(self.connection, target)
        if model_id == self.current_id and action != "rollback":
            newest = newest_deployment_in(self.connection, self.loop)
            if action != "switch" or (requested or None) == (newest.requested_config if newest else None):
                return target
        here = champions.c.loop == self.loop
        self.connection.execute(sa.update(champions).where(here).values(model_id=model_id, updated_at=self.now))
        self.update_model(self.current_id, retired_at=self.now)
        self.update_model(model_id, deployed_at=self.now, retired_at=None, archived_at=None)
        record_deployment_in(
            self.connection,
            loop=self.loop,
            action=action,
            model_id=model_id,
            previous_id=self.current_id,
            actor=actor,
            reason=reason,
            comparison_id=comparison_id,
            created_at=self.now,
            config={**(config or {}), **(requested or {})} or None,
            requested_config=dict(requested) if requested else None,
        )
        return model_in(self.connection, self.loop, model_id) if model_id else None

    def archive(self, model_id: str, actor: str, reason: str) -> None:
        """Hide a version from lists, and record it."""
        self.update_model(model_id, archived_at=self.now)
        record_note_in(self.connection, self.loop, "archive", model_id, actor, reason, self.now)

    def update_model(self, model_id: str | None, **times: datetime | None) -> None:
        """Set times of a model version; of the base model (None) none are kept."""
        here = (model_versions.c.loop == self.loop, model_versions.c.id == model_id)
        self.connection.execute(sa.update(model_versions).where(*here).values(**times))


@contextmanager
def lock_champion(db: Database, loop: str) -> Iterator[LockedChampion]:
    """Lock the loop's champion until the transaction ends."""
    with db.write() as connection:
        current_id = lock_loop_in(connection, loop)
        yield LockedChampion(connection, loop, current_id, datetime.now(UTC))


def lock_loop_in(connection: sa.Connection, loop: str) -> str | None:
    """Lock the row of a loop in `champions` until the transaction ends, and return the champion's model id."""
    # Only an existing row can be locked, so the first change of a loop inserts it.
    insert_if_absent(connection, champions, {"loop": loop, "model_id": None, "updated_at": datetime.now(UTC)})
    pointer = sa.select(champions.c.model_id).where(champions.c.loop == loop).with_for_update()
    model_id: str | None = connection.execute(pointer).scalar_one()
    return model_id


def _champion_in(connection: sa.Connection, loop: str) -> ModelVersion | None:
    model_id = connection.execute(sa.select(champions.c.model_id).where(champions.c.loop == loop)).scalar()
    return model_in(connection, loop, model_id) if model_id else None


def _previous_id(connection: sa.Connection, loop: str) -> str | None:
    stack = deployment_stack(deployments_in(connection, loop))
    if len(stack) < 2:
        raise RegistryError(
            f"loop {loop} serves its base model and has no earlier champion; there is nothing to roll back to"
        )
    return stack[-2]


def _check_justified(connection: sa.Connection, candidate: CandidateModel, comparison_id: str) -> ComparisonRecord:
    """Return the comparison; raise an error unless it justifies this promotion and the champion is still the same."""
    found = comparison_in(connection, candidate.loop, comparison_id)
    if found is None:
        raise RegistryError(f"the comparison {comparison_id} is not in the database; materialize eval_report again")
    if not found.promote or found.challenger_sha256 != candidate.sha256:
        refusal = {"reject": "rejects its challenger", "inconclusive": "is inconclusive"}
        problem = refusal.get(found.decision, "is about another model")
        reason = found.reason.replace("\n", "; ")
        raise RegistryError(
            f"the comparison {comparison_id} {problem} ({reason}), so it does not justify this promotion; "
            "evaluate this model"
        )
    newest = newest_deployment_in(connection, candidate.loop)
    if found.after_deployment != (newest.id if newest else 0):
        how = f" ({newest.action} by {newest.actor}, {newest.created_at:%Y-%m-%d %H:%M} UTC)" if newest else ""
        raise ChampionChangedError(
            f"the champion changed{how} since comparison {comparison_id} was made. A comparison justifies one "
            "promotion, and none after the champion's next change; nothing was changed. Materialize eval_report again"
        )
    return found


def _check_promoted(connection: sa.Connection, model: ModelVersion) -> None:
    """Raise an error if a version was never promoted, or its row names another file than the promoted one."""
    promotions = promotions_in(connection, model.loop, model.id)
    compared = [comparison_in(connection, model.loop, one.comparison_id) for one in promotions if one.comparison_id]
    known = {found.challenger_sha256 for found in compared if found is not None}
    if not promotions or (known and model.sha256 not in known):
        raise RegistryError(
            f"{model.name} cannot serve: the history of {model.loop} has no promotion of this model (SHA-256 "
            f"{model.sha256[:16]}...); `finetune model history` shows what was promoted. Promote it by a run first"
        )


def _changed(connection: sa.Connection, loop: str, expected_id: str | None) -> ChampionChangedError:
    now = _champion_in(connection, loop)
    expected = model_in(connection, loop, expected_id) if expected_id else None
    was = expected.name if expected else (expected_id or f"{loop}'s base model")
    return ChampionChangedError(
        f"the champion changed: expected {was}, found {now.name if now else 'the base model'}; nothing was changed. "
        "Evaluate again, against the current champion"
    )


def _check_actor_and_reason(action: Action, actor: str, reason: str) -> None:
    missing = [name for name, value in (("actor", actor), ("reason", reason)) if not value.strip()]
    if missing:
        raise RegistryError(f"{action} needs {' and '.join(missing)}: the history records who did it and why")
