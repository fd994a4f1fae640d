"""Sampling of training examples by their rewards."""

import random
from collections.abc import Sequence


def sample_by_reward(rewards: Sequence[float | None], seed: int) -> list[int]:
    """Draw as many indices as there are rewards, each in proportion to 1 + reward, in ascending order.

    A reward of -1 is never drawn, and +1 is drawn twice as often as 0. Systematic resampling (Kitagawa 1996) in a
    shuffled order draws each index as often as expected, rounded up or down; the same seed gives the same sample.

    Args:
        rewards: each -1 to 1; None for an example without one (replay data), which gets the mean weight of the others.
        seed: of the order and the start of the draw.
    """
    rewarded = [1.0 + reward for reward in rewards if reward is not None]
    mean = sum(rewarded) / len(rewarded) if rewarded else 1.0
    weights = [mean if reward is None else 1.0 + reward for reward in rewards]
    step = sum(weights) / max(len(weights), 1)
    if step == 0:
        return list(range(len(rewards)))
    generator = random.Random(seed)
    order = list(range(len(weights)))
    generator.shuffle(order)  # a periodic pattern in the data could coincide with the steps
    drawn: list[int] = []
    cumulative, threshold = 0.0, generator.random() * step
    for index in order:
        cumulative += weights[index]
        while threshold < cumulative and len(drawn) < len(weights):
            drawn.append(index)
            threshold += step
    return sorted(drawn)
