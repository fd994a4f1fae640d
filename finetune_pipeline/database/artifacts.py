"""The hashes of the published artifacts, which identify folders that were edited or not written by a run."""

from datetime import datetime

import sqlalchemy as sa

from finetune_pipeline.database.connection import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import published_artifacts


def record_published(db: Database, loop: str, stage: str, version: str, sha256: str, created_at: datetime) -> None:
    """Record that this artifact was published.

    Args:
        sha256: of its manifest.
    """
    values = {"loop": loop, "stage": stage, "version": version, "sha256": sha256, "created_at": created_at}
    with db.write() as connection:
        insert_if_absent(connection, published_artifacts, values)


def is_published(db: Database, loop: str, stage: str, version: str, sha256: str) -> bool:
    """Return whether an artifact with this manifest was published."""
    table = published_artifacts.c
    here = (table.loop == loop, table.stage == stage, table.version == version, table.sha256 == sha256)
    with db.read() as connection:
        return connection.execute(sa.select(table.sha256).where(*here)).first() is not None
