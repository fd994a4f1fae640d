"""The comparisons that were made: one row for each report, whatever its verdict."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import Field
from sqlalchemy.dialects import postgresql, sqlite

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import model_comparisons
from finetune_pipeline.records import Moment, Record
from finetune_pipeline.registry.models import located_path, stored_path


class ModelComparison(Record):
    """One evaluation report, in short."""

    id: str = Field(description="Version of the report.")
    loop: str
    challenger_sha256: str
    champion_id: str | None = Field(description="Registry id of the champion; None is the base model.")
    champion_sha256: str
    benchmark_sha256: str
    promote: bool
    reason: str
    watermark: int = Field(ge=0, description="The data that was judged ends at this sequence.")
    report_path: Path
    created_at: Moment


def record_comparison(db: Database, comparison: ModelComparison) -> None:
    """Keep a comparison; one that is kept already (same loop and id) stays as it is."""
    with db.write() as connection:
        record_comparison_in(connection, comparison)


def record_comparison_in(connection: sa.Connection, comparison: ModelComparison) -> None:
    """As `record_comparison`, within a transaction."""
    values = comparison.model_dump() | {"report_path": stored_path(comparison.report_path)}
    insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
    row: Any = insert(model_comparisons).values(values)
    connection.execute(row.on_conflict_do_nothing())


def find_comparison(db: Database, loop: str, id: str) -> ModelComparison | None:
    """The comparison of this id."""
    return next(iter(_select(db, model_comparisons.c.loop == loop, model_comparisons.c.id == id)), None)


def list_comparisons(db: Database, loop: str) -> list[ModelComparison]:
    """All comparisons of a loop, the newest first."""
    return _select(db, model_comparisons.c.loop == loop)


def judged_watermark(db: Database, loop: str) -> int:
    """Where the newest data that was judged ends, whatever the verdict; 0 if none was."""
    newest = sa.select(sa.func.max(model_comparisons.c.watermark)).where(model_comparisons.c.loop == loop)
    with db.read() as connection:
        return connection.execute(newest).scalar() or 0


def _select(db: Database, *where: sa.ColumnElement[bool]) -> list[ModelComparison]:
    rows = sa.select(model_comparisons).where(*where).order_by(model_comparisons.c.created_at.desc())
    with db.read() as connection:
        return [_from_row(row) for row in connection.execute(rows)]


def _from_row(row: sa.Row[Any]) -> ModelComparison:
    values = dict(row._mapping)
    return ModelComparison(**{**values, "report_path": located_path(values["report_path"])})
