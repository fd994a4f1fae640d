"""The first pass of curation: filter and redact each example by itself, and hash what selection compares.

The result has a row for each row of the snapshot: hashes, MinHash sketches and counts, but no text. So the results of
millions of rows fit into memory, and can be cached from one dataset to the next without personal data in them.

    filter_shards -> shards whose result is cached are read from the cache
                  -> the others are cut into chunks, which are filtered here, in processes, or on a Ray cluster
    filter_chunk  -> filter_batch -> _filter_row: quick filters, redact, all filters, hashes

Loads numpy.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.curation.acceptance import (
    BENCHMARK_REASONS,
    Policy,
    accept,
    benchmark_overlap,
    has_rejected_output,
    is_undesirable,
    quick_filters,
)
from finetune_pipeline.curation.deduplication import BANDS, BITS, Sketches, sketch
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.snapshot import COLUMNS, Array, Shard, example_of
from finetune_pipeline.inference.threads import available_cores
from finetune_pipeline.ray_session import check_installed, connected
from finetune_pipeline.records import Example, canonical_answer, conversation_text, normalize
from finetune_pipeline.settings import LOGS
from finetune_pipeline.subprocess_lifetime import die_with_parent

if TYPE_CHECKING:
    import pyarrow as pa

CODE_VERSION = 22
"""Part of the version of every dataset and of every cache key. Raise it when the same row may be filtered, redacted or
selected differently than before, so that cached results and datasets of the old code are not used."""

_CHUNK_ROWS, _BATCH_ROWS = 20_000, 2_000
_SINGLE_PROCESS_ROWS = 20_000  # up to here, starting processes takes longer than it saves
_MAX_PROCESSES = 8
_ABANDONED_SECONDS = 86_400  # no process is still writing a temporary file of this age
_RAY_OBJECT_STORE_BYTES = 300_000_000

Identity = Callable[[Example], str]
"""Returns the content hash of an example, by which the store recognizes it after it was judged."""

RESULT_COLUMNS = {
    # `undesirable` examples are rejected answers for KTO; `benchmark` marks examples left out for overlap with it.
    "accepted": "bool", "undesirable": "bool", "benchmark": "bool", "reason": "string",
    # How much the example is trusted.
    "reviewed": "bool", "by_person": "bool", "corrected": "bool", "reward": "float64", "created_at": "float64",
    "id_hash": "uint64",
    "rejected_output": "bool",  # a person corrected the model's output, which makes a preference pair
    # Hashes: of the conversation, of the conversation for its split, of the answer to train on, of the model's output.
    "prompt": "uint64", "split": "uint32", "target": "uint64", "output": "uint64",
    "source": "string", "redacted": "string", "content_hash": "string",
    "bands": "bytes", "bits": "bytes", "shingles": "uint32",
    "bytes": "uint32",  # of all texts of the row
}  # fmt: skip
"""The columns of the result. Those after `reason` are only valid where a row is accepted or undesirable."""
_WIDTHS = {"bands": BANDS * 4, "bits": BITS // 8}


def schema() -> "pa.Schema":
    """Return the Arrow types of the result."""
    import pyarrow as pa

    return pa.schema(
        {
            name: pa.binary(_WIDTHS[name]) if name in _WIDTHS else pa.type_for_alias(kind)
            for name, kind in RESULT_COLUMNS.items()
        }
    )


# --- All shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterCache:
    """Where the results of shards are kept, one file for each.

    Attributes:
        keys: of the shards; a key has to change with the shard's content, the settings, and every file and package
            that the policy depends on.
    """

    folder: Path
    keys: Sequence[str]


@dataclass(frozen=True)
class Chunk:
    """Some row groups of a shard, filtered at once."""

    shard: Shard
    row_groups: tuple[int, ...]


def filter_shards(
    shards: Sequence[Shard], policy: Policy, identity: Identity, cache: FilterCache | None = None
) -> "list[pa.Table]":
    """Return the results of each shard, in the order of its rows.

    Args:
        cache: results are read from it and written to it; results that belong to none of the shards are deleted.
    """
    import pyarrow as pa

    if cache is None:
        return [pa.Table.from_batches(_filter([shard], policy, identity), schema()) for shard in shards]
    paths = [cache.folder / f"{key}.arrow" for key in cache.keys]
    # An opened table stays readable, even if another run of the loop deletes its file.
    tables = {path: table for path in paths if (table := _open(path)) is not None}
    # By path: two shards with the same content have the same key, and are filtered once.
    missing = {path: shard for shard, path in zip(shards, paths, strict=True) if path not in tables}
    results = _filter(list(missing.values()), policy, identity)
    for path, shard in missing.items():
        tables[path] = _write(path, results, shard.count)
    for path in set(cache.folder.glob("*.arrow")) - set(paths):
        path.unlink(missing_ok=True)
    for path in cache.folder.glob("*.tmp"):  # left by a killed run
        with suppress(FileNotFoundError):  # another run has just renamed it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
    return [tables[path] for path in paths]


def _open(path: Path) -> "pa.Table | None":
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        return None


def _write(path: Path, results: "Iterator[pa.RecordBatch]", count: int) -> "pa.Table":
    """Write the next `count` rows to a file and open it; the file appears only when it is complete."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with pa.ipc.new_file(str(temporary), schema()) as writer:
            while count > 0:
                batch = next(results)
                writer.write_batch(batch)
                count -= batch.num_rows
        assert count == 0, f"{path}: rows of another shard were among those of this one"
        table = _open(temporary)
        temporary.replace(path)
        return table
    finally:
        temporary.unlink(missing_ok=True)


def _filter(shards: Sequence[Shard], policy: Policy, identity: Identity) -> "Iterator[pa.RecordBatch]":
    """Yield the results of all rows of these shards, in their order."""
    chunks = [chunk for shard in shards for chunk in chunks_of(shard)]
    if policy.settings.compute == "ray" and chunks:
        yield from _filter_on_ray(chunks, policy, identity)
        return
    processes = min(len(available_cores()), _MAX_PROCESSES)
    if processes == 1 or sum(shard.count for shard in shards) <= _SINGLE_PROCESS_ROWS:
        for chunk in chunks:
            yield from filter_chunk(chunk, policy, identity)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), partial(die_with_parent, os.getpid())) as pool:
        for batches in pool.map(partial(filter_chunk, policy=policy, identity=identity), chunks):
            yield from batches


def chunks_of(shard: Shard) -> Iterator[Chunk]:
    """Cut a shard into chunks of whole row groups."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(shard.path)
    groups: list[int] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= _CHUNK_ROWS:
            yield Chunk(shard, tuple(groups))
            groups, rows = [], 0
    if groups:
        yield Chunk(shard, tuple(groups))


def _filter_on_ray(chunks: Sequence[Chunk], policy: Policy, identity: Identity) -> "Iterator[pa.RecordBatch]":
    """Filter chunks on the cluster at RAY_ADDRESS, or on one that is started on this machine, by Ray Data.

    The workers have to see the snapshot under the same path. The policy travels to them, and so does this package; only
    hashes and counts come back.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """
    check_installed("curation.compute")
    import pyarrow as pa

    with connected({}, None, _RAY_OBJECT_STORE_BYTES):
        import ray

        work = ray.put((tuple(chunks), policy, identity))
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
        # Tasks, not actors: actors on every core would leave none to read the numbers, and wait for ever.
        results = numbers.map_batches(_filter_on_worker, batch_size=1, fn_args=([work],))
        for row in results.iter_rows():
            with pa.ipc.open_stream(row["result"]) as batches:
                yield from batches


def _filter_on_worker(batch: dict[str, Any], work: list[Any]) -> dict[str, list[bytes]]:
    import pyarrow as pa
    import ray

    chunks, policy, identity = ray.get(work[0])
    results = []
    for number in batch["id"].tolist():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema()) as writer:
            for result in filter_chunk(chunks[number], policy, identity):
                writer.write_batch(result)
        results.append(sink.getvalue().to_pybytes())
    return {"result": results}


# --- One chunk, one row -----------------------------------------------------------------------------------------------


def filter_chunk(chunk: Chunk, policy: Policy, identity: Identity) -> "list[pa.RecordBatch]":
    """Return the results of the rows of a chunk."""
    return [
        filter_batch(batch.slice(start, _BATCH_ROWS), policy, identity)
        for batch in chunk.shard.batches(COLUMNS, chunk.row_groups)
        for start in range(0, batch.num_rows, _BATCH_ROWS)
    ]


def filter_batch(batch: "pa.RecordBatch", policy: Policy, identity: Identity) -> "pa.RecordBatch":
    """Return the results of a batch of rows; a row whose target is null is no example, and is not accepted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = batch.select(COLUMNS).to_pylist()
    results = [_filter_row(row, policy, identity) for row in rows]
    accepted = [result for result in results if result.get("accepted")]
    targets = np.array([result["target"] for result in accepted], np.uint64)
    sketches = sketch([result["text"] for result in accepted], targets)
    for result, bands, bits, shingles in zip(
        accepted, sketches.bands, sketches.bits, sketches.shingles.tolist(), strict=True
    ):
        result |= {"bands": bands.tobytes(), "bits": bits.tobytes(), "shingles": shingles}
    # The size of the texts of each row, by which the second pass reads as many rows at once as fit into memory.
    size = np.zeros(batch.num_rows, np.uint32)
    for name in ("prompt", "output", "target", "provenance"):
        size += pc.fill_null(pc.binary_length(batch.column(name)), 0).to_numpy(zero_copy_only=False).astype(np.uint32)
    for index, row in enumerate(rows):
        size[index] += sum(len(turn["content"].encode()) for turn in row["history"] or ())
    defaults = {"string": None, "bool": False}
    columns: dict[str, Any] = {
        name: [
            result.get(name, bytes(_WIDTHS[name]) if name in _WIDTHS else defaults.get(kind, 0)) for result in results
        ]
        for name, kind in RESULT_COLUMNS.items()
    }
    return pa.RecordBatch.from_pydict({**columns, "bytes": size}, schema())


def _filter_row(row: dict[str, Any], policy: Policy, identity: Identity) -> dict[str, Any]:
    if row["target"] is None:
        return {}
    original = example_of(row)
    decision = quick_filters(original, policy)
    if decision.accepted:
        example, redacted = redact_example(original, policy.settings.redaction)
        decision = accept(example, policy)
        if decision.accepted:
            return {
                "accepted": True,
                "rejected_output": has_rejected_output(example, policy.settings.max_answer_chars),
                "content_hash": identity(original),  # as the store has it: before redaction
                **_features(example, redacted),
            }
    result: dict[str, Any] = {"reason": decision.reason, "benchmark": decision.reason in BENCHMARK_REASONS}
    if not is_undesirable(original, policy):
        return result
    example, redacted = redact_example(original, policy.settings.redaction)
    if benchmark_overlap(example.prompt, example.history, policy):
        return result | {"benchmark": True}
    return result | {"benchmark": False, "undesirable": True, **_features(example, redacted)}


def _features(example: Example, redacted: Mapping[str, int]) -> dict[str, Any]:
    """Return what selection needs of a redacted example."""
    text = normalize(conversation_text(example.prompt, example.history))
    target = answer_hash(example.target)
    return {
        "reviewed": example.review is not None,
        "by_person": example.corrected or example.confirmed,
        "corrected": example.corrected,
        "reward": example.reward,
        "created_at": example.created_at.timestamp(),
        "id_hash": hash64(str(example.interaction_id)),
        "text": text,  # for the sketch; the result has no such column
        "prompt": hash64(text),
        "split": split_hash(text),
        "target": target,
        "output": target if example.output == example.target else answer_hash(example.output),
        "source": example.source,
        "redacted": json.dumps(redacted) if redacted else None,
    }


def hash64(text: str) -> int:
    """Return the first 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_hash(text: str) -> int:
    """Return the 32 bits that decide the split of a normalized conversation."""
    return hash64(f"split:{text}") >> 32


def answer_hash(answer: str) -> int:
    """Return the hash of an answer; the same JSON in another notation has the same hash."""
    return hash64(canonical_answer(answer))


# --- The result as a whole --------------------------------------------------------------------------------------------


class FilterResult:
    """The columns of all shards. A row that a later shard supersedes is never found."""

    def __init__(self, tables: "Sequence[pa.Table]", superseded: Array) -> None:
        import pyarrow as pa

        self._table = pa.concat_tables(tables)
        self._valid = ~superseded

    def where(self, column: str) -> Array:
        """Return the indices of the rows of which a column is true."""
        return np.flatnonzero(self._table[column].to_numpy() & self._valid)

    def numbers(self, column: str, indices: Array) -> Array:
        """Return the values of a numeric or boolean column at these indices."""
        return np.asarray(self._table[column].to_numpy()[indices])

    def texts(self, column: str, indices: Array) -> "pa.ChunkedArray":
        """Return the values of a text column at these indices."""
        import pyarrow as pa

        return self._table[column].take(pa.array(indices))

    def sources(self, indices: Array) -> tuple[list[str], Array]:
        """Return the names of the sources of these rows, and for each row the position of its source among them."""
        encoded = self.texts("source", indices).fill_null(LOGS).combine_chunks().dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def reasons(self) -> Counter[str]:
        """Return why rows were not accepted -> number of rows."""
        counts = self._table["reason"].filter(self._valid).drop_null().value_counts().to_pylist()
        return Counter({count["values"]: count["counts"] for count in counts})

    def sketches(self, indices: Array) -> Sketches:
        """Return the MinHash sketches of accepted rows."""

        def matrix(column: str, kind: type[Any]) -> Array:
            width = _WIDTHS[column]
            chunks = [
                np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
                for chunk in self._table[column].chunks
                if len(chunk)
            ]
            whole = np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)
            return np.asarray(whole.reshape(-1, width).view(kind)[indices])

        bands, bits = matrix("bands", np.uint32), matrix("bits", np.uint64)
        return Sketches(bands, bits, self.numbers("shingles", indices), self.numbers("target", indices))
