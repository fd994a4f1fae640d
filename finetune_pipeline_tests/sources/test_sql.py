"""SQL sources on real databases: no row lost or doubled, nothing written, no password shown."""

import json
import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.settings import SqlSource
from finetune_pipeline.sources.source_record import Cursor, SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.sql import _is_ahead, read

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
COLUMNS = {
    "kind": "sql", "name": "ratings", "url_env": "RATINGS_URL", "table": "answers", "key": "id",
    "cursor": "Changed at", "prompt": "prompt", "response": "response",
    "rating": "stars", "ratings": {"5": 1.0, "4": 0.7, "1": -1.0},
    "gold_star": "gold", "author": "author", "domain": "domain", "kind_column": "kind",
}  # fmt: skip


def source(**changes):
    return SqlSource.model_validate({**COLUMNS, **changes})


@pytest.fixture
def answers(url, monkeypatch):
    """A table as applications have them, and how to write into it."""
    monkeypatch.setenv("RATINGS_URL", url)
    engine = sa.create_engine(url)
    table = sa.Table(
        "answers", sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("Changed at", sa.DateTime(timezone=True)),
        sa.Column("prompt", sa.Text), sa.Column("response", sa.Text), sa.Column("stars", sa.Integer),
        sa.Column("gold", sa.Boolean), sa.Column("author", sa.Text), sa.Column("domain", sa.Text),
        sa.Column("kind", sa.Text), sa.Column("team", sa.Integer), sa.Column("notes", sa.LargeBinary),
    )  # fmt: skip
    table.create(engine)

    def put(*rows):
        with engine.begin() as connection:
            for row in rows:
                connection.execute(table.delete().where(table.c.id == row["id"]))
                connection.execute(table.insert().values(row))

    yield put
    engine.dispose()


def row(id, minutes=0, **changes):
    at = {"Changed at": NOON + timedelta(minutes=minutes)}
    return {"id": id, "prompt": f"asked {id}", "response": f"answered {id}", "stars": 5, **at, **changes}


def given(source, cursor=None):
    """Items by provenance, what was skipped, and the last cursor as the store gives it back."""
    found = list(read(source, cursor))
    cursors = [one.value for one in found if isinstance(one, Cursor)]
    records = {one.provenance: one for one in found if isinstance(one, SourceRecord)}
    skipped = {one.provenance: one.reason for one in found if isinstance(one, SkippedRecord)}
    return records, skipped, json.loads(json.dumps(cursors[-1])) if cursors else None


def test_a_row_becomes_a_record_by_the_mapping(answers):
    answers(
        row(1, author="ann", domain="walls", kind="new", stars=4), row(2, stars=None, gold=True), row(3, gold=False)
    )
    records, skipped, _ = given(source())
    first = records["answers:1"]
    assert (first.prompt, first.answer, first.reward) == ("asked 1", "answered 1", 0.7)
    assert (first.user, first.domain, first.kind) == ("ann", "walls", "new")
    assert [records[f"answers:{n}"].reward for n in (2, 3)] == [1.0, 1.0] and not skipped
    assert given(source(gold_reward=0.9))[0]["answers:2"].reward == 0.9
    unrated = source(rating=None, ratings={}, gold_star=None)
    assert {record.reward for record in given(unrated)[0].values()} == {None}


def test_filters_select_rows_with_one_of_the_values(answers):
    answers(row(1, author="ann", team=1), row(2, author="bob", team=1), row(3, author="ann", team=2), row(4))
    assert set(given(source(only={"author": ["ann"]}))[0]) == {"answers:1", "answers:3"}
    assert set(given(source(only={"author": ["ann", "bob"], "team": ["1"]}))[0]) == {"answers:1", "answers:2"}


def test_unusable_rows_are_skipped_with_a_reason(answers):
    answers(
        row(1, prompt=None), row(2, response=" \n"), row(3, stars=3), row(4, stars=None), row(5),
        {**row(6), "Changed at": None}, row(7, domain="x"),
    )  # fmt: skip
    records, skipped, cursor = given(source())
    assert set(records) == {"answers:5", "answers:7"} and cursor is not None
    assert skipped == {
        "answers:1": "prompt is NULL",
        "answers:2": "response is empty",
        "answers:3": "stars is '3'; ratings knows 5, 4, 1",
        "answers:4": "stars is NULL",
        "answers:6": "Changed at is NULL, so it is unknown whether it was read",
    }
    wrong = given(source(response="notes", gold_star="domain"))[1]
    assert wrong["answers:5"] == "notes is NULL"
    answers(row(5, notes=b"\xff"), row(7, domain="perhaps", notes=b"x"))
    wrong = given(source(response="notes", gold_star="domain"))[1]
    assert wrong["answers:5"] in {"notes is bytes, expected text", "notes is memoryview, expected text"}
    assert given(source(gold_star="domain"))[1]["answers:7"] == "domain is 'perhaps', neither yes nor no"


def test_pages_lose_no_row_with_equal_cursor_values(answers):
    answers(*(row(n, minutes=n // 10) for n in range(1, 41)))
    records, _, _ = given(source(batch_rows=7))
    assert list(records) == [f"answers:{n}" for n in range(1, 41)]
    assert sum(isinstance(one, Cursor) for one in read(source(batch_rows=7), None)) == 6


def test_a_sync_resumes_where_the_last_one_ended(answers):
    answers(*(row(n, minutes=n) for n in range(1, 6)))
    cursor = given(source(overlap=0))[2]
    answers(row(6, minutes=6), row(2, minutes=7, stars=1))
    records, _, later = given(source(overlap=0), cursor)
    assert set(records) == {"answers:5", "answers:6", "answers:2"}  # the last row again: see the next test
    assert records["answers:2"].reward == -1.0
    assert set(given(source(overlap=0), later)[0]) == {"answers:2"}


def test_rows_committed_late_are_not_lost(answers, url):
    answers(row(5, minutes=5), row(9, minutes=5))
    cursor = given(source())[2]
    answers(row(7, minutes=5))  # the same time as the last row that was read, and a lower key
    assert "answers:7" in given(source(overlap=0), cursor)[0]
    if url.startswith("sqlite"):
        return  # SQLite: times are texts, and there is one writer at a time
    answers(row(8, minutes=4.5))  # half a minute earlier
    assert "answers:8" not in given(source(overlap=0), cursor)[0]
    assert "answers:8" in given(source(overlap=60), cursor)[0]
    assert given(source(overlap=86_400), cursor)[2] == cursor  # an overlap never moves the cursor back


def test_an_emptied_table_keeps_its_cursor(answers):
    answers(row(1))
    cursor = given(source())[2]
    answers({**row(1), "Changed at": None})
    assert given(source(), cursor)[2] == cursor and not given(source(), cursor)[0]


@pytest.mark.parametrize("kind", ["integer", "numeric", "text", "date", "float"])
def test_numbers_texts_and_dates_work_as_cursors(url, monkeypatch, kind):
    monkeypatch.setenv("RATINGS_URL", url)
    types = {"integer": sa.BigInteger, "numeric": sa.Numeric, "text": sa.Text, "date": sa.Date, "float": sa.Double}
    values = {
        "integer": [2**40 + n for n in range(30)],
        "numeric": [Decimal(f"{n}.25") for n in range(30)],
        "text": [f"2026-05-01 12:00:{n:02}" for n in range(30)],
        "date": [(NOON + timedelta(days=n)).date() for n in range(30)],
        "float": [n / 10 for n in range(30)],
    }[kind]
    engine = sa.create_engine(url)
    table = sa.Table("t", sa.MetaData(), sa.Column("k", sa.Text, primary_key=True), sa.Column("w", types[kind]))
    table.create(engine)

    def put(numbers):
        with engine.begin() as connection:
            connection.execute(table.insert(), [{"k": f"key {n}", "w": values[n]} for n in numbers])

    one = source(table="t", key="k", cursor="w", prompt="k", response="k", rating=None, ratings={}, gold_star=None,
               author=None, domain=None, kind_column=None, overlap=0, batch_rows=4)  # fmt: skip
    put(range(0, 30, 2))
    records, _, cursor = given(one)
    assert len(records) == 15
    put([29])
    assert set(given(one, cursor)[0]) == {"t:key 28", "t:key 29"}
    engine.dispose()


def test_it_never_writes(answers, url, tmp_path):
    answers(row(1))
    statements = []

    def note(_connection, _cursor, statement, *_rest):
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        assert given(source())[0]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert statements and not [s for s in statements if s.split()[0].upper() not in {"SELECT", "PRAGMA", "SHOW", "SET"}]


def test_sqlite_is_opened_read_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RATINGS_URL", f"sqlite:///{tmp_path}/not there.db")
    with pytest.raises(SourceError, match=r"not there\.db does not exist; correct RATINGS_URL"):
        given(source())
    assert not list(tmp_path.iterdir())
    path = tmp_path / "an # odd ? name.db"
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE answers (id, "Changed at", prompt, response)')
        connection.execute("INSERT INTO answers VALUES ('a', 1, 'asked', CAST(x'ff61' AS TEXT)), ('b', 2, 'x', 'y')")
    before = hash_file(path)
    path.chmod(0o444)
    monkeypatch.setenv("RATINGS_URL", sa.URL.create("sqlite", database=str(path)).render_as_string())
    plain = source(rating=None, ratings={}, gold_star=None, author=None, domain=None, kind_column=None)
    records, skipped, _ = given(plain)
    assert set(records) == {"answers:b"} and skipped == {"answers:a": "response is not UTF-8"}
    assert hash_file(path) == before


@pytest.mark.parametrize("page", [1, 2, 10_000])
def test_a_row_with_a_cursor_that_is_not_utf_8_is_skipped(tmp_path, monkeypatch, page):
    path = tmp_path / "ratings.db"
    bad = "CAST(x'ff61' AS TEXT)"
    rows = [("'a'", "'1'"), (bad, "'1'"), (bad, "'2'"), ("'d'", "'3'"), ("'e'", bad), ("'f'", bad), ("NULL", bad)]
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE answers (id, "Changed at", prompt, response)')
        for key, changed in rows:
            connection.execute(f"INSERT INTO answers VALUES ({key}, {changed}, 'asked', 'answered')")
    monkeypatch.setenv("RATINGS_URL", f"sqlite:///{path}")
    plain = source(rating=None, ratings={}, gold_star=None, author=None, domain=None, kind_column=None, batch_rows=page)
    records, skipped, cursor = given(plain)
    assert set(records) == {"answers:a", "answers:d"} and (cursor["kind"], cursor["value"]) == ("text", "3")
    assert skipped["answers:\\udcffa"] == "id is not UTF-8, so no sync could resume after it"
    assert skipped["answers:f"].startswith("Changed at is not UTF-8") and "answers:e" in skipped
    assert all(provenance.encode() for provenance in skipped)
    assert set(given(plain, cursor)[0]) == {"answers:d"}


def test_a_wrong_name_is_reported_with_the_existing_ones(answers):
    with pytest.raises(SourceError, match="there is no table or view answer; there are: answers"):
        given(source(table="answer"))
    with pytest.raises(SourceError, match="answers has no column star; it has: id, Changed at, prompt"):
        given(source(rating="star"))
    with pytest.raises(SourceError, match="has no column id; DROP TABLE answers"):
        given(source(prompt="id; DROP TABLE answers"))
    with pytest.raises(SourceError, match="has no column nobody"):
        given(source(only={"nobody": ["x"]}))


def test_a_key_that_is_not_unique_is_an_error(answers):
    answers(row(1, author="ann"), row(2, author="ann"))
    with pytest.raises(SourceError, match="'ann' is the key of several rows of answers"):
        given(source(key="author"))


def test_views_and_schemas_can_be_read(answers, url):
    answers(row(1), row(2))
    engine = sa.create_engine(url)
    schema = "main" if url.startswith("sqlite") else "public"
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE VIEW best AS SELECT * FROM answers WHERE id = 2"))
    engine.dispose()
    assert set(given(source(table=f"{schema}.best"))[0]) == {f"{schema}.best:2"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "RATINGS_URL is not set"),
        ("hunter2 is no url", "not a database URL"),
        ("nosuchdb://ann:hunter2@db/x", "not a database URL|not installed"),
        ("postgresql+psycopg://ann:hunter2@127.0.0.1:1/x", "cannot be read"),
        ("postgresql+psycopg://ann:hunter2@127.0.0.1:port/x", "not a database URL"),
        ("mysql+pymysql://ann:hunter2@db/x", "driver of mysql.pymysql is not installed"),
    ],
)
def test_connection_errors_do_not_show_the_password(monkeypatch, caplog, text, said):
    monkeypatch.setenv("RATINGS_URL", text) if text else monkeypatch.delenv("RATINGS_URL", raising=False)
    with pytest.raises(SourceError, match=said) as problem:
        given(source())
    chain = [problem.value, problem.value.__cause__]
    assert not any("hunter2" in str(error) for error in chain) and "hunter2" not in caplog.text
    assert problem.value.__suppress_context__ or problem.value.__context__ is None


@pytest.mark.parametrize(
    "changes",
    [{"ratings": {}}, {"rating": None}, {"ratings": {"5": 2}}],
    ids=["no rewards", "no rating", "reward above 1"],
)
def test_a_rating_needs_its_rewards_and_rewards_their_rating(changes):
    with pytest.raises(ValidationError):
        source(**changes)


def restarted(source, cursor):
    """Return the provenances of the records that a sync yields, and the `restarted` of its cursors."""
    found = list(read(source, cursor))
    return {one.provenance for one in found if isinstance(one, SourceRecord)}, {
        one.restarted for one in found if isinstance(one, Cursor)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"table": "best"}, {"key": "prompt"}, {"cursor": "id"}, {"prompt": "response"}, {"response": "prompt"},
        {"rating": "team"}, {"ratings": {"5": 0.5}}, {"gold_star": None}, {"gold_reward": 0.5}, {"reward": 0.5},
        {"author": None}, {"domain": None}, {"kind_column": None}, {"only": {"stars": ["5"]}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_changed_settings_read_all_rows_again(answers, url, changes):
    answers(row(1, team=5), row(2, minutes=60, team=5))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE VIEW best AS SELECT * FROM answers"))
    engine.dispose()
    cursor = given(source())[2]
    assert restarted(source(), cursor) == ({"answers:2"}, {False})
    provenances, of_restarted = restarted(source(**changes), cursor)
    assert len(provenances) == 2 and of_restarted == {True}
    later = given(source(**changes), cursor)[2]
    assert len(restarted(source(**changes, overlap=0), later)[0]) == 1
    assert restarted(source(), None)[1] == {False}


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"max_fraction": 0.5}, {"max_examples": 3}, {"overlap": 9}, {"batch_rows": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_no_row_keep_the_cursor(answers, changes):
    answers(row(1), row(2, minutes=60))
    cursor = given(source())[2]
    assert restarted(source(**changes), cursor) == ({"answers:2"}, {False})


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_postgresql_is_read_in_read_only_transactions(answers, url):
    answers(row(1))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        shown = "current_setting('transaction_read_only') AS read_only"
        connection.execute(sa.text(f"CREATE VIEW shown AS SELECT *, {shown} FROM answers"))
    engine.dispose()
    assert given(source(table="shown", response="read_only"))[0]["shown:1"].answer == "on"


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_another_database_restarts_and_another_password_does_not(answers, url, monkeypatch):
    answers(row(1), row(2, minutes=60))
    cursor = given(source())[2]
    for changed in (url.replace("tests@", "tests:secret@"), f"{url}?password=secret"):
        monkeypatch.setenv("RATINGS_URL", changed)
        assert restarted(source(), cursor) == ({"answers:2"}, {False})
    monkeypatch.setenv("RATINGS_URL", url.replace("127.0.0.1", "localhost"))
    assert restarted(source(), cursor) == ({"answers:1", "answers:2"}, {True})


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_cursor_column_of_another_type_restarts(answers, url):
    answers(row(1), row(2, minutes=60))
    cursor = given(source())[2]
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text('ALTER TABLE answers ALTER COLUMN "Changed at" TYPE timestamp'))
    engine.dispose()
    assert restarted(source(), cursor) == ({"answers:1", "answers:2"}, {True})


@pytest.mark.parametrize("cursor", [{"id": 3}, {"kind": "number", "value": "9"}, "9"])
def test_a_cursor_without_settings_restarts(answers, cursor):
    answers(row(1), row(2))
    assert restarted(source(), cursor) == ({"answers:1", "answers:2"}, {True})


def test_settings_that_no_row_matches_leave_no_cursor(answers):
    answers(row(1))
    cursor = given(source())[2]
    assert list(read(source(only={"domain": ["none"]}), cursor)) == [Cursor(None, restarted=True)]


def test_a_hundred_thousand_rows_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / "large.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE answers (id INTEGER PRIMARY KEY, at INTEGER, prompt TEXT, response TEXT)")
        connection.execute("CREATE INDEX behind ON answers (at, id)")
        rows = ((n, n // 100, f"asked {n} " + "x" * 200, "answered " + "y" * 200) for n in range(100_000))
        connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows)
    one = source(cursor="at", rating=None, ratings={}, gold_star=None, author=None, domain=None, kind_column=None)
    script = f"""
import resource
from finetune_pipeline.settings import SqlSource
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.sources.sql import _is_ahead, read
found, first = 0, 0
for one in read(SqlSource.model_validate_json({one.model_dump_json()!r}), None):
    found += isinstance(one, SourceRecord)
    first = first or found == 2000 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first)
"""
    environment = {**os.environ, "RATINGS_URL": f"sqlite:///{path}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found, grown = map(int, done.stdout.split())
    assert found == 100_000
    assert grown < 8 * 1024  # kilobytes, after the first pages; the rows are 46 MB


AHEAD = timedelta(days=30_000)


def test_a_row_from_the_future_waits_and_hides_no_later_row(answers):
    now = datetime.now(UTC)
    answers(row(1), row(2, **{"Changed at": now + AHEAD}), row(3, **{"Changed at": now + timedelta(minutes=5)}))
    records, skipped, cursor = given(source(batch_rows=1))
    assert set(records) == {"answers:1", "answers:3"}
    assert "in the future; the row is read when that time has come" in skipped["answers:2"]
    answers(row(4, **{"Changed at": now + timedelta(minutes=6)}))
    assert "answers:4" in given(source(), cursor)[0]
    assert all(
        one.deferred for one in read(source(), cursor) if isinstance(one, SkippedRecord)
    )  # earlier records are kept
    answers(row(2, **{"Changed at": now + timedelta(minutes=7)}))
    assert "answers:2" in given(source(), cursor)[0]


def test_a_cursor_in_the_future_is_not_resumed_from(answers, monkeypatch):
    answers(row(1), row(2, **{"Changed at": datetime.now(UTC) + AHEAD}))
    with monkeypatch.context() as before:
        before.setattr("finetune_pipeline.sources.sql._is_ahead", lambda value: False)
        cursor = given(source())[2]
    answers(row(3))
    records, _, new = given(source(), cursor)
    assert set(records) == {"answers:1", "answers:3"} and new["value"] < cursor["value"]


FAR = datetime(2999, 1, 1, tzinfo=UTC)


def here(zone):
    return datetime.now(timezone(timedelta(hours=zone)))


@pytest.mark.parametrize(
    ("value", "ahead"),
    [
        (lambda: FAR, True),
        (lambda: FAR.replace(tzinfo=None), True),
        (lambda: here(14), False),
        (lambda: here(0).replace(tzinfo=None) + timedelta(minutes=5), False),
        (lambda: here(0).replace(tzinfo=None) + timedelta(hours=9), True),
        (lambda: FAR.date(), True),
        (lambda: here(14).date(), False),  # tomorrow, in UTC
        (lambda: str(FAR), True),
        (lambda: "2999-01-01", True),
        (lambda: "9999-12-31T23:59:59-05:00", True),  # after the last year, in UTC
        (lambda: "0999-a-text", False),
        (lambda: "29990101", False),  # may be any number
        (lambda: 4_102_444_800_000, False),
        (lambda: datetime(1, 1, 2), False),
    ],
)
def test_what_counts_as_the_future(value, ahead):
    assert _is_ahead(value()) == ahead
