"""Ingest what is new, then write a snapshot of the loop's interactions as Parquet: the work of the asset raw_logs."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    draft,
    find_alteration,
    find_unaltered,
    get_latest,
    hash_file,
    package_versions,
    publish,
    version_of,
)
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.erasure import erased_after
from finetune_pipeline.feedback.source_state import skipped_records, undeclared_sources
from finetune_pipeline.feedback.store import counters, interactions_with_examples, newest_offset, store_id
from finetune_pipeline.manifests import FileRecord, RawLogsManifest
from finetune_pipeline.pipeline.ingest import IngestReport, ingest
from finetune_pipeline.pipeline.source_sync import SourceReport, sync_sources
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ingest_ledger import ReadTotals, read_totals, rejected_lines
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.wording import counted

MAX_SHARDS = 32
FORM = 2
"""Raise it when the examples of stored events change, so that no snapshot links shards with the old ones."""
MAX_LISTED = 20
"""Rejected lines and skipped records that are listed; the others are only counted."""

COLUMNS = {
    "interaction_id": "string", "ingest_offset": "int64", "created_at": "timestamp", "prompt": "string",
    "history": "turns",
    "output": "string", "model": "string", "user": "string", "confidence": "float64", "validation_score": "float64",
    "domain": "string", "kind": "string", "retrieved_context": "string", "variant": "string", "flag": "string",
    "source": "string", "provenance": "string", "target": "string", "reward": "float64", "confirmed": "bool",
    "corrected": "bool", "implicit": "bool", "review": "string",
}  # fmt: skip
"""The columns of a snapshot and their types in the Parquet files."""


@dataclass(frozen=True)
class CollectedLogs:
    """What `collect_logs` read, and the snapshot that it wrote.

    Attributes:
        totals: the loop's counters, see `feedback.store.counters`.
        ingested: what this call took from event files and dropped files.
        sources: what this call took from each declared source.
        undeclared: source -> interactions that still train although the YAML no longer declares the source.
        skipped: the first records of declared sources that could not be used: source, provenance, reason.
        files_read: totals over all event files that were ever read.
        rejected: the first rejected lines of event files: path, line, reason.
    """

    artifact: Artifact[RawLogsManifest]
    totals: Counter[str]
    ingested: IngestReport
    sources: Sequence[SourceReport]
    undeclared: dict[str, int]
    skipped: Sequence[Any]
    files_read: ReadTotals
    rejected: Sequence[Any]


def collect_logs(loop: LoopSettings, database: Database, log: Callable[[str], None]) -> CollectedLogs:
    """Take new event files and declared sources into the store, and write a snapshot of the loop's interactions.

    Raises:
        SourceError: the loop has no interactions, or a folder that its YAML names does not exist.
    """
    ingested = ingest(loop, database, log)
    sources = sync_sources(loop, database, log)
    artifact, counts = snapshot(loop, database, sources)
    with database.read() as connection:
        return CollectedLogs(
            artifact=artifact,
            totals=counts,
            ingested=ingested,
            sources=sources,
            undeclared=undeclared_sources(connection, loop),
            skipped=skipped_records(connection, loop, MAX_LISTED),
            files_read=read_totals(connection, loop.name),
            rejected=rejected_lines(connection, loop.name, MAX_LISTED),
        )


def snapshot(
    loop: LoopSettings, database: Database, sources: Sequence[SourceReport] = ()
) -> tuple[Artifact[RawLogsManifest], Counter[str]]:
    """Return the loop's interactions as Parquet files, with the example that each of them yields now.

    A snapshot consists of shards. Shards of the last snapshot are hard-linked; interactions that came or changed since
    go into one new shard, and a later shard's row of an interaction replaces an earlier one. If nothing is new, the
    last snapshot is returned. Everything is written again as a single shard if there is no usable last snapshot, an
    event was erased, the reward settings changed, or the snapshot already has `MAX_SHARDS` shards.

    Args:
        sources: what was read from declared sources; the error message names them if there are no interactions.

    Raises:
        SourceError: the loop has no interactions.
    """
    with database.read() as connection:
        until, counts = newest_offset(connection), counters(connection, loop.name)
        if not counts["interactions"]:
            raise SourceError(_no_interactions(loop, connection, sources))
        base = _last_usable(loop, connection, until)
        if base is not None:
            if not any(interactions_with_examples(connection, loop.name, until, base.manifest.watermark)):
                return base, counts
            base = base if len(base.manifest.shards) < MAX_SHARDS else None
        return _write(loop, connection, base, until, counts), counts


def _no_interactions(loop: LoopSettings, connection: sa.Connection, sources: Sequence[SourceReport]) -> str:
    folders = " or ".join(str(folder) for folder in loop.log_folders)
    message = f"loop {loop.name} has no interactions: no event file in {folders} has a readable line"
    read, rejected = read_totals(connection, loop.name), rejected_lines(connection, loop.name, 1)
    if rejected:
        first = rejected[0]
        message += (
            f". {read.rejected:,} of {counted(read.lines, 'line')} rejected; first reason: {Path(first.path).name}:"
            f"{first.line}: {first.reason}"
        )
    for source in sources:
        if source.error:
            reason = source.error.removeprefix(f"source {source.name}: ")
            message += f". The declared source {source.name} failed: {reason}"
    empty = ", ".join(source.name for source in sources if not source.error)
    if empty:
        message += f". Nothing usable came from {empty}"
    return (
        f'{message}. Fix that, or put JSONL of {{"event": "interaction", ...}} lines there '
        "(see docs/how-to/feedback.md), then run again"
    )


def _last_usable(loop: LoopSettings, connection: sa.Connection, until: int) -> Artifact[RawLogsManifest] | None:
    """Return the last snapshot if the next one can link its shards."""
    try:
        last = get_latest(RawLogsManifest, loop.name)
    except ArtifactError:  # deleted or damaged
        return None
    if last is None or find_alteration(last) or last.manifest.settings != _settings(loop):
        return None
    if last.manifest.watermark > until:  # the database was restored from an earlier backup
        return None
    if last.manifest.inputs.get("store") != str(store_id(connection)):  # offsets of another database
        return None
    return None if erased_after(connection, loop.name, last.manifest.watermark) else last


def _settings(loop: LoopSettings) -> dict[str, Any]:
    return {**loop.feedback.model_dump(mode="json"), "columns": COLUMNS, "form": FORM}


def _write(
    loop: LoopSettings,
    connection: sa.Connection,
    base: Artifact[RawLogsManifest] | None,
    until: int,
    counts: Counter[str],
) -> Artifact[RawLogsManifest]:
    """Write the shards of `base` and one of what is new since (of everything, without a base) as a new snapshot."""
    shards = base.manifest.shards if base else []
    newest = f"records-{len(shards) + 1:04}.parquet"
    with draft(loop.name, RawLogsManifest.stage, str(until)) as folder:
        linked: dict[str, FileRecord] = {}
        for name in shards:
            assert base is not None
            try:
                os.link(base.path / name, folder / name)
            except OSError:  # another device, or a file system without hard links
                shutil.copyfile(base.path / name, folder / name)
            linked[name] = base.manifest.files[name]
        after = base.manifest.watermark if base else 0
        new = _write_parquet(folder / newest, interactions_with_examples(connection, loop.name, until, after))
        # The version is the hash of the content: two databases with the same offsets do not share a snapshot.
        content = {name: record.sha256 for name, record in linked.items()}
        inputs = {**content, newest: hash_file(folder / newest), "events": f"1..{until}"}
        version = version_of(inputs, _settings(loop))
        found = find_unaltered(RawLogsManifest, loop.name, version)
        if found is not None:
            return found
        fields = {
            "loop": loop.name,
            "version": version,
            "inputs": {"events": f"1..{until}", "store": str(store_id(connection))},
            "settings": _settings(loop),
            "packages": package_versions("finetune-pipeline", "pyarrow"),
            "interactions": counts["interactions"],
            "feedback": counts["feedback"],
            "examples": counts["examples"],
            "shards": [*shards, newest],
            "new": new,
            "watermark": until,
        }
        return publish(folder, RawLogsManifest, fields, linked)


def _write_parquet(path: Path, batches: Iterator[Sequence[Any]]) -> int:
    """Write batches of rows to a Parquet file; return the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    types = {
        "string": text,
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "turns": pa.list_(pa.struct({"role": text, "content": text})),
    }
    schema = pa.schema({name: types[kind] for name, kind in COLUMNS.items()})
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in batches:
            writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema))
            written += len(rows)
    return written
