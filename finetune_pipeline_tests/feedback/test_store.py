import threading

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline_tests.conftest import feedback, interaction


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
    assert record(*events, *events) == store.Recorded(interactions=1, feedback=1, duplicates=2)
    assert record(*events) == store.Recorded(duplicates=2)
    with connect().read() as connection:
        assert store.totals(connection, "notes") == store.Totals(1, 1, 1, 0)


def test_feedback_may_come_before_its_interaction():
    record(feedback("f", "a", "thumbs_up"))
    assert new() == []
    with connect().read() as connection:
        assert store.totals(connection, "notes").unmatched_feedback == 1
    record(interaction("a"))
    assert [example.prompt for example in new()] == ["prompt a"]


def test_late_feedback_makes_an_example_new_again_until_it_was_judged():
    record(interaction("a", confidence=0.2), feedback("f", "a", "success", score=90))
    with connect().read() as connection:
        seen = store.newest_sequence(connection)
    assert new(after=seen) == []
    record(feedback("g", "a", "thumbs_up", minutes=5))
    (example,) = new(after=seen)
    assert example.confirmed
    with connect().write() as connection:
        store.mark_judged(connection, "notes", [store.content_hash(example.prompt, example.target)] * 2)
    assert new(after=0) == []


def test_writers_at_the_same_time_lose_nothing_and_share_no_sequence():
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
        sequences = connection.execute(sa.select(t.interactions.c.sequence)).scalars().all()
    assert len(sequences) == len(set(sequences)) == 8 * 20 + 1


def test_a_failed_transaction_leaves_no_trace():
    with pytest.raises(RuntimeError), connect().write() as connection:
        store.record(connection, "notes", [interaction("a")], default_reward)
        raise RuntimeError("killed in between")
    with connect().read() as connection:
        assert store.totals(connection, "notes").interactions == 0
        assert store.newest_sequence(connection) == 0


def test_an_event_of_another_loop_takes_nothing_away():
    record(interaction("a"), feedback("f", "a", "thumbs_up"))
    strange = feedback("g", "a", "thumbs_down", minutes=5).model_copy(update={"task": "other"})
    with connect().write() as connection:
        store.record(connection, "other", [strange], default_reward)
    assert len(new()) == 1


@pytest.mark.parametrize("text", ["'; DROP TABLE interactions; --", "%s {0} \\", "ünïcödé 🚧", "x" * 100_000])
def test_whatever_is_logged_is_data(text):
    record(interaction("a", prompt=text, output=text, user=text[:200]), feedback("f", "a", "thumbs_up"))
    assert [(example.prompt, example.target) for example in new()] == [(text, text)]
