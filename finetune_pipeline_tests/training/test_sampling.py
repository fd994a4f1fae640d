"""Examples drawn by their reward."""

from collections import Counter

import pytest

from finetune_pipeline.training.data import load, tokenizer
from finetune_pipeline.training.sampling import by_reward

from .conftest import rows, save, with_settings


def test_an_example_comes_as_often_as_its_reward_asks_for():
    rewards = [-1.0] * 100 + [0.0] * 100 + [0.5] * 100 + [1.0] * 100
    times = Counter(by_reward(rewards, seed=3))
    assert sum(times.values()) == 400
    for place, reward in enumerate(rewards):
        assert abs(times[place] - (1 + reward) / 1.125) < 1  # rounded up or down, never more
    better, best = (sum(times[place] for place in range(start, start + 100)) for start in (100, 300))
    assert 1.6 < best / better < 2.4


def test_equal_rewards_give_each_example_once_and_another_seed_draws_others():
    assert by_reward([0.4] * 50, seed=1) == list(range(50))
    uneven = [0.2 + n / 100 for n in range(80)]
    assert by_reward(uneven, 1) == by_reward(uneven, 1) != by_reward(uneven, 2)
    assert by_reward([-1.0, -1.0], 0) == [0, 1]
    assert by_reward([], 0) == []


def test_what_nobody_judged_weighs_as_much_as_the_others_on_average():
    rewards = [0.2] * 50 + [0.6] * 50 + [None] * 100
    times = Counter(by_reward(rewards, seed=3))
    replayed = sum(times[place] for place in range(100, 200))
    assert sum(times.values()) == 200 and abs(replayed - 100) <= 10
    assert all(times[place] in (0, 1, 2) for place in range(200))
    assert by_reward([None] * 5, 0) == list(range(5))


def test_replayed_examples_do_not_outweigh_what_people_corrected(job, tmp_path):
    taught = [{**row, "reward": 0.2, "source": "feedback"} for row in rows(20, 100)]
    replayed = [{**row, "reward": 1.0, "source": "replay"} for row in rows(20, 500)]
    weighted = with_settings(job, reward_weighted=True)
    weighted = weighted.model_copy(update={"dataset": save(tmp_path / "d", [*taught, *replayed])})
    drawn = load(weighted, tokenizer(job.base_model)).train["reward"][:]
    assert drawn == [0.2] * 20 + [None] * 20  # each once


def test_a_weighted_training_sees_the_better_rewarded_more_often_and_the_same_when_it_goes_on(job, tmp_path):
    rewarded = [{**row, "reward": 1.0 if number % 2 else -0.5} for number, row in enumerate(rows(40, 100))]
    weighted = with_settings(job, reward_weighted=True)
    weighted = weighted.model_copy(update={"dataset": save(tmp_path / "d", rewarded)})
    tokens = tokenizer(job.base_model)
    first, again = (load(weighted, tokens).train["reward"][:] for _ in range(2))
    assert first == again
    assert len(first) == 40
    assert sum(reward > 0 for reward in first) == pytest.approx(32, abs=4)  # weights of 2.0 and 0.5
