"""Declared sources in the store: new, changed, retracted and restored records, and their provenance."""

import threading
import tracemalloc
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from finetune_pipeline import settings
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.source_state import undeclared_sources
from finetune_pipeline.feedback.store import counters
from finetune_pipeline.pipeline import source_sync
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.settings import SettingsError
from finetune_pipeline.sources.source_record import Cursor, SkippedRecord, SourceError, SourceRecord
from finetune_pipeline_tests.conftest import dataset_rows, snapshot_examples
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events

from ...sources.test_files import write_as
from .declared_source import SOURCE, materialized, records, take, targets


def test_records_become_examples_with_source_and_provenance(loop):
    report = take(loop, *records("ash", "elm"))
    assert (report.records, report.new, report.retracted, report.skipped) == (2, 2, 0, 0)
    artifact, _ = snapshot(loop, connect())
    rows = dataset_rows(build_dataset(loop, artifact).path, "train")
    assert {(row["source"], row["provenance"]) for row in rows} == {("imported", "ash.md"), ("imported", "elm.md")}
    assert build_dataset(loop, artifact).manifest.sources == {"imported": 2}
    assert count_new(loop, connect(), 0) == 2


def test_a_second_reading_changes_nothing(loop):
    take(loop, *records("ash", "elm"))
    first, _ = snapshot(loop, connect())
    report = take(loop, *records("elm", "ash"))
    assert (report.records, report.new, report.retracted) == (2, 0, 0)
    assert snapshot(loop, connect())[0].manifest.version == first.manifest.version


def test_a_removed_record_is_retracted_and_restored_when_it_returns(loop):
    take(loop, *records("ash", "elm"))
    assert targets(loop) == ["ash spoke", "elm spoke"]
    assert take(loop, *records("ash")).retracted == 1
    assert targets(loop) == ["ash spoke"]
    with connect().read() as connection:
        assert counters(connection, loop.name)["examples"] == 1
    assert take(loop, *records("ash", "elm")).new == 0
    assert targets(loop) == ["ash spoke", "elm spoke"]


def test_a_changed_record_replaces_the_old_one(loop):
    take(loop, *records("ash"))
    report = take(loop, SourceRecord("ash.md", "what did ash say about it all?", "ash said more"))
    assert (report.new, report.retracted) == (1, 1)
    assert targets(loop) == ["ash said more"]


def ids_of(loop):
    """Return provenance -> id of the active records."""
    i = t.interactions.c
    with connect().read() as connection:
        query = sa.select(i.provenance, i.id).where(i.loop == loop.name, i.retracted_offset.is_(None))
        return {row.provenance: row.id for row in connection.execute(query)}


def test_a_moved_record_keeps_its_id_and_feedback(loop):
    def line(number, name):
        return SourceRecord(f"a.jsonl:{number}", f"what did {name} say about it all?", f"{name} spoke")

    take(loop, line(1, "ash"), line(2, "elm"))
    before = ids_of(loop)
    FeedbackClient(loop).correct(before["a.jsonl:2"], "elm sang")
    report = take(loop, line(1, "oak"), line(2, "ash"), line(3, "elm"))
    assert (report.records, report.new, report.retracted) == (3, 1, 0)
    assert targets(loop) == ["ash spoke", "elm sang", "oak spoke"]
    after = ids_of(loop)
    assert (after["a.jsonl:2"], after["a.jsonl:3"]) == (before["a.jsonl:1"], before["a.jsonl:2"])
    rows = dataset_rows(build_dataset(loop, snapshot(loop, connect())[0]).path, "train")
    assert {row["provenance"]: row["completion"] for row in rows}["a.jsonl:3"] == "elm sang"
    assert take(loop, line(1, "oak"), line(2, "ash")).retracted == 1
    assert take(loop, line(1, "oak"), line(2, "ash"), line(7, "elm")).new == 0
    assert targets(loop) == ["ash spoke", "elm sang", "oak spoke"]
    assert ids_of(loop)["a.jsonl:7"] == before["a.jsonl:2"]


def test_the_same_text_twice_is_two_records(loop):
    def at(*places):
        return [SourceRecord(place, "what did ash say?", "ash spoke") for place in places]

    take(loop, *at("a:1", "a:2", "a:3"))
    before = ids_of(loop)
    assert len(set(before.values())) == 3
    report = take(loop, *at("a:2", "a:4"))
    assert (report.records, report.new, report.retracted) == (2, 0, 1)
    assert ids_of(loop) == {"a:2": before["a:1"], "a:4": before["a:2"]}


def test_records_with_keys_differ_even_if_their_text_is_equal(loop):
    def rows(*keys):
        return [SourceRecord(key, "what did ash say?", "ash spoke", keyed=True) for key in keys]

    take(loop, *rows("t:1", "t:2"))
    before = ids_of(loop)
    assert take(loop, *rows("t:2")).retracted == 1
    assert ids_of(loop) == {"t:2": before["t:2"]}


def test_a_source_with_cursors_resumes_and_retracts_only_what_changed(loop):
    (source,) = loop.sources
    cursors = []

    def read(settings, cursor):
        cursors.append(cursor)
        yield from (
            records("ash", "elm") if cursor is None else [SourceRecord("ash.md", "what did ash say?", "ash said more")]
        )
        yield Cursor({"id": 2 if cursor is None else 3})

    sync_source(loop, source, connect(), read)
    assert sync_source(loop, source, connect(), read).retracted == 1
    assert cursors == [None, {"id": 2}]
    assert targets(loop) == ["ash said more", "elm spoke"]


def test_after_each_cursor_changes_are_tracked_again(loop, monkeypatch):
    monkeypatch.setattr(source_sync, "_BETWEEN_CURSORS", 2)
    (source,) = loop.sources
    changed = [
        SourceRecord(one.provenance, one.prompt, f"{one.answer} again") for one in records("ash", "elm", "fir", "oak")
    ]
    for one in (records("ash", "elm", "fir", "oak"), changed):
        found = [*one[:2], Cursor(1), *one[2:], Cursor(2)]
        report = sync_source(loop, source, connect(), lambda settings, cursor, found=found: iter(found))
    assert (report.new, report.retracted) == (4, 4)
    assert targets(loop) == [f"{name} spoke again" for name in ("ash", "elm", "fir", "oak")]


def test_a_restarted_reading_retracts_and_writes_its_cursor_at_the_end(loop):
    (source,) = loop.sources
    cursors = []

    def read(*found, fault=None):
        def reading(settings, cursor):
            cursors.append(cursor)
            for record in found:
                yield record
                yield Cursor(f"{record.provenance} of b", restarted=True)
            if fault:
                raise fault

        return reading

    sync_source(loop, source, connect(), lambda settings, cursor: iter([*records("ash", "elm"), Cursor("of a")]))
    with pytest.raises(SourceError):
        sync_source(loop, source, connect(), read(*records("oak"), fault=SourceError("the line is gone")))
    assert targets(loop) == ["ash spoke", "elm spoke", "oak spoke"]
    wrong = [SkippedRecord("oak.md", "expected a rating"), Cursor("of c", restarted=True)]
    report = sync_source(loop, source, connect(), lambda settings, cursor: iter(wrong))
    assert report.error.startswith("no record is usable")
    report = sync_source(loop, source, connect(), read(*records("oak", "ash")))
    assert (report.new, report.retracted) == (0, 1)
    assert targets(loop) == ["ash spoke", "oak spoke"]
    sync_source(loop, source, connect(), read())
    assert cursors == ["of a", "of a", "ash.md of b"]


def test_a_correction_becomes_a_correction_example(loop):
    take(loop, *records("ash", model_output="ash was silent"))
    artifact, _ = snapshot(loop, connect())
    (example,) = snapshot_examples(artifact)
    assert (example.corrected, example.target, example.output) == (True, "ash spoke", "ash was silent")


def test_a_quota_limits_a_source(make_loop):
    source = {**SOURCE, "max_fraction": 0.25}
    loop = make_loop(sources=[source], curation={"min_examples": 1, "validation_fraction": 0.0})
    events = loop.drop_folder / "a.jsonl"
    write_events(events, *corrected(["amy", "ben", "cid"]))
    ingest(loop, connect(), print)
    take(loop, *records("ash", "elm", "oak", "yew", "fir", "bay"))
    artifact, _ = snapshot(loop, connect())
    manifest = build_dataset(loop, artifact).manifest
    assert manifest.sources == {"imported": 1, "logs": 3}
    assert manifest.left_out["over the quota of imported"] == 5


def test_files_reach_the_dataset_card_through_dagster(make_loop, instance, tmp_path):
    rows = [{"instruction": "Be short.", "input": f"what did {n} say?", "output": f"{n} spoke"} for n in range(6)]
    (tmp_path / "files").mkdir()
    write_as(tmp_path / "files" / "a.parquet", rows)
    write_as(tmp_path / "files" / "b.csv", [{"prompt": "what did ash say?", "completion": "ash spoke"}, {"prompt": ""}])
    source = {**SOURCE, "path": str(tmp_path / "files"), "reward": 0.9}
    loop = make_loop(sources=[source], system_prompt="Be short.", curation={"min_examples": 1})
    metadata = materialized(loop, instance, "raw_logs", "curated_dataset")
    (skipped,) = metadata["raw_logs"]["skipped records"].value
    assert skipped.startswith("imported: found no fields")
    card = metadata["curated_dataset"]["card"].value
    assert "| imported | 7 | 100.0% |" in card
    path = settings.home() / "artifacts" / metadata["curated_dataset"]["folder in FINETUNE_HOME/artifacts"].value
    card_and_sample = (path / "card.md").read_text()
    assert card_and_sample.startswith(card) and '"provenance": "a.parquet:' in card_and_sample
    assert "spoke" in card_and_sample and "spoke" not in str(metadata)  # no text of examples in Dagster's database
    assert {row["reward"] for row in dataset_rows(path, "train")} == {0.9}
    assert "what did 0 say?" in {
        row["prompt"] for split in ("train", "validation") for row in dataset_rows(path, split)
    }
    assert [
        metadata["raw_logs"][name].value
        for name in ("new interactions", "new feedback events", "retracted interactions")
    ] == [7, 7, 0]
    renamed = make_loop(sources=[{**source, "name": "renamed"}], curation={"min_examples": 1})
    metadata = materialized(renamed, instance, "raw_logs")["raw_logs"]
    (skipped,) = metadata["skipped records"].value
    assert skipped.startswith("renamed: found no fields")
    assert "| imported | 7 | 0 | 0 | 0 | 0 |  | not declared, but still trains" in metadata["sources"].value


def test_a_retracted_source_is_restored_if_it_is_declared(make_loop):
    loop = make_loop(sources=[SOURCE], curation={"min_examples": 1})
    (source,) = loop.sources
    cursors = []

    def read(settings, cursor):
        cursors.append(cursor)
        yield from records("ash", "elm")
        yield Cursor("the end")

    sync_source(loop, source, connect(), read)
    undeclared = make_loop(curation={"min_examples": 1})
    with connect().read() as connection:
        assert undeclared_sources(connection, loop) == {}
        assert undeclared_sources(connection, undeclared) == {"imported": 2}
    assert source_sync.retract_source(loop.name, "imported", connect()) == 2
    with connect().read() as connection:
        assert undeclared_sources(connection, undeclared) == {}
    assert targets(loop) == []
    sync_source(loop, source, connect(), read)
    assert cursors == [None, None] and targets(loop) == ["ash spoke", "elm spoke"]


def test_concurrent_syncs_of_a_source_take_turns(loop):
    (source,) = loop.sources
    begun, go_on, said = threading.Event(), threading.Event(), []

    def slow(settings, cursor):
        yield from records("ash")
        begun.set()
        assert go_on.wait(60)

    def tell(message):
        said.append(message)
        go_on.set()

    first = threading.Thread(target=sync_source, args=(loop, source, connect(), slow))
    first.start()
    assert begun.wait(60)
    sync_source(loop, source, connect(), lambda settings, cursor: iter(records("ash", "elm")), tell)
    first.join()
    assert said == ["another sync of imported is running on this machine; waiting for it to finish"]
    assert targets(loop) == ["ash spoke", "elm spoke"]


def test_two_sources_of_one_name_are_an_error(make_loop):
    with pytest.raises(SettingsError, match="imported is taken"):
        make_loop(sources=[SOURCE, SOURCE])
    with pytest.raises(SettingsError, match="logs is taken"):
        make_loop(sources=[{**SOURCE, "name": "logs"}])


def test_a_restored_reward_of_the_source_counts_again(make_loop):
    rewards = []
    for reward in (0.8, 0.5, 0.8):
        loop = make_loop(sources=[{**SOURCE, "reward": reward}], curation={"min_examples": 1})
        take(loop, *records("ash"))
        (example,) = snapshot_examples(snapshot(loop, connect())[0])
        rewards.append(example.reward)
    assert rewards == [0.8, 0.5, 0.8]


def test_a_source_with_cursors_keeps_no_ids_in_memory(loop):
    take(loop, *records("ash"))
    asked = {"loop": loop.name, "created_at": datetime(2026, 1, 1, tzinfo=UTC), "prompt": "p", "output": "o"}
    rows = [
        {
            "id": f"00000000-0000-4000-8000-{n:012x}",
            "ingest_offset": n + 1_000,
            "source": "imported",
            "provenance": f"{n}",
            **asked,
        }
        for n in range(100_000)
    ]
    with connect().write() as connection:
        connection.execute(t.interactions.insert(), rows)
    del rows
    (source,) = loop.sources
    tracemalloc.start()
    report = sync_source(
        loop, source, connect(), lambda settings, cursor: iter([Cursor(1), *records("ash", "elm"), Cursor(2)])
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.records, report.new, report.retracted) == (2, 1, 0)
    assert peak < 4e6
