"""Outcomes of the blocking checks of each artifact, in the database, so that no edited file changes one."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import upsert
from finetune_pipeline.database.tables import check_outcomes
from finetune_pipeline.manifests import Manifest
from finetune_pipeline.records import Record, UtcDatetime


class CheckOutcome(Record):
    """The latest outcome of one check of one artifact."""

    loop: str
    stage: str
    version: str
    sha256: str
    name: str
    passed: bool
    run_id: str
    created_at: UtcDatetime


def record_outcomes(db: Database, artifact: Artifact[Any], outcomes: Mapping[str, bool], run_id: str) -> None:
    """Record the outcomes of an artifact's blocking checks; a later outcome of a check replaces an earlier one.

    Args:
        db: the database.
        artifact: what was checked.
        outcomes: whether each check passed; checks that do not block are ignored.
        run_id: the run of the checks.
    """
    with db.write() as connection:
        record_outcomes_in(connection, artifact, outcomes, run_id)


def record_outcomes_in(
    connection: sa.Connection, artifact: Artifact[Any], outcomes: Mapping[str, bool], run_id: str
) -> None:
    """Record outcomes as `record_outcomes` does, within a transaction."""
    manifest = artifact.manifest
    place = {"loop": manifest.loop, "stage": manifest.stage, "version": manifest.version, "sha256": artifact.sha256}
    for name in manifest.blocking_checks:
        found = {"passed": outcomes[name], "run_id": run_id, "created_at": datetime.now(UTC)}
        upsert(connection, check_outcomes, {**place, "name": name, **found})


def outcomes_of(db: Database, loop: str, kind: type[Manifest], version: str, sha256: str) -> dict[str, CheckOutcome]:
    """Return the outcomes of one artifact, by name of the check.

    Args:
        sha256: of the artifact's manifest.
    """
    c = check_outcomes.c
    here = (c.loop == loop, c.stage == kind.stage, c.version == version, c.sha256 == sha256)
    with db.read() as connection:
        rows = connection.execute(sa.select(check_outcomes).where(*here)).all()
    return {row.name: CheckOutcome(**row._mapping) for row in rows}
