"""The asset checks: their specs, and their results from what the pipeline functions return."""

from collections.abc import Iterator

import dagster as dg

from finetune_pipeline.pipeline.snapshot import CollectedLogs
from finetune_pipeline.settings import LoopSettings


def _spec(loop: LoopSettings, stage: str, name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=[*loop.prefix, stage], description=description, blocking=blocking)


def raw_logs_check_specs(loop: LoopSettings) -> list[dg.AssetCheckSpec]:
    """Return the checks of raw_logs."""
    limit = f"{loop.ingest.max_rejected_fraction:.0%}"
    return [
        _spec(
            loop,
            "raw_logs",
            "rejected_lines",
            f"At most {limit} of all lines of event files were rejected, and every file could be read.",
        ),
        _spec(loop, "raw_logs", "sources_read", "Every declared source could be read to its end."),
    ]


def raw_logs_checks(loop: LoopSettings, logs: CollectedLogs) -> Iterator[dg.AssetCheckResult]:
    """Yield the results of the checks of raw_logs."""
    read, ingested = logs.files_read, logs.ingested
    fraction = read.rejected / read.lines if read.lines else 0.0
    yield dg.AssetCheckResult(
        check_name="rejected_lines",
        passed=fraction <= loop.ingest.max_rejected_fraction and not ingested.unreadable,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "rejected": read.rejected,
            "lines": read.lines,
            "files": read.files,
            "rejected_fraction": fraction,
            "files_with_unfinished_last_line": read.unfinished,
            "known_with_other_content": ingested.conflicts,
            "conflicts": ingested.conflicting,
            "offenders": [*ingested.unreadable, *(f"{row.path}:{row.line}: {row.reason}" for row in logs.rejected)],
        },
    )
    failed = [f"{source.name}: {source.error}" for source in logs.sources if source.error]
    yield dg.AssetCheckResult(
        check_name="sources_read",
        passed=not failed,
        description="; ".join(failed) or None,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"sources": len(logs.sources), "failed": len(failed), "offenders": failed},
    )
