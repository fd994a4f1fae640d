"""Which examples a pass of the training sees when rewards weigh them."""

import random
from collections.abc import Sequence


def by_reward(rewards: Sequence[float], seed: int) -> list[int]:
    """As many places as there are rewards, each place as often as its reward asks for, in ascending order.

    Weights are 1 + reward, so that a reward of -1 is never drawn and +1 twice as often as 0. Drawn by systematic
    resampling (Kitagawa 1996): each place comes as often as its expectation, rounded up or down, and the same seed
    gives the same draw.

    Args:
        rewards: each -1 to 1.
        seed: of the one random number that the draw needs.
    """
    weights = [1.0 + reward for reward in rewards]
    step = sum(weights) / max(len(weights), 1)
    if step == 0:
        return list(range(len(rewards)))
    places: list[int] = []
    reached, mark = 0.0, random.Random(seed).random() * step
    for place, weight in enumerate(weights):
        reached += weight
        while mark < reached and len(places) < len(weights):
            places.append(place)
            mark += step
    return places
