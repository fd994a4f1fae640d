"""The rows that are curated, by their place: Parquet files that are read in batches, or a table in memory.

Loads pyarrow and numpy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.records import Example

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 20_000
ROWS = tuple(Example.model_fields)
"""The columns of a snapshot that curation reads."""

Numbers = np.ndarray[Any, Any]


def schema() -> "pa.Schema":
    """Their types."""
    import pyarrow as pa

    text = pa.string()
    types = {
        "ingest_offset": pa.int64(), "reward": pa.float64(), "confidence": pa.float64(), "confirmed": pa.bool_(),
        "corrected": pa.bool_(), "history": pa.list_(pa.struct({"role": text, "content": text})),
    }  # fmt: skip
    return pa.schema({name: types.get(name, text) for name in ROWS})


def table_of(examples: Iterable[Example]) -> "pa.Table":
    """Examples as rows."""
    import pyarrow as pa

    return pa.Table.from_pylist([example.model_dump(mode="json") for example in examples], schema())


@dataclass(frozen=True)
class Part:
    """A Parquet file of rows, or the rows themselves."""

    rows: "Path | pa.Table"

    @cached_property
    def count(self) -> int:
        """How many rows it has."""
        import pyarrow.parquet as pq

        return int(pq.read_metadata(self.rows).num_rows if isinstance(self.rows, Path) else self.rows.num_rows)

    def batches(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> "Iterator[pa.RecordBatch]":
        """All rows in their order, or those of some of the file's row groups."""
        import pyarrow.parquet as pq

        if isinstance(self.rows, Path):
            with pq.ParquetFile(self.rows) as file:
                yield from file.iter_batches(_BATCH, row_groups=groups, columns=list(columns))
        else:
            yield from self.rows.select(list(columns)).to_batches(_BATCH)


class Rows:
    """The rows of all parts, one after another."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *(part.count for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, places: Numbers, columns: Sequence[str]) -> "pa.Table":
        """The rows of these places, in their order; the parts are read once."""
        import pyarrow as pa

        ascending = np.sort(places)
        found = [batch for part in self._at(ascending, columns) for batch in part]
        if not found:
            return schema().empty_table().select(list(columns))
        order = np.empty(len(places), np.int64)
        order[np.argsort(places, kind="stable")] = np.arange(len(places))
        return pa.Table.from_batches(found).take(pa.array(order))

    def _at(self, ascending: Numbers, columns: Sequence[str]) -> "Iterator[Iterable[pa.RecordBatch]]":
        for part, start, end in zip(self.parts, self._starts[:-1], self._starts[1:], strict=True):
            mine = ascending[np.searchsorted(ascending, start) : np.searchsorted(ascending, end)] - start
            if len(mine):
                yield _some(part.batches(columns), mine)

    def superseded(self) -> Numbers:
        """Whether a later part has a row of the same interaction, which stands instead."""
        import pyarrow as pa
        import pyarrow.compute as pc

        gone = np.zeros(len(self), np.bool_)
        later: list[pa.Array] = []
        for part, end in reversed(list(zip(self.parts, self._starts[1:], strict=True))):
            known, start = pa.chunked_array(later, pa.string()), end - part.count
            if part is self.parts[0] and not later:
                break  # there is no other part
            for batch in part.batches(["interaction_id"]):
                ids = batch.column(0)
                gone[start : start + len(ids)] = pc.is_in(ids, value_set=known).to_numpy(zero_copy_only=False)
                start += len(ids)
                if part is not self.parts[0]:  # nothing is older than the first, and it may be the history of years
                    later.append(ids)
        return gone


def _some(batches: "Iterable[pa.RecordBatch]", places: Numbers) -> "Iterator[pa.RecordBatch]":
    """The rows of these places, which ascend."""
    import pyarrow as pa

    start = 0
    for batch in batches:
        end = start + batch.num_rows
        mine = places[np.searchsorted(places, start) : np.searchsorted(places, end)] - start
        if len(mine):
            yield batch.take(pa.array(mine))
        start = end
