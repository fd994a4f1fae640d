"""Recorded comparisons: one row for each evaluation report, whatever its verdict, and those made by hand."""

from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import comparisons, manual_comparisons
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
    decision: Literal["promote", "reject", "inconclusive"]
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
    wins: int | None = Field(default=None, description="Questions in which the challenger's score is higher.")
    losses: int | None = Field(default=None, description="Questions in which it is lower.")
    ties: int | None = Field(default=None, description="Questions in which it is equal.")

    @property
    def promote(self) -> bool:
        """Whether the challenger may become champion."""
        return self.decision == "promote"


class ManualComparison(Record):
    """Two models that somebody compared with `finetune compare`. It judges no data and promotes nothing."""

    id: str = Field(description="Version of the report.")
    loop: str
    first: str = Field(description="Name of a version, path of a GGUF, or URL and model.")
    first_sha256: str
    second: str
    second_sha256: str
    benchmark_sha256: str
    wins: int = Field(ge=0, description="Questions in which the second model's score is higher.")
    losses: int = Field(ge=0, description="Questions in which it is lower.")
    ties: int = Field(ge=0, description="Questions in which it is equal.")
    p_value: float = Field(ge=0, le=1, description="One-sided, that the second model is not better.")
    report_path: Path
    created_at: UtcDatetime


def record_comparison_in(connection: sa.Connection, comparison: ComparisonRecord) -> None:
    """Record a comparison, unless one with the same loop and id is recorded."""
    values = comparison.model_dump() | {"report_path": stored_path(comparison.report_path)}
    insert_if_absent(connection, comparisons, values)


def record_manual_comparison(db: Database, comparison: ManualComparison) -> None:
    """Record a comparison that was made by hand."""
    values = comparison.model_dump() | {"report_path": stored_path(comparison.report_path)}
    with db.write() as connection:
        insert_if_absent(connection, manual_comparisons, values)


def list_manual_comparisons(db: Database, loop: str) -> list[ManualComparison]:
    """Return the comparisons of a loop that were made by hand, newest first."""
    c = manual_comparisons.c
    with db.read() as connection:
        rows = connection.execute(sa.select(manual_comparisons).where(c.loop == loop).order_by(c.created_at.desc()))
        found = [dict(row._mapping) for row in rows]
    return [ManualComparison(**{**row, "report_path": absolute_path(row["report_path"])}) for row in found]


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
