"""SQL statements that SQLAlchemy has only per dialect, and splitting of long parameter lists."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

T = TypeVar("T")


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """Return an INSERT of the connection's dialect, which has `on_conflict_do_nothing` and `on_conflict_do_update`."""
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name](table)


def insert_if_absent(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Insert a row, unless one with the same key exists: that one stays as it is."""
    connection.execute(insert(connection, table).values(row).on_conflict_do_nothing())


def upsert(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Insert a row, or overwrite the columns of the existing one with the same primary key."""
    keys = [column.name for column in table.primary_key]
    others = {name: value for name, value in row.items() if name not in keys}
    statement = insert(connection, table).values(row)
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=others))


def chunks(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """Yield the values in slices of at most `size`, since a statement may have only so many parameters."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
