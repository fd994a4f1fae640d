"""A SQL source in the store and the dataset."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.source_state import skipped_records
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_sources
from finetune_pipeline_tests.conftest import dataset_rows, snapshot_examples
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events

SOURCE = {
    "kind": "sql", "name": "ratings", "url_env": "RATINGS_URL", "table": "answers", "key": "id", "cursor": "changed",
    "prompt": "prompt", "response": "response", "rating": "stars", "ratings": {"5": 1.0, "1": -1.0}, "batch_rows": 1000,
}  # fmt: skip
CURATION = {"min_examples": 1, "validation_fraction": 0.0}
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def rated(url, monkeypatch):
    """Write rows: id -> stars, all changed at a minute."""
    monkeypatch.setenv("RATINGS_URL", url)
    engine = sa.create_engine(url)
    table = sa.Table(
        "answers", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("changed", sa.DateTime(timezone=True)), sa.Column("prompt", sa.Text),
        sa.Column("response", sa.Text), sa.Column("stars", sa.Integer),
    )  # fmt: skip
    table.create(engine)

    def put(minute, **stars):
        ids = {int(name[1:]): value for name, value in stars.items()}
        at = NOON + timedelta(minutes=minute)
        rows = [
            {"id": n, "changed": at, "prompt": f"what of number {n}?", "response": f"answer {n}", "stars": value}
            for n, value in ids.items()
        ]
        with engine.begin() as connection:
            connection.execute(table.delete().where(table.c.id.in_(list(ids))))
            connection.execute(table.insert(), rows)

    yield put
    engine.dispose()


def read_all(loop):
    (report,) = sync_sources(loop, connect(), print)
    assert not report.error
    return report


def rewards(loop):
    artifact, _ = snapshot(loop, connect())
    return {example.provenance: example.reward for example in snapshot_examples(artifact)}


def test_added_changed_and_unusable_rows_are_followed(make_loop, rated):
    loop = make_loop(sources=[SOURCE], curation=CURATION)
    rated(1, n1=5, n2=5, n3=3)
    assert (read_all(loop).new, rewards(loop)) == (2, {"answers:1": 1.0, "answers:2": 1.0})
    with connect().read() as connection:
        assert [tuple(row) for row in skipped_records(connection, loop, 9)] == [
            ("ratings", "answers:3", "stars is '3'; ratings knows 1, 5")
        ]
    version = snapshot(loop, connect())[0].manifest.version
    assert read_all(loop).new == 0 and snapshot(loop, connect())[0].manifest.version == version
    rated(5, n1=1, n4=5)
    report = read_all(loop)
    assert (report.new, report.retracted) == (2, 1)
    assert rewards(loop) == {"answers:1": -1.0, "answers:2": 1.0, "answers:4": 1.0}
    rated(9, n2=None, n3=5)
    assert (read_all(loop).retracted, set(rewards(loop))) == (1, {"answers:1", "answers:3", "answers:4"})
    rated(12, n1=5)
    read_all(loop)
    assert rewards(loop)["answers:1"] == 1.0
    artifact, _ = snapshot(loop, connect())
    rows = dataset_rows(build_dataset(loop, artifact).path, "train")
    assert {(row["source"], row["provenance"]) for row in rows} == {("ratings", f"answers:{n}") for n in (1, 3, 4)}


def test_complete_pages_of_changed_rows_replace_the_old_ones(make_loop, rated):
    loop = make_loop(sources=[SOURCE], curation=CURATION)
    rated(1, **{f"n{n}": 5 for n in range(1_100)})
    assert read_all(loop).new == 1_100
    rated(9, **{f"n{n}": 1 for n in range(1_100)})
    report = read_all(loop)
    assert (report.new, report.retracted) == (1_100, 1_100)
    assert set(rewards(loop).values()) == {-1.0}


def test_a_quota_limits_a_large_table(make_loop, rated):
    loop = make_loop(sources=[{**SOURCE, "max_fraction": 0.5}], curation=CURATION)
    write_events(loop.drop_folder / "a.jsonl", *corrected(["amy", "ben", "cid"]))
    ingest(loop, connect(), print)
    rated(1, **{f"n{n}": 5 for n in range(20)})
    read_all(loop)
    manifest = build_dataset(loop, snapshot(loop, connect())[0]).manifest
    assert manifest.sources == {"logs": 3, "ratings": 3}
    assert manifest.left_out["over the quota of ratings"] == 17


def test_an_emptied_table_retracts_nothing(make_loop, rated, url):
    loop = make_loop(sources=[SOURCE], curation=CURATION)
    rated(1, n1=5)
    read_all(loop)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM answers"))
    engine.dispose()
    assert read_all(loop).retracted == 0
    assert rewards(loop) == {"answers:1": 1.0}


def test_changed_settings_apply_to_rows_that_were_read_before(make_loop, rated):
    rated(1, n1=5, n2=1, n3=5)
    rated(60, n9=5)
    read_all(make_loop(sources=[SOURCE], curation=CURATION))
    other = make_loop(sources=[{**SOURCE, "ratings": {"5": 0.9}, "only": {"id": ["1", "2", "9"]}}])
    report = read_all(other)
    assert (report.new, report.retracted, report.skipped) == (2, 4, 1)
    assert rewards(other) == {"answers:1": 0.9, "answers:9": 0.9}
    rated(99, n1=1)
    assert read_all(other).records == 1  # it resumes from the cursor of that reading
    assert rewards(other) == {"answers:9": 0.9}


def test_settings_without_matching_rows_retract_all_until_they_are_reverted(make_loop, rated):
    loop = make_loop(sources=[SOURCE], curation=CURATION)
    rated(1, n1=5)
    rated(60, n9=5)
    read_all(loop)
    none = make_loop(sources=[{**SOURCE, "only": {"id": ["7"]}}], curation=CURATION)
    assert (read_all(none).retracted, read_all(none).records) == (2, 0)
    read_all(make_loop(sources=[SOURCE], curation=CURATION))
    assert rewards(loop) == {"answers:1": 1.0, "answers:9": 1.0}
