"""Filters, prompts instead of ids, and the order of arrival, on a real database."""

from datetime import timedelta

import pytest

from finetune_pipeline.feedback import search as searches
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.search import (
    UNRATED,
    InteractionFilter,
    events_after,
    interactions_with_prompt,
    offset_of_last,
)
from finetune_pipeline_tests.conftest import START, feedback, interaction, uid

NAMES = {uid(name): name for name in ("wall", "door", "roof", "sky")}
EVENTS = [
    interaction("wall", prompt="a 100% Brick wall", output="brick", user="ann"),
    interaction("door", prompt="a door", output="oak", user="bob"),
    feedback("1", "wall", "thumbs_up", minutes=60, user="bob"),
    feedback("2", "door", "correction", minutes=5, correction="red oak", user="ann"),
    interaction("roof", prompt="a roof", output="slate", created_at=START + timedelta(days=2)),
    feedback("3", "sky", "thumbs_down", user="ann"),  # its interaction has not arrived
]


@pytest.fixture
def filled(db):
    put(db, *EVENTS)
    return db


def put(db, *events):
    with db.write() as connection:
        store.record(connection, "notes", events, default_reward)


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ["roof", "door", "wall"]),
        ({"text": "BRICK"}, ["wall"]),
        ({"text": "0%"}, ["wall"]),
        ({"text": "_"}, []),
        ({"text": "red"}, ["door"]),  # in a correction
        ({"user": "ann"}, ["door", "wall"]),
        ({"user": "ann", "label": "thumbs_up"}, []),
        ({"user": "bob", "label": "thumbs_up"}, ["wall"]),
        ({"label": UNRATED}, ["roof"]),
        ({"label": UNRATED, "user": "ann"}, []),
        ({"since": START + timedelta(minutes=30)}, ["roof", "wall"]),
        ({"until": START + DAY, "user": "bob"}, ["door", "wall"]),
        ({"since": START + DAY, "label": UNRATED}, ["roof"]),
        ({"since": START + timedelta(minutes=30), "until": START + DAY, "label": "correction"}, []),
    ],
)
def test_all_filters_hold(filled, wanted, found):
    with filled.read() as connection:
        given = searches.search(connection, "notes", InteractionFilter(**wanted), 10)
        assert [NAMES[one.interaction.id] for one in given] == found
        assert searches.search(connection, "elsewhere", InteractionFilter(**wanted), 10) == []


AGAIN = {"prompt": "a door"}
EARLIER = ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("more", "prompt", "found"),
    [
        ([], "a door", ["door"]),
        ([], " A  DOOR ", ["door"]),
        ([], "door", ["door"]),  # a part of one prompt
        ([], "a", ["roof", "door", "wall"]),
        ([], "100%", ["wall"]),
        ([], "window", []),
        ([interaction("new", output="oak", **AGAIN)], "a door", ["new"]),  # the same again: the latest
        ([interaction("new", output="elm", **AGAIN)], "a door", ["new", "door"]),
        ([interaction("new", output="oak", history=EARLIER, **AGAIN)], "a door", ["new", "door"]),
        ([interaction("new", prompt="a door of glass")], "a door", ["door"]),  # the full prompt wins
    ],
)  # fmt: skip
def test_a_prompt_names_the_latest_interaction_or_all_that_may_be_meant(filled, more, prompt, found):
    put(filled, *more)
    with filled.read() as connection:
        ids = [one.id for one in interactions_with_prompt(connection, "notes", prompt)]
    assert ids == [uid(name) for name in found]


@pytest.mark.parametrize("fetched", [1, 2, 500])
def test_events_come_in_the_order_of_arrival_with_rewards(filled, fetched, monkeypatch):
    monkeypatch.setattr(searches, "_FETCHED_ROWS", fetched)
    with filled.read() as connection:
        found = list(events_after(connection, "notes", 0, default_reward))
        assert [event.id for _, event in found] == [event.id for event in EVENTS]
        assert [number for number, _ in found] == sorted(number for number, _ in found)
        rewards = [getattr(event, "reward", None) for _, event in found]
        assert rewards[2] == 1.0 and 0.2 < rewards[3] < 0.6 and rewards[5] is None
        for count in range(len(EVENTS) + 2):
            offset = offset_of_last(connection, "notes", count)
            last = [event.id for _, event in events_after(connection, "notes", offset, default_reward)]
            assert last == [event.id for event in EVENTS[max(0, len(EVENTS) - count) :]]
