"""Answers that nobody objected to get examples after some hours; feedback and other settings replace them."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.curation.dataset_files import DATASET_CARD, PREFERENCE, read_split
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.review import load_candidates, record_decision, undo_decision
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import counters, newest_offset, record
from finetune_pipeline.pipeline import implicit_acceptance, ingest
from finetune_pipeline.pipeline import snapshot as snapshots
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.implicit_acceptance import accept_unrated
from finetune_pipeline.pipeline.pending import find_new
from finetune_pipeline.pipeline.status import loop_status
from finetune_pipeline.settings import ImplicitAcceptance
from finetune_pipeline_tests.conftest import dataset_rows, feedback, interaction, snapshot_examples, uid
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events

ACCEPTED_UNTIL = datetime(2026, 1, 10, tzinfo=UTC)
NOW = ACCEPTED_UNTIL + timedelta(hours=24)
RULE = ImplicitAcceptance(after_hours=24, min_confidence=0.9, reward=0.4)


@pytest.fixture
def on_each_database(url, monkeypatch):
    """The test runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


def with_rule(loop, rule):
    return loop.model_copy(update={"feedback": loop.feedback.model_copy(update={"implicit_acceptance": rule})})


@pytest.fixture
def on(loop):
    """The loop with implicit acceptance."""
    return with_rule(loop, RULE)


def add(*events):
    with connect().write() as connection:
        record(connection, "notes", events, default_reward)


def accept(loop, now=NOW):
    return accept_unrated(loop, connect(), now)


def examples():
    """Reward of each example by its target, with a star for implicit ones."""
    e = t.examples.c
    with connect().read() as connection:
        rows = connection.execute(sa.select(e.target, e.reward, e.implicit).order_by(e.target)).all()
    return {f"{row.target}{'*' if row.implicit else ''}": row.reward for row in rows}


def counted(name):
    with connect().read() as connection:
        return counters(connection, "notes")[name]


@pytest.mark.parametrize("order", ["recorded before", "recorded after"])
@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({}, True),
        ({"created_at": ACCEPTED_UNTIL}, True),
        ({"created_at": ACCEPTED_UNTIL + timedelta(seconds=1)}, False),
        ({"confidence": 0.89}, False),
        ({"confidence": None}, False),
        ({"flag": "confidence 0.90 is below 0.95"}, False),
        ({"variant": "ask"}, False),
        ({"variant": "champion"}, True),
        ({"validation_score": 79}, False),
        ({"validation_score": 80}, True),
        ({"source": "vault", "provenance": "a.md"}, False),
        ({"output": " "}, False),
    ],
    ids=str,
)
def test_an_answer_is_accepted_if_all_conditions_hold(on, fields, accepted, order):
    if order == "recorded after":  # such as a log that is ingested late
        accept(on)
    add(interaction("a", **fields))
    assert accept(on) == (accepted and order == "recorded before")
    assert list(examples().values()) == [0.4] * accepted
    assert (counted("implicit"), counted("examples"), counted("rewarded")) == (accepted, accepted, 0)


FEEDBACK = [
    ({"kind": "thumbs_up"}, {"answer a": 1.0}),
    ({"kind": "thumbs_down"}, {"answer a": -1.0}),
    ({"kind": "rating", "rating": "3"}, {"answer a": 0.0}),
    ({"kind": "rating", "rating": "gold"}, {"answer a": 1.0}),
    ({"kind": "success", "score": 100}, {"answer a": 1.0}),
    ({"kind": "validation_failure", "score": 0}, {"answer a": -1.0}),
    ({"kind": "reward", "reward": 0.1}, {"answer a": 0.1}),
    ({"kind": "correction", "correction": "other", "reward": 0.5}, {"other": 0.5}),
    ({"kind": "thumbs_down", "output_hash": "0" * 64}, {}),  # on another answer, but nobody accepted this one
]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("given", "expected"), FEEDBACK, ids=str)
def test_feedback_of_each_kind_counts_instead(on, given, expected, order):
    add(interaction("a"))
    if order == "after":
        assert accept(on) == 1
    add(feedback("f", "a", **given))
    assert accept(on, NOW + timedelta(hours=1)) == 0
    assert examples() == expected
    assert counted("implicit") == 0


def test_each_answer_is_accepted_once_in_pages_with_a_new_offset(on, on_each_database, monkeypatch):
    monkeypatch.setattr(implicit_acceptance, "PAGE", 2)
    old = [interaction(f"{n}", created_at=ACCEPTED_UNTIL - timedelta(hours=n // 3)) for n in range(7)]
    add(*old, interaction("young", created_at=ACCEPTED_UNTIL + timedelta(hours=1)))
    with connect().read() as connection:
        before = newest_offset(connection)
    assert accept(on) == 7
    e = t.examples.c
    with connect().read() as connection:
        rows = connection.execute(sa.select(e.interaction_id, e.ingest_offset, e.confirmed, e.corrected)).all()
    assert all(row.ingest_offset > before and not row.confirmed and not row.corrected for row in rows)
    assert accept(on) == 0
    with connect().read() as connection:
        assert connection.execute(sa.select(e.interaction_id, e.ingest_offset, e.confirmed, e.corrected)).all() == rows
    assert accept(on, NOW + timedelta(hours=1)) == 1  # the young one
    assert accept(on, NOW - timedelta(hours=9)) == 0  # a clock that goes back changes nothing
    assert counted("implicit") == 8


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (None, {"answer said": 1.0}),
        ({"reward": 0.7}, {"answer sure*": 0.7, "answer older*": 0.7, "answer said": 1.0}),
        ({"min_confidence": 0.95}, {"answer sure*": 0.4, "answer said": 1.0}),
        ({"min_confidence": 0.8}, {"answer sure*": 0.4, "answer older*": 0.4, "answer less*": 0.4, "answer said": 1.0}),
        ({"after_hours": 48}, {"answer older*": 0.4, "answer said": 1.0}),
    ],
    ids=str,
)
def test_changed_settings_make_the_implicit_examples_again(loop, on, on_each_database, changed, expected):
    add(
        interaction("sure", confidence=0.99, created_at=ACCEPTED_UNTIL),
        interaction("older", created_at=ACCEPTED_UNTIL - timedelta(hours=30)),
        interaction("less", confidence=0.8),
        interaction("said", created_at=ACCEPTED_UNTIL),
        feedback("f", "said", "thumbs_up"),
    )
    accept(on)
    first = {"answer sure*": 0.4, "answer older*": 0.4, "answer said": 1.0}
    assert examples() == first
    accept(with_rule(loop, RULE.model_copy(update=changed) if changed else None))
    assert examples() == expected
    assert counted("implicit") == len(expected) - 1
    accept(on)
    assert examples() == first


@pytest.mark.parametrize("order", ["objected first", "accepted first", "together"])
def test_silence_does_not_outvote_an_objection_to_the_same_answer(on, on_each_database, order):
    same = {"prompt": "same", "output": "said"}
    copies = [interaction("copy", **same), interaction("another", prompt="same", output="another")]
    objection = [interaction("judged", **same), feedback("down", "judged", "thumbs_down")]
    first, then = (objection, copies) if order == "objected first" else (copies, objection)
    if order == "together":
        accept(on)  # so that recording applies the rule
        add(*first, *then)
    else:
        add(*first)
        accept(on)
        add(*then)
    accept(on, NOW + timedelta(seconds=1))
    with connect().read() as connection:
        before = newest_offset(connection)
    assert examples() == {"said": -1.0, "said*": -1.0, "another*": 0.4}
    assert counted("implicit") == 1
    add(feedback("up", "judged", "thumbs_up", minutes=9))
    assert examples() == {"said": 1.0, "said*": 0.4, "another*": 0.4}
    assert counted("implicit") == 2
    e = t.examples.c
    with connect().read() as connection:
        offset = sa.select(e.ingest_offset).where(e.interaction_id == str(uid("copy")))
        assert connection.execute(offset).scalar_one() > before  # so that the next snapshot has it


@pytest.mark.parametrize("kind", ["approve", "reject", "edit"])
def test_a_decision_holds_for_the_same_content_and_an_undo_brings_the_example_back(on, kind):
    add(*(interaction(name, prompt="same", output="said") for name in ("a", "b")))
    accept(on)
    before = examples()
    with connect().write() as connection:
        (shown,) = load_candidates(connection, "notes", [str(uid("a"))], default_reward)
        target = "edited" if kind == "edit" else "said"
        record_decision(connection, "notes", shown, kind, target, "ann", default_reward)
        reviews = connection.execute(sa.select(t.examples.c.review)).scalars().all()
    assert reviews == [kind, kind]
    assert counted("implicit") == 0
    with connect().write() as connection:
        undo_decision(connection, "notes", "ann", default_reward)
    assert examples() == before
    assert counted("implicit") == 2


def test_the_count_and_status_have_them_apart(loop, on):
    hours_ago = datetime.now(UTC) - timedelta(hours=25)
    add(
        interaction("a", prompt="what now?", confidence=0.97, created_at=hours_ago),
        interaction("young", prompt="and then?", confidence=0.97, created_at=datetime.now(UTC)),
    )
    assert find_new(loop, connect(), watermark=0).count == 0
    assert find_new(on, connect(), watermark=0).count == 1
    state = loop_status(on, connect())
    assert (state.implicit, state.new_examples, state.feedback) == (1, 1, 0)
    low = with_rule(loop, RULE.model_copy(update={"reward": 0.1}))
    assert find_new(low, connect(), watermark=0).count == 0  # curation's filters apply
    assert loop_status(low, connect()).not_counted == {"reward below 0.3": 1}
    assert loop_status(loop, connect()).implicit == 0


def everything_stored():
    tables = (t.examples, t.implicit_acceptance, t.loop_counters, t.counters)
    with connect().read() as connection:
        return [sorted(map(str, connection.execute(sa.select(table)))) for table in tables]


@pytest.mark.parametrize("stored", [None, RULE, RULE.model_copy(update={"min_confidence": 0.8})], ids=str)
@pytest.mark.parametrize("given", [None, RULE, RULE.model_copy(update={"reward": 0.1})], ids=str)
def test_status_writes_nothing_and_counts_what_ingestion_will_accept(loop, on_each_database, stored, given):
    now = datetime.now(UTC)
    old, older = (now - timedelta(hours=hours) for hours in (25, 50))
    add(
        *(interaction(f"old {n}", prompt=f"what {n}?", confidence=0.85 + n / 20, created_at=older) for n in range(3)),
        *(interaction(f"copy {n}", prompt="the same?", output="x", confidence=1.0, created_at=older) for n in range(2)),
        *(interaction(name, prompt=f"{name}?", confidence=1.0, created_at=older) for name in ("liked", "hash", "bad")),
        feedback("f", "liked", "thumbs_up"),
        feedback("g", "hash", "thumbs_down", output_hash="0" * 64),
        feedback("h", "bad", "thumbs_down"),
        interaction("again", prompt="bad?", output="answer bad", confidence=1.0, created_at=older),
        interaction("young", confidence=1.0, created_at=now),
        interaction("unsure", confidence=0.5, created_at=older),
    )
    with connect().write() as connection:
        shown = next(load_candidates(connection, "notes", [str(uid("copy 0"))], default_reward))
        record_decision(connection, "notes", shown, "reject", "x", "ann", default_reward)
    accept(with_rule(loop, stored), now - timedelta(hours=20))
    add(interaction("late", prompt="late?", confidence=1.0, created_at=old))
    looked_at = with_rule(loop, given)
    before = everything_stored()
    expected = loop_status(looked_at, connect())
    assert everything_stored() == before
    accept(looked_at, now)
    assert loop_status(looked_at, connect()) == expected
    assert (expected.implicit > 0) == (given is not None)


def test_a_dataset_trains_them_and_has_no_pair_of_them(on):
    at = datetime.now(UTC) - timedelta(hours=30)
    add(*corrected(["ash", "birch", "cedar", "dogwood", "elm"]))
    snapshots.snapshot(on, connect())
    events = on.log_folders[0] / "events.jsonl"
    write_events(
        events,
        *(interaction(f"{n}", prompt=f"{name} wood?", output=name, created_at=at, confidence=0.95)
          for n, name in enumerate(["oak", "fir"])),
        interaction("no", prompt="which tree?", output="none", created_at=at, confidence=0.5),
    )  # fmt: skip
    lines = []
    ingest.ingest(on, connect(), lines.append)
    assert lines[-1] == "2 answers nobody objected to count as accepted from now on"
    second, counts = snapshots.snapshot(on, connect())
    assert counts["implicit"] == 2
    made = {one.target: one for one in snapshot_examples(second)}
    assert {"oak", "fir"} < made.keys() and "none" not in made
    assert not made["oak"].confirmed and made["oak"].reward == 0.4
    data = build_dataset(on, second)
    trained = {row["completion"] for split in ("train", "validation") for row in dataset_rows(data.path, split)}
    assert trained == {f"{name} spoke" for name in ("ash", "birch", "cedar", "dogwood", "elm")} | {"oak", "fir"}
    card = (data.path / DATASET_CARD).read_text()
    assert "Of these, 2 answers were accepted because nobody objected (implicit acceptance)." in card
    pairs = [row for split in ("train", "validation") for row in read_split(data.path, PREFERENCE, split)]
    assert pairs and not [row for row in pairs if {row["chosen"], row["rejected"]} & {"oak", "fir"}]
    add(feedback("f", "0", "thumbs_down", minutes=5))
    third, counts = snapshots.snapshot(on, connect())
    assert counts["implicit"] == 1
    assert {one.target: one.reward for one in snapshot_examples(third)}["oak"] == -1.0
    off = with_rule(on, None)
    ingest.ingest(off, connect(), lines.append)
    fourth, _ = snapshots.snapshot(off, connect())
    assert "fir" not in {one.target for one in snapshot_examples(fourth)}
    assert "nobody objected" not in (build_dataset(off, fourth).path / DATASET_CARD).read_text()


def test_finding_them_reads_only_what_became_old_enough(on):
    add(*(interaction(f"{n}") for n in range(20)))
    accept(on)
    statements = []
    engine = connect().engine
    sa.event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2:4]))
    add(interaction("late", created_at=ACCEPTED_UNTIL + timedelta(minutes=1)))
    assert accept(on, NOW + timedelta(hours=1)) == 1
    (query,) = [given for given in statements if "LIMIT" in given[0] and "interactions.created_at >" in given[0]]
    with connect().read() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query[0]}", query[1])]
    assert "ix_interactions_loop_created_at (loop=? AND created_at>? AND created_at<?)" in plan[0], plan
