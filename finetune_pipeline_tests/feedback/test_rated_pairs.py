"""Pairs of answers of which people prefer one, from the events in a real database."""

from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rated_pairs import RatedPair, rated_pairs
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline_tests.conftest import feedback, interaction

TURN = {"role": "assistant", "content": "Which wall?"}
EVENTS = [
    interaction("corrected", prompt="a door", output="oak"),
    feedback("1", "corrected", "correction", correction="red oak"),
    interaction("liked", prompt="a wall", output="brick"),
    feedback("2", "liked", "thumbs_up"),
    interaction("disliked", prompt="a wall", output="straw"),
    feedback("3", "disliked", "thumbs_down"),
    interaction("also liked", prompt="a wall", output="stone"),
    feedback("4", "also liked", "thumbs_up"),
    # Nobody prefers one of these: no person, another conversation, the same answer, or about the same rating.
    interaction("by a validator", prompt="a roof", output="slate"),
    feedback("5", "by a validator", "success", score=100),
    interaction("failed", prompt="a roof", output="paper"),
    feedback("6", "failed", "validation_failure", score=0),
    interaction("in a conversation", prompt="a wall", history=[TURN], output="glass"),
    feedback("7", "in a conversation", "thumbs_down"),
    interaction("unchanged", prompt="a floor", output="wood"),
    feedback("8", "unchanged", "correction", correction=" wood "),
    interaction("four", prompt="a stair", output="steel"),
    feedback("9", "four", "rating", rating="4"),
    interaction("five", prompt="a stair", output="iron"),
    feedback("10", "five", "rating", rating="5"),
]


def test_people_prefer_a_correction_and_the_higher_rating(db):
    with db.write() as connection:
        store.record(connection, "notes", EVENTS, default_reward)
    with db.read() as connection:
        pairs = rated_pairs(connection, "notes", 10)
        assert rated_pairs(connection, "notes", 1) == pairs[:1]
        assert rated_pairs(connection, "another", 10) == []
    assert pairs == [RatedPair("a wall", "stone", "straw"), RatedPair("a door", "red oak", "oak")]
