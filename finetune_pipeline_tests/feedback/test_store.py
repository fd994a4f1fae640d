import itertools
import random
import threading
from collections import Counter

import pytest
import sqlalchemy as sa

from finetune_pipeline.curation.acceptance import Policy, quick_filters
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import feedback, interaction, uid


@pytest.fixture(autouse=True)
def on_each_database(url, monkeypatch):
    """Every test here runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


def record(*events):
    with connect().write() as connection:
        return store.record(connection, "notes", events, default_reward)


def new(after=0):
    with connect().read() as connection:
        return list(store.new_examples(connection, "notes", after, min_reward=0.3))


def test_an_event_counts_once_however_often_it_arrives():
    events = [interaction("a"), feedback("f", "a", "thumbs_up")]
    assert record(*events, *events) == store.RecordResult(interactions=1, feedback=1, duplicates=2)
    assert record(*events) == store.RecordResult(duplicates=2)
    with connect().read() as connection:
        assert dict(store.counters(connection, "notes")) == {
            "interactions": 1, "feedback": 1, "feedback.thumbs_up": 1, "examples": 1, "rewarded": 1,
        }  # fmt: skip


def test_feedback_may_come_before_its_interaction():
    record(feedback("f", "a", "thumbs_up"))
    assert new() == []
    with connect().read() as connection:
        assert store.counters(connection, "notes")["unmatched"] == 1
    record(interaction("a"))
    assert [example.prompt for example in new()] == ["prompt a"]


def test_late_feedback_makes_an_example_new_until_it_is_judged():
    record(interaction("a", confidence=0.2), feedback("f", "a", "success", score=90))
    with connect().read() as connection:
        seen = store.newest_offset(connection)
    assert new(after=seen) == []
    record(feedback("g", "a", "thumbs_up", minutes=5))
    (example,) = new(after=seen)
    assert example.confirmed
    with connect().write() as connection:
        store.mark_judged(connection, "notes", [content_hash(example.prompt, example.target)] * 2)
    assert new(after=0) == []


def test_judged_contents_are_read_from_an_iterator_in_chunks():
    hashes = (f"{number % 1_100:064}" for number in range(1_300))  # some repeat, within a chunk and across chunks
    with connect().write() as connection:
        store.mark_judged(connection, "notes", hashes)
        stored = connection.execute(sa.select(t.judged_examples.c.content_hash)).scalars().all()
    assert sorted(stored) == [f"{number:064}" for number in range(1_100)]


def test_concurrent_writers_lose_nothing_and_share_no_offset():
    connect()
    threads = [
        threading.Thread(target=record, args=(*(interaction(f"{w}-{i}") for i in range(20)), interaction("same")))
        for w in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with connect().read() as connection:
        sequences = connection.execute(sa.select(t.interactions.c.ingest_offset)).scalars().all()
    assert len(sequences) == len(set(sequences)) == 8 * 20 + 1


def test_a_failed_transaction_leaves_no_trace():
    with pytest.raises(RuntimeError), connect().write() as connection:
        store.record(connection, "notes", [interaction("a")], default_reward)
        raise RuntimeError("killed in between")
    with connect().read() as connection:
        assert store.counters(connection, "notes")["interactions"] == 0
        assert store.newest_offset(connection) == 0


def test_an_event_of_another_loop_changes_nothing():
    record(interaction("a"), feedback("f", "a", "thumbs_up"))
    strange = feedback("g", "a", "thumbs_down", minutes=5).model_copy(update={"loop": "other"})
    with connect().write() as connection:
        store.record(connection, "other", [strange], default_reward)
    assert len(new()) == 1


@pytest.mark.parametrize("text", ["'; DROP TABLE interactions; --", "%s {0} \\", "ünïcödé 🚧", "x" * 100_000])
def test_logged_text_is_data(text):
    record(interaction("a", prompt=text, output=text, user=text[:200]), feedback("f", "a", "thumbs_up"))
    assert [(example.prompt, example.target) for example in new()] == [(text, text)]


def counted():
    """The loop_counters, counted from the tables."""
    with connect().read() as connection:
        rows = connection.execute(sa.select(t.feedback)).all()
        known = set(connection.execute(sa.select(t.interactions.c.id)).scalars())
        flags = connection.execute(sa.select(t.interactions.c.flag)).scalars().all()
        examples = connection.execute(sa.select(t.examples)).all()
    counts = {
        "interactions": len(known),
        "feedback": len(rows),
        **{f"feedback.{kind}": n for kind, n in Counter(row.kind for row in rows).items()},
        "examples": len(examples),
        "corrected": sum(row.corrected for row in examples),
        "rewarded": sum(row.reward > 0 and not row.corrected for row in examples),
        "unmatched": sum(row.interaction_id not in known for row in rows),
        "flagged": sum(flag is not None for flag in flags),
    }
    return {name: value for name, value in counts.items() if value}


def loop_counters():
    with connect().read() as connection:
        return store.counters(connection, "notes")


def test_the_counters_equal_the_counted_rows_in_any_order_of_arrival():
    chance = random.Random(3)
    names = [f"{i}" for i in range(12)]
    events = [interaction(name, flag="confidence 0.10 is below 0.85" if int(name) % 3 == 0 else None) for name in names]
    for number in range(60):
        on = chance.choice([*names, "never", "never either"])
        kind = chance.choice(["thumbs_up", "thumbs_down", "correction", "success", "validation_failure", "rating"])
        more = {"correction": {"correction": f"better {number}"}, "rating": {"rating": chance.choice("12345")}}
        given = more.get(kind, {"score": chance.randrange(101)} if kind in {"success", "validation_failure"} else {})
        events.append(feedback(f"f{number}", on, kind, minutes=number, **given))
    events += chance.sample(events, 20)
    chance.shuffle(events)
    while events:
        size = chance.randrange(1, 9)
        batch, events = events[:size], events[size:]
        record(*batch)
        assert loop_counters() == counted()
    assert loop_counters()["unmatched"] > 0
    with connect().read() as connection:
        assert {row.interaction_id for row in store.unmatched_feedback(connection, "notes", 99)} <= {
            str(uid("never")), str(uid("never either"))
        }  # fmt: skip


def test_concurrent_events_are_counted_correctly():
    threads = [
        threading.Thread(
            target=record, args=(interaction("same"), interaction(f"{i}"), feedback("f", "same", "thumbs_up"))
        )
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loop_counters() == counted() == {
        "interactions": 17, "feedback": 1, "feedback.thumbs_up": 1, "examples": 1, "rewarded": 1
    }  # fmt: skip


def test_an_erased_id_is_not_recorded_again():
    with connect().write() as connection:
        row = {"id": str(uid("a")), "loop": "notes", "ingest_offset": store.take_offsets(connection, 1)}
        connection.execute(t.erased_events.insert().values(row))
    late = feedback("f", "a", "correction", correction="what somebody wanted erased")
    assert record(interaction("a"), late) == store.RecordResult(duplicates=2)
    assert loop_counters() == {}


def test_an_interaction_is_found_with_its_feedback_and_example():
    given = feedback("f", "a", "correction", correction="better")
    history = ({"role": "user", "content": "earlier"}, {"role": "assistant", "content": "yes"})
    asked = interaction(
        "a", history=history, domain="fire", variant="champion", flag="unsure", retrieved_context="code 7"
    )
    record(asked, given)
    with connect().read() as connection:
        found = store.find_interaction(connection, uid("a"))
        assert (found.interaction, found.feedback, found.example.target) == (asked, (given,), "better")
        assert found.example.history == asked.history
        assert store.flagged_interactions(connection, "notes", 9) == []
        assert store.find_interaction(connection, uid("nobody")) is None


def test_recording_reads_by_id_and_never_the_whole_history(url):
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL chooses by its statistics, not by the query alone")
    record(*(interaction(f"old {n}") for n in range(50)), feedback("old", "old 1", "thumbs_up"))
    database = connect()
    plans = []

    def explain(connection, cursor, statement, parameters, *_):
        if statement.startswith("SELECT"):
            with database.engine.raw_connection().driver_connection as other:
                plans.extend(row[3] for row in other.execute(f"EXPLAIN QUERY PLAN {statement}", parameters))

    sa.event.listen(database.engine, "before_cursor_execute", explain)
    try:
        record(interaction("a"), feedback("f", "a", "thumbs_up"), feedback("g", "old 2", "thumbs_down"))
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", explain)
    searches = [plan for plan in plans if plan.startswith(("SEARCH", "SCAN"))]
    searches = [plan for plan in searches if "implicit_acceptance" not in plan]  # it has one row of each loop
    assert len(searches) > 4
    assert [plan for plan in searches if "SCAN" in plan or "(loop=?" in plan] == []


def test_flagged_interactions_are_listed_until_they_have_feedback():
    unsure = interaction("a", flag="low confidence")
    record(unsure, interaction("b"))
    with connect().read() as connection:
        assert store.flagged_interactions(connection, "notes", 9) == [unsure]
    record(feedback("f", "a", "thumbs_up"))
    with connect().read() as connection:
        assert store.flagged_interactions(connection, "notes", 9) == []


def test_an_example_qualifies_alike_in_the_database_and_in_python():
    record(interaction("a"), feedback("f", "a", "thumbs_up"))
    policy = Policy(CurationSettings(min_reward=0.3), NearIndex({}), answer_validator(None))
    reviews, rewards = (None, "approve", "edit", "reject"), (-1.0, 0.25, 0.3, 1.0)
    for review, corrected, reward in itertools.product(reviews, (False, True), rewards):
        values = {"review": review, "corrected": corrected, "reward": reward}
        with connect().write() as connection:
            connection.execute(t.examples.update().values(values))
        with connect().read() as connection:
            example = store.find_interaction(connection, uid("a")).example
            low = store.count_low_reward(connection, "notes", 0, min_reward=0.3)
        assert example.qualifies(0.3) == bool(new()) == quick_filters(example, policy).accepted, values
        assert low == (review is None and not example.qualifies(0.3)), values


def test_the_same_prompt_with_another_history_is_another_example():
    turns = {"history": ({"role": "user", "content": "in metres"},)}
    up = [feedback("f", "a", "thumbs_up"), feedback("g", "b", "thumbs_up")]
    record(interaction("a", prompt="x", output="y"), interaction("b", prompt="x", output="y", **turns), *up)
    with connect().read() as connection:
        assert len(set(connection.execute(sa.select(t.examples.c.content_hash)).scalars())) == 2
