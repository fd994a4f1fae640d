"""How much memory a reader needs, without what other tests left behind in this process."""

import tracemalloc
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa


def count_and_peak(items: Iterable[object]) -> tuple[Counter[type], int]:
    """Read items without keeping them.

    The resident memory of the process would also depend on what its allocators kept or returned meanwhile.

    Returns:
        The number of items of each type, and the peak in bytes of what Python and Arrow allocated for them.
    """
    counts: Counter[type] = Counter()
    before, in_arrow = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for item in items:
            counts[type(item)] += 1
            in_arrow = max(in_arrow, pa.total_allocated_bytes() - before)
        return counts, tracemalloc.get_traced_memory()[1] + in_arrow
    finally:
        tracemalloc.stop()
