"""Declared sources beside the log: feedback, erasure and export."""

import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.erasure import erase_user, person_data
from finetune_pipeline.feedback.formats import export_alpaca, export_events, import_rows
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.source_state import skipped_records
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.sources.row_readers import read_rows as read_rows_of
from finetune_pipeline.sources.source_record import SkippedRecord, SourceRecord
from finetune_pipeline_tests.conftest import interaction, snapshot_examples, uid
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events

from ...sources.test_files import write_as
from .declared_source import records, take, targets


def test_late_feedback_does_not_restore_a_retracted_record(loop, tmp_path):
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.feedback.store import record
    from finetune_pipeline.records import Feedback

    take(loop, *records("ash", "elm"))
    database = connect()
    with database.read() as connection:
        i = t.interactions.c
        id = connection.execute(sa.select(i.id).where(i.provenance == "ash.md")).scalar_one()
    take(loop, *records("elm"))
    thumb = {"kind": "thumbs_up", "interaction_id": id, "loop": loop.name, "created_at": "2026-01-01T00:00:00Z"}
    with database.write() as connection:
        record(
            connection,
            loop.name,
            [Feedback.model_validate({"id": "00000000-0000-4000-8000-000000000001", **thumb})],
            reward_function(loop.feedback),
        )
    assert targets(loop) == ["elm spoke"]


def erase(loop, user):
    with connect().write() as connection:
        return erase_user(connection, loop.name, user, default_reward)


def of_user(loop, user):
    with connect().read() as connection:
        return person_data(connection, loop.name, user)


def test_an_erased_author_is_never_read_from_a_declared_source(loop):
    take(
        loop, *records("ash", user="alice"), *records("elm", user="bob"), SkippedRecord("oak.md", "user: found 'alice'")
    )
    assert of_user(loop, "alice").sources == ("imported",)
    erase(loop, "alice")
    moved = [SourceRecord("line 2", "what did ash say about it all?", "ash spoke", user="alice", reward=0.9)]
    report = take(loop, *moved, *records("ash", "fir", user="alice"), *records("elm", user="bob"))
    assert (report.records, report.new, report.retracted, report.skipped) == (1, 0, 0, 3)
    assert not of_user(loop, "alice").count and targets(loop) == ["elm spoke"]
    with connect().read() as connection:
        reasons = {row.reason for row in skipped_records(connection, loop, 9)}
        everything = str([connection.execute(sa.select(table)).all() for table in t.metadata.sorted_tables])
    assert reasons == {"its author was erased"} and "alice" not in everything


def test_an_erased_author_is_not_ingested_but_may_log_again(loop):
    row = {"prompt": "what did ash say?", "completion": "ash spoke"}
    loop.drop_folder.mkdir(parents=True)
    write_as(loop.drop_folder / "a.jsonl", [{**row, "user": "alice"}])
    assert ingest(loop, connect(), print).recorded.interactions == 1
    erase(loop, "alice")
    write_as(loop.drop_folder / "b.jsonl", [{**row, "completion": "ash said more", "user": "alice"}, row])
    write_events(loop.drop_folder / "c.jsonl", interaction("later", user="alice"))
    done = ingest(loop, connect(), print)
    assert (done.recorded.interactions, done.rejected) == (1, 1)
    assert of_user(loop, "alice").interactions == (str(uid("later")),)
    with connect().read() as connection:
        (row,) = connection.execute(sa.select(t.rejected_lines)).all()
    assert (row.reason, row.excerpt) == ("its author was erased", "")


def test_an_application_cannot_claim_a_source(loop):
    asked, said = corrected(["ash"])
    write_events(loop.drop_folder / "a.jsonl", asked.model_copy(update={"source": "imported"}), said)
    done = ingest(loop, connect(), print)
    assert (done.recorded.interactions, done.recorded.feedback, done.rejected) == (0, 1, 1)
    write_events(loop.drop_folder / "b.jsonl", asked)
    ingest(loop, connect(), print)
    assert take(loop, *records("elm")).retracted == 0
    assert targets(loop) == ["ash spoke", "elm spoke"]


def test_exported_events_exclude_records_of_sources(loop, tmp_path):
    write_events(loop.drop_folder / "a.jsonl", *corrected(["amy"]))
    write_as(loop.drop_folder / "b.jsonl", [{"prompt": "what did ben say?", "completion": "ben spoke"}])
    ingest(loop, connect(), print)
    take(loop, *records("ash", "elm", "oak"))
    take(loop, *records("ash", "elm"))
    with connect().read() as connection:
        i = t.interactions.c
        ash = connection.execute(sa.select(i.id).where(i.provenance == "ash.md")).scalar_one()
    FeedbackClient(loop).correct(ash, "ash whispered")
    out = tmp_path / "out.jsonl"
    assert export_events(out, loop, connect()) == (3, 4)
    assert export_alpaca(tmp_path / "out.json", loop, connect(), list) == (4, 1)
    assert "oak" not in out.read_text() + (tmp_path / "out.json").read_text()
    before = targets(loop)
    other = connect(f"sqlite:///{tmp_path / 'other.db'}")
    assert import_rows(out, read_rows_of(out, 10**6), loop, other).rejected == 0
    (source,) = loop.sources
    sync_source(loop, source, other, lambda settings, cursor: iter(records("ash", "elm")))
    artifact, _ = snapshot(loop, other)
    assert sorted(example.target for example in snapshot_examples(artifact)) == [
        one for one in before if one != "ben spoke"
    ]
    assert "ash whispered" in before
