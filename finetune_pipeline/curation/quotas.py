"""How many examples each source may give to a dataset, so that none drowns the others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The most that a source may give: a number of examples, and a share of the whole dataset (0 to 1)."""

    examples: int | None = None
    share: float = 1.0


def allowed(counts: Mapping[str, int], quotas: Mapping[str, Quota]) -> dict[str, int]:
    """How many of its examples each source may give.

    Shares are of what is left after all cuts. Where the shares of the sources that have anything add up to less than
    one, they stand for their proportions: a source that is alone drowns nobody.

    Args:
        counts: source -> examples that it has.
        quotas: source -> its quota; a source without one is not limited.
    """
    kept = {
        source: count if (most := quotas.get(source, Quota()).examples) is None else min(count, most)
        for source, count in counts.items()
    }
    shares = {source: quotas.get(source, Quota()).share for source, count in kept.items() if count}
    scale = max(1.0, 1 / sum(shares.values())) if shares else 1.0
    while True:
        total = sum(kept.values())
        # A hair above, since in floats 0.2 * 5 may be less than 1.
        cut = {s: min(n, math.floor(total * min(1.0, shares.get(s, 1.0) * scale) + 1e-9)) for s, n in kept.items()}
        if cut == kept:
            return kept
        kept = cut
