"""Decisions in the real store: what they change, what they survive, how they are undone."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import review, store
from finetune_pipeline.feedback.erasure import erase_user
from finetune_pipeline.feedback.review import (
    ReviewError,
    load_candidates,
    record_decision,
    review_candidates,
    undo_decision,
)
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import counters, find_interaction, new_examples, restore, retract
from finetune_pipeline_tests.conftest import feedback, interaction, uid

LOOP = "notes"


def put(db, *events):
    with db.write() as connection:
        store.record(connection, LOOP, events, default_reward)


def seen(db, name):
    with db.read() as connection:
        return next(load_candidates(connection, LOOP, [str(uid(name))], default_reward))


def say(db, name, kind, target=None, reviewer="rita"):
    shown = seen(db, name)
    with db.write() as connection:
        record_decision(
            connection, LOOP, shown, kind, shown.answer if target is None else target, reviewer, default_reward
        )


def take_back(db, reviewer="rita", name=None):
    with db.write() as connection:
        return undo_decision(connection, LOOP, reviewer, default_reward, uid(name) if name else None)


def example(db, name):
    with db.read() as connection:
        return find_interaction(connection, uid(name)).example


def candidates(db, qualifying=False):
    with db.read() as connection:
        found = review_candidates(connection, LOOP, default_reward, 0.85, 0.3, include_qualifying=qualifying)
    names = {str(uid(name)): name for name in ("a", "b", "c", "d")}
    return {names[str(one.interaction.id)] for one in found}


def counted(db):
    with db.read() as connection:
        return counters(connection, LOOP)


def newest(db):
    with db.read() as connection:
        return store.newest_offset(connection)


def changed(db, after):
    with db.read() as connection:
        return {
            row.interaction_id: row
            for rows in store.interactions_with_examples(connection, LOOP, newest(db), after)
            for row in rows
        }


def new(db):
    with db.read() as connection:
        return {one.prompt for one in new_examples(connection, LOOP, 0, 0.3)}


def test_an_approval_confirms_an_answer_without_feedback(db):
    put(db, interaction("a", confidence=0.2))
    assert example(db, "a") is None
    say(db, "a", "approve")
    found = example(db, "a")
    assert (found.review, found.target, found.reward, found.confirmed, found.corrected) == (
        "approve", "answer a", 1.0, True, False
    )  # fmt: skip
    assert counted(db)["examples"] == 1


def test_an_edit_is_a_correction_whatever_feedback_follows(db):
    put(db, interaction("a"), feedback("up", "a", "thumbs_up"))
    say(db, "a", "edit", "answer A, better")
    put(db, feedback("down", "a", "thumbs_down", minutes=5), feedback("fix", "a", "correction", 9, correction="worse"))
    found = example(db, "a")
    assert (found.review, found.target, found.corrected) == ("edit", "answer A, better", True)
    assert 0.2 < found.reward < 0.6
    assert new(db) == {"prompt a"}


def test_a_rejected_example_is_not_new_and_later_feedback_changes_nothing(db):
    put(db, interaction("a"), feedback("up", "a", "thumbs_up"))
    say(db, "a", "reject")
    put(db, feedback("up again", "a", "thumbs_up", minutes=5))
    assert example(db, "a").review == "reject"
    assert new(db) == set()


def test_a_decision_holds_for_the_same_content_elsewhere(db):
    same = {"prompt": "the same question", "output": "the same answer"}
    put(db, *(interaction(name, **same) for name in "ab"), *(feedback(f"on {n}", n, "thumbs_up") for n in "ab"))
    put(db, interaction("c", prompt="the same question"), feedback("on c", "c", "thumbs_up"))
    say(db, "a", "edit", "the right answer")
    assert [example(db, name).target for name in "abc"] == ["the right answer", "the right answer", "answer c"]
    put(
        db, interaction("d", prompt=" The same  question", output="the same answer"), feedback("on d", "d", "thumbs_up")
    )
    assert (example(db, "d").review, example(db, "d").target) == ("edit", "the right answer")
    assert candidates(db, qualifying=True) == {"c"}
    assert take_back(db) == str(uid("a"))
    assert {example(db, name).target for name in "abd"} == {"the same answer"}
    assert {example(db, name).review for name in "abd"} == {None}


def test_a_snapshot_sees_every_decision_and_every_undo(db):
    put(db, interaction("a"), interaction("b"), feedback("on b", "b", "thumbs_up"))
    before = newest(db)
    assert not changed(db, before)
    say(db, "a", "approve")
    say(db, "b", "reject")
    rows = changed(db, before)
    assert {rows[str(uid("a"))].review, rows[str(uid("b"))].review} == {"approve", "reject"}
    before = newest(db)
    take_back(db, name="a")
    (row,) = changed(db, before).values()
    assert (row.interaction_id, row.target, row.review) == (str(uid("a")), None, None)
    assert counted(db)["examples"] == 1


def test_decisions_are_append_only_and_the_newest_stands(db):
    put(db, interaction("a"), feedback("on a", "a", "thumbs_up"))
    say(db, "a", "approve")
    say(db, "a", "reject", reviewer="sam")
    assert example(db, "a").review == "reject"
    assert take_back(db, "rita") is None  # hers stands no more
    assert take_back(db, "sam") == str(uid("a"))
    assert example(db, "a").review is None and candidates(db, qualifying=True) == {"a"}
    assert take_back(db, "sam") is None
    d = t.review_decisions.c
    with db.read() as connection:
        rows = connection.execute(sa.select(d.decision, d.reviewer, d.target).order_by(d.ingest_offset)).all()
    assert [tuple(row) for row in rows] == [
        ("approve", "rita", "answer a"), ("reject", "sam", "answer a"), ("undo", "sam", None)
    ]  # fmt: skip


def test_a_decision_survives_a_retraction(db):
    put(db, interaction("a", source="vault", provenance="a.md"), feedback("on a", "a", "thumbs_up"))
    say(db, "a", "edit", "better")
    with db.write() as connection:
        retract(connection, LOOP, [str(uid("a"))])
    assert example(db, "a") is None
    put(db, interaction("b", prompt="prompt a", output="answer a", source="vault", provenance="moved/a.md"),
        feedback("on b", "b", "thumbs_up"))  # fmt: skip
    assert example(db, "b").target == "better"
    with db.write() as connection:
        restore(connection, LOOP, {str(uid("a")): "a.md"}, default_reward)
    assert example(db, "a").target == "better"


def test_candidates_are_undecided_and_unsure_disputed_or_rejected(db):
    put(db, interaction("a", confidence=0.2), interaction("b"), feedback("b up", "b", "thumbs_up"),
        feedback("b down", "b", "thumbs_down"), interaction("c"), feedback("c down", "c", "thumbs_down"),
        interaction("d", confidence=0.2), feedback("d up", "d", "thumbs_up"))  # fmt: skip
    assert candidates(db) == {"a", "b", "c"}
    say(db, "a", "approve")
    say(db, "b", "reject")
    assert candidates(db) == {"c"}
    put(db, feedback("a fixed", "a", "correction", correction="other"))  # a person wrote another answer since
    assert candidates(db) == {"a", "c"}
    assert seen(db, "a").answer == "other" and example(db, "a").target == "answer a"
    say(db, "a", "approve")
    assert candidates(db) == {"c"} and example(db, "a").target == "other"


def test_validators_and_corrections_that_agree_are_no_candidates(db):
    put(db, interaction("a"), feedback("a fails", "a", "validation_failure", score=10), interaction("b"),
        feedback("b fixed", "b", "correction", correction="x"), feedback("b down", "b", "thumbs_down"),
        interaction("c"), feedback("c 1", "c", "correction", correction="x"),
        feedback("c 2", "c", "correction", correction="y"))  # fmt: skip
    assert candidates(db) == {"c"}


def test_a_decision_on_a_changed_or_deleted_interaction_is_rejected(db):
    put(db, interaction("a", user="ann"))
    shown = seen(db, "a")
    put(db, feedback("fix", "a", "correction", correction="other"))
    with pytest.raises(ReviewError, match="corrected in the meantime"), db.write() as connection:
        record_decision(connection, LOOP, shown, "approve", shown.answer, "rita", default_reward)
    with pytest.raises(ReviewError, match=r"target: .*NUL.*nothing was recorded"):
        say(db, "a", "edit", "a\x00b")
    with pytest.raises(ReviewError, match="reviewer"):
        say(db, "a", "approve", reviewer="")
    shown = seen(db, "a")
    with db.write() as connection:
        erase_user(connection, LOOP, "ann", default_reward)
    with pytest.raises(ReviewError, match="deleted in the meantime"), db.write() as connection:
        record_decision(connection, LOOP, shown, "approve", shown.answer, "rita", default_reward)


def test_erasing_a_reviewer_undoes_the_effect_of_their_decisions(db):
    same = {"prompt": "the same question", "output": "the same answer"}
    put(db, *(interaction(name, user="ann" if name == "a" else "bob", **same) for name in "ab"),
        *(feedback(f"on {n}", n, "thumbs_up") for n in "ab"), interaction("c", user="bob"))  # fmt: skip
    say(db, "a", "edit", "rita wrote this")
    say(db, "c", "approve", reviewer="sam")
    before = newest(db)
    with db.write() as connection:
        assert erase_user(connection, LOOP, "rita", default_reward).decisions == 1
    assert {example(db, name).target for name in "ab"} == {"the same answer"}
    with db.read() as connection:  # older snapshots contain her text, so the next one is complete
        f = t.erased_events.c
        assert connection.execute(sa.select(f.id).where(f.ingest_offset > before)).first()
    say(db, "a", "edit", "on ann's words")
    with db.write() as connection:
        erase_user(connection, LOOP, "ann", default_reward)
    assert example(db, "b").target == "the same answer"
    assert example(db, "c").review == "approve"
    with db.write() as connection:
        erase_user(connection, LOOP, "sam", default_reward)
    assert example(db, "c") is None and counted(db)["examples"] == 1


@pytest.mark.parametrize(
    "given",
    [
        ("low confidence", {"confidence": 0.1}, ()),
        ("disputed", {}, [("thumbs_up", "u"), ("thumbs_down", "v"), ("thumbs_down", "w")]),
        ("rejected", {}, [("thumbs_down", "u")]),
        ("tied", {}, [("thumbs_up", "u"), ("thumbs_down", "v")]),
        ("would train", {}, [("thumbs_up", "u")]),
    ],
    ids=lambda given: given[0],
)
def test_of_too_many_candidates_the_newest_by_time_are_kept(db, monkeypatch, given):
    """A log that is imported late arrives last, and does not displace what was logged since."""
    _, fields, votes = given
    monkeypatch.setattr(review, "MAX_CANDIDATES", 1)
    for name, at in (("a", 3), ("b", 2), ("c", 1)):  # in the order of arrival
        at = interaction("a").created_at + timedelta(days=at)
        put(db, interaction(name, prompt=name, created_at=at, **fields))
        for kind, user in votes:
            put(db, feedback(f"{name} {user}", name, kind, user=user))
    assert candidates(db, qualifying=True) == {"a"}
