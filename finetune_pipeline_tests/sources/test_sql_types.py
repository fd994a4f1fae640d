"""Rated answers whose columns have types, and values, that no row of plain numbers and texts has."""

import pytest
import sqlalchemy as sa

from .test_sql import feed, given


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
    """A feed of that table, without ratings."""
    mapped = {"table": "t", "key": "k", "watermark": "w", "prompt": "p", "response": "p", "rating": None, "ratings": {}}
    return feed(**{**mapped, "gold_star": None, "author": None, "domain": None, "kind_column": None, **changes})


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
def test_a_row_whose_number_is_not_finite_is_named_and_the_others_are_read(table, kind, last, values, page):
    table(f"w {kind}", *values)
    items, skipped, mark = given(plain(batch_rows=page))
    assert set(items) == {"t:2"} and mark["value"] == last
    assert set(skipped) == {"t:1", "t:3", "t:4"}
    assert skipped["t:4"].lower().startswith("w is inf")
    assert skipped["t:4"].endswith(", so no reading could go on behind it")
    assert set(given(plain(batch_rows=page), mark)[0]) == {"t:2"}
