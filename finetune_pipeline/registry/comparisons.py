"""Recorded comparisons: one row for each evaluation report, whatever its verdict."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import comparisons
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.model_versions import absolute_path, stored_path


class ComparisonRecord(Record):
    """The models, verdict and report of one comparison."""

    id: str = Field(description="Version of the report.")
    loop: str
    challenger_sha256: str
    champion_id: str | None = Field(description="Registry id of the champion; None is the base model.")
    champion_sha256: str
    benchmark_sha256: str
    promote: bool
    reason: str
    watermark: int = Field(ge=0, description="Last ingest offset of the judged data.")
    report_path: Path
    created_at: UtcDatetime
    report_sha256: str | None = Field(
        default=None, description="Of the report's manifest, which holds the hashes of the report's files."
    )
    after_deployment: int | None = Field(
        default=None, description="Id of the loop's newest deployment at that time; 0 if there was none."
    )


def record_comparison_in(connection: sa.Connection, comparison: ComparisonRecord) -> None:
    """Record a comparison, unless one with the same loop and id is recorded."""
    values = comparison.model_dump() | {"report_path": stored_path(comparison.report_path)}
    insert_if_absent(connection, comparisons, values)


def find_comparison(db: Database, loop: str, id: str) -> ComparisonRecord | None:
    """Return the comparison with this id."""
    with db.read() as connection:
        return comparison_in(connection, loop, id)


def comparison_in(connection: sa.Connection, loop: str, id: str) -> ComparisonRecord | None:
    """Return the comparison with this id, within a transaction."""
    query = sa.select(comparisons).where(comparisons.c.loop == loop, comparisons.c.id == id)
    row = connection.execute(query).first()
    return _from_row(row) if row else None


def extend_watermark_in(connection: sa.Connection, loop: str, challenger_sha256: str, watermark: int) -> None:
    """Raise the watermark of the newest comparison of this challenger, after new data gave the same model again.

    Otherwise that data would start the loop again, with the same result.
    """
    c = comparisons.c
    query = sa.select(c.id).where(c.loop == loop, c.challenger_sha256 == challenger_sha256)
    newest = connection.execute(query.order_by(c.created_at.desc()).limit(1)).scalar()
    here = (c.loop == loop, c.id == newest, c.watermark < watermark)
    connection.execute(sa.update(comparisons).where(*here).values(watermark=watermark))


def list_comparisons(db: Database, loop: str) -> list[ComparisonRecord]:
    """Return all comparisons of a loop, newest first."""
    c = comparisons.c
    with db.read() as connection:
        rows = connection.execute(sa.select(comparisons).where(c.loop == loop).order_by(c.created_at.desc()))
        return [_from_row(row) for row in rows]


def judged_watermark(db: Database, loop: str) -> int:
    """Return the last ingest offset of all judged data, whatever the verdict; 0 if none was judged."""
    query = sa.select(sa.func.max(comparisons.c.watermark)).where(comparisons.c.loop == loop)
    with db.read() as connection:
        return connection.execute(query).scalar() or 0


def _from_row(row: sa.Row[Any]) -> ComparisonRecord:
    values = dict(row._mapping)
    return ComparisonRecord(**{**values, "report_path": absolute_path(values["report_path"])})
