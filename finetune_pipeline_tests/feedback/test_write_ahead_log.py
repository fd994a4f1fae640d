"""Every acknowledged event reaches the store, whatever happens to the process, the database or the disk."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import interactions
from finetune_pipeline.feedback import write_ahead_log
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import counters, find_interaction
from finetune_pipeline.feedback.write_ahead_log import Recorder, recover_orphans, write_ahead_log_folder
from finetune_pipeline.settings import FeedbackSettings, SettingsError
from finetune_pipeline_tests.conftest import feedback, interaction, uid
from finetune_pipeline_tests.waiting import wait_until


def rewards(loop):
    return reward_function(FeedbackSettings())


def count(database):
    with database.read() as connection:
        return counters(connection, "notes")["interactions"]


@pytest.fixture
def recorder(db):
    made = Recorder(db, rewards)
    yield made
    made.close()


def leave(*events, torn=b"", name="left"):
    """Write the log of a process that was killed."""
    write_ahead_log_folder().mkdir(parents=True, exist_ok=True)
    path = write_ahead_log_folder() / f"{name}.jsonl"
    path.write_bytes(b"".join(event.model_dump_json().encode() + b"\n" for event in events) + torn)
    return path


# ---- in use


def test_an_event_is_in_the_log_at_once_and_in_the_store_soon(db, recorder):
    assert recorder.add(interaction("a")).result(60) == "recorded"
    assert recorder.add(interaction("a")).result(60) == "duplicate"
    assert recorder.add(feedback("on a", "a", "thumbs_up")).result(60) == "recorded"
    assert recorder.add(feedback("early", "b", "thumbs_up")).result(60) == "unmatched"
    assert (recorder.pending, recorder.path.stat().st_size) == (0, 0)
    with db.read() as connection:
        found = find_interaction(connection, uid("a"))
    assert (len(found.feedback), found.example.reward > 0) == (1, True)


def test_an_interaction_is_found_in_the_log_until_the_store_has_it(db, recorder, monkeypatch):
    resume, move = threading.Event(), recorder._move_to_store
    monkeypatch.setattr(recorder, "_move_to_store", lambda lines: (resume.wait(60), move(lines)))
    futures = [recorder.add(interaction(name)) for name in ("a", "b")] + [
        recorder.add(feedback("on c", "c", "thumbs_up"))
    ]
    assert recorder.find_pending(uid("b")) == interaction("b")
    assert recorder.find_pending(uid("c")) is recorder.find_pending(uid("on c")) is None
    resume.set()
    assert [future.result(60) for future in futures] == ["recorded", "recorded", "unmatched"]
    assert recorder.find_pending(uid("b")) is None


def test_what_sixteen_threads_add_is_stored_once_each(db, recorder):
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda n: recorder.add(interaction(f"{n % 100}")), range(400)))
    outcomes = [future.result(60) for future in futures]
    assert (outcomes.count("recorded"), outcomes.count("duplicate")) == (100, 300)
    assert count(db) == 100


def test_the_log_is_deleted_on_close(db):
    recorder = Recorder(db, rewards)
    for n in range(50):
        recorder.add(interaction(f"{n}"))
    recorder.close()
    assert count(db) == 50
    assert list(write_ahead_log_folder().iterdir()) == []


def test_the_log_stays_small_when_traffic_never_pauses(own_home, monkeypatch):
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
            stop.wait(0.001)  # about 4000 events a second from all threads, which never pause together

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(sizes) > 600)
    stop.set()
    for thread in threads:
        thread.join()
    recorder.close()
    assert count(database) == len(sizes)
    assert max(sizes) < 600 * 800


# ---- a database that cannot take them


def test_a_locked_database_delays_no_caller_and_loses_nothing(own_home):
    database = connect()
    recorder = Recorder(database, rewards)
    other = sqlite3.connect(database.engine.url.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    users = set()
    sa.event.listen(database.engine, "checkout", lambda *_: users.add(threading.get_ident()))
    for n in range(200):
        last = recorder.add(interaction(f"{n}"))
    wait_until(lambda: users)  # the recorder's own thread waits for the database
    assert threading.get_ident() not in users  # the caller never does
    assert recorder.pending
    assert not recorder.wait(0.1)
    assert not last.done()
    other.execute("COMMIT")
    other.close()
    assert last.result(60) == "recorded"
    recorder.close()
    assert count(database) == 200


def test_an_unavailable_store_is_reported_and_retried(own_home, monkeypatch):
    monkeypatch.setattr(write_ahead_log, "_RETRY_SECONDS", (0.05,))
    database = connect()
    recorder = Recorder(database, rewards)
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE interactions RENAME TO away"))
    done = recorder.add(interaction("a"))
    wait_until(lambda: recorder.store_error)
    assert "no such table" in recorder.store_error and str(recorder.path) in recorder.store_error
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO interactions"))
    assert done.result(60) == "recorded"
    assert recorder.store_error is None
    recorder.close()


def test_an_event_that_the_store_rejects_blocks_no_others(db):
    def picky(loop):
        def reward(given, about):
            if given.id == uid("bad"):
                raise ValueError("not this one")
            return 0.5

        return reward

    recorder = Recorder(db, picky)
    added = [interaction("a"), feedback("bad", "a", "thumbs_up"), feedback("good", "a", "thumbs_up")]
    outcomes = [recorder.add(event).result(60) for event in added]
    recorder.close()
    assert outcomes == ["recorded", "dead_lettered", "recorded"]
    assert "not this one" in recorder.dead_letter
    dead_letters = recorder.path.with_suffix(".dead_letter")
    assert str(uid("bad")) in dead_letters.read_text()
    assert str(uid("good")) not in dead_letters.read_text()


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
held.__enter__()  # nothing leaves the log meanwhile
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
kept, message = [], None
for n in range(100):
    try:
        recorder.add(interaction(str(n)))
        kept.append(n)
    except ArtifactError as error:
        message = str(error)
        break
size = recorder.path.stat().st_size
assert size <= 10_000
assert recorder.path.read_bytes().endswith(b"}\\n"), "half a line"
assert recorder.path.read_bytes().count(b"\\n") == len(kept)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.add(interaction("after"))
assert recorder.path.read_bytes().count(b"\\n") == len(kept) + 1
print(len(kept), message, flush=True)
import os
os._exit(0)
"""


def test_a_full_disk_rejects_an_event_and_leaves_no_half_line(own_home):
    connect()
    ended = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    number, said = ended.stdout.split(maxsplit=1)
    assert said.startswith("the disk is full: ")
    assert recover_orphans(connect(), rewards) == int(number) + 1
    assert count(connect()) == int(number) + 1


# ---- what a killed process left


def test_the_log_of_a_killed_process_is_recovered_without_its_torn_line(db):
    events = [interaction("a"), feedback("on a", "a", "thumbs_up"), interaction("b")]
    path = leave(*events, torn=interaction("torn").model_dump_json().encode()[:-5])
    assert recover_orphans(db, rewards) == 3
    assert count(db) == 2
    assert not path.exists()
    assert list(write_ahead_log_folder().iterdir()) == []
    assert recover_orphans(db, rewards) == 0


def test_an_event_that_is_stored_already_is_not_added_again(db):
    leave(interaction("a"), interaction("b"), name="first")
    leave(interaction("b"), interaction("c"), name="second")
    assert recover_orphans(db, rewards) == 3
    assert count(db) == 3


def test_the_log_of_a_running_process_is_left_alone(db, recorder):
    other = db.write()
    with other:
        pass
    assert recorder.path.exists()
    assert recover_orphans(db, rewards) == 0
    assert recorder.path.exists()
    assert recorder.add(interaction("a")).result(60) == "recorded"


def test_the_log_of_an_earlier_version_is_recovered_under_the_new_field_names(db, own_home):
    path = leave(interaction("a", variant="champion"), feedback("on a", "a", "thumbs_up"))
    earlier = own_home / "journal"
    earlier.mkdir()
    for name, into in {"task": "loop", "arm": "variant", "origin": "provenance"}.items():
        path.write_text(path.read_text().replace(f'"{into}":', f'"{name}":'))
    unknown = json.dumps({"event": "interaction", "task": "notes", "verdict": 1}) + "\n"
    path.rename(earlier / path.name).open("a").write(unknown)
    assert '"task":' in (earlier / path.name).read_text() and '"arm":' in (earlier / path.name).read_text()
    assert recover_orphans(db, rewards) == 2
    with db.read() as connection:
        found = find_interaction(connection, uid("a"))
    assert (found.interaction.loop, found.interaction.variant, len(found.feedback)) == ("notes", "champion", 1)
    assert list(earlier.iterdir()) == []
    (dead_letters,) = write_ahead_log.dead_letter_files()
    assert dead_letters.read_text() == unknown
    before = earlier / "before.refused"  # dead letters of that version are still known
    before.touch()
    assert write_ahead_log.dead_letter_files() == [dead_letters, before]


def test_more_than_one_batch_is_recovered(db, monkeypatch):
    monkeypatch.setattr(write_ahead_log, "BATCH", 7)
    leave(*(interaction(f"{n}") for n in range(30)))
    assert recover_orphans(db, rewards) == 30


def test_an_event_from_the_future_becomes_a_dead_letter(db):
    later = datetime.now(UTC) + timedelta(days=1)
    path = leave(interaction("a"), interaction("ahead", created_at=later), interaction("b"))
    assert recover_orphans(db, rewards) == 2
    (kept,) = path.with_suffix(".dead_letter").read_text().splitlines()
    assert json.loads(kept)["id"] == str(uid("ahead"))


def test_unusable_lines_and_events_become_dead_letters_and_the_rest_is_recovered(db):
    def of_known_loops(loop):
        if loop != "notes":
            raise SettingsError(f"no loop is named {loop!r}")
        return rewards(loop)

    path = leave(interaction("a"), interaction("b").model_copy(update={"loop": "gone"}), interaction("c"))
    path.write_bytes(b"not json\n" + path.read_bytes())
    assert recover_orphans(db, of_known_loops) == 2
    dead_letters = path.with_suffix(".dead_letter").read_text()
    assert dead_letters.startswith("not json\n")
    assert str(uid("b")) in dead_letters
    assert not path.exists()


def _recover(folder, start, added):
    os.environ["FINETUNE_HOME"] = folder
    database = connect()
    start.wait()
    for _ in range(20):
        added.put(recover_orphans(database, rewards))


def test_two_racing_processes_recover_a_log_once(own_home):
    database = connect()
    for n in range(20):
        leave(*(interaction(f"{n} {m}") for m in range(10)), name=f"log{n}")
    context = multiprocessing.get_context("spawn")
    start, added = context.Event(), context.Queue()
    racers = [context.Process(target=_recover, args=(str(own_home), start, added)) for _ in range(2)]
    for racer in racers:
        racer.start()
    start.set()
    total = sum(added.get(timeout=60) for _ in range(40))
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert total == count(database) == 200
    assert list(write_ahead_log_folder().iterdir()) == []


def test_a_log_that_vanishes_before_it_is_locked_is_no_error(own_home, monkeypatch):
    path = leave(interaction("a"))
    monkeypatch.setattr(write_ahead_log, "log_files", lambda: [path])
    path.unlink()
    assert recover_orphans(connect(), rewards) == 0


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
    for events_before_the_kill in (10, 100, 300):
        process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
        first = "".join(process.stdout.readline() for _ in range(events_before_the_kill))
        process.kill()
        lines = (first + process.stdout.read()).split("\n")
        process.wait()
        told = max([told, *(int(line) for line in lines[:-1] if line)])
    recover_orphans(database, rewards)
    with database.read() as connection:
        ids = set(connection.execute(sa.select(interactions.c.id)).scalars())
    assert told > 10
    assert {str(uid(str(n))) for n in range(told + 1)} <= ids


# ---- power cuts


@pytest.mark.parametrize(("durability", "flushes"), [("kill", 0), ("power-cut", 3)])
def test_each_event_is_flushed_only_when_power_cuts_must_lose_nothing(own_home, monkeypatch, durability, flushes):
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


def test_a_disk_that_cannot_flush_rejects_the_event(own_home, monkeypatch):
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


def test_a_read_only_server_causes_a_retry_and_no_dead_letter(db):
    if db.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such state")
    with closing(Recorder(db, rewards)) as recorder:
        name = db.engine.url.database
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        db.engine.dispose()
        added = recorder.add(interaction("a"))
        wait_until(lambda: recorder.store_error)
        other = sa.create_engine(db.engine.url, isolation_level="AUTOCOMMIT")
        with other.connect() as connection:
            connection.execute(sa.text("SET default_transaction_read_only = off"))
            connection.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
        other.dispose()
        db.engine.dispose()
        assert added.result(60) == "recorded"


def test_a_closed_recorder_rejects_events(db):
    recorder = Recorder(db, rewards)
    recorder.close()
    with pytest.raises(RuntimeError, match="is closed"):
        recorder.add(interaction("a"))
