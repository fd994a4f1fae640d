"""Rewards, and how much the users agree."""

import pytest

from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.statistics import (
    BINS,
    agreement,
    krippendorff_alpha,
    reward_statistics,
    use_statistics,
)
from finetune_pipeline.records import text_hash
from finetune_pipeline_tests.conftest import feedback, interaction

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section B: ten units by Meg and Owen.
MEG, OWEN = "0100000010", "1110010000"


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([(2 - (one + two), one + two) for one, two in zip(map(int, MEG), map(int, OWEN), strict=True)], 0.095),
        ([(2, 0), (0, 2)], 1.0),
        ([(3, 0), (0, 3), (1, 0), (0, 1)], 1.0),  # units with one value are left out
        ([(1, 1), (1, 1)], -0.5),
        ([(2, 0), (5, 0)], None),  # without variation it is undefined
        ([(1, 0)], None),
        ([], None),
    ],
)
def test_alpha(units, expected):
    assert krippendorff_alpha(units) == (expected if expected is None else pytest.approx(expected, abs=0.0005))


def put(db, *events):
    with db.write() as connection:
        store.record(connection, "notes", events, default_reward)


def test_the_latest_rating_of_each_user_on_each_answer_counts(db):
    put(db, *(interaction(name) for name in "abcd"))
    put(
        db,
        feedback("1", "a", "thumbs_up", user="u"),
        feedback("2", "a", "thumbs_down", minutes=5, user="u"),
        feedback("3", "a", "rating", rating=1, user="v"),
        feedback("4", "b", "thumbs_up", user="u"),
        feedback("5", "b", "thumbs_up", user="v"),
        feedback("6", "b", "rating", rating=3, user="w"),  # neutral
        feedback("7", "c", "thumbs_up", user="u"),
        feedback("8", "c", "success", score=10),  # of no person
        feedback("9", "d", "thumbs_up"),
        feedback("10", "d", "thumbs_down", minutes=1),  # the same, unnamed person
    )
    with db.read() as connection:
        found = agreement(connection, "notes", default_reward)
    assert (found.alpha, found.answers, found.ratings) == (1.0, 2, 4)
    put(db, feedback("11", "c", "thumbs_down", user="x"))
    with db.read() as connection:
        assert agreement(connection, "notes", default_reward).alpha == pytest.approx(1 - (2 / 6) / (18 / 30))
        assert agreement(connection, "elsewhere", default_reward).alpha is None


@pytest.mark.parametrize("hashed", [None, '{"a": 1}', '{ "a":1 }'])
def test_a_rating_of_the_logged_answer_is_about_it_however_it_is_named(db, hashed):
    put(db, interaction("a", output='{"a": 1}'), feedback("fix", "a", "correction", correction='{ "a":1 }', user="c"))
    named = {"output_hash": text_hash(hashed)} if hashed else {}
    put(db, feedback("1", "a", "thumbs_up", user="u"), feedback("2", "a", "thumbs_down", user="v", **named))
    with db.read() as connection:
        found = agreement(connection, "notes", default_reward)
    assert (found.answers, found.ratings) == (1, 2)


def test_rewards_are_averaged_and_counted_in_bins(db):
    given = {"a": -1.0, "b": -0.2, "c": 0.0, "d": 0.8, "e": 1.0}
    put(db, *map(interaction, given), *(feedback(f"on {n}", n, "reward", reward=r) for n, r in given.items()))
    with db.read() as connection:
        found = reward_statistics(connection, "notes")
        assert reward_statistics(connection, "elsewhere").average is None
    assert found.average == pytest.approx(0.12)
    assert {bin: n for bin, n in zip(BINS, found.histogram, strict=True) if n} == {
        (-1.0, -0.8): 1, (-0.2, 0.0): 1, (0.0, 0.2): 1, (0.8, 1.0): 2,
    }  # fmt: skip


def test_what_was_said_about_one_version(db):
    names = ("up", "down", "fixed", "three", "gold", "two", "silent")
    put(db, *(interaction(name, output=f"answer {name}", model="notes@v1.0.0") for name in names))
    put(db, interaction("other", model="notes@v1.1.0"), feedback("0", "other", "thumbs_down"))
    put(
        db,
        feedback("1", "up", "thumbs_up"),
        feedback("2", "down", "thumbs_down"),
        feedback("3", "fixed", "correction", correction="better"),  # its reward is positive, its answer was wrong
        feedback("4", "three", "rating", rating="3"),
        feedback("5", "gold", "rating", rating="gold", user="u"),
        feedback("6", "two", "rating", rating="5", user="u", minutes=1),
        feedback("7", "two", "rating", rating="2", user="u", minutes=2),  # replaces that user's rating
    )
    with db.read() as connection:
        found = use_statistics(connection, "notes", "notes@v1.0.0")
        unused = use_statistics(connection, "notes", "notes@base")
    assert (found.answers, found.won, found.lost, found.tied) == (7, 2, 3, 1)
    assert (found.win_rate, found.ratings, found.gold_rate) == (2 / 5, 3, 1 / 3)
    assert found.average_rating == pytest.approx(10 / 3)
    assert found.rating_deviation == pytest.approx(1.5275, abs=1e-4)
    assert found.average_reward == pytest.approx((1.0 - 1.0 + 0.2 + 0.0 + 1.0 - 0.9) / 6, abs=0.1)
    assert (unused.answers, unused.win_rate, unused.average_rating, unused.average_reward) == (0, None, None, None)
