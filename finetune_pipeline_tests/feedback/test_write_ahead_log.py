"""What was acknowledged is in the store in the end, whatever happens to the process, the database or the disk."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import interactions
from finetune_pipeline.feedback import write_ahead_log
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import find, totals
from finetune_pipeline.feedback.write_ahead_log import Recorder, journal_folder, take_over_orphans
from finetune_pipeline.settings import FeedbackSettings, SettingsError
from finetune_pipeline_tests.conftest import feedback, interaction, uid


def rewards(loop):
    return reward_function(FeedbackSettings())


def count(database):
    with database.read() as connection:
        return totals(connection, "notes").interactions


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def recorder(db):
    made = Recorder(db, rewards)
    yield made
    made.close()


def leave(*events, torn=b"", name="left"):
    """A journal whose process is gone."""
    journal_folder().mkdir(parents=True, exist_ok=True)
    path = journal_folder() / f"{name}.jsonl"
    path.write_bytes(b"".join(event.model_dump_json().encode() + b"\n" for event in events) + torn)
    return path


# ---- in use


def test_an_event_is_in_the_journal_at_once_and_in_the_store_soon(db, recorder):
    assert recorder.add(interaction("a")).result(10) == "recorded"
    assert recorder.add(interaction("a")).result(10) == "duplicate"
    assert recorder.add(feedback("on a", "a", "thumbs_up")).result(10) == "recorded"
    assert recorder.add(feedback("early", "b", "thumbs_up")).result(10) == "waiting"
    assert (recorder.pending, recorder.path.stat().st_size) == (0, 0)
    with db.read() as connection:
        found = find(connection, uid("a"))
    assert (len(found.feedback), found.example.reward > 0) == (1, True)


def test_what_sixteen_threads_add_is_there_once_each(db, recorder):
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda n: recorder.add(interaction(f"{n % 100}")), range(400)))
    outcomes = [future.result(20) for future in futures]
    assert (outcomes.count("recorded"), outcomes.count("duplicate")) == (100, 300)
    assert count(db) == 100


def test_the_journal_is_gone_after_an_orderly_end(db):
    recorder = Recorder(db, rewards)
    for n in range(50):
        recorder.add(interaction(f"{n}"))
    recorder.close()
    assert count(db) == 50
    assert list(journal_folder().iterdir()) == []


def test_a_journal_stays_small_where_traffic_never_pauses(own_home, monkeypatch):
    monkeypatch.setattr(write_ahead_log, "SHRINK_BYTES", 20_000)
    database = connect()
    recorder = Recorder(database, rewards)
    stop, sizes = threading.Event(), []

    def add():
        n = 0
        while not stop.is_set():
            recorder.add(interaction(f"{threading.get_ident()} {n}", prompt="x" * 500))
            sizes.append(recorder.path.stat().st_size)
            n += 1
            time.sleep(0.001)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(sizes) > 600, 60)
    stop.set()
    for thread in threads:
        thread.join()
    recorder.close()
    assert count(database) == len(sizes)
    assert max(sizes) < 600 * 800


# ---- a database that cannot take them


def test_a_locked_database_delays_nobody_and_loses_nothing(own_home):
    database = connect()
    recorder = Recorder(database, rewards)
    other = sqlite3.connect(database.engine.url.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    slowest = 0.0
    for n in range(200):
        began = time.monotonic()
        last = recorder.add(interaction(f"{n}"))
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.01)
    assert slowest < 0.5
    assert recorder.pending
    assert not recorder.wait(0.1)
    assert not last.done()
    other.execute("COMMIT")
    other.close()
    assert last.result(20) == "recorded"
    recorder.close()
    assert count(database) == 200


def test_a_store_that_is_away_is_said_and_tried_again(own_home, monkeypatch):
    monkeypatch.setattr(write_ahead_log, "_RETRY_SECONDS", (0.05,))
    database = connect()
    recorder = Recorder(database, rewards)
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE interactions RENAME TO away"))
    done = recorder.add(interaction("a"))
    wait_until(lambda: recorder.trouble)
    assert "no such table" in recorder.trouble and str(recorder.path) in recorder.trouble
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO interactions"))
    assert done.result(10) == "recorded"
    assert recorder.trouble is None
    recorder.close()


def test_an_event_that_the_store_refuses_keeps_nothing_else_waiting(db):
    def picky(loop):
        def reward(given, about):
            if given.id == uid("bad"):
                raise ValueError("not this one")
            return 0.5

        return reward

    recorder = Recorder(db, picky)
    added = [interaction("a"), feedback("bad", "a", "thumbs_up"), feedback("good", "a", "thumbs_up")]
    outcomes = [recorder.add(event).result(10) for event in added]
    recorder.close()
    assert outcomes == ["recorded", "refused", "recorded"]
    assert "not this one" in recorder.refused
    aside = recorder.path.with_suffix(".refused")
    assert str(uid("bad")) in aside.read_text()
    assert str(uid("good")) not in aside.read_text()


# ---- a disk that is full


FILL = """
import resource, sys
from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.write_ahead_log import Recorder
from finetune_pipeline_tests.conftest import interaction

database = connect()
recorder = Recorder(database, lambda loop: None)
held = database.write()
held.__enter__()  # nothing leaves the journal meanwhile
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
kept, refused = [], None
for n in range(100):
    try:
        recorder.add(interaction(str(n)))
        kept.append(n)
    except ArtifactError as error:
        refused = str(error)
        break
size = recorder.path.stat().st_size
assert size <= 10_000
assert recorder.path.read_bytes().endswith(b"}\\n"), "half a line"
assert recorder.path.read_bytes().count(b"\\n") == len(kept)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.add(interaction("after"))
assert recorder.path.read_bytes().count(b"\\n") == len(kept) + 1
print(len(kept), refused, flush=True)
import os
os._exit(0)
"""


def test_a_full_disk_refuses_an_event_and_leaves_no_half_line(own_home):
    connect()
    ended = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    number, said = ended.stdout.split(maxsplit=1)
    assert said.startswith("the disk is full: ")
    assert take_over_orphans(connect(), rewards) == int(number) + 1
    assert count(connect()) == int(number) + 1


# ---- what a killed process left


def test_what_a_killed_process_left_is_taken_over_and_a_torn_line_is_not(db):
    events = [interaction("a"), feedback("on a", "a", "thumbs_up"), interaction("b")]
    path = leave(*events, torn=interaction("torn").model_dump_json().encode()[:-5])
    assert take_over_orphans(db, rewards) == 3
    assert count(db) == 2
    assert not path.exists()
    assert list(journal_folder().iterdir()) == []
    assert take_over_orphans(db, rewards) == 0


def test_what_was_in_the_store_already_is_not_taken_over_twice(db):
    leave(interaction("a"), interaction("b"), name="first")
    leave(interaction("b"), interaction("c"), name="second")
    assert take_over_orphans(db, rewards) == 3
    assert count(db) == 3


def test_the_journal_of_a_living_process_is_left_alone(db, recorder):
    other = db.write()
    with other:
        pass
    assert recorder.path.exists()
    assert take_over_orphans(db, rewards) == 0
    assert recorder.path.exists()
    assert recorder.add(interaction("a")).result(10) == "recorded"


def test_more_than_a_batch_is_taken_over(db, monkeypatch):
    monkeypatch.setattr(write_ahead_log, "BATCH", 7)
    leave(*(interaction(f"{n}") for n in range(30)))
    assert take_over_orphans(db, rewards) == 30


def test_an_event_from_a_clock_that_was_ahead_is_rejected_and_the_rest_is_recovered(db):
    later = datetime.now(UTC) + timedelta(days=1)
    path = leave(interaction("a"), interaction("ahead", created_at=later), interaction("b"))
    assert take_over_orphans(db, rewards) == 2
    (kept,) = path.with_suffix(".refused").read_text().splitlines()
    assert json.loads(kept)["id"] == str(uid("ahead"))


def test_lines_and_events_that_cannot_be_used_are_put_aside_and_the_rest_is_taken_over(db):
    def of_known_loops(loop):
        if loop != "notes":
            raise SettingsError(f"no loop is named {loop!r}")
        return rewards(loop)

    path = leave(interaction("a"), interaction("b").model_copy(update={"loop": "gone"}), interaction("c"))
    path.write_bytes(b"not json\n" + path.read_bytes())
    assert take_over_orphans(db, of_known_loops) == 2
    aside = path.with_suffix(".refused").read_text()
    assert aside.startswith("not json\n")
    assert str(uid("b")) in aside
    assert not path.exists()


def _take_over(folder, start, added):
    os.environ["FINETUNE_HOME"] = folder
    database = connect()
    start.wait()
    for _ in range(20):
        added.put(take_over_orphans(database, rewards))


def test_two_processes_that_race_take_an_orphan_over_once(own_home):
    database = connect()
    for n in range(20):
        leave(*(interaction(f"{n} {m}") for m in range(10)), name=f"journal{n}")
    context = multiprocessing.get_context("spawn")
    start, added = context.Event(), context.Queue()
    racers = [context.Process(target=_take_over, args=(str(own_home), start, added)) for _ in range(2)]
    for racer in racers:
        racer.start()
    start.set()
    total = sum(added.get(timeout=60) for _ in range(40))
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert total == count(database) == 200
    assert list(journal_folder().iterdir()) == []


def test_a_journal_that_vanishes_between_the_look_and_the_lock_is_no_error(own_home, monkeypatch):
    path = leave(interaction("a"))
    monkeypatch.setattr(Path, "glob", lambda *_: [path])
    path.unlink()
    assert take_over_orphans(connect(), rewards) == 0


KILLED = """
import sys
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.write_ahead_log import Recorder
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.settings import FeedbackSettings
from finetune_pipeline_tests.conftest import interaction

recorder = Recorder(connect(), lambda loop: reward_function(FeedbackSettings()))
n = 0
while True:
    recorder.add(interaction(str(n)))
    print(n, flush=True)
    n += 1
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(own_home):
    database = connect()
    told = 0
    for moment in (0.03, 0.1, 0.3):
        process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(moment)
        process.kill()
        lines = process.stdout.read().split("\n")
        process.wait()
        told = max([told, *(int(line) for line in lines[:-1] if line)])
    take_over_orphans(database, rewards)
    with database.read() as connection:
        ids = set(connection.execute(sa.select(interactions.c.id)).scalars())
    assert told > 10
    assert {str(uid(str(n))) for n in range(told + 1)} <= ids


# ---- power cuts


@pytest.mark.parametrize(("durability", "flushes"), [("kill", 0), ("power-cut", 3)])
def test_each_event_is_flushed_only_where_a_power_cut_must_lose_nothing(own_home, monkeypatch, durability, flushes):
    monkeypatch.setenv("FINETUNE_DURABILITY", durability)
    database = connect()
    recorder = Recorder(database, rewards)
    flushed, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(file), real(file)))
    for n in range(3):
        recorder.add(interaction(f"{n}"))
    assert flushed.count(recorder._file) == flushes
    recorder.close()
    assert count(database) == 3


def test_a_disk_that_cannot_flush_refuses_the_event(own_home, monkeypatch):
    monkeypatch.setenv("FINETUNE_DURABILITY", "power-cut")
    recorder = Recorder(connect(), rewards)

    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        recorder.add(interaction("a"))
    monkeypatch.undo()
    assert recorder.path.stat().st_size == 0
    recorder.close()


def test_a_server_that_only_reads_for_a_while_refuses_nothing_for_good(db):
    if db.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such state")
    with closing(Recorder(db, rewards)) as recorder:
        name = db.engine.url.database
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        db.engine.dispose()
        added = recorder.add(interaction("a"))
        wait_until(lambda: recorder.trouble)
        other = sa.create_engine(db.engine.url, isolation_level="AUTOCOMMIT")
        with other.connect() as connection:
            connection.execute(sa.text("SET default_transaction_read_only = off"))
            connection.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
        other.dispose()
        db.engine.dispose()
        assert added.result(20) == "recorded"


def test_a_closed_recorder_takes_nothing(db):
    recorder = Recorder(db, rewards)
    recorder.close()
    with pytest.raises(RuntimeError, match="is closed"):
        recorder.add(interaction("a"))
