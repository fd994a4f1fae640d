import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.store import RecordResult, counters
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_events import ingested_events
from finetune_pipeline.pipeline.source_sync import sync_sources
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError
from finetune_pipeline.sources.ingest_ledger import read_totals, rejected_lines
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline_tests.conftest import START, feedback, interaction, uid
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events
from finetune_pipeline_tests.sources.test_files import write_as
from finetune_pipeline_tests.waiting import wait_until


def take(loop):
    return ingest(loop, connect(), lambda text: None)


def interactions(loop):
    with connect().read() as connection:
        return counters(connection, loop.name)["interactions"]


def test_only_what_is_new_is_read(loop):
    file = loop.drop_folder / "log.jsonl"
    write_events(file, *corrected(["ash", "birch"]))
    assert take(loop).recorded == RecordResult(2, 2, 0)
    assert take(loop).files == 0
    write_events(file, *corrected(["cedar"]))
    again = take(loop)
    assert (again.lines, again.recorded) == (2, RecordResult(1, 1, 0))


def test_a_rewritten_or_copied_file_adds_nothing_twice(loop):
    file = loop.drop_folder / "log.jsonl"
    write_events(file, *corrected(["ash"]))
    take(loop)
    text = file.read_text()
    file.write_text("\n" + text)  # rewritten: other bytes before the offset
    (loop.drop_folder / "copy.jsonl").write_text(text)
    assert take(loop).recorded == RecordResult(0, 0, 4)
    assert interactions(loop) == 1


def logged(*names):
    """Return lines of equal length."""
    return "".join(interaction(name).model_dump_json() + "\n" for name in names).encode()


def put_back(file, stat):
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def written_over(file, new):
    with file.open("r+b") as out:
        out.write(new)


def truncated_and_written_again(file, new):
    with file.open("r+b") as out:
        out.truncate()
        out.write(new)


def replaced(file, new):
    (file.parent / ".new").write_bytes(new)
    (file.parent / ".new").replace(file)


def link_led_elsewhere(file, new):
    other = file.parent / "other.log"
    other.write_bytes(new)
    file.unlink()
    file.symlink_to(other)


CHANGES = [written_over, truncated_and_written_again, replaced, link_led_elsewhere]


@pytest.mark.parametrize("keep_mtime", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("more", [(), ("n8", "n9")], ids=["same size", "longer"])
def test_a_rewritten_log_is_read_again_and_nothing_counts_twice(loop, change, keep_mtime, more):
    # More than any buffer, with the change at its very start.
    names = [f"a{n}" for n in range(10, 90)]
    file = loop.drop_folder / "log.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(logged("o1", *names))
    before = file.stat()
    assert take(loop).recorded.interactions == 81
    change(file, logged("n1", *names, *more))
    if keep_mtime:
        put_back(file, before)
    done = take(loop)
    assert (done.files, done.rewritten, done.recorded.interactions) == (1, 1, 1 + len(more))
    assert interactions(loop) == 82 + len(more)
    assert take(loop).files == 0


def test_a_touched_log_is_verified_and_not_read_again(loop):
    file = loop.drop_folder / "log.jsonl"
    write_events(file, interaction("ash"))
    take(loop)
    file.touch()
    done = take(loop)
    assert (done.files, done.lines, done.rewritten) == (1, 0, 0)
    assert take(loop).files == 0


def test_a_log_that_shrank_and_grew_again_is_read_from_its_start(loop):
    """As `copytruncate` of logrotate leaves it. If the writer does not append, the file begins with a hole."""
    file = loop.drop_folder / "log.jsonl"
    write_events(file, *(interaction(f"old{n}") for n in range(5)))
    take(loop)
    size = file.stat().st_size
    file.write_bytes(logged(*(f"new{n}" for n in range(9))))
    assert take(loop).recorded.interactions == 9
    with file.open("r+b") as out:
        out.truncate(0)
        out.seek(2 * size)
        out.write(logged("last"))
    done = take(loop)
    assert (done.recorded.interactions, done.rejected, interactions(loop)) == (1, 1, 15)


@pytest.mark.parametrize("start", [0, 1, 60])
def test_a_hole_that_is_filled_later_loses_nothing(loop, start):
    """As downloads and file systems do that allocate first: events replace NUL bytes."""
    whole = logged(*(f"n{number}" for number in range(200)))
    begin, end = len(logged(*(f"n{number}" for number in range(start)))) + 20, len(whole) - 5_000
    file = loop.drop_folder / "log.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(whole[:begin] + b"\0" * (end - begin) + whole[end:])
    before = file.stat()
    assert take(loop).rejected > 0
    assert interactions(loop) > start
    written_over(file, whole)
    put_back(file, before)
    done = take(loop)
    assert (done.lines, done.rejected, done.rewritten, interactions(loop)) == (200, 0, 1, 200)
    with connect().read() as connection:
        assert rejected_lines(connection, "notes", 10) == []


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_table_that_is_rewritten_at_equal_size_is_read_again(loop, name):
    file = drop(loop, name)
    take(loop)
    before = file.stat()
    content = file.read_bytes()
    other = drop(loop, f"b{file.suffix}", [{**row, "completion": row["completion"].upper()} for row in ROWS])
    new = other.read_bytes().ljust(len(content))
    other.unlink()
    assert len(new) == len(content)
    written_over(file, new)
    put_back(file, before)
    assert (take(loop).recorded, interactions(loop)) == (RecordResult(2, 2, 0), 4)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (interaction("a"), interaction("a", output="another answer"), True),
        (interaction("a"), interaction("a", prompt="another prompt"), True),
        (interaction("a"), interaction("a", confidence=0.1), True),
        (interaction("a"), interaction("a", history=[{"role": "user", "content": "before"}]), True),
        (feedback("f", "a", "thumbs_up"), feedback("f", "a", "thumbs_down"), True),
        (feedback("f", "a", "thumbs_up"), feedback("f", "b", "thumbs_up"), True),
        (feedback("f", "a", "correction", correction="x"), feedback("f", "a", "correction", correction="y"), True),
        (interaction("a"), interaction("a"), False),
        (interaction("a"), interaction("a", created_at=START + timedelta(days=1)), False),  # logged again, later
        (interaction("a"), interaction("a", latency_ms=7.0, confidence=None), False),
    ],
)
@pytest.mark.parametrize("apart", [True, False], ids=["in two files", "in one file"])
def test_an_id_that_returns_with_other_content_is_reported_and_changes_nothing(loop, first, second, told, apart):
    write_events(loop.drop_folder / "a.jsonl", first)
    if apart:
        take(loop)
    other = loop.drop_folder / ("b.jsonl" if apart else "a.jsonl")
    write_events(other, second)
    said = []
    done = ingest(loop, connect(), said.append)
    assert (done.conflicts, done.recorded.duplicates) == (int(told), 1)
    where = f"{other}:{1 if apart else 2}: the {second.event} {second.id} already exists with different content"
    assert [one.startswith(where) for one in done.conflicting] == [True] * told
    assert ("already exists with different content" in said[-1]) == told
    with connect().read() as connection:
        table = {"interaction": t.interactions, "feedback": t.feedback}[first.event]
        row = connection.execute(sa.select(table)).one()
    stored = "output" if first.event == "interaction" else "kind"
    assert getattr(row, stored) == getattr(first, stored)


AHEAD = datetime(2099, 1, 1, tzinfo=UTC)
TIMES = {
    "with a zone": (lambda: AHEAD.isoformat(), False),
    "without a zone": (lambda: AHEAD.replace(tzinfo=None).isoformat(), False),
    "seconds": (lambda: int(AHEAD.timestamp()), False),
    "milliseconds": (lambda: int(AHEAD.timestamp() * 1_000), False),
    "the last there is": (lambda: "9999-12-31T23:59:59Z", False),
    "an hour ahead in a zone behind": (lambda: minutes_ahead(60, zone=-11), False),
    "minutes ahead": (lambda: minutes_ahead(5), True),  # clocks differ
    "minutes ahead in a zone ahead": (lambda: minutes_ahead(5, zone=14), True),
    "long ago": (lambda: "1970-01-01T00:00:00Z", True),
}


def minutes_ahead(minutes, zone=0):
    return (datetime.now(UTC) + timedelta(minutes=minutes)).astimezone(timezone(timedelta(hours=zone))).isoformat()


@pytest.mark.parametrize(
    ("name", "form", "when"),
    [
        *(("log.jsonl", form, when) for form in ("event", "conversation") for when in TIMES),
        *((f"log.{kind}", "conversation", "without a zone") for kind in ("json", "csv", "parquet")),
    ],
)
def test_a_time_in_the_future_is_rejected_however_it_is_written(loop, name, form, when):
    moment, taken = TIMES[when]
    row = {"prompt": "p", "output": "o", "created_at": moment()}
    if form == "event":
        row |= {"event": "interaction", "id": str(uid("a"))}
    drop(loop, name, [row])
    done = take(loop)
    assert (done.recorded.interactions, done.rejected) == (int(taken), int(not taken))
    if not taken:
        with connect().read() as connection:
            (line,) = rejected_lines(connection, "notes", 10)
        assert line.reason.startswith("created_at: ") and "is in the future" in line.reason


def test_an_ingest_recomputes_examples_that_a_migration_marked(loop):
    write_events(loop.drop_folder / "log.jsonl", *corrected(["ash"]))
    take(loop)
    before = examples_of(loop)
    with connect().write() as connection:
        connection.execute(t.examples.update().values(content_hash="", target="of before the repair"))
    said = []
    ingest(loop, connect(), said.append)
    assert examples_of(loop) == before
    assert said[0].startswith("recomputed the examples of 1 interaction by")


def test_a_note_about_a_future_day_counts_as_of_today(loop):
    record = SourceRecord("a.md", "what is planned?", "a meeting", created_at=AHEAD)
    made, said = ingested_events(loop, record)
    assert made.created_at == said.created_at < datetime.now(UTC)


def test_bad_lines_are_quarantined_with_file_line_and_reason(loop):
    file = loop.drop_folder / "log.jsonl"
    write_events(file, interaction("ash"))
    with file.open("ab") as out:
        out.write(b"broken\n\xff\xfe\n")
    write_events(file, interaction("birch"))
    assert take(loop).rejected == 2
    with connect().read() as connection:
        rows = rejected_lines(connection, "notes", 10)
    assert [(row.path, row.line) for row in rows] == [(str(file), 2), (str(file), 3)]
    assert rows[0].reason.startswith("not JSON") and rows[1].reason.startswith("not UTF-8")
    assert interactions(loop) == 2


def test_the_reason_of_a_rejected_line_shows_no_secret(loop):
    file = loop.drop_folder / "log.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"ann@example.com": 1, "note": 2}) + "\n")
    assert take(loop).rejected == 1
    with connect().read() as connection:
        (row,) = rejected_lines(connection, "notes", 10)
    assert row.reason.startswith("found the fields '[EMAIL], note'")


def test_a_fixed_file_is_read_again_and_its_quarantine_is_lifted(loop):
    file = loop.drop_folder / "log.jsonl"
    write_events(file, interaction("ash"))
    good = file.read_text()
    file.write_text(good + "broken\n")
    take(loop)
    file.write_text(good + interaction("birch").model_dump_json() + "\n")
    assert take(loop).rejected == 0
    with connect().read() as connection:
        assert rejected_lines(connection, "notes", 10) == []


def test_missing_and_empty_folders_are_errors_that_say_what_to_do(make_loop):
    missing = make_loop(ingest={"folders": ["nowhere/at/all"]})
    with pytest.raises(SourceError, match=r"nowhere/at/all does not exist; create it, or correct ingest\.folders"):
        take(missing)
    empty = make_loop()
    take(empty)
    with pytest.raises(SourceError, match=r"has no interactions.*then run again"):
        snapshot(empty, connect())


def test_if_every_line_is_rejected_the_first_reason_is_shown(loop):
    """In the file's line of the log, and in the error of a loop without interactions."""
    lines = [interaction(str(n)).model_copy(update={"loop": "another"}).model_dump_json() for n in range(3)]
    (loop.drop_folder).mkdir(parents=True)
    (loop.drop_folder / "sample.jsonl").write_text("\n".join(lines) + "\n")
    log = []
    ingest(loop, connect(), log.append)
    reason = "belongs to loop 'another', but this file is read for 'notes'; name that loop with --loop"
    assert log[0].endswith(f"3 lines rejected (first reason: line 1: {reason})")
    with pytest.raises(SourceError) as error:
        snapshot(loop, connect())
    assert f"has a readable line. 3 of 3 lines rejected; first reason: sample.jsonl:1: {reason}. Fix" in str(
        error.value
    )


def test_an_unreadable_file_is_reported_and_the_others_are_read(loop, monkeypatch):
    write_events(loop.drop_folder / "bad.jsonl", interaction("ash"))
    write_events(loop.drop_folder / "good.jsonl", interaction("birch"))
    really_open = Path.open

    def refuse(path, *arguments, **more):
        if path.name == "bad.jsonl":
            raise PermissionError(13, "Permission denied")
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)  # root, as which CI may run, can read every file
    done = take(loop)
    assert done.unreadable == [f"{loop.drop_folder / 'bad.jsonl'}: Permission denied; fix that, or move the file away"]
    assert interactions(loop) == 1


def test_an_incomplete_last_line_is_counted_until_it_is_complete(loop):
    file = loop.drop_folder / "log.jsonl"
    whole = interaction("ash").model_dump_json() + "\n"
    file.parent.mkdir(parents=True)
    file.write_text(whole + whole[:30])
    take(loop)
    with connect().read() as connection:
        assert read_totals(connection, "notes").unfinished == 1
    file.write_text(whole + interaction("birch").model_dump_json() + "\n")
    take(loop)
    with connect().read() as connection:
        assert read_totals(connection, "notes").unfinished == 0
    assert interactions(loop) == 2


def test_the_same_records_give_the_same_snapshot(loop):
    write_events(loop.drop_folder / "log.jsonl", *corrected(["ash", "birch"]))
    take(loop)
    first, _ = snapshot(loop, connect())
    assert snapshot(loop, connect())[0] == first
    assert [path.name for path in first.path.parent.iterdir() if path.is_dir()] == [first.path.name]
    assert sorted(path.name for path in first.path.iterdir()) == ["manifest.json", "records-0001.parquet"]
    assert (first.manifest.interactions, first.manifest.feedback, first.manifest.watermark) == (2, 2, 4)


INGEST = """
import sys
from pathlib import Path
from finetune_pipeline.database import connect
from finetune_pipeline.pipeline import ingest as module
from finetune_pipeline.settings import read_loop
module.BATCH = 20
print("ready", flush=True)
module.ingest(read_loop(Path(sys.argv[1])), connect(), lambda text: None)
"""


def test_a_kill_loses_nothing_and_doubles_nothing(loop, tmp_path):
    write_events(loop.drop_folder / "log.jsonl", *(interaction(f"i{n}") for n in range(3_000)))
    command = [sys.executable, "-c", INGEST, str(tmp_path / "defs" / "notes" / "defs.yaml")]
    connect()
    seen = [0]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT_ROOT, env={**os.environ})
        process.stdout.readline()
        wait_until(lambda: interactions(loop) > seen[-1] + 100)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(interactions(loop))
    take(loop)
    assert interactions(loop) == 3_000
    assert seen == sorted(seen)
    with connect().read() as connection:
        row = connection.execute(sa.select(t.ingested_files)).one()
    assert (row.lines, row.rejected, row.finished) == (3_000, 0, True)


def test_two_concurrent_ingests_record_once(loop, tmp_path):
    write_events(loop.drop_folder / "log.jsonl", *(interaction(f"i{n}") for n in range(500)))
    command = [sys.executable, "-c", INGEST, str(tmp_path / "defs" / "notes" / "defs.yaml")]
    processes = [subprocess.Popen(command, cwd=PROJECT_ROOT, env={**os.environ}) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert interactions(loop) == 500


ROWS = [{"prompt": f"what did {name} say?", "completion": f"{name} spoke"} for name in ("ash", "elm")]


def drop(loop, name, rows=ROWS):
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    return write_as(loop.drop_folder / name, rows)


def examples_of(loop):
    """Return prompt, target, reward, source and provenance of the store's examples."""
    i, e = t.interactions.c, t.examples.c
    query = sa.select(i.prompt, e.target, e.reward, i.source, i.provenance).join(t.examples, i.id == e.interaction_id)
    with connect().read() as connection:
        return sorted(tuple(row) for row in connection.execute(query))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_dropped_conversations_are_ingested_once_with_file_and_line(loop, name):
    drop(loop, name)
    assert take(loop).recorded == RecordResult(2, 2, 0)
    first = {"a.csv": 2}.get(name, 1)
    assert examples_of(loop)[0] == ("what did ash say?", "ash spoke", 0.8, "ingested", f"{name}:{first}")
    assert take(loop).files == 0
    drop(loop, "copy.jsonl")
    assert take(loop).recorded == RecordResult(0, 0, 4)


def test_formats_may_be_mixed_and_a_rows_reward_counts(make_loop):
    loop = make_loop(system_prompt="Be short.", ingest={"default_reward": 0.5})
    file = loop.drop_folder / "log.jsonl"
    write_events(file, *corrected(["ash"]))
    with file.open("a") as out:
        for row in (
            {"instruction": "Be short.", "input": "a wall", "output": "wall", "reward": -0.5},
            {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]},
            {"prompt": "p", "output": "no", "correction": "yes"},
            {"conversations": "none"},
            {"instruction": "Be short.", "input": "", "output": "o"},
        ):
            out.write(json.dumps(row) + "\n")
    done = take(loop)
    assert (done.rejected, done.recorded) == (2, RecordResult(4, 4, 0))
    rows = {row[0]: row[1:] for row in examples_of(loop)}
    assert rows["a wall"] == ("wall", -0.5, "ingested", "log.jsonl:3")
    assert rows["user"][:2] == ("assistant", 0.5) and rows["p"][:2] == ("yes", 0.5)
    assert rows["please note what ash said about the ash matter"][2] is None  # from the log
    with connect().read() as connection:
        bad, nothing = rejected_lines(connection, "notes", 10)
    assert (bad.line, "conversations: found a text" in bad.reason) == (6, True)
    assert (nothing.line, "own system prompt" in nothing.reason) == (7, True)


def test_another_reward_is_feedback_on_the_same_conversation(loop):
    drop(loop, "a.csv")
    take(loop)
    drop(loop, "b.csv", [{**ROWS[0], "reward": -1.0}])
    assert take(loop).recorded == RecordResult(0, 1, 1)
    assert [row[2] for row in examples_of(loop)] == [-1.0, 0.8]


def test_a_changed_file_is_read_again_and_its_bad_rows_are_reported(loop):
    file = drop(loop, "a.csv", [*ROWS, {"prompt": "p"}])
    assert take(loop).rejected == 1
    with connect().read() as connection:
        assert [(row.path, row.line) for row in rejected_lines(connection, "notes", 10)] == [(str(file), 4)]
        assert read_totals(connection, "notes").unfinished == 0
    drop(loop, "a.csv", [*ROWS, {"prompt": "p", "completion": "c"}])
    assert (take(loop).recorded, interactions(loop)) == (RecordResult(1, 1, 4), 3)
    with connect().read() as connection:
        assert rejected_lines(connection, "notes", 10) == []


def test_a_csv_that_may_be_incomplete_waits(loop):
    file = drop(loop, "a.csv")
    file.write_bytes(file.read_bytes()[:-4])  # ends within its last answer
    assert (take(loop).files, interactions(loop)) == (0, 0)
    os.utime(file, (time.time() - 60,) * 2)  # the file is complete
    assert take(loop).recorded.interactions == 2


def test_bad_rows_of_a_one_line_array_are_reported_separately(loop):
    file = drop(loop, "a.json")
    file.write_text(json.dumps([{"x": 1}, *ROWS, {"x": 2}, 7]))
    assert (take(loop).rejected, interactions(loop)) == (3, 2)
    with connect().read() as connection:
        assert [row.line for row in rejected_lines(connection, "notes", 10)] == [1, 4, 5]


def test_a_file_name_that_is_not_utf_8_is_reported(loop):
    drop(loop, "a.csv").rename(loop.drop_folder / os.fsdecode(b"a\xfc.csv"))
    drop(loop, "b.csv", ROWS[:1])
    done = take(loop)
    assert interactions(loop) == 1
    assert done.unreadable == [f"{loop.drop_folder}/a\ufffd.csv: its name is not UTF-8; rename it"]


def test_links_out_of_the_drop_folder_are_not_read(loop, tmp_path):
    drop(loop, "a.csv")
    write_as(tmp_path / "outside.jsonl", [{"prompt": "outside", "completion": "c"}])
    (loop.drop_folder / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert (take(loop).files, interactions(loop)) == (1, 2)


def test_a_kill_within_a_table_loses_and_doubles_nothing(loop, tmp_path):
    drop(loop, "a.csv", [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(2_000)])
    command = [sys.executable, "-c", INGEST, str(tmp_path / "defs" / "notes" / "defs.yaml")]
    connect()
    for least in (1, 500):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT_ROOT, env={**os.environ})
        process.stdout.readline()
        wait_until(lambda least=least: interactions(loop) >= least)
        process.send_signal(signal.SIGKILL)
        process.wait()
    take(loop)
    assert len(examples_of(loop)) == interactions(loop) == 2_000
    with connect().read() as connection:
        row = connection.execute(sa.select(t.ingested_files)).one()
    assert (row.lines, row.rejected, row.finished) == (2_001, 0, True)


def test_no_source_may_be_named_ingested(make_loop):
    with pytest.raises(SettingsError, match="ingested is taken"):
        make_loop(sources=[{"kind": "files", "name": "ingested", "path": "x"}])


def test_dropped_files_can_have_a_quota(make_loop):
    quota = {"kind": "ingested", "max_examples": 3}
    loop = make_loop(sources=[quota], curation={"min_examples": 1, "validation_fraction": 0.0})
    rows = [{"prompt": f"what is row {n} of it?", "completion": f"it is {n}"} for n in range(9)]
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    (loop.drop_folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    take(loop)
    assert sync_sources(loop, connect(), print) == []  # it is not read as a declared source
    manifest = build_dataset(loop, snapshot(loop, connect())[0]).manifest
    assert (manifest.train, manifest.left_out) == (3, {"over the quota of ingested": 6})
