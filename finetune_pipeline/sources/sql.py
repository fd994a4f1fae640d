"""Read rated answers from any database that SQLAlchemy supports, in pages, in the order of a cursor column.

The next page begins after the last row of the page before: `(cursor, key) > (of that row)`. A sync resumes from the
cursor of the last one, including the rows with that same value, and from a little before it (`overlap`). So rows that
were committed late, with the same value or a slightly lower one, are not lost. Rows that are already known change
nothing.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import MONEY
from sqlalchemy.engine import make_url

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.records import CLOCK_SKEW, is_in_future
from finetune_pipeline.settings import SqlSource
from finetune_pipeline.sources.source_record import Cursor, SkippedRecord, SourceError, SourceOutput, SourceRecord
from finetune_pipeline.validation_messages import short_repr

_YES = frozenset({"true", "t", "yes", "y", "1", "gold"})
_NO = frozenset({"false", "f", "no", "n", "0", ""})
_MAX_UNORDERED = 100
_MAX_TEXT = 4_000
_FIRST_DAY, _DAY_AFTER = date(1, 1, 2), date(9999, 12, 31)  # a day inside Python's range, because of time zones

_KINDS: dict[str, tuple[type, Callable[[str], Any], Callable[[Any], str]]] = {
    "number": (int, int, str),
    "float": (float, float, repr),
    "decimal": (Decimal, Decimal, str),
    "time": (datetime, datetime.fromisoformat, datetime.isoformat),
    "date": (date, date.fromisoformat, date.isoformat),
    "text": (str, str, str),
}
"""Types of the cursor column, and how a value is stored. A time precedes a date, since every datetime is a date."""


def read(source: SqlSource, cursor: Any) -> Iterator[SourceOutput]:
    """Yield the rows that were added or changed since the cursor, and a cursor after each page.

    If the cursor belongs to other settings, all rows are read.

    Args:
        cursor: `{"kind", "value", "settings"}`: the highest value of the cursor column so far, and a hash of the
            settings that decide which rows are read and what they become.

    Raises:
        SourceError: the database cannot be reached, or the table or one of its columns does not exist.
    """
    engine, password = _connect(source)
    try:
        table = _reflect(engine, source)
        query = {name: value for name, value in engine.url.query.items() if "pass" not in name}
        url = engine.url.set(password="", query=query).render_as_string()
        excluded = {"name", "url_env", "max_examples", "max_fraction", "overlap", "batch_rows"}
        settings = hash_of([url, repr(table.c[source.cursor].type), source.model_dump(mode="json", exclude=excluded)])
        restarted = cursor is not None and (not isinstance(cursor, dict) or cursor.get("settings") != settings)
        # An earlier version may have left a cursor in the future, which would hide all rows until then.
        restarted = restarted or (cursor is not None and _is_ahead(_stored_value(cursor)))
        start = None if restarted else cursor
        if cursor is not None:  # without a cursor, an empty table would retract everything
            yield Cursor(start, restarted)
        yield from _unordered_rows(engine, source, table)
        for one in _ordered_rows(engine, source, table, start):
            yield Cursor({**one.value, "settings": settings}, restarted) if isinstance(one, Cursor) else one
    except sa.exc.SQLAlchemyError as error:
        message = str(getattr(error, "orig", None) or error).strip()
        for text in {password, quote(password), quote_plus(password)} - {""}:
            message = message.replace(text, "***")
        if isinstance(error, sa.exc.DataError):
            raise SourceError(
                f"source {source.name}: a value in {source.table} cannot be read ({message}), in the cursor "
                f"{source.cursor} or in another column that the YAML names; correct it, or name as `table` a view "
                "that leaves such rows out"
            ) from None
        raise SourceError(
            f"source {source.name}: the database of {source.url_env} cannot be read ({message}); check that it runs, "
            "that its user may read the table, and that the URL is right"
        ) from None
    finally:
        engine.dispose()


def _ordered_rows(engine: sa.Engine, source: SqlSource, table: sa.TableClause, cursor: Any) -> Iterator[SourceOutput]:
    """Yield the rows from a cursor on, and a cursor without its settings after each page."""
    by: sa.ColumnElement[Any] = table.c[source.cursor]
    if isinstance(by.type, sa.REAL):
        # Python reads 0.1 of four bytes as 0.1 of eight bytes, which is another number.
        by = sa.cast(by, sa.Double)
    by_key = table.c[source.key]
    names = (
        source.prompt, source.response, source.rating, source.gold_star, source.author, source.domain,
        source.kind_column,
    )  # fmt: skip
    columns = [by, by_key, *(sa.null() if name is None else table.c[name] for name in names)]
    # Labels, since one column may be named for two purposes.
    query = sa.select(*(column.label(f"c{n}") for n, column in enumerate(columns)))
    query = query.where(by.is_not(None), by_key.is_not(None), _is_in_range(engine, by), *_filters(source, table))
    query = query.order_by(by, by_key).limit(source.batch_rows)
    highest = None if cursor is None else _stored_value(cursor)
    page = query if highest is None else query.where(by >= _before(highest, source.overlap))
    last: tuple[Any, Any] | None = None  # cursor value and key of the last row
    offset = 0  # rows after it that a page cannot begin after
    while True:
        with engine.connect() as connection:  # each page has its own short transaction
            rows = connection.execute(page.offset(offset or None)).all()
        reached = None
        for row in rows:
            value, key = row[0], row[1]
            if reason := _unorderable(source, value, key):
                offset += 1
                yield SkippedRecord(_provenance(source, key), f"{reason}, so no sync could resume after it")
                continue
            if (value, key) == last:
                raise SourceError(
                    f"source {source.name}: {key!r} is the key of several rows of {source.table}; name as `key` the "
                    "column that identifies a row permanently"
                )
            last, offset = (value, key), 0
            if _is_ahead(value):  # a cursor there would hide all rows that arrive until then
                reason = f"{source.cursor} is {value}, in the future; the row is read when that time has come"
                reason += " (a time without a zone is UTC)"
                yield SkippedRecord(_provenance(source, key), reason, deferred=True)
                continue
            reached = value
            yield _record(source, row)
        if not rows:
            return
        if reached is not None:
            # Only the database knows the order of texts; it returned no text before the cursor.
            highest = reached if highest is None or isinstance(reached, str) else max(highest, reached)
        if highest is not None:
            yield Cursor(_stored(source, highest))
        if len(rows) < source.batch_rows:
            return
        if last is not None:
            after = sa.or_(by > last[0], sa.and_(by == last[0], by_key > last[1]))
            page = query.where(by >= last[0], after)  # the first condition is redundant, but lets an index be used


def _is_ahead(value: Any) -> bool:
    """Return whether a value is a time or date, or the text of one, in the future; numbers are not checked."""
    if isinstance(value, str) and value[4:5] == "-":
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return False
    if isinstance(value, datetime):
        return is_in_future(value)
    # In the easternmost time zones it is already tomorrow.
    return isinstance(value, date) and value > (datetime.now(UTC) + CLOCK_SKEW).date() + timedelta(days=1)


def _unorderable(source: SqlSource, value: Any, key: Any) -> str:
    """Return why no page can begin after a row; empty if one can."""
    for column, found in ((source.cursor, value), (source.key, key)):
        try:
            str(found).encode()
        except UnicodeEncodeError:
            return f"{column} is not UTF-8"
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return f"{source.cursor} is {value}"
    return ""


def _is_in_range(engine: sa.Engine, value: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Return a condition that excludes times that no driver can read: infinity, years before 1 and after 9999."""
    if engine.dialect.name != "postgresql" or not isinstance(value.type, sa.DateTime | sa.Date):
        return sa.true()
    return sa.and_(value >= _FIRST_DAY, value < _DAY_AFTER)


def _filters(source: SqlSource, table: sa.TableClause) -> list[sa.ColumnElement[bool]]:
    """Return the conditions of `only`. Values are compared as text, and in columns with decimals as numbers too."""
    conditions: list[sa.ColumnElement[bool]] = []
    for name, values in source.only.items():
        column = table.c[name]
        # An enum of the database can be compared with its values only.
        is_text = isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
        condition: sa.ColumnElement[bool] = (column if is_text else sa.cast(column, sa.String(_MAX_TEXT))).in_(values)
        if isinstance(column.type, sa.Numeric | sa.Float):  # the text of 3 may be 3.0
            numbers = []
            for text in values:
                with suppress(ArithmeticError):
                    numbers.append(Decimal(text))
            condition = sa.or_(condition, column.in_([number for number in numbers if number.is_finite()]))
        conditions.append(condition)
    return conditions


def _unordered_rows(engine: sa.Engine, source: SqlSource, table: sa.TableClause) -> Iterator[SkippedRecord]:
    """Yield the first rows that have no place in the order: their cursor value or key is NULL, or not a time."""
    value, key = table.c[source.cursor], table.c[source.key]
    unordered = sa.or_(value.is_(None), key.is_(None), sa.not_(_is_in_range(engine, value)))
    query = sa.select(key, sa.cast(value, sa.String(_MAX_TEXT))).where(unordered, *_filters(source, table))
    with engine.connect() as connection:
        rows = connection.execute(query.limit(_MAX_UNORDERED)).all()
    for own_key, text in rows:
        where, reason = _provenance(source, own_key), f"{source.cursor} is NULL"
        if own_key is None:
            where, reason = f"{source.table}: no key, {source.cursor} {_as_text(text)}", f"{source.key} is NULL"
        elif text is not None:
            reason = f"{source.cursor} is {_as_text(text)}, not a time from {_FIRST_DAY} until before {_DAY_AFTER}"
        yield SkippedRecord(where, f"{reason}, so it is unknown whether it was read")


def _record(source: SqlSource, row: Any) -> SourceRecord | SkippedRecord:
    value, key, prompt, response, rating, gold_star, author, domain, kind = row
    provenance = _provenance(source, key)
    try:
        return SourceRecord(
            provenance=provenance,
            prompt=_text(source.prompt, prompt),
            answer=_text(source.response, response),
            reward=_reward(source, rating, gold_star),
            created_at=value if isinstance(value, datetime) else None,
            user=_optional_text(source.author, author),
            domain=_optional_text(source.domain, domain),
            kind=_optional_text(source.kind_column, kind),
            keyed=True,
        )
    except ValueError as problem:
        return SkippedRecord(provenance, str(problem))


def _provenance(source: SqlSource, key: Any) -> str:
    return f"{source.table}:{_as_text(key)}"


def _as_text(value: Any) -> str:
    """Return a value as text that can be stored: without NUL characters and surrogates."""
    return str(value).replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _text(column: str, value: Any) -> str:
    if value is None:
        raise ValueError(f"{column} is NULL")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column} is not UTF-8") from None
    return value


def _optional_text(column: str | None, value: Any) -> str | None:
    """Return an author, domain or kind. A number, time or UUID becomes text; JSON, an array or bytes is an error."""
    if value is None or value == "":
        return None
    is_structured = isinstance(value, bytes | bytearray | memoryview | Mapping | list | tuple | set)
    return _text(str(column), value if is_structured else str(value))


def _reward(source: SqlSource, rating: Any, gold_star: Any) -> float | None:
    """Return the reward of a row, or None for the source's `reward`."""
    if source.gold_star is not None:
        flag = "" if gold_star is None else _yaml_text(gold_star).lower()
        if flag not in _YES | _NO:
            raise ValueError(f"{source.gold_star} is {short_repr(flag)}, neither yes nor no")
        if flag in _YES:
            return source.gold_reward
    if source.rating is None:
        return None
    if rating is None:
        raise ValueError(f"{source.rating} is NULL")
    value = _yaml_text(rating)
    if value not in source.ratings:
        raise ValueError(f"{source.rating} is {short_repr(value)}; ratings knows {', '.join(source.ratings)}")
    return source.ratings[value]


def _yaml_text(value: Any) -> str:
    """Return a value as it is written in YAML: 5 for 5, 5.0 and Decimal("5.00"); true for True."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, Decimal):
        return str(value.normalize())
    return str(value).strip()


def _stored(source: SqlSource, value: Any) -> dict[str, str]:
    """Return a cursor value as it is stored."""
    for kind, (type_, _, write) in _KINDS.items():
        if isinstance(value, type_) and not isinstance(value, bool):
            return {"kind": kind, "value": write(value)}
    raise SourceError(
        f"source {source.name}: the cursor {source.cursor} of {source.table} is {value!r} "
        f"({type(value).__name__}); expected a number, a time or a text"
    )


def _stored_value(cursor: dict[str, str]) -> Any:
    return _KINDS[cursor["kind"]][1](cursor["value"])


def _before(value: Any, overlap: float) -> Any:
    """Return a cursor value minus the overlap; a text as it is."""
    try:
        if isinstance(value, datetime):
            return value - timedelta(seconds=overlap)
        if isinstance(value, date):
            return value - timedelta(days=math.ceil(overlap / 86_400))
        if isinstance(value, int | float):
            return value - type(value)(overlap)
        if isinstance(value, Decimal):
            return value - Decimal(str(overlap))
    except OverflowError:  # close to the year 1
        return value
    return value


def _connect(source: SqlSource) -> tuple[sa.Engine, str]:
    """Return a read-only engine, and the password, which no message may contain."""
    text = os.environ.get(source.url_env)
    if not text:
        raise SourceError(
            f"source {source.name}: the environment variable {source.url_env} is not set; export the database's URL "
            "in it, such as sqlite:////path/file.db or postgresql+psycopg://HOST/NAME"
        )
    try:
        url = make_url(text)
        password, file = str(url.password or ""), url.database
        if url.get_backend_name() == "sqlite" and file and not file.startswith((":memory:", "file:")):
            if not Path(file).is_file():
                raise SourceError(f"source {source.name}: the file {file} does not exist; correct {source.url_env}")
            # Read-only: otherwise SQLite would create a missing file.
            database = f"file:{quote(str(Path(file).resolve()))}"
            url = url.set(database=database, query={"mode": "ro", "uri": "true"})
        options = {"postgresql_readonly": True}  # other databases ignore it
        engine = sa.create_engine(url, hide_parameters=True, execution_options=options)
    except (sa.exc.ArgumentError, ValueError):  # their messages may contain the URL
        raise SourceError(
            f"source {source.name}: the value of {source.url_env} is not a database URL that SQLAlchemy knows; "
            "expected for example sqlite:////path/file.db or postgresql+psycopg://HOST/NAME"
        ) from None
    except ImportError as error:
        raise SourceError(
            f"source {source.name}: the driver of {url.drivername} is not installed ({error.name}); install it, or "
            f"name another in {source.url_env}, such as postgresql+psycopg://"
        ) from None
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA query_only=ON")
            # Text that is not UTF-8 would end the sync. As surrogates it is recognized, and only that row is skipped.
            connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")

    return engine, password


def _reflect(engine: sa.Engine, source: SqlSource) -> sa.TableClause:
    """Return the table as the database describes it, and check that all columns of the YAML exist."""
    schema, _, name = source.table.rpartition(".")
    inspector = sa.inspect(engine)
    try:
        found = inspector.get_columns(name, schema=schema or None)
    except sa.exc.NoSuchTableError:
        found = []
    if not found:
        there = sorted({*inspector.get_table_names(schema or None), *inspector.get_view_names(schema or None)})
        raise SourceError(
            f"source {source.name}: there is no table or view {source.table}; there are: {', '.join(there) or 'none'}"
        )
    names = [column["name"] for column in found]
    optional = (source.rating, source.gold_star, source.author, source.domain, source.kind_column)
    used = {source.key, source.cursor, source.prompt, source.response, *source.only, *filter(None, optional)}
    missing = sorted(used - set(names))
    if missing:
        raise SourceError(
            f"source {source.name}: {source.table} has no column {', '.join(missing)}; it has: {', '.join(names)}"
        )
    if any(c["name"] == source.cursor and isinstance(c["type"], MONEY) for c in found):
        raise SourceError(
            f"source {source.name}: the cursor {source.cursor} of {source.table} is money, which is read as text and "
            "sorted differently; name another, or as `table` a view in which it is cast to numeric"
        )
    # SQLite stores a time as the text that was written, and compares it as text. Parsed, it would be another text.
    typed = engine.dialect.name != "sqlite"
    columns: list[sa.ColumnClause[Any]] = [sa.column(c["name"], c["type"] if typed else None) for c in found]
    return sa.table(name, *columns, schema=schema or None)
