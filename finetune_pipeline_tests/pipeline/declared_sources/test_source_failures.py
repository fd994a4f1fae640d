"""A declared source that fails or has unusable records retracts nothing, and says why."""

import json
import re

import dagster as dg
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.source_state import skipped_records
from finetune_pipeline.pipeline import source_preview, source_sync
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.orchestration.conftest import definitions

from ...sources.test_files import write_as
from .declared_source import SOURCE, materialized, records, take, targets


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

    monkeypatch.setattr(source_sync, "reader_for", lambda *_: read)
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


def test_reasons_are_redacted_with_the_kinds_of_the_loop(make_loop, monkeypatch):
    loop = make_loop(sources=[SOURCE], curation={"redaction": {"ipv4": True, "email": False}})
    text, clean = "host 10.1.2.3 of ann@example.com", "host [IPV4] of ann@example.com"
    take(loop, *records("ash"), SkippedRecord("10.1.2.3", f"found {text!r}"))
    with connect().read() as connection:
        (row,) = skipped_records(connection, loop, 10)
    assert (row.provenance, row.reason) == ("[IPV4]", f"found {clean!r}")
    assert clean in take(loop, *records("ash"), SkippedRecord("a.md", text, unreadable=True)).error
    assert "('[IPV4]'" in take(loop, SkippedRecord("10.1.2.3", text)).error

    def read(settings, cursor):
        yield from [*records("ash"), SkippedRecord("a.md", text), SourceRecord("b.md", "", "x", user=text)]
        raise SourceError(text)

    for module in (source_sync, source_preview):
        monkeypatch.setattr(module, "reader_for", lambda *_: read)
    assert [report.error for report in source_sync.sync_sources(loop, connect(), print)] == [clean]
    preview = source_preview.preview_source(loop, SOURCE["name"], 1)
    assert (preview.error, preview.skipped[clean]) == (clean, 1)
    log = loop.drop_folder / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"event": text}) + "\n")
    assert clean in str(ingest(loop, connect(), print).rejections)


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
    assert report.error.startswith("no record is usable, so nothing was retracted ('a.jsonl:1': ")
    assert targets(loop) == ["0 spoke", "1 spoke", "2 spoke"]


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
    assert report.error.endswith("'fir.md': is closed; 'sub': cannot be read")
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
    assert check.description.startswith("imported: not read to its end, and nothing retracted there: '...': row")


def test_only_the_first_skipped_records_are_kept_and_all_are_counted(loop, monkeypatch):
    monkeypatch.setattr(source_sync, "_MAX_SKIPPED", 3)
    assert take(loop, *(SkippedRecord(f"{n}", "is broken") for n in range(9))).skipped == 9
    with connect().read() as connection:
        assert len(skipped_records(connection, loop, 99)) == 3


def test_a_loop_without_records_says_which_source_failed(make_loop, tmp_path):
    loop = make_loop(sources=[{**SOURCE, "path": str(tmp_path / "nowhere")}])
    done = source_sync.sync_sources(loop, connect(), print)
    with pytest.raises(SourceError, match=r"imported failed: .*nowhere does not exist"):
        snapshot(loop, connect(), done)
