"""How many examples each source may give to a dataset, so that none drowns the others."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The most that a source may give: a number of examples, and a share of the whole dataset (0 to 1)."""

    examples: int | None = None
    share: float = 1.0


def allowed(counts: Mapping[str, int], quotas: Mapping[str, Quota]) -> dict[str, int]:
    """How many of its examples each source may give.

    Of the sources that have anything, the one of the largest share leads (a source without a quota has the share 1; of
    equal shares, the one with most examples). It gives all that it has, and the others are measured by it: each gives
    at most its share of the dataset or, if that is more, as much beside the leader as their two shares say. The second
    counts where the others cannot fill what the leader's share leaves: shares then stand for their proportions. A
    source that has less than it may give holds nobody back, and none that has something is cut to nothing.

    More of one source never means less of another, but for the first examples of a new leader.

    Args:
        counts: source -> examples that it has.
        quotas: source -> its quota; a source without one is not limited.
    """
    has: dict[str, int] = {}
    for source, count in counts.items():
        most = quotas.get(source, Quota()).examples
        has[source] = count if most is None else min(count, most)
    shares = {source: quotas.get(source, Quota()).share for source, count in has.items() if count}
    if not shares:
        return has
    size = _size(has, shares)
    # A hair above, since in floats 0.2 * 5 may be less than 1.
    return {source: min(n, max(1, int(shares[source] * size + 1e-9))) if n else 0 for source, n in has.items()}


def _size(has: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """The size of the dataset of which the shares are taken: at least so much that the leader is within its own."""
    share, examples = max((shares[source], has[source]) for source in shares)
    smallest = examples / share
    size = float(sum(has.values()))
    while size > smallest:
        cut = {source for source in shares if has[source] > shares[source] * size}
        # The size of which the cut ones have just their shares: Newton's method on a sum of straight lines, from above.
        smaller = sum(n for source, n in has.items() if source not in cut) / (1 - sum(shares[source] for source in cut))
        if smaller >= size:
            return size
        size = smaller
    return smallest
