"""The asset raw_logs: what the application logged, taken into the store, and a snapshot of it as Parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact, draft, find, hash_file, package_versions, publish
from finetune_pipeline.children import die_with_run
from finetune_pipeline.database import Database, connect
from finetune_pipeline.feedback.store import Totals, newest_sequence, records, totals
from finetune_pipeline.loop.ingest import Ingested, ingest
from finetune_pipeline.loop.io import pointers_key
from finetune_pipeline.records import RawLogsManifest
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.jsonl import SourceError
from finetune_pipeline.sources.ledger import read_totals, rejected_lines

FILE = "records.parquet"
NAMED = 20


def raw_logs_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset raw_logs of a loop, with its check."""
    check = dg.AssetCheckSpec(
        "rejected_lines",
        asset=[*loop.prefix, "raw_logs"],
        description=f"At most {loop.sources.max_rejected_share:.0%} of all lines of the event files were rejected, and "
        "every file could be read.",
    )

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        check_specs=[check],
        kinds={"parquet", "sqlite"},
    )
    def raw_logs(context: dg.AssetExecutionContext) -> Iterator[Any]:
        """What the application logged: prompts, answers and feedback.

        Takes every new event file of the drop folder into the store (each event once, by its id; each file from where
        it was left), puts lines that are no events into quarantine with file, line and reason, and writes a snapshot
        of all the loop's records.
        """
        die_with_run()
        database = connect()
        ingested = ingest(loop, database, context.log.info)
        artifact, counts = snapshot(loop, database)
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact, counts, ingested))
        yield _rejected_lines(loop, database, ingested)

    return raw_logs


def snapshot(loop: LoopSettings, database: Database) -> tuple[Artifact[RawLogsManifest], Totals]:
    """Write the loop's records, as they are at this moment, to Parquet; the same records give the same version.

    Raises:
        SourceError: there are none.
    """
    with database.read() as connection:
        until, counts = newest_sequence(connection), totals(connection, loop.name)
        if not counts.interactions:
            folders = ", ".join(str(folder) for folder in loop.log_folders)
            raise SourceError(
                f"loop {loop.name} has no interactions: no event file with a readable line is in {folders}. Put "
                'JSONL of {"event": "interaction", ...} lines there (see the README), then materialize again'
            )
        with draft(loop.name, RawLogsManifest.stage, str(until)) as folder:
            _write_parquet(folder / FILE, records(connection, loop.name, until))
            version = hash_file(folder / FILE)[:16]
            found = find(RawLogsManifest, loop.name, version)
            if found is not None:
                return found, counts
            fields = {
                "loop": loop.name,
                "version": version,
                "inputs": {"events": f"1..{until}"},
                "settings": loop.feedback.model_dump(),
                "packages": package_versions("finetune-pipeline", "pyarrow"),
                "interactions": counts.interactions,
                "feedback": counts.feedback,
                "examples": counts.examples,
                "watermark": until,
            }
            return publish(folder, RawLogsManifest, fields), counts


def _rejected_lines(loop: LoopSettings, database: Database, ingested: Ingested) -> dg.AssetCheckResult:
    with database.read() as connection:
        rejected = rejected_lines(connection, loop.name, NAMED)
        read = read_totals(connection, loop.name)
    share = read.rejected / read.lines if read.lines else 0.0
    return dg.AssetCheckResult(
        check_name="rejected_lines",
        passed=share <= loop.sources.max_rejected_share and not ingested.unreadable,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "rejected": read.rejected,
            "lines": read.lines,
            "files": read.files,
            "share": share,
            "files with an unfinished last line": read.unfinished,
            "offenders": [*ingested.unreadable, *(f"{row.path}:{row.line}: {row.reason}" for row in rejected)],
        },
    )


def _write_parquet(path: Path, batches: Iterator[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, real, flag = pa.string(), pa.float64(), pa.bool_()
    schema = pa.schema(
        {
            "interaction_id": text, "sequence": pa.int64(), "created_at": pa.timestamp("us", tz="UTC"),
            "prompt": text, "output": text, "model": text, "user": text, "confidence": real,
            "target": text, "reward": real, "confirmed": flag, "corrected": flag,
        }
    )  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in batches:
            writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema))


def _metadata(artifact: Artifact[RawLogsManifest], counts: Totals, ingested: Ingested) -> dict[str, Any]:
    return {
        "interactions": counts.interactions,
        "feedback": counts.feedback,
        "examples": counts.examples,
        "unmatched_feedback": counts.unmatched_feedback,
        "new_interactions": ingested.recorded.interactions,
        "new_feedback": ingested.recorded.feedback,
        "known_already": ingested.recorded.duplicates,
        "rejected_now": ingested.rejected,
        "files_read": ingested.files,
        "watermark": artifact.manifest.watermark,
        "version": artifact.manifest.version,
        "path": dg.MetadataValue.path(artifact.path),
    }
