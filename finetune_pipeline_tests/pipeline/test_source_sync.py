"""Declared sources in the store: new, changed, retracted and restored records, and their provenance."""

import re
import threading
import tracemalloc
from datetime import UTC, datetime

import dagster as dg
import pytest
import sqlalchemy as sa

from finetune_pipeline import settings
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.erasure import erase_user, person_data
from finetune_pipeline.feedback.formats import export_alpaca, export_events, import_rows
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.source_state import skipped_records, undeclared_sources
from finetune_pipeline.feedback.store import counters
from finetune_pipeline.pipeline import source_sync
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.settings import SettingsError
from finetune_pipeline.sources.row_readers import read_rows as read_rows_of
from finetune_pipeline.sources.source_record import Cursor, SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline_tests.conftest import dataset_rows, interaction, snapshot_examples, uid
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events

from ..sources.test_files import write_as

SOURCE = {"kind": "files", "name": "imported", "path": "somewhere"}


@pytest.fixture(autouse=True)
def on_each_database(url, monkeypatch):
    """Every test here runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


@pytest.fixture
def loop(make_loop):
    return make_loop(sources=[SOURCE], curation={"min_examples": 1, "validation_fraction": 0.0})


def records(*names, **changes):
    return [
        SourceRecord(f"{name}.md", f"what did {name} say about it all?", f"{name} spoke", **changes) for name in names
    ]


def take(loop, *found):
    (source,) = loop.sources
    return sync_source(loop, source, connect(), lambda settings, cursor: iter(found))


def targets(loop):
    artifact, _ = snapshot(loop, connect())
    return sorted(example.target for example in snapshot_examples(artifact))


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


def test_a_source_that_fails_half_way_retracts_nothing(loop):
    take(loop, *records("ash", "elm"))
    (source,) = loop.sources

    def read(settings, cursor):
        yield from records("oak")
        raise SourceError("the disk is gone")

    with pytest.raises(SourceError):
        sync_source(loop, source, connect(), read)
    assert targets(loop) == ["ash spoke", "elm spoke", "oak spoke"]  # records before the error are kept


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (PermissionError(13, "Permission denied", "/closed/vault"), "PermissionError: .*'/closed/vault'"),
        (OSError(36, "File name too long"), "OSError: .*File name too long"),
        (RuntimeError("Could not determine home directory."), "RuntimeError: Could not"),
        (UnicodeError("label empty or too long"), "UnicodeError: label empty"),
        (SourceError("ann@example.com stands in several rows"), r"^\[EMAIL\] stands in several rows"),
    ],
)
def test_a_failing_source_is_reported_and_the_others_are_read(make_loop, monkeypatch, fault, said):
    def read(settings, cursor):
        if settings.name == "closed":
            raise fault
        yield from records("ash")

    monkeypatch.setattr(source_sync, "reader_for", lambda source: read)
    loop = make_loop(sources=[{**SOURCE, "name": "closed"}, SOURCE])
    closed, imported = source_sync.sync_sources(loop, connect(), print)
    assert re.search(said, closed.error) and "ann@" not in closed.error
    assert (imported.error, imported.new) == ("", 1)


def test_a_path_in_an_unknown_home_is_reported(make_loop):
    source = {"kind": "vault", "name": "notes", "path": "~nosuchuser/vault"}
    (report,) = source_sync.sync_sources(make_loop(sources=[source]), connect(), print)
    assert "RuntimeError" in report.error and "correct the source's settings" in report.error


def test_unusable_records_are_kept_with_their_reason(loop):
    report = take(
        loop,
        SkippedRecord("broken.md", "its frontmatter is not YAML"),
        SourceRecord("empty.md", "", "nothing"),
        *records("ash"),
    )
    assert report.skipped == 2
    with connect().read() as connection:
        found = {row.provenance: row.reason for row in skipped_records(connection, loop, 10)}
    assert found["broken.md"] == "its frontmatter is not YAML"
    assert "prompt" in found["empty.md"]
    assert take(loop, *records("ash")).skipped == 0
    with connect().read() as connection:
        assert not skipped_records(connection, loop, 10)


def test_reasons_of_skipped_records_show_no_secret(loop):
    long = f"{'word ' * 14}ann.smith@example.com is behind it"  # messages are cut between words
    report = take(
        loop,
        SkippedRecord("people:ann@example.com", "stars is 'hf_" + "aB1" * 12 + "'; ratings knows 1, 5"),
        SkippedRecord("people:bob@example.com", f"found {short_repr(long)}, expected a role"),
        SourceRecord("People.md#Call ann@example.com", "what did ash say?", "ash spoke"),
    )
    assert report.skipped == 2
    with connect().read() as connection:
        (row,) = skipped_records(connection, loop, 10)
    assert row.provenance == "people:[EMAIL]" and not {"ann", "aB1"} & set(row.reason.replace(".", " ").split())
    artifact, _ = snapshot(loop, connect())
    made = build_dataset(loop, artifact)
    (learnt,) = dataset_rows(made.path, "train")
    assert learnt["provenance"] == "People.md#Call [EMAIL]"
    assert made.manifest.redacted == {"email": 1} and "ann@" not in (made.path / "card.md").read_text()


def test_a_correction_becomes_a_correction_example(loop):
    take(loop, *records("ash", model_output="ash was silent"))
    artifact, _ = snapshot(loop, connect())
    (example,) = snapshot_examples(artifact)
    assert (example.corrected, example.target, example.output) == (True, "ash spoke", "ash was silent")


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


def materialized(loop, instance, *names):
    """Materialize these assets and return their metadata."""
    job = definitions(loop).resolve_job_def("notes_loop")
    run = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", name]) for name in names])
    made = (event.materialization for event in run.get_asset_materialization_events())
    return {one.asset_key.path[-1]: one.metadata for one in made}


def test_files_reach_the_dataset_card_through_dagster(make_loop, instance, tmp_path):
    rows = [{"instruction": "Be short.", "input": f"what did {n} say?", "output": f"{n} spoke"} for n in range(6)]
    (tmp_path / "files").mkdir()
    write_as(tmp_path / "files" / "a.parquet", rows)
    write_as(tmp_path / "files" / "b.csv", [{"prompt": "what did ash say?", "completion": "ash spoke"}, {"prompt": ""}])
    source = {**SOURCE, "path": str(tmp_path / "files"), "reward": 0.9}
    loop = make_loop(sources=[source], system_prompt="Be short.", curation={"min_examples": 1})
    metadata = materialized(loop, instance, "raw_logs", "curated_dataset")
    (skipped,) = metadata["raw_logs"]["skipped records"].value
    assert skipped.startswith("imported: b.csv:3: found no fields")
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
    assert skipped.startswith("renamed: b.csv:3: ")
    assert "| imported | 7 | 0 | 0 | 0 | not declared, but still trains" in metadata["sources"].value


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


def test_deferred_records_are_not_retracted_and_not_an_error(loop):
    take(loop, *records("ash", "elm", "elm.md [2]", "oak"))
    report = take(loop, *records("ash"), SkippedRecord("elm.md", "no tokens are left", deferred=True))
    assert (report.retracted, report.skipped, report.error) == (1, 1, "")
    assert targets(loop) == ["ash spoke", "elm spoke", "elm.md [2] spoke"]
    assert take(loop, SkippedRecord("elm.md", "no tokens are left", deferred=True)).error == ""


def test_a_source_without_usable_records_retracts_nothing(make_loop, tmp_path):
    write_as(tmp_path / "a.jsonl", [{"prompt": f"what did {n} say?", "completion": f"{n} spoke"} for n in range(3)])
    source = {**SOURCE, "path": str(tmp_path / "a.jsonl")}
    loop = make_loop(sources=[source], curation={"min_examples": 1})
    source_sync.sync_sources(loop, connect(), print)
    wrong = make_loop(sources=[{**source, "format": "sharegpt"}], curation={"min_examples": 1})
    (report,) = source_sync.sync_sources(wrong, connect(), print)
    assert (report.records, report.retracted, report.skipped) == (0, 0, 3)
    assert report.error.startswith("no record is usable, so nothing was retracted (a.jsonl:1: ")
    assert targets(loop) == ["0 spoke", "1 spoke", "2 spoke"]


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


def test_records_below_something_unreadable_are_not_retracted(loop):
    take(
        loop,
        *records("sub/ash", "sub/elm", "sub2/oak", "yew"),
        SourceRecord("fir.md#Top", "what did fir say?", "fir spoke"),
    )
    report = take(
        loop,
        SkippedRecord("sub", "cannot be read", unreadable=True),
        SkippedRecord("fir.md", "is closed", unreadable=True),
    )
    assert (report.retracted, report.skipped) == (2, 2)
    assert report.error.endswith("fir.md: is closed; sub: cannot be read")
    assert targets(loop) == ["fir spoke", "sub/ash spoke", "sub/elm spoke"]
    assert take(loop, SkippedRecord("", "the folder itself cannot be listed", unreadable=True)).retracted == 0
    assert take(loop, SkippedRecord("sub", "is no folder any more"), *records("yew")).retracted == 3
    assert targets(loop) == ["yew spoke"]


@pytest.mark.parametrize(("name", "whole"), [("a.json", True), ("a.json", False), ("a.parquet", True)])
def test_an_incomplete_file_retracts_nothing_and_fails_the_check(make_loop, instance, tmp_path, name, whole):
    path = tmp_path / "files" / name
    path.parent.mkdir()
    write_as(path, [{"prompt": f"what did {n} say?", "completion": f"{n} spoke"} for n in range(4)])
    loop = make_loop(
        sources=[{**SOURCE, "path": str(path.parent)}],
        curation={"min_examples": 1, "validation_fraction": 0.0},
    )
    materialized(loop, instance, "raw_logs")
    path.write_bytes(path.read_bytes()[:-8] if whole else b" ")
    run = (
        definitions(loop)
        .resolve_job_def("notes_loop")
        .execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", "raw_logs"])])
    )
    assert targets(loop) == [f"{n} spoke" for n in range(4)]
    (check,) = [one for one in run.get_asset_check_evaluations() if one.check_name == "sources_read"]
    assert not check.passed
    assert check.description.startswith(f"imported: not read to its end, and nothing retracted there: {name}: row")


def test_a_restored_reward_of_the_source_counts_again(make_loop):
    rewards = []
    for reward in (0.8, 0.5, 0.8):
        loop = make_loop(sources=[{**SOURCE, "reward": reward}], curation={"min_examples": 1})
        take(loop, *records("ash"))
        (example,) = snapshot_examples(snapshot(loop, connect())[0])
        rewards.append(example.reward)
    assert rewards == [0.8, 0.5, 0.8]


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


def test_only_the_first_skipped_records_are_kept_and_all_are_counted(loop, monkeypatch):
    monkeypatch.setattr(source_sync, "_MAX_SKIPPED", 3)
    assert take(loop, *(SkippedRecord(f"{n}", "is broken") for n in range(9))).skipped == 9
    with connect().read() as connection:
        assert len(skipped_records(connection, loop, 99)) == 3


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
    assert export_alpaca(tmp_path / "out.json", loop, connect(), str) == (4, 1)
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


def test_a_loop_without_records_says_which_source_failed(make_loop, tmp_path):
    loop = make_loop(sources=[{**SOURCE, "path": str(tmp_path / "nowhere")}])
    done = source_sync.sync_sources(loop, connect(), print)
    with pytest.raises(SourceError, match=r"imported failed: .*nowhere does not exist"):
        snapshot(loop, connect(), done)
