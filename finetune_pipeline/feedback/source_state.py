"""What the store keeps for each declared source: its cursor, the records it skipped, and what came from it."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks, upsert
from finetune_pipeline.settings import INGESTED, LoopSettings


def read_cursor(connection: sa.Connection, loop: str, source: str) -> Any:
    """Return where the last sync of a source ended, or None."""
    c = t.source_cursors.c
    query = sa.select(c.cursor).where(c.loop == loop, c.source == source)
    return connection.execute(query).scalar_one_or_none()


def write_cursor(connection: sa.Connection, loop: str, source: str, cursor: Any) -> None:
    """Replace the cursor of a source."""
    row = {"loop": loop, "source": source, "cursor": cursor, "read_at": datetime.now(UTC)}
    upsert(connection, t.source_cursors, row)


def delete_cursor(connection: sa.Connection, loop: str, source: str) -> None:
    """Delete the cursor of a source, so that the next sync starts from the beginning."""
    c = t.source_cursors.c
    connection.execute(t.source_cursors.delete().where(c.loop == loop, c.source == source))


def replace_skipped_records(connection: sa.Connection, loop: str, source: str, reasons: Mapping[str, str]) -> None:
    """Replace the list of records that the last sync skipped.

    Args:
        reasons: provenance -> why the record was skipped.
    """
    s = t.skipped_records.c
    connection.execute(t.skipped_records.delete().where(s.loop == loop, s.source == source))
    rows = [{"loop": loop, "source": source, "provenance": at, "reason": reason} for at, reason in reasons.items()]
    if rows:
        connection.execute(t.skipped_records.insert(), rows)


def skipped_records(connection: sa.Connection, loop: LoopSettings, limit: int) -> Sequence[Any]:
    """Return the first skipped records of the declared sources: source, provenance, reason."""
    s = t.skipped_records.c
    own = sa.and_(s.loop == loop.name, s.source.in_([source.name for source in loop.sources]))
    query = sa.select(s.source, s.provenance, s.reason).where(own).order_by(s.source, s.provenance)
    return connection.execute(query.limit(limit)).all()


def active_at(
    connection: sa.Connection, loop: str, source: str, provenances: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield id and provenance of the source's interactions at these provenances that are not retracted."""
    i = t.interactions.c
    for chunk in chunks(provenances):
        own = sa.and_(i.loop == loop, i.source == source, i.provenance.in_(chunk), i.retracted_offset.is_(None))
        for row in connection.execute(sa.select(i.id, i.provenance).where(own)):
            yield row.id, row.provenance


def active_sources(connection: sa.Connection, loop: str) -> dict[str, int]:
    """Return each source with its number of interactions that are not retracted."""
    i = t.interactions.c
    own = sa.and_(i.loop == loop, i.source.is_not(None), i.retracted_offset.is_(None))
    query = sa.select(i.source, sa.func.count().label("records")).where(own).group_by(i.source).order_by(i.source)
    return {row.source: row.records for row in connection.execute(query)}


def undeclared_sources(connection: sa.Connection, loop: LoopSettings) -> dict[str, int]:
    """Return the active sources that the loop's YAML no longer declares, with their number of interactions."""
    declared = {INGESTED, *(source.name for source in loop.sources)}
    return {source: n for source, n in active_sources(connection, loop.name).items() if source not in declared}
