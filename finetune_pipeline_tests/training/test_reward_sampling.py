"""Sampling of examples by their rewards."""

from collections import Counter

import pytest

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.training.reward_sampling import sample_by_reward
from finetune_pipeline.training.tokenized_data import load_data

from .conftest import rows, save, with_settings


def test_an_example_is_drawn_in_proportion_to_its_reward():
    rewards = [-1.0] * 100 + [0.0] * 100 + [0.5] * 100 + [1.0] * 100
    times = Counter(sample_by_reward(rewards, seed=3))
    assert sum(times.values()) == 400
    for index, reward in enumerate(rewards):
        assert abs(times[index] - (1 + reward) / 1.125) < 1  # rounded up or down, never more
    better, best = (sum(times[index] for index in range(start, start + 100)) for start in (100, 300))
    assert 1.6 < best / better < 2.4


def test_equal_rewards_draw_each_example_once():
    assert sample_by_reward([0.4] * 50, seed=1) == list(range(50))
    uneven = [0.2 + n / 100 for n in range(80)]
    assert sample_by_reward(uneven, 1) == sample_by_reward(uneven, 1) != sample_by_reward(uneven, 2)
    assert sample_by_reward([-1.0, -1.0], 0) == [0, 1]
    assert sample_by_reward([], 0) == []


def test_examples_without_a_reward_get_the_mean_weight():
    rewards = [0.2] * 50 + [0.6] * 50 + [None] * 100
    times = Counter(sample_by_reward(rewards, seed=3))
    replayed = sum(times[index] for index in range(100, 200))
    assert sum(times.values()) == 200 and abs(replayed - 100) <= 10
    assert all(times[index] in (0, 1, 2) for index in range(200))
    assert sample_by_reward([None] * 5, 0) == list(range(5))


def test_replay_data_does_not_outweigh_corrections(job, tmp_path):
    corrected = [{**row, "reward": 0.2, "source": "feedback"} for row in rows(20, 100)]
    replayed = [{**row, "reward": 1.0, "source": "replay"} for row in rows(20, 500)]
    weighted = with_settings(job, reward_weighted=True)
    weighted = weighted.model_copy(update={"dataset": save(tmp_path / "d", [*corrected, *replayed])})
    drawn = load_data(weighted, load_tokenizer(job.base_model)).train["reward"][:]
    assert drawn == [0.2] * 20 + [None] * 20  # each once


def test_a_resumed_run_sees_the_same_sample(job, tmp_path):
    rewarded = [{**row, "reward": 1.0 if number % 2 else -0.5} for number, row in enumerate(rows(40, 100))]
    weighted = with_settings(job, reward_weighted=True)
    weighted = weighted.model_copy(update={"dataset": save(tmp_path / "d", rewarded)})
    tokens = load_tokenizer(job.base_model)
    first, again = (load_data(weighted, tokens).train["reward"][:] for _ in range(2))
    assert first == again
    assert len(first) == 40
    assert sum(reward > 0 for reward in first) == pytest.approx(32, abs=4)  # weights of 2.0 and 0.5
