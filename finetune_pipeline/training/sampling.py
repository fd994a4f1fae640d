"""Which examples a pass of the training sees when rewards weigh them."""

import random
from collections.abc import Sequence


def by_reward(rewards: Sequence[float | None], seed: int) -> list[int]:
    """As many places as there are rewards, each place as often as its reward asks for, in ascending order.

    Weights are 1 + reward, so that a reward of -1 is never drawn and +1 twice as often as 0. Drawn by systematic
    resampling (Kitagawa 1996) in a shuffled order: each place comes as often as its expectation, rounded up or down,
    and the same seed gives the same draw.

    Args:
        rewards: each -1 to 1; None for an example that nobody judged (a replayed one), which weighs as much as the
            others do on average.
        seed: of the order and the start of the draw.
    """
    judged = [1.0 + reward for reward in rewards if reward is not None]
    mean = sum(judged) / len(judged) if judged else 1.0
    weights = [mean if reward is None else 1.0 + reward for reward in rewards]
    step = sum(weights) / max(len(weights), 1)
    if step == 0:
        return list(range(len(rewards)))
    chance = random.Random(seed)
    order = list(range(len(weights)))
    chance.shuffle(order)  # or a pattern in the data could fall in with the steps
    places: list[int] = []
    reached, mark = 0.0, chance.random() * step
    for place in order:
        reached += weights[place]
        while mark < reached and len(places) < len(weights):
            places.append(place)
            mark += step
    return sorted(places)
