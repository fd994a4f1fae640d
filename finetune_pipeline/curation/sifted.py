"""The first pass over all parts of a snapshot, in processes of its own where there is much; kept from cycle to cycle.

What was found of a part is kept under a key of the caller's, which has to change with the part, the settings and every
file that the policy was read from. It holds hashes and counts, no text. Loads pyarrow.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.sifting import Identity, schema, sift
from finetune_pipeline.curation.snapshot import ROWS, Part
from finetune_pipeline.subprocess_lifetime import die_with_parent

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK, _BATCH = 20_000, 2_000
_ALONE = 20_000  # rows up to which the start of processes would take longer than they save
_MOST_PROCESSES = 8
_ABANDONED = 86_400  # seconds after which nobody is writing a temporary file any more


@dataclass(frozen=True)
class Cache:
    """Where what was found of each part is kept, and under which key."""

    folder: Path
    keys: Sequence[str]

    def paths(self) -> list[Path]:
        """One file for each part."""
        return [self.folder / f"{key}.arrow" for key in self.keys]


@dataclass(frozen=True)
class Chunk:
    """Rows that are looked at in one go: some row groups of a file, or a table."""

    part: Part
    groups: tuple[int, ...] | None = None


def sift_parts(parts: Sequence[Part], policy: Policy, identity: Identity, cache: Cache | None) -> "list[pa.Table]":
    """What is known of every row of each part.

    Args:
        cache: where parts that were looked at before are found, and new ones kept; what belongs to none of these parts
            is removed from it.
    """
    if cache is None:
        return [_read(_sift([part], policy, identity)) for part in parts]
    paths = cache.paths()
    # From here on a table stays readable, whatever another run of the loop takes out of the folder.
    tables = {path: table for path in paths if (table := _kept(path)) is not None}
    # By path: two parts may be the same byte by byte, and are looked at once.
    missing = {path: part for part, path in zip(parts, paths, strict=True) if path not in tables}
    found = _sift(list(missing.values()), policy, identity)
    for path, part in missing.items():
        tables[path] = _keep(path, found, part.count)
    _tidy(cache.folder, paths)
    return [tables[path] for path in paths]


def _kept(path: Path) -> "pa.Table | None":
    """What was kept under this name; its file is mapped, and stays so after its removal."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        return None


def _tidy(folder: Path, paths: Sequence[Path]) -> None:
    """Remove what belongs to none of the parts, and what a killed run left half written."""
    for path in set(folder.glob("*.arrow")) - set(paths):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.tmp"):
        with suppress(FileNotFoundError):  # another run has just finished it
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _read(tables: "Iterator[pa.RecordBatch]") -> "pa.Table":
    import pyarrow as pa

    return pa.Table.from_batches(tables, schema())


def _keep(path: Path, batches: "Iterator[pa.RecordBatch]", count: int) -> "pa.Table":
    """Write as many rows as the part has, and read them; a kill leaves no half of them under this name."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.ipc.new_file(str(temporary), schema()) as writer:
            while count > 0:
                batch = next(batches)
                writer.write_batch(batch)
                count -= batch.num_rows
        assert count == 0, f"{path}: rows of another part were among those of this one"
        table = _kept(temporary)
        temporary.replace(path)
        return table
    finally:
        temporary.unlink(missing_ok=True)


def _sift(parts: Sequence[Part], policy: Policy, identity: Identity) -> "Iterator[pa.RecordBatch]":
    """What is known of all rows of these parts, in their order."""
    chunks = [chunk for part in parts for chunk in chunked(part)]
    if policy.settings.compute == "ray" and chunks:
        from finetune_pipeline.curation import ray_data

        yield from ray_data.sift(chunks, policy, identity)
        return
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, _MOST_PROCESSES)
    if processes == 1 or sum(part.count for part in parts) <= _ALONE:
        for chunk in chunks:
            yield from sift_chunk(chunk, policy, identity)
        return
    started = partial(die_with_parent, os.getpid())
    with ProcessPoolExecutor(processes, get_context("spawn"), started) as pool:
        for found in pool.map(partial(sift_chunk, policy=policy, identity=identity), chunks):
            yield from found


def chunked(part: Part) -> Iterator[Chunk]:
    """A part as chunks of whole row groups; a table is one chunk."""
    import pyarrow.parquet as pq

    if not isinstance(part.rows, Path):
        yield Chunk(part)
        return
    metadata = pq.read_metadata(part.rows)
    groups: list[int] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= _CHUNK:
            yield Chunk(part, tuple(groups))
            groups, rows = [], 0
    if groups:
        yield Chunk(part, tuple(groups))


def sift_chunk(chunk: Chunk, policy: Policy, identity: Identity) -> "list[pa.RecordBatch]":
    """What is known of the rows of a chunk."""
    return [
        sift(batch.slice(start, _BATCH), policy, identity)
        for batch in chunk.part.batches(ROWS, chunk.groups)
        for start in range(0, batch.num_rows, _BATCH)
    ]
