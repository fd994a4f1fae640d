"""Deleting a person's data, on a real database."""

import json
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.erasure import erase_user, loops_with_data, overwrite_deleted, person_data
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.pipeline.ingest import ingest_file
from finetune_pipeline_tests.conftest import START, feedback, interaction, uid

EVENTS = [
    # Ann's own, with what others thought of it.
    interaction("a1", user="ann", flag="low confidence"),
    feedback("a1-bob", "a1", "correction", correction="right", user="bob"),
    feedback("a1-check", "a1", "success", score=90),
    interaction("a2", user="ann"),
    feedback("a2-ann", "a2", "thumbs_up", user="ann"),
    # Bob's, where Ann had the last word.
    interaction("b1", user="bob", flag="low confidence"),
    feedback("b1-check", "b1", "success", score=100),
    feedback("b1-ann", "b1", "thumbs_down", user="ann"),
    interaction("b2", user="bob"),
    feedback("b2-ann", "b2", "correction", correction="as Ann has it", user="ann"),
    interaction("b3", user="bob"),
    feedback("b3-bob", "b3", "thumbs_up", user="bob"),
    # Of interactions that never came.
    feedback("x-ann", "x", "thumbs_up", user="ann"),
    feedback("x-bob", "x", "thumbs_up", user="bob"),
]
ANNS = ["a1", "a1-bob", "a1-check", "a2", "a2-ann", "b1-ann", "b2-ann", "x-ann"]


def record(db, *events, loop="notes"):
    with db.write() as connection:
        return store.record(connection, loop, events, default_reward)


def erase(db, user="ann", loop="notes"):
    with db.write() as connection:
        return erase_user(connection, loop, user, default_reward)


def counters(db, loop="notes"):
    with db.read() as connection:
        return store.counters(connection, loop)


def examples(db):
    with db.read() as connection:
        e = t.examples.c
        rows = connection.execute(sa.select(e.interaction_id, e.target, e.reward).order_by(e.ingest_offset)).all()
    return {interaction_id: (target, reward) for interaction_id, target, reward in rows}


def everything(db):
    """All that the tables hold, as text."""
    with db.read() as connection:
        return str([connection.execute(sa.select(table)).all() for table in t.metadata.sorted_tables])


def test_a_person_is_erased_completely_and_others_are_kept(db):
    record(db, *EVENTS)
    with db.read() as connection:
        held = person_data(connection, "notes", "ann")
    assert {*held.interactions, *held.feedback} == {str(uid(name)) for name in ANNS}
    assert set(held.affected_interactions) == {str(uid(name)) for name in ("a1", "a2", "b1", "b2", "x")}
    done = erase(db)
    assert (done.interactions, done.feedback) == (2, 6)
    assert done.ids == {str(uid(name)) for name in ANNS}
    assert "ann" not in everything(db) and "Ann" not in everything(db)
    # Bob's answers are worth again what they were without Ann.
    assert examples(db) == {str(uid("b1")): ("answer b1", 1.0), str(uid("b3")): ("answer b3", 1.0)}


def test_the_counters_are_as_if_the_person_had_never_existed(db, tmp_path):
    record(db, *EVENTS)
    erase(db)
    other = connect(f"sqlite:///{tmp_path / 'other.db'}")
    record(other, *(event for event in EVENTS if str(event.id) not in {str(uid(name)) for name in ANNS}))
    assert counters(db) == counters(other)
    assert counters(db) == {
        "interactions": 3, "flagged": 1, "feedback": 3, "feedback.success": 1, "feedback.thumbs_up": 2,
        "examples": 2, "rewarded": 2, "unmatched": 1,
    }  # fmt: skip


def test_erased_events_are_not_recorded_again(db):
    record(db, *EVENTS)
    erase(db)
    again = record(db, *EVENTS)
    assert (again.interactions, again.feedback) == (0, 0)
    assert {event.id for event in EVENTS} == again.duplicate_ids
    assert counters(db)["interactions"] == 3
    assert "ann" not in everything(db)
    assert erase(db).ids == frozenset()


def test_an_erasure_has_ingest_offsets(db):
    record(db, *EVENTS)
    with db.read() as connection:
        before = store.newest_offset(connection)
    erase(db)
    with db.read() as connection:
        rows = connection.execute(sa.select(t.erased_events.c.id, t.erased_events.c.ingest_offset)).all()
        after = store.newest_offset(connection)
    # And a hash of the name, for what declared sources give.
    assert len(rows) == len(ANNS) + 1 and {row.id for row in rows} > {str(uid(name)) for name in ANNS}
    assert sorted(row.ingest_offset for row in rows) == list(range(before + 1, after + 1))


def test_another_loop_and_another_name_are_left_alone(db):
    record(db, *EVENTS, interaction("c", user="Ann"), interaction("d", user="ann2"))
    strange = interaction("e", user="ann").model_copy(update={"loop": "other"})
    record(db, strange, loop="other")
    erase(db)
    assert counters(db)["interactions"] == 5
    assert counters(db, "other") == {"interactions": 1}
    with db.read() as connection:
        assert loops_with_data(connection) == ["notes", "other"]
    assert erase(db, loop="other").interactions == 1
    assert counters(db, "other") == {}


def test_review_decisions_are_erased_with_their_interaction_and_reviewer(db):
    record(db, *EVENTS)
    made = [("on-hers", "a1", "eve", "notes"), ("hers", "b1", "ann", "notes"), ("on-own", "a2", "ann", "notes"),
            ("others", "b1", "eve", "notes"), ("elsewhere", "c", "ann", "other")]  # fmt: skip
    rows = [
        {"id": id, "loop": loop, "ingest_offset": 1_000 + n, "interaction_id": str(uid(on)), "decision": "edit",
         "target": f"as {by} has it", "reviewer": by, "created_at": START}
        for n, (id, on, by, loop) in enumerate(made)
    ]  # fmt: skip
    with db.write() as connection:
        connection.execute(t.review_decisions.insert(), rows)
    with db.read() as connection:
        assert set(person_data(connection, "notes", "ann").decisions) == {"on-hers", "hers", "on-own"}
    assert erase(db).decisions == 3
    with db.read() as connection:
        assert set(connection.execute(sa.select(t.review_decisions.c.id)).scalars()) == {"others", "elsewhere"}
    erase(db, loop="other")
    assert "ann" not in everything(db)


@pytest.mark.parametrize(
    ("user", "excerpt", "goes"),
    [
        ("ann", '{"prompt": "p", "user": "ann"', True),
        ("ann", '{"user":"ann","prompt"', True),
        ("ann", '["ann"', True),
        ("ann", '{"user": "anna"}', False),
        ("ann", '{"user": "Ann"}', False),
        ("ann", '{"prompt": "ann said so"}', False),
        ("output", '{"output": "x", "user": "bob"}', False),  # the key of a field is no person
        ("output", '{"output" : "x", "user": "output"}', True),
        ("Zoë", '{"user": "Zo\\u00eb"}', True),
        ("Zoë", '{"user": "Zoë"}', True),
        ('a"b', '{"user": "a\\"b"}', True),
        ("%", '{"user": "ann"}', False),
        ("_nn", '{"user": "ann"}', False),
    ],
)
def test_rejected_lines_that_name_the_person_are_deleted(db, user, excerpt, goes):
    row = {"loop": "notes", "path": "log.jsonl", "line": 1, "reason": "not JSON", "excerpt": excerpt}
    with db.write() as connection:
        connection.execute(t.rejected_lines.insert(), [row, {**row, "line": 2, "excerpt": "other"}])
    assert erase(db, user).rejected_lines == goes
    with db.read() as connection:
        assert connection.execute(sa.select(t.rejected_lines.c.line)).scalars().all() == ([2] if goes else [1, 2])


# Lines of a log that are rejected although, or because, Ann's name comes late; only names and ids are kept of them.
ANNS_LINE = {"prompt": "p" * 500, "output": 5, "user": "ann", "created_at": "2026-01-01", "id": str(uid("new"))}
LINES = {
    "the name is far behind": (json.dumps({"event": "interaction", **ANNS_LINE}), True),
    "no JSON": ('{"event": "interaction", "prompt": "' + "p" * 500 + '", "user": "ann"', True),
    "of feedback on hers": (json.dumps({"event": "feedback", "interaction_id": str(uid("a1")), "kind": "?"}), True),
    "of her feedback, without a name": (json.dumps({"event": "feedback", "id": str(uid("b1-ann")), "kind": "?"}), True),
    "only in the reason": (json.dumps({"event": "ann", "id": str(uid("other"))}), True),
    "of somebody else": (json.dumps({"event": "interaction", **ANNS_LINE, "user": "bob"}), False),
    "of an earlier version, cut": ("{" + "x" * 199, True),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(("line", "goes"), LINES.values(), ids=LINES)
def test_rejected_lines_are_found_wherever_they_name_the_person(db, tmp_path, loop, suffix, line, goes):
    record(db, *EVENTS)
    path = tmp_path / f"log.{suffix}"
    path.write_text(f"[{line}]" if suffix == "json" else f"{line}\n")
    assert ingest_file(loop, db, path, default_reward).rejected == 1
    if line.startswith("{x"):
        with db.write() as connection:
            connection.execute(t.rejected_lines.update().values(excerpt=line))
    with db.read() as connection:
        (kept,) = connection.execute(sa.select(t.rejected_lines.c.excerpt)).scalars()
    assert "ppp" not in kept
    if suffix == "json" and not line.endswith("}"):
        return  # of a damaged array nothing is kept
    assert erase(db).rejected_lines == goes


@pytest.mark.parametrize("user", ["'; DROP TABLE interactions; --", "%", "_", "", "ünï 🚧"])
def test_a_name_is_data(db, user):
    record(db, *EVENTS, interaction("z", user=user))
    assert erase(db, user).interactions == 1
    assert counters(db)["interactions"] == 5


def test_more_events_than_fit_into_one_statement_are_erased(db):
    many = [interaction(f"i{n}", user="ann") for n in range(1_200)]
    record(db, *many, *(feedback(f"f{n}", f"i{n}", "thumbs_up") for n in range(1_200)))
    done = erase(db)
    assert (done.interactions, done.feedback, len(done.ids)) == (1_200, 1_200, 2_400)
    assert counters(db) == {} and examples(db) == {}


def test_a_failure_erases_nothing(db):
    record(db, *EVENTS)
    before = everything(db)

    def broken(feedback, interaction):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), db.write() as connection:
        erase_user(connection, "notes", "ann", broken)
    assert everything(db) == before


def test_concurrent_writers_lose_nothing(db):
    record(db, *EVENTS)
    faults = []

    def write(number):
        try:
            for step in range(10):
                name = f"{number}-{step}"
                record(db, interaction(name, user="bob"), feedback(f"f{name}", "b1", "thumbs_up", user="bob"), *EVENTS)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert erase(db).interactions == 2
    for thread in threads:
        thread.join()
    assert not faults
    counts = counters(db)
    assert (counts["interactions"], counts["feedback"]) == (3 + 40, 3 + 40)
    assert "ann" not in everything(db)


def test_sqlites_files_do_not_contain_the_text_any_more(tmp_path):
    path = tmp_path / "tests.db"
    db = connect(f"sqlite:///{path}")
    secret = "the words that nobody else may read"
    record(db, *(interaction(f"b{n}", user="bob") for n in range(50)))
    record(db, interaction("a", user="ann", prompt=secret, output=f"{secret} twice " * 500))
    record(db, feedback("f", "a", "correction", correction=f"{secret} corrected"))
    files = [path, tmp_path / "tests.db-wal"]
    assert any(secret.encode() in file.read_bytes() for file in files)
    erase(db)
    assert overwrite_deleted(db)
    assert not any(secret.encode() in file.read_bytes() for file in files if file.exists())


READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT count(*) FROM interactions").fetchone()
print("reading", flush=True)
sys.stdin.read()
"""


def test_another_reader_keeps_the_text_in_the_files_which_is_reported_soon(tmp_path):
    path, log = tmp_path / "tests.db", tmp_path / "tests.db-wal"
    db = connect(f"sqlite:///{path}")
    record(db, interaction("a", user="ann", output="the words that nobody else may read"))
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with reader:
        assert reader.stdout.readline() == "reading\n"
        erase(db)
        waits = []
        sa.event.listen(db.engine, "checkout", lambda raw, *_: raw.set_trace_callback(waits.append))
        assert not overwrite_deleted(db)
        limit = waits[waits.index("PRAGMA wal_checkpoint(TRUNCATE)") - 1]
        assert int(limit.removeprefix("PRAGMA busy_timeout=")) <= 10_000
        assert b"nobody else" in log.read_bytes()
        reader.stdin.close()
    assert overwrite_deleted(db)
    assert not any(b"nobody else" in file.read_bytes() for file in (path, log) if file.exists())
    with db.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
