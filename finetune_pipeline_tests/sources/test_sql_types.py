"""SQL sources with unusual column types and values."""

import pytest
import sqlalchemy as sa

from finetune_pipeline.sources.source_record import SourceError

from .test_sql import given, source


@pytest.fixture
def table(url, monkeypatch):
    """Make the table `t` of the columns w and more; its rows have the keys 1, 2, ... in their order."""
    monkeypatch.setenv("RATINGS_URL", url)

    def make(columns, *rows, before=""):
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            if before:
                connection.exec_driver_sql(before)
            connection.exec_driver_sql(f"CREATE TABLE t (k integer PRIMARY KEY, p text, {columns})")
            for number, row in enumerate(rows, 1):
                connection.exec_driver_sql(f"INSERT INTO t VALUES ({number}, 'asked {number}', {row})")
        engine.dispose()

    return make


def plain(**changes):
    """A source of that table, without ratings."""
    mapped = {"table": "t", "key": "k", "cursor": "w", "prompt": "p", "response": "p", "rating": None, "ratings": {}}
    return source(**{**mapped, "gold_star": None, "author": None, "domain": None, "kind_column": None, **changes})


@pytest.mark.parametrize("page", [1, 2, 1_000])
@pytest.mark.parametrize(
    ("url", "kind", "last", "values"),
    [
        ("postgresql", "numeric", "7.5", ["'NaN'", "7.5", "'-Infinity'", "'Infinity'"]),
        ("postgresql", "float8", "7.5", ["'NaN'", "7.5", "'-Infinity'", "'Infinity'"]),
        ("sqlite", "real", "7.5", ["9e999", "7.5", "-9e999", "9e999"]),
    ],
    indirect=["url"],
)
def test_a_row_with_a_non_finite_cursor_is_skipped(table, kind, last, values, page):
    table(f"w {kind}", *values)
    records, skipped, cursor = given(plain(batch_rows=page))
    assert set(records) == {"t:2"} and cursor["value"] == last
    assert set(skipped) == {"t:1", "t:3", "t:4"}
    assert skipped["t:4"].lower().startswith("w is inf")
    assert skipped["t:4"].endswith(", so no sync could resume after it")
    assert set(given(plain(batch_rows=page), cursor)[0]) == {"t:2"}


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("page", [1, 1_000])
@pytest.mark.parametrize("kind", ["timestamptz", "timestamp", "date"])
def test_a_row_with_a_time_outside_pythons_range_is_skipped(table, kind, page):
    beyond = ["infinity", "-infinity", "0044-03-15 BC", "12000-01-01", "9999-12-31", "0001-01-01"]
    table(f"w {kind}", *(f"'{value}'" for value in [*beyond, "2026-05-01", "0001-01-02", "9999-12-30"]), "NULL")
    records, skipped, cursor = given(plain(batch_rows=page))
    assert set(records) == {"t:7", "t:8"} and cursor["value"].startswith("2026-05-01")
    assert set(skipped) == {"t:1", "t:2", "t:3", "t:4", "t:5", "t:6", "t:9", "t:10"}
    assert "in the future" in skipped["t:9"]
    assert skipped["t:1"] == (
        "w is infinity, not a time from 0001-01-02 until before 9999-12-31, so it is unknown whether it was read"
    )
    assert skipped["t:10"] == "w is NULL, so it is unknown whether it was read"
    assert "t:7" in given(plain(batch_rows=page), cursor)[0]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati"])
def test_the_first_and_last_times_are_read_in_every_zone(table, url, monkeypatch, zone):
    table(
        "w timestamptz", *(f"'{value}+00'" for value in ("0001-01-01", "0001-01-04", "9999-12-29", "9999-12-31 23:59"))
    )
    monkeypatch.setenv("RATINGS_URL", f"{url}?options=-ctimezone%3D{zone}")
    records, skipped, _ = given(plain())
    assert set(records) == {"t:2"} and "in the future" in skipped["t:3"]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_an_unreadable_value_in_another_column_is_an_error_with_advice(table):
    table("w integer, d date", "1, 'infinity'")
    with pytest.raises(SourceError, match=r"a value in t cannot be read \(.*infinity.*\), in the cursor w or .* view"):
        given(plain(domain="d"))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(("column", "kind"), [("domain", "dict"), ("author", "list"), ("prompt", "dict")])
def test_json_and_arrays_are_not_read_as_text(table, column, kind):
    value = "'{}'::jsonb" if kind == "dict" else "ARRAY[1]"
    table(f"w integer, d {'jsonb' if kind == 'dict' else 'integer[]'}", f"1, {value}", "2, NULL")
    taken, skipped, _ = given(plain(**{column: "d"}))
    assert skipped["t:1"] == f"d is {kind}, expected text"
    assert ("t:2" in taken) == (column != "prompt")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_filters_may_contain_values_that_an_enum_lacks(table):
    table("w integer, d mood", "1, 'sad'", "2, 'ok'", before="CREATE TYPE mood AS ENUM ('sad', 'ok')")
    assert set(given(plain(only={"d": ["sad", "gone"]}))[0]) == {"t:1"}
    assert not given(plain(only={"d": ["gone"]}))[0]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("kind", ["numeric(3,1)", "numeric", "real", "float8"])
def test_filters_compare_numbers_as_numbers(table, kind):
    table(f"w integer, d {kind}", "1, 3.0", "2, 0.1", "3, 4", "4, 'NaN'", "5, NULL")
    assert set(given(plain(only={"d": ["3", "0.1"]}))[0]) == {"t:1", "t:2"}
    assert set(given(plain(only={"d": ["4.00", "3.04", "three", "9999", "Infinity"]}))[0]) == {"t:3"}
    assert set(given(plain(only={"d": ["NaN"]}))[0]) == {"t:4"}


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_four_byte_float_cursor_loses_no_row(table):
    table("w real", *(f"{number / 10}" for number in range(1, 20)))
    records, _, cursor = given(plain(batch_rows=2))
    assert list(records) == [f"t:{number}" for number in range(1, 20)]
    assert set(given(plain(batch_rows=2, overlap=0), cursor)[0]) == {"t:19"}


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_money_cursor_is_an_error(table):
    table("w money", "1", "2")
    with pytest.raises(SourceError, match=r"the cursor w of t is money, .* a view in which it is cast to numeric"):
        given(plain())


@pytest.mark.parametrize(
    ("kind", "late", "last", "overlap"),
    [
        ("date", "'2026-05-02'", "'2026-05-03'", 60),
        ("date", "'2026-05-01'", "'2026-05-03'", 86_401),
        ("numeric", "100.25", "160.25", 60),
        ("float8", "100.25", "160.25", 60),
        ("integer", "100", "160", 60),
    ],
)
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_row_committed_late_within_the_overlap_is_read(table, url, kind, late, last, overlap):
    table(f"w {kind}", last)
    cursor = given(plain())[2]
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO t VALUES (2, 'late', {late})")
    assert "t:2" not in given(plain(overlap=0), cursor)[0]
    assert "t:2" in given(plain(overlap=overlap), cursor)[0]
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM t WHERE k = 1")
    engine.dispose()
    records, _, later = given(plain(overlap=overlap), cursor)
    assert set(records) == {"t:2"} and later == cursor  # late rows never move the cursor back
