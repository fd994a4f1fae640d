"""A loop in figures, settings as rows, and interactions as people see them."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.search import InteractionFilter
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline.declared_settings import declared_settings
from finetune_pipeline.pipeline.interactions import find_interactions, view_interaction
from finetune_pipeline.pipeline.overview import loop_figures
from finetune_pipeline.registry.training_jobs import TrainingJob, create_job, new_job_id
from finetune_pipeline_tests.conftest import START, feedback, interaction, uid

LOGGED = [
    interaction(
        "liked",
        model="notes@base",
        metadata={"who": "jo@firm.example"},
        prompt="mail jo@firm.example about it",
        output="sent to jo@firm.example",
    ),
    feedback("1", "liked", "rating", rating="gold", user="ann"),
    interaction("disliked", model="notes@base", confidence=0.2),
    feedback("2", "disliked", "thumbs_down", user="ann"),
    interaction("corrected", model="notes@base"),
    feedback("3", "corrected", "correction", correction="ask jo@firm.example", user="bob"),
    interaction("unrated", model="notes@base"),
]


@pytest.fixture
def loop(make_loop):
    return make_loop(curation={"min_examples": 1})


@pytest.fixture
def logged(loop):
    with connect().write() as connection:
        record(connection, loop.name, LOGGED, default_reward)
    return loop


def test_a_new_loop_has_no_figures(loop):
    found = loop_figures(loop, connect())
    assert (found.champion, found.gold, found.active_jobs, found.average_win_rate) == (None, 0, 0, None)
    assert not found.versions and not found.jobs and found.rewards.average is None


def test_figures_of_use_and_of_jobs(logged):
    db = connect()
    create_job(db, TrainingJob(id=new_job_id(), loop="notes", origin="cli", created_by="ann", created_at=START))
    found = loop_figures(logged, db)
    assert (found.gold, found.active_jobs, len(found.jobs)) == (1, 1, 1)
    assert (found.live.won, found.live.lost, found.live.answers) == (1, 2, 4)
    assert sum(found.rewards.histogram) == 3


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"reward": (0.2, 1.0)}, {"liked", "corrected"}),
        ({"reward": (-1.0, 0.0)}, {"disliked"}),
        ({"confidence": (0.0, 0.5)}, {"disliked"}),
        ({"confidence": (0.5, 1.0), "reward": (0.9, 1.0)}, {"liked"}),
    ],
)
def test_interactions_are_found_by_reward_and_confidence(logged, wanted, found):
    shown = find_interactions(logged, connect(), InteractionFilter(**wanted), 10)
    assert {one.interaction.id for one in shown} == {uid(name) for name in found}


def test_pages_follow_each_other(logged):
    db = connect()
    pages = [find_interactions(logged, db, InteractionFilter(), 2, skip) for skip in (0, 2, 4)]
    ids = [one.interaction.id for page in pages for one in page]
    assert len(ids) == len(set(ids)) == 4


def test_personal_data_is_replaced_everywhere(logged):
    db = connect()
    shown = [view_interaction(logged, db, uid(name)) for name in ("liked", "corrected")]
    assert shown[0].stored.interaction.prompt == "mail [EMAIL] about it"
    assert shown[0].stored.interaction.output == shown[0].trains.target == "sent to [EMAIL]"
    assert shown[1].stored.feedback[0].correction == shown[1].trains.target == "ask [EMAIL]"
    everything = str(shown) + str(find_interactions(logged, db, InteractionFilter(), 10))
    assert "jo@firm.example" not in everything


@pytest.mark.parametrize(
    ("name", "accepted", "reason"),
    [
        ("liked", True, "It trains the answer, and counts as new"),
        ("corrected", True, "It trains the correction"),
        ("disliked", False, "Curation leaves it out: reward below 0.3."),
        ("unrated", False, "The answer has no feedback."),
    ],
)
def test_it_is_said_what_an_interaction_trains_and_why(logged, name, accepted, reason):
    trains = view_interaction(logged, connect(), uid(name)).trains
    assert trains.accepted is accepted and trains.reason.startswith(reason)
    assert (trains.target is not None) is accepted


def test_an_interaction_of_another_loop_is_not_shown(logged):
    other = logged.model_copy(update={"name": "other"})
    assert view_interaction(other, connect(), uid("liked")) is None
    assert view_interaction(logged, connect(), uid("nothing")) is None


def test_settings_are_rows_without_secrets(loop):
    loop = loop.model_copy(update={"description": "see https://ann:hunter2@db.example", "owners": ("jo@firm.example",)})
    rows = {row.name: row for row in declared_settings(loop)}
    assert rows["name"].given and rows["name"].value == '"notes"'
    rate = rows["training.learning_rate"]
    assert rate.description == "Peak learning rate." and float(rate.default) > 0
    assert not rows["trigger.timezone"].given and rows["trigger.new_examples"].default == "50"
    assert rows["owners"].value == '["[EMAIL]"]'
    assert "hunter2" not in str(rows)
