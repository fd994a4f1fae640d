"""The rows of a snapshot: Parquet shards that are read in batches, or row by row index. Loads numpy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.records import Example

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 20_000
COLUMNS = tuple(Example.model_fields)
"""The columns of a snapshot that curation reads: the fields of an Example."""

Array = np.ndarray[Any, Any]


def schema() -> "pa.Schema":
    """Return the Arrow types of the columns."""
    import pyarrow as pa

    text = pa.string()
    types = {
        "ingest_offset": pa.int64(), "created_at": pa.timestamp("us", tz="UTC"),
        "reward": pa.float64(), "confidence": pa.float64(), "confirmed": pa.bool_(),
        "corrected": pa.bool_(), "implicit": pa.bool_(),
        "history": pa.list_(pa.struct({"role": text, "content": text})),
    }  # fmt: skip
    return pa.schema({name: types.get(name, text) for name in COLUMNS})


def example_of(row: Mapping[str, Any]) -> Example:
    """Return the example of a row."""
    return Example.model_validate({**row, "history": row["history"] or ()})


def row_of(example: Example) -> dict[str, Any]:
    """Return the row of an example."""
    return {**example.model_dump(mode="json"), "created_at": example.created_at}


@dataclass(frozen=True)
class Shard:
    """A Parquet file of a snapshot."""

    path: Path

    @cached_property
    def count(self) -> int:
        """Number of rows."""
        import pyarrow.parquet as pq

        return int(pq.read_metadata(self.path).num_rows)

    def batches(self, columns: Sequence[str], row_groups: Sequence[int] | None = None) -> "Iterator[pa.RecordBatch]":
        """Yield the rows of all row groups, or of these, in their order."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(_BATCH_ROWS, row_groups=row_groups, columns=list(columns))


class Snapshot:
    """The rows of all shards; a row index counts through the shards in their order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: Array, columns: Sequence[str]) -> "pa.Table":
        """Return the rows at these indices, in the order of the indices; each shard is read at most once."""
        import pyarrow as pa

        ascending = np.sort(indices)
        found: list[pa.RecordBatch] = []
        for shard, start, end in zip(self.shards, self._starts[:-1], self._starts[1:], strict=True):
            in_shard = ascending[np.searchsorted(ascending, start) : np.searchsorted(ascending, end)] - start
            if len(in_shard):
                found += _rows_of(shard.batches(columns), in_shard)
        if not found:
            return schema().empty_table().select(list(columns))
        order = np.empty(len(indices), np.int64)
        order[np.argsort(indices, kind="stable")] = np.arange(len(indices))
        return pa.Table.from_batches(found).take(pa.array(order))

    def superseded(self) -> Array:
        """Return a mask of the rows whose interaction has a row in a later shard, which replaces them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        mask = np.zeros(len(self), np.bool_)
        if len(self.shards) == 1:
            return mask
        later: list[pa.Array] = []  # the ids of the shards after the current one
        for shard, start in reversed(list(zip(self.shards, self._starts[:-1], strict=True))):
            known = pa.chunked_array(later, pa.string())
            for batch in shard.batches(["interaction_id"]):
                ids = batch.column(0)
                mask[start : start + len(ids)] = pc.is_in(ids, value_set=known).to_numpy(zero_copy_only=False)
                start += len(ids)
                if shard is not self.shards[0]:  # no shard is older than the first, which may hold years of logs
                    later.append(ids)
        return mask


def _rows_of(batches: "Iterable[pa.RecordBatch]", ascending: Array) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    start = 0
    for batch in batches:
        end = start + batch.num_rows
        in_batch = ascending[np.searchsorted(ascending, start) : np.searchsorted(ascending, end)] - start
        if len(in_batch):
            yield batch.take(pa.array(in_batch))
        start = end
