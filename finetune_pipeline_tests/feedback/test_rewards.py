import json

import pytest

from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.rewards import default_reward, reward_function, score_reward
from finetune_pipeline.records import Feedback
from finetune_pipeline.settings import CurationSettings, FeedbackSettings, SettingsError
from finetune_pipeline_tests.conftest import feedback, interaction, uid


@pytest.mark.parametrize(
    ("score", "reward"),
    [
        (0, -1.0),  # the worst failure
        (30, -0.65),  # linear between
        (60, -0.3),  # where failures end
        (70, 0.25),  # neither: between both ends
        (80, 0.8),  # where successes begin
        (90, 0.9),
        (100, 1.0),
    ],
)
def test_a_score_gives_its_reward(score, reward):
    assert score_reward(score) == pytest.approx(reward)


@pytest.mark.parametrize("edge", [60, 80])
def test_the_reward_does_not_jump_at_the_edges(edge):
    assert score_reward(edge - 1e-6) == pytest.approx(score_reward(edge), abs=1e-5)


def test_a_correction_has_more_reward_the_less_it_changes():
    answer = interaction("a", output='{"material": "concrete", "thickness_mm": 150}')
    little = feedback("1", "a", "correction", correction='{"material": "concrete", "thickness_mm": 180}')
    much = feedback("2", "a", "correction", correction="a door")
    assert 0.2 <= default_reward(much, answer) < default_reward(little, answer) <= 0.6


def test_thumbs_stay_within_their_ranges():
    answer = interaction("a")
    assert default_reward(feedback("1", "a", "thumbs_up"), answer) == 1.0
    assert default_reward(feedback("2", "a", "thumbs_up", score=0), answer) == pytest.approx(0.7)
    assert default_reward(feedback("3", "a", "thumbs_down"), answer) == -1.0
    assert default_reward(feedback("4", "a", "thumbs_down", score=0), answer) == pytest.approx(-0.9)


def generous(feedback, interaction):
    return 7.0


def test_a_loops_own_reward_is_clipped_to_the_range():
    own = reward_function(FeedbackSettings(reward_function=f"{__name__}.generous"))
    assert own(feedback("1", "a", "thumbs_down"), interaction("a")) == 1.0


@pytest.mark.parametrize("path", ["nowhere.at_all", "finetune_pipeline.records.missing", "name"])
def test_a_missing_reward_function_is_reported(path):
    with pytest.raises(SettingsError, match=path):
        reward_function(FeedbackSettings(reward_function=path))


def test_a_rating_has_the_reward_of_the_loops_settings():
    reward = reward_function(FeedbackSettings(ratings={"1": -1, "2": -0.5, "3": 0.1, "4": 0.5, "5": 0.8, "gold": 1}))
    answer = interaction("a")
    assert [reward(feedback("1", "a", "rating", rating=stars), answer) for stars in ("2", "5", "gold")] == [
        -0.5,
        0.8,
        1,
    ]


@pytest.mark.parametrize("stars", [1, 2, 3, 4, 5])
def test_stars_may_be_numbers(stars):
    """In an event, in a call of the client, and as the keys of a YAML mapping."""
    given = feedback("1", "a", "rating", rating=stars)
    assert given.rating == str(stars)
    line = given.model_dump(mode="json") | {"rating": stars}
    assert Feedback.model_validate_json(json.dumps(line)) == given
    client = FeedbackClient("aec_parser")
    client.rate(uid("a"), stars)
    assert client.stats()["feedback.rating"] == 1
    assert FeedbackSettings(ratings={1: -1, 2: -0.9, 3: 0, 4: 0.7, 5: 0.9, "gold": 1}) == FeedbackSettings()


@pytest.mark.parametrize("rating", [0, 6, -1, True, 5.0, 10**30, "05", None])
def test_other_numbers_are_no_stars(rating):
    with pytest.raises(ValueError, match="rating"):
        feedback("1", "a", "rating", rating=rating)


@pytest.mark.parametrize("kind", ["success", "validation_failure"])
@pytest.mark.parametrize(("score", "trains"), [(60, False), (70, False), (71, True), (80, True)])
def test_the_documented_scores_train_or_not(kind, score, trains):
    """docs/how-to/feedback.md names the lowest score; the kind's name makes no difference."""
    reward = default_reward(feedback("1", "a", kind, score=score), interaction("a"))
    assert (reward >= CurationSettings().min_reward) is trains


def test_every_rating_needs_a_reward():
    with pytest.raises(ValueError, match="gold is missing"):
        FeedbackSettings(ratings={"1": -1, "2": -0.5, "3": 0, "4": 0.5, "5": 0.8})


def test_a_reward_given_with_the_feedback_is_used():
    assert default_reward(feedback("1", "a", "reward", reward=-0.25), interaction("a")) == -0.25
    assert default_reward(feedback("2", "a", "success", score=100, reward=0.1), interaction("a")) == 0.1


@pytest.mark.parametrize("value", [7, -1.01, float("nan"), float("inf"), "much"])
def test_a_reward_outside_its_range_is_rejected(value):
    with pytest.raises(ValueError, match="reward"):
        feedback("1", "a", "reward", reward=value)
