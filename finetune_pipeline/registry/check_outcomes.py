"""Outcomes of each artifact's blocking checks, in the database, so that editing a file cannot change them."""

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
        artifact: the checked artifact.
        outcomes: whether each check passed; checks that do not block are ignored.
        run_id: the run that checked it.
    """
    with db.write() as connection:
        record_outcomes_in(connection, artifact, outcomes, run_id)


def record_outcomes_in(
    connection: sa.Connection, artifact: Artifact[Any], outcomes: Mapping[str, bool], run_id: str
) -> None:
    """Record outcomes within a transaction; see `record_outcomes`."""
    manifest = artifact.manifest
    key = {"loop": manifest.loop, "stage": manifest.stage, "version": manifest.version, "sha256": artifact.sha256}
    for name in manifest.blocking_checks:
        outcome = {"passed": outcomes[name], "run_id": run_id, "created_at": datetime.now(UTC)}
        upsert(connection, check_outcomes, {**key, "name": name, **outcome})


def outcomes_of(db: Database, loop: str, kind: type[Manifest], version: str, sha256: str) -> dict[str, CheckOutcome]:
    """Return the outcomes of one artifact by the name of the check.

    Args:
        sha256: hash of the artifact's manifest.
    """
    c = check_outcomes.c
    here = (c.loop == loop, c.stage == kind.stage, c.version == version, c.sha256 == sha256)
    with db.read() as connection:
        rows = connection.execute(sa.select(check_outcomes).where(*here)).all()
    return {row.name: CheckOutcome(**row._mapping) for row in rows}
