"""Rated answers in any database that SQLAlchemy reaches. It is only read, row by row in the order of its watermark.

A page ends at a row, and the next one begins behind it: `(watermark, key) > (of that row)`. A reading begins again at
the watermark of the last one, that value included, and a little before it (`overlap`): rows that were committed late
with the same value, or a slightly lower one, are not lost, and those known already change nothing.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import MONEY
from sqlalchemy.engine import URL, make_url

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.records import CLOCK_SKEW, is_in_future
from finetune_pipeline.settings import SqlSource
from finetune_pipeline.sources.source_record import Cursor, Reading, SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.validation_messages import short_repr

_YES = frozenset({"true", "t", "yes", "y", "1", "gold"})
_NO = frozenset({"false", "f", "no", "n", "0", ""})
_NAMED = 100
_LONGEST_NAME = 4_000
_FIRST_DAY, _DAY_AFTER = date(1, 1, 2), date(9999, 12, 31)  # a day from Python's ends, where a zone may lead beyond

_KINDS: dict[str, tuple[type, Callable[[str], Any], Callable[[Any], str]]] = {
    "number": (int, int, str),
    "float": (float, float, repr),
    "decimal": (Decimal, Decimal, str),
    "time": (datetime, datetime.fromisoformat, datetime.isoformat),
    "date": (date, date.fromisoformat, date.isoformat),
    "text": (str, str, str),
}
"""What a watermark may be, and how it stands in a cursor; a time before a date, since every datetime is a date."""


class _Unusable(ValueError):
    """A row cannot be used; the message says why."""


def read(source: SqlSource, cursor: Any) -> Reading:
    """Read the rows that came or changed since the cursor, or all if it is of other settings; yield a cursor per page.

    Args:
        cursor: `{"kind", "value", "settings"}`: the highest watermark that was read, and the hash of what decided which
            rows were, and what became of them.

    Raises:
        SourceError: the database cannot be reached, or the table or a column of it is not there.
    """
    engine, secret = _engine(source)
    try:
        with _told(source, secret):
            table = _table(engine, source)
            settings = _settings(engine, source, table)
            restarted = cursor is not None and (not isinstance(cursor, dict) or cursor.get("settings") != settings)
            # Also if an earlier version left a cursor in the future, after which no row would be found until then.
            restarted = restarted or (cursor is not None and _is_ahead(_watermark(cursor)))
            start = None if restarted else cursor
            if cursor is not None:  # without one, a table that is empty now would count as a source that has nothing
                yield Cursor(start, restarted)
            yield from _without_place(engine, source, table)
            for one in _rows(engine, source, table, start):
                yield Cursor({**one.value, "settings": settings}, restarted) if isinstance(one, Cursor) else one
    finally:
        engine.dispose()


def _settings(engine: sa.Engine, source: SqlSource, table: sa.TableClause) -> str:
    """A hash of what decides which rows are read and what each becomes: where one changes, all are read again."""
    query = {name: value for name, value in engine.url.query.items() if "pass" not in name}
    url = engine.url.set(password="", query=query).render_as_string()
    what = source.model_dump(
        mode="json", exclude={"name", "url_env", "max_examples", "max_fraction", "overlap", "batch_rows"}
    )
    return hash_of([url, repr(table.c[source.cursor].type), what])


def _rows(engine: sa.Engine, source: SqlSource, table: sa.TableClause, cursor: Any) -> Reading:
    start = _earlier(_watermark(cursor), source.overlap) if cursor is not None else None
    place: tuple[Any, Any] | None = None
    passed = 0  # rows behind the place that cannot be one
    highest = None if cursor is None else _watermark(cursor)
    while True:
        rows = _page(engine, source, table, start, place, passed)
        reached = None
        for row in rows:
            here = (row[0], row[1])
            if why := _no_place(source, *here):
                passed += 1
                yield SkippedRecord(_provenance(source, row[1]), f"{why}, so no reading could go on behind it")
                continue
            if here == place:
                raise SourceError(
                    f"source {source.name}: {row[1]!r} stands in several rows of {source.table}; name as `key` the "
                    "column that names a row for good"
                )
            place, passed = here, 0
            if _is_ahead(row[0]):  # a cursor there would hide all rows that arrive until then
                why = f"{source.cursor} is {row[0]}, in the future; it is read when that time has come"
                yield SkippedRecord(_provenance(source, row[1]), f"{why} (a time without a zone is UTC)", deferred=True)
                continue
            reached = row[0]
            yield _item(source, row)
        if not rows:
            return
        if reached is not None:
            # Of a text the database alone knows the order, and there nothing was read before the cursor.
            highest = reached if highest is None or isinstance(reached, str) else max(highest, reached)
        if highest is not None:
            yield Cursor(_as_cursor(source, highest))
        if len(rows) < source.batch_rows:
            return


def _is_ahead(watermark: Any) -> bool:
    """Return whether a watermark is a time or date, or the text of one, in the future; numbers are not checked."""
    if isinstance(watermark, str) and watermark[4:5] == "-":
        try:
            watermark = datetime.fromisoformat(watermark)
        except ValueError:
            return False
    if isinstance(watermark, datetime):
        return is_in_future(watermark)
    # In the easternmost time zones it is already tomorrow.
    return isinstance(watermark, date) and watermark > (datetime.now(UTC) + CLOCK_SKEW).date() + timedelta(days=1)


def _no_place(source: SqlSource, watermark: Any, key: Any) -> str:
    """Why no page could begin behind a row; empty if one can."""
    for column, value in ((source.cursor, watermark), (source.key, key)):
        if not _is_utf8(value):
            return f"{column} is not UTF-8"
    if isinstance(watermark, float | Decimal) and not math.isfinite(watermark):
        return f"{source.cursor} is {watermark}"
    return ""


def _page(
    engine: sa.Engine, source: SqlSource, table: sa.TableClause, start: Any, place: tuple[Any, Any] | None, passed: int
) -> Sequence[Any]:
    """The next rows: watermark, key, prompt, response, rating, gold star, author, domain, kind."""
    watermark, key = _order(source, table)
    placed = (watermark.is_not(None), key.is_not(None), _is_readable(engine, watermark))
    query = sa.select(*_columns(source, table)).where(*placed, *_only(source, table))
    if place is not None:
        behind = sa.or_(watermark > place[0], sa.and_(watermark == place[0], key > place[1]))
        query = query.where(watermark >= place[0], behind)  # the first says no more, and lets an index be used
    elif start is not None:
        query = query.where(watermark >= start)
    with _connection(engine) as connection:
        return connection.execute(query.order_by(watermark, key).limit(source.batch_rows).offset(passed or None)).all()


def _order(source: SqlSource, table: sa.TableClause) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """Watermark and key, as pages compare them."""
    watermark: sa.ColumnElement[Any] = table.c[source.cursor]
    if isinstance(watermark.type, sa.REAL):  # 0.1 of four bytes is read as 0.1, and that of eight is another number
        watermark = sa.cast(watermark, sa.Double)
    return watermark, table.c[source.key]


def _is_readable(engine: sa.Engine, watermark: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """PostgreSQL's times reach beyond Python's: infinity, years before 1 and after 9999, which no driver reads."""
    if engine.dialect.name != "postgresql" or not isinstance(watermark.type, sa.DateTime | sa.Date):
        return sa.true()
    return sa.and_(watermark >= _FIRST_DAY, watermark < _DAY_AFTER)


def _columns(source: SqlSource, table: sa.TableClause) -> list[sa.ColumnElement[Any]]:
    """What is read of a row; null for what the mapping leaves out."""
    names = (
        source.prompt, source.response, source.rating, source.gold_star, source.author, source.domain,
        source.kind_column,
    )  # fmt: skip
    columns = [*_order(source, table), *(sa.null() if name is None else table.c[name] for name in names)]
    # Under labels of our own, since one column may be named for two purposes.
    return [column.label(f"c{n}") for n, column in enumerate(columns)]


def _only(source: SqlSource, table: sa.TableClause) -> list[sa.ColumnElement[bool]]:
    """The filters: each column must have one of its values."""
    return [_is_one_of(table.c[name], values) for name, values in source.only.items()]


def _is_one_of(column: sa.ColumnClause[Any], values: Sequence[str]) -> sa.ColumnElement[bool]:
    """Compared as text; numbers with decimals as numbers too, since the text of 3 may be 3.0."""
    # An enum of the database takes no other value than its own, not even to be compared with.
    is_text = isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
    same_text = (column if is_text else sa.cast(column, sa.String(_LONGEST_NAME))).in_(values)
    if not isinstance(column.type, sa.Numeric | sa.Float):
        return same_text
    return sa.or_(same_text, column.in_([number for value in values if (number := _number(value)) is not None]))


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except ArithmeticError:
        return None
    return number if number.is_finite() else None


def _without_place(engine: sa.Engine, source: SqlSource, table: sa.TableClause) -> Iterator[SkippedRecord]:
    """Rows that stand nowhere in the order, since their watermark or key is NULL or no time; the first of them."""
    watermark, key = table.c[source.cursor], table.c[source.key]
    placeless = sa.or_(watermark.is_(None), key.is_(None), sa.not_(_is_readable(engine, watermark)))
    query = sa.select(key, sa.cast(watermark, sa.String(_LONGEST_NAME))).where(placeless, *_only(source, table))
    with _connection(engine) as connection:
        rows = connection.execute(query.limit(_NAMED)).all()
    for one, cursor in rows:
        found = f"{source.key if one is None else source.cursor} is NULL"
        if one is not None and cursor is not None:
            found = f"{source.cursor} is {_written(cursor)}, no time from {_FIRST_DAY} until before {_DAY_AFTER}"
        where = (
            _provenance(source, one)
            if one is not None
            else f"{source.table}: no key, {source.cursor} {_written(cursor)}"
        )
        yield SkippedRecord(where, f"{found}, so nobody can say whether it was read")


def _item(source: SqlSource, row: Any) -> SourceRecord | SkippedRecord:
    watermark, key, prompt, response, rating, gold, author, domain, kind = row
    provenance = _provenance(source, key)
    try:
        return SourceRecord(
            provenance=provenance,
            prompt=_text(source.prompt, prompt),
            answer=_text(source.response, response),
            reward=_reward(source, rating, gold),
            created_at=watermark if isinstance(watermark, datetime) else None,
            user=_name(source.author, author),
            domain=_name(source.domain, domain),
            kind=_name(source.kind_column, kind),
            keyed=True,
        )
    except _Unusable as problem:
        return SkippedRecord(provenance, str(problem))


def _provenance(source: SqlSource, key: Any) -> str:
    return f"{source.table}:{_written(key)}"


def _written(value: Any) -> str:
    # A key is data: no store keeps a NUL or half a character.
    return str(value).replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _is_utf8(value: Any) -> bool:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(column: str, value: Any) -> str:
    if value is None:
        raise _Unusable(f"{column} is NULL")
    if not isinstance(value, str):
        raise _Unusable(f"{column} is {type(value).__name__}, expected text")
    if not value.strip():
        raise _Unusable(f"{column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{column} is not UTF-8") from None
    return value


def _name(column: str | None, value: Any) -> str | None:
    """An author, domain or kind; a number is one too."""
    if value is None or value == "":
        return None
    return _text(str(column), value if isinstance(value, bytes | bytearray | memoryview) else str(value))


def _reward(source: SqlSource, rating: Any, gold: Any) -> float | None:
    """What the row is worth; None is the source's own."""
    if source.gold_star is not None and _is_set(source.gold_star, gold):
        return source.gold_reward
    if source.rating is None:
        return None
    if rating is None:
        raise _Unusable(f"{source.rating} is NULL")
    value = _plain(rating)
    if value not in source.ratings:
        raise _Unusable(f"{source.rating} is {short_repr(value)}; ratings knows {', '.join(source.ratings)}")
    return source.ratings[value]


def _is_set(column: str, value: Any) -> bool:
    text = "" if value is None else _plain(value).lower()
    if text not in _YES | _NO:
        raise _Unusable(f"{column} is {short_repr(text)}, neither yes nor no")
    return text in _YES


def _plain(value: Any) -> str:
    """A value as a person writes it in YAML: 5 for 5, 5.0 and Decimal("5.00"); true for True."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, Decimal):
        return str(value.normalize())
    return str(value).strip()


def _as_cursor(source: SqlSource, value: Any) -> dict[str, str]:
    for kind, (type_, _, write) in _KINDS.items():
        if isinstance(value, type_) and not isinstance(value, bool):
            return {"kind": kind, "value": write(value)}
    raise SourceError(
        f"source {source.name}: the watermark {source.cursor} of {source.table} is {value!r} "
        f"({type(value).__name__}); expected a number, a time or a text"
    )


def _watermark(cursor: dict[str, str]) -> Any:
    return _KINDS[cursor["kind"]][1](cursor["value"])


def _earlier(watermark: Any, overlap: float) -> Any:
    """The watermark so far back, where one can say how far."""
    try:
        if isinstance(watermark, datetime):
            return watermark - timedelta(seconds=overlap)
        if isinstance(watermark, date):
            return watermark - timedelta(days=math.ceil(overlap / 86_400))
        if isinstance(watermark, int | float):
            return watermark - type(watermark)(overlap)
        if isinstance(watermark, Decimal):
            return watermark - Decimal(str(overlap))
    except OverflowError:  # at the beginning of time
        return watermark
    return watermark


def _engine(source: SqlSource) -> tuple[sa.Engine, str]:
    """What connects to the database, reading only; and the password, which no message may hold."""
    text = os.environ.get(source.url_env)
    if not text:
        raise SourceError(
            f"source {source.name}: the environment variable {source.url_env} is not set; export the database's URL "
            "in it, such as sqlite:////path/file.db or postgresql+psycopg://HOST/NAME"
        )
    try:
        url = make_url(text)
        password = str(url.password or "")
        engine = sa.create_engine(_only_readable(source, url), hide_parameters=True)
    except (sa.exc.ArgumentError, ValueError):  # their messages may hold the URL
        raise SourceError(
            f"source {source.name}: what {source.url_env} holds is no database URL that SQLAlchemy knows; expected "
            "such as sqlite:////path/file.db or postgresql+psycopg://HOST/NAME"
        ) from None
    except ImportError as error:
        raise SourceError(
            f"source {source.name}: the driver of {url.drivername} is not installed ({error.name}); install it, or "
            f"name another in {source.url_env}, such as postgresql+psycopg://"
        ) from None
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine, password


def _only_readable(source: SqlSource, url: URL) -> URL:
    """SQLite makes a file that is not there, unless it is told to read only."""
    path = url.database
    if url.get_backend_name() != "sqlite" or not path or path.startswith((":memory:", "file:")):
        return url
    if not Path(path).is_file():
        raise SourceError(f"source {source.name}: the file {path} is not there; correct {source.url_env}")
    return url.set(database=f"file:{quote(str(Path(path).resolve()))}", query={"mode": "ro", "uri": "true"})


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA query_only=ON")
    # A text that is not UTF-8 would end the reading; so it comes as half characters, and is named.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")


@contextmanager
def _connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that can only read; each page has its own transaction, which ends with it."""
    options = {"postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
    with engine.connect().execution_options(**options) as connection:
        yield connection


def _table(engine: sa.Engine, source: SqlSource) -> sa.TableClause:
    """The table as the database describes it. What the YAML names must be there, letter by letter."""
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
    missing = sorted(_named(source) - set(names))
    if missing:
        raise SourceError(
            f"source {source.name}: {source.table} has no column {', '.join(missing)}; it has: {', '.join(names)}"
        )
    if any(c["name"] == source.cursor and isinstance(c["type"], MONEY) for c in found):
        raise SourceError(
            f"source {source.name}: the watermark {source.cursor} of {source.table} is money, which is read as a text "
            "and stands in another order; name another, or as `table` a view in which it is cast to numeric"
        )
    # SQLite keeps a time as whatever text was written, and compares it so; read as a time, it would be another text.
    typed = engine.dialect.name != "sqlite"
    columns: list[sa.ColumnClause[Any]] = [sa.column(c["name"], c["type"] if typed else None) for c in found]
    return sa.table(name, *columns, schema=schema or None)


def _named(source: SqlSource) -> set[str]:
    """Every column that the YAML names."""
    mapped = (source.rating, source.gold_star, source.author, source.domain, source.kind_column)
    return {source.key, source.cursor, source.prompt, source.response, *source.only, *(name for name in mapped if name)}


@contextmanager
def _told(source: SqlSource, secret: str) -> Iterator[None]:
    """Errors of the database as one that says what to do, without the password."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or error).strip()
        for text in {secret, quote(secret), quote_plus(secret)} - {""}:
            said = said.replace(text, "***")
        if isinstance(error, sa.exc.DataError):
            raise SourceError(
                f"source {source.name}: a value in {source.table} cannot be read ({said}), in the watermark "
                f"{source.cursor} or in another column that the YAML names; correct it, or name as `table` a view "
                "that leaves such rows out"
            ) from None
        raise SourceError(
            f"source {source.name}: the database of {source.url_env} cannot be read ({said}); see that it runs, "
            "that its user may read the table, and that the URL is right"
        ) from None
