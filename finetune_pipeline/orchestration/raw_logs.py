"""The asset raw_logs: what the application logged, taken into the store, and a snapshot of it as Parquet."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    alteration,
    draft,
    find_unaltered,
    hash_file,
    package_versions,
    pointed,
    publish,
    version_of,
)
from finetune_pipeline.database import Database, connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.store import Totals, newest_offset, records, store_id, totals
from finetune_pipeline.orchestration.io_manager import pointers_key
from finetune_pipeline.pipeline.ingest import Ingested, ingest
from finetune_pipeline.pipeline.source_sync import Fed, no_longer_declared, read_feeds, skipped_records
from finetune_pipeline.records import FileRecord, RawLogsManifest
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ledger import read_totals, rejected_lines
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.subprocess_lifetime import die_with_run

NAMED = 20
MAX_PARTS = 32
COLUMNS = {
    "interaction_id": "string", "ingest_offset": "int64", "created_at": "moment", "prompt": "string",
    "history": "turns",
    "output": "string", "model": "string", "user": "string", "confidence": "float64", "validation_score": "float64",
    "domain": "string", "kind": "string", "retrieved_context": "string", "variant": "string", "flag": "string",
    "source": "string", "provenance": "string", "target": "string", "reward": "float64", "confirmed": "bool",
    "corrected": "bool", "review": "string",
}  # fmt: skip
"""What a snapshot holds of each interaction, and its type in the Parquet files."""


def raw_logs_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset raw_logs of a loop, with its check."""
    check = dg.AssetCheckSpec(
        "rejected_lines",
        asset=[*loop.prefix, "raw_logs"],
        description=f"At most {loop.ingest.max_rejected_fraction:.0%} of all lines of event files were rejected, and "
        "every file could be read.",
    )

    sources = dg.AssetCheckSpec(
        "sources_read",
        asset=[*loop.prefix, "raw_logs"],
        description="Every declared source could be read to its end.",
    )

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        check_specs=[check, sources],
        kinds={"parquet", "sqlite"},
    )
    def raw_logs(context: dg.AssetExecutionContext) -> Iterator[Any]:
        """What the application logged: prompts, answers and feedback.

        Takes every new event file of the drop folder into the store (each event once, by its id; each file from where
        it was left), puts lines that are no events into quarantine with file, line and reason, and writes a snapshot
        of all the loop's records: the parts of the last snapshot, and what came or changed since as one more.
        """
        die_with_run()
        database = connect()
        ingested = ingest(loop, database, context.log.info)
        feeds = read_feeds(loop, database, context.log.info)
        artifact, counts = snapshot(loop, database, feeds)
        metadata = _metadata(artifact, counts, ingested, feeds) | _sources(loop, database, feeds)
        yield dg.MaterializeResult(value=artifact, metadata=metadata)
        yield _rejected_lines(loop, database, ingested)
        yield _sources_read(feeds)

    return raw_logs


def snapshot(
    loop: LoopSettings, database: Database, feeds: Sequence[Fed] = ()
) -> tuple[Artifact[RawLogsManifest], Totals]:
    """The loop's records as they are at this moment, as Parquet; when nothing is new, the last snapshot itself.

    What the last snapshot holds is linked, not written again. Everything is written anew, as one part, where there is
    no last snapshot, an event was erased since, the reward settings changed, or there would be too many parts.

    Args:
        feeds: what reading the declared sources did, to be told where there are no records.

    Raises:
        SourceError: there are none.
    """
    with database.read() as connection:
        until, counts = newest_offset(connection), totals(connection, loop.name)
        if not counts.interactions:
            raise SourceError(_nothing(loop, feeds))
        base = _base(loop, connection, until)
        if base is not None:
            if not any(records(connection, loop.name, until, base.manifest.watermark)):
                return base, counts
            base = base if len(base.manifest.parts) < MAX_PARTS else None
        return _write(loop, connection, base, until, counts), counts


def _nothing(loop: LoopSettings, feeds: Sequence[Fed]) -> str:
    folders = ", ".join(str(folder) for folder in loop.log_folders)
    failed = "".join(f". Of the declared sources, {fed.name} failed: {fed.failed}" for fed in feeds if fed.failed)
    empty = ", ".join(fed.name for fed in feeds if not fed.failed)
    gave = f". Nothing usable came from {empty}" if empty else ""
    return (
        f"loop {loop.name} has no interactions: no event file with a readable line is in {folders}{failed}{gave}. Mend "
        'that, or put JSONL of {"event": "interaction", ...} lines there (see the README), then materialize again'
    )


def _base(loop: LoopSettings, connection: sa.Connection, until: int) -> Artifact[RawLogsManifest] | None:
    """The last snapshot, if what it holds still stands."""
    try:
        last = pointed(RawLogsManifest, loop.name)
    except ArtifactError:
        return None  # it was deleted or damaged; the store has everything
    if last is not None and alteration(last):
        return None  # edited since; the store has everything
    if last is None or last.manifest.settings != _settings(loop) or last.manifest.watermark > until:
        return None  # a watermark ahead of the store: it was put back to an earlier copy of itself
    if last.manifest.inputs.get("store") != str(store_id(connection)):
        return None  # another database: its sequences are others
    f = t.erased_events.c
    erased = sa.select(f.id).where(f.loop == loop.name, f.ingest_offset > last.manifest.watermark).limit(1)
    return None if connection.execute(erased).first() else last


def _settings(loop: LoopSettings) -> dict[str, Any]:
    return {**loop.feedback.model_dump(mode="json"), "columns": COLUMNS}


def _write(
    loop: LoopSettings, connection: sa.Connection, base: Artifact[RawLogsManifest] | None, until: int, counts: Totals
) -> Artifact[RawLogsManifest]:
    """Write what is new since `base` (or everything) beside the parts of `base`."""
    old = base.manifest.parts if base else []
    newest = f"records-{len(old) + 1:04}.parquet"
    with draft(loop.name, RawLogsManifest.stage, str(until)) as folder:
        known = _take_over(base, folder) if base else {}
        after = base.manifest.watermark if base else 0
        new = _write_parquet(folder / newest, records(connection, loop.name, until, after))
        content = {name: record.sha256 for name, record in known.items()}
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
            "interactions": counts.interactions,
            "feedback": counts.feedback,
            "examples": counts.examples,
            "parts": [*old, newest],
            "new": new,
            "watermark": until,
        }
        return publish(folder, RawLogsManifest, fields, known)


def _take_over(base: Artifact[RawLogsManifest], folder: Path) -> dict[str, FileRecord]:
    """Put the parts of a snapshot into another one, as links where the disk can; returns their hashes."""
    for name in base.manifest.parts:
        try:
            os.link(base.path / name, folder / name)
        except OSError:  # another device, or a file system without links
            shutil.copyfile(base.path / name, folder / name)
    return {name: base.manifest.files[name] for name in base.manifest.parts}


def _rejected_lines(loop: LoopSettings, database: Database, ingested: Ingested) -> dg.AssetCheckResult:
    with database.read() as connection:
        rejected = rejected_lines(connection, loop.name, NAMED)
        read = read_totals(connection, loop.name)
    share = read.rejected / read.lines if read.lines else 0.0
    return dg.AssetCheckResult(
        check_name="rejected_lines",
        passed=share <= loop.ingest.max_rejected_fraction and not ingested.unreadable,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "rejected": read.rejected,
            "lines": read.lines,
            "files": read.files,
            "share": share,
            "files with an unfinished last line": read.unfinished,
            "known_with_other_content": ingested.conflicts,
            "conflicts": ingested.conflicting,
            "offenders": [*ingested.unreadable, *(f"{row.path}:{row.line}: {row.reason}" for row in rejected)],
        },
    )


def _sources_read(feeds: Sequence[Fed]) -> dg.AssetCheckResult:
    failed = [f"{fed.name}: {fed.failed}" for fed in feeds if fed.failed]
    return dg.AssetCheckResult(
        check_name="sources_read",
        passed=not failed,
        description="; ".join(failed) or None,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"sources": len(feeds), "failed": len(failed), "offenders": failed},
    )


def _sources(loop: LoopSettings, database: Database, feeds: Sequence[Fed]) -> dict[str, Any]:
    """What each declared source gave, what no longer declared ones still teach, and what could not be used."""
    with database.read() as connection:
        left = no_longer_declared(connection, loop)
        skipped = skipped_records(connection, loop, NAMED)
    if not feeds and not left:
        return {}
    lines = ["| source | items | new | retracted | skipped | |", "|---|---|---|---|---|---|"]
    lines += [f"| {f.name} | {f.items} | {f.new} | {f.retracted} | {f.skipped} | {f.failed} |" for f in feeds]
    lines += [f"| {name} | {items} | 0 | 0 | 0 | {_left_behind(name)} |" for name, items in left.items()]
    return {
        "sources": dg.MetadataValue.md("\n".join(lines)),
        "skipped": [f"{row.source}: {row.provenance}: {row.reason}" for row in skipped],
    }


def _left_behind(source: str) -> str:
    return (
        f"no longer declared, and teaches on without a quota; `finetune feedback retract --source {source}` ends that"
    )


def _write_parquet(path: Path, batches: Iterator[Sequence[Any]]) -> int:
    """Write rows to a Parquet file; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    types = {
        "string": text,
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "moment": pa.timestamp("us", tz="UTC"),
        "turns": pa.list_(pa.struct({"role": text, "content": text})),
    }
    schema = pa.schema({name: types[kind] for name, kind in COLUMNS.items()})
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in batches:
            writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema))
            written += len(rows)
    return written


def _metadata(
    artifact: Artifact[RawLogsManifest], counts: Totals, ingested: Ingested, feeds: Sequence[Fed]
) -> dict[str, Any]:
    from_sources = sum(fed.new for fed in feeds)  # each comes with the feedback that gives it its reward
    return {
        "interactions": counts.interactions,
        "feedback": counts.feedback,
        "examples": counts.examples,
        "unmatched_feedback": counts.unmatched_feedback,
        "new_interactions": ingested.recorded.interactions + from_sources,
        "new_feedback": ingested.recorded.feedback + from_sources,
        "retracted": sum(fed.retracted for fed in feeds),
        "known_already": ingested.recorded.duplicates,
        "rejected_now": ingested.rejected,
        "known_with_other_content": ingested.conflicts,
        "files_read": ingested.files,
        "files_rewritten": ingested.rewritten,
        "parts": len(artifact.manifest.parts),
        "rows_of_newest_part": artifact.manifest.new,
        "watermark": artifact.manifest.watermark,
        "version": artifact.manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }
