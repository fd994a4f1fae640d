"""The asset raw_logs: ingests new events and writes a snapshot of all of them as Parquet."""

from collections import Counter
from typing import Any

import dagster as dg

from finetune_pipeline.manifests import RawLogsManifest
from finetune_pipeline.markdown_table import markdown_table
from finetune_pipeline.orchestration.checks import check_specs, raw_logs_results
from finetune_pipeline.orchestration.job_steps import job_step
from finetune_pipeline.orchestration.resources import FinetuneHome, loop_asset, materialized
from finetune_pipeline.pipeline.snapshot import CollectedLogs, collect_logs
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.validation_messages import without_values
from finetune_pipeline.wording import counted_reasons


def raw_logs_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset raw_logs of a loop, with its checks."""

    @loop_asset(
        loop,
        RawLogsManifest,
        depends_on=(loop.ingest, loop.feedback, loop.sources),
        check_specs=check_specs(loop, RawLogsManifest.stage),
        kinds={"parquet"},
    )
    def raw_logs(context: dg.AssetExecutionContext, finetune_home: FinetuneHome) -> dg.MaterializeResult:  # type: ignore[type-arg]  # with checks, Dagster takes no type argument
        """A snapshot of all prompts, answers and feedback of the loop, after ingesting new files and declared sources.

        If a check is red: fix the files and lines (rejected_lines) or the source (sources_read) that its metadata
        lists, then materialize again; everything that could be read is in the snapshot, and no event counts twice.
        `finetune ingest --problems` shows the reasons with the values and places that are left out here.
        """
        # What messages quote is data, which must not enter Dagster's database: a person could not be erased from there.
        with job_step(loop, context):
            try:
                logs = collect_logs(loop, finetune_home.database(), lambda text: context.log.info(without_values(text)))
            except SourceError as error:
                raise SourceError(without_values(str(error))) from None
        return materialized(logs.artifact, _metadata(logs), raw_logs_results(loop, logs))

    return raw_logs


def _metadata(logs: CollectedLogs) -> dict[str, Any]:
    manifest, recorded = logs.artifact.manifest, logs.ingested.recorded
    from_sources = sum(source.new for source in logs.sources)  # each with one feedback, which gives it its reward
    metadata: dict[str, Any] = {
        "interactions": logs.totals["interactions"],
        "feedback events": logs.totals["feedback"],
        "examples": logs.totals["examples"],
        "new interactions": recorded.interactions + from_sources,
        "new feedback events": recorded.feedback + from_sources,
        "rejected lines": logs.ingested.rejected,
        "dagster/row_count": logs.totals["interactions"],
        "unmatched feedback events": logs.totals["unmatched"],
        "duplicate events": recorded.duplicates,
        "id conflicts": logs.ingested.conflicts,
        "retracted interactions": sum(source.retracted for source in logs.sources),
        "files read": logs.ingested.files,
        "rewritten files": logs.ingested.rewritten,
        "shards": len(manifest.shards),
        "rows of the newest shard": manifest.new,
        "watermark": manifest.watermark,
    }
    if logs.sources or logs.undeclared:
        headings = ["source", "records", "files", "new", "retracted", "skipped", "why skipped", "error"]
        rows: list[tuple[Any, ...]] = [
            (
                source.name,
                source.records,
                source.files,
                source.new,
                source.retracted,
                source.skipped,
                without_values(counted_reasons(source.reasons)),
                without_values(source.error),
            )
            for source in logs.sources
        ]
        for name, count in logs.undeclared.items():
            remedy = f"`finetune feedback retract --source {name}` stops that"
            rows.append((name, count, 0, 0, 0, 0, "", f"not declared, but still trains without a quota; {remedy}"))
        metadata["sources"] = dg.MetadataValue.md(markdown_table(headings, rows, "lrrrrrll"))
        # Without the provenances, which may be titles of notes; `finetune ingest --problems` lists them.
        skipped = Counter(f"{row.source}: {without_values(row.reason)}" for row in logs.skipped)
        metadata["skipped records"] = [f"{reason} ({count:,})" for reason, count in skipped.items()]
    return metadata
