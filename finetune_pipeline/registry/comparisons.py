"""The comparisons that were made: one row for each report, whatever its verdict."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import comparisons
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.model_versions import located_path, stored_path


class ComparisonRecord(Record):
    """One evaluation report, in short."""

    id: str = Field(description="Version of the report.")
    loop: str
    challenger_sha256: str
    champion_id: str | None = Field(description="Registry id of the champion; None is the base model.")
    champion_sha256: str
    benchmark_sha256: str
    promote: bool
    reason: str
    watermark: int = Field(ge=0, description="The data that was judged ends at this ingest_offset.")
    report_path: Path
    created_at: UtcDatetime
    report_sha256: str | None = Field(
        default=None, description="Of the report's manifest, which holds the hashes of the report's files."
    )
    after_deployment: int | None = Field(
        default=None, description="Id of the champion's newest move when this was made; 0: it had never moved."
    )


def record_comparison(db: Database, comparison: ComparisonRecord) -> None:
    """Keep a comparison; one that is kept already (same loop and id) stays as it is."""
    with db.write() as connection:
        record_comparison_in(connection, comparison)


def record_comparison_in(connection: sa.Connection, comparison: ComparisonRecord) -> None:
    """As `record_comparison`, within a transaction."""
    values = comparison.model_dump() | {"report_path": stored_path(comparison.report_path)}
    insert_if_absent(connection, comparisons, values)


def find_comparison(db: Database, loop: str, id: str) -> ComparisonRecord | None:
    """The comparison of this id."""
    with db.read() as connection:
        return comparison_in(connection, loop, id)


def comparison_in(connection: sa.Connection, loop: str, id: str) -> ComparisonRecord | None:
    """Return the comparison of this id, within a transaction."""
    here = (comparisons.c.loop == loop, comparisons.c.id == id)
    row = connection.execute(sa.select(comparisons).where(*here)).first()
    return _from_row(row) if row else None


def extend_watermark_in(connection: sa.Connection, loop: str, challenger_sha256: str, watermark: int) -> None:
    """Extend the newest comparison of this challenger to data up to `watermark`, which gave the same model again.

    Otherwise that data would start the loop again, with the same result.
    """
    c = comparisons.c
    of_it = (c.loop == loop, c.challenger_sha256 == challenger_sha256)
    newest = connection.execute(sa.select(c.id).where(*of_it).order_by(c.created_at.desc()).limit(1)).scalar()
    here = (c.loop == loop, c.id == newest, c.watermark < watermark)
    connection.execute(sa.update(comparisons).where(*here).values(watermark=watermark))


def list_comparisons(db: Database, loop: str) -> list[ComparisonRecord]:
    """All comparisons of a loop, the newest first."""
    c = comparisons.c
    with db.read() as connection:
        rows = connection.execute(sa.select(comparisons).where(c.loop == loop).order_by(c.created_at.desc()))
        return [_from_row(row) for row in rows]


def judged_watermark(db: Database, loop: str) -> int:
    """Where the newest data that was judged ends, whatever the verdict; 0 if none was."""
    newest = sa.select(sa.func.max(comparisons.c.watermark)).where(comparisons.c.loop == loop)
    with db.read() as connection:
        return connection.execute(newest).scalar() or 0


def _from_row(row: sa.Row[Any]) -> ComparisonRecord:
    values = dict(row._mapping)
    return ComparisonRecord(**{**values, "report_path": located_path(values["report_path"])})
