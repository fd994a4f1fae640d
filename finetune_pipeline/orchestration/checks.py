"""The asset checks: their specs, and their results from what the pipeline functions return."""

from collections.abc import Iterable, Iterator

import dagster as dg

from finetune_pipeline.evaluation.comparison import Comparison
from finetune_pipeline.evaluation.gate import Verdict
from finetune_pipeline.manifests import DatasetManifest, GgufManifest, RawLogsManifest, ReportManifest
from finetune_pipeline.pipeline.export import ModelCheck
from finetune_pipeline.pipeline.snapshot import CollectedLogs
from finetune_pipeline.settings import LoopSettings


def check_specs(loop: LoopSettings, stage: str) -> list[dg.AssetCheckSpec]:
    """Return the specs of the checks of an asset."""
    rejected, agreement = f"{loop.ingest.max_rejected_fraction:.0%}", f"{loop.export.min_agreement:.0%}"
    descriptions = {
        RawLogsManifest.stage: {
            "rejected_lines": f"At most {rejected} of all lines of event files were rejected, and every file could be "
            "read.",
            "sources_read": "Every declared source could be read to its end.",
        },
        DatasetManifest.stage: {
            "enough_examples": f"The dataset has at least {loop.curation.min_examples} examples.",
            "no_benchmark_overlap": "No example is a near-duplicate of a benchmark question.",
            "targets_parse": "Every answer to train on passes the output schema.",
        },
        GgufManifest.stage: {
            "loads_and_answers": "The model loads in the engine and answers.",
            "tokenizer_parity": "The engine tokenizes the chat template as training did.",
            "agreement": f"At least {agreement} of answers equal those of the base with its unmerged adapter.",
        },
        ReportManifest.stage: {
            "gain": f"The challenger gains at least {loop.gate.min_gain:.0%} ({loop.gate.mode}) over the champion.",
            "significance": "The gain is significant by a paired test.",
            "no_slice_regressed": "No slice of the benchmark regressed.",
        },
    }[stage]
    blocking = {*DatasetManifest.blocking_checks, *GgufManifest.blocking_checks}
    if loop.gate.on_reject == "fail":
        blocking |= {*ReportManifest.blocking_checks}
    return [
        dg.AssetCheckSpec(name, asset=[*loop.prefix, stage], description=text, blocking=name in blocking)
        for name, text in descriptions.items()
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
            "id_conflicts": ingested.conflicts,
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


def gguf_model_checks(loop: LoopSettings, checks: Iterable[ModelCheck]) -> Iterator[dg.AssetCheckResult]:
    """Yield the results of the checks of gguf_model."""
    for check in checks:
        blocking = check.name in GgufManifest.blocking_checks
        severity = dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN
        metrics = check.metrics
        description = metrics.get("error") or metrics.get("skipped")
        if "fraction" in metrics:
            description = (
                f"{metrics['same']} of {metrics['total']} answers are the same ({metrics['fraction']:.0%}), at least "
                f"{loop.export.min_agreement:.0%} needed"
            )
        yield dg.AssetCheckResult(
            check_name=check.name, passed=check.passed, severity=severity, description=description, metadata=metrics
        )


def eval_report_checks(loop: LoopSettings, comparison: Comparison, verdict: Verdict) -> Iterator[dg.AssetCheckResult]:
    """Yield the results of the checks of eval_report."""
    rejects = loop.gate.on_reject == "fail"
    yield dg.AssetCheckResult(
        check_name="gain",
        passed=verdict.promote,
        severity=dg.AssetCheckSeverity.ERROR if rejects else dg.AssetCheckSeverity.WARN,
        description=verdict.reason,
        metadata={
            "correct_challenger": verdict.challenger_correct,
            "correct_champion": verdict.champion_correct,
            "required_correct": verdict.required_correct,
            "total": verdict.total,
            "minimum_correct": verdict.minimum_correct,
            "valid": verdict.valid,
            "answers": verdict.answers,
        },
    )
    significance = comparison.significance
    yield dg.AssetCheckResult(
        check_name="significance",
        passed=significance.p_value <= loop.gate.significance_level,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"p = {significance.p_value:.2g} ({significance.method}), at most {loop.gate.significance_level:g} "
        "allowed",
        metadata={"p_value": float(significance.p_value), "method": significance.method},
    )
    worst = min(comparison.slices, key=lambda group: group.points, default=None)
    changes = {group.name: f"{group.points:+.1%}" for group in comparison.slices}
    yield dg.AssetCheckResult(
        check_name="no_slice_regressed",
        passed=not comparison.regressed_slices,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(comparison.regressed_slices)} of {len(comparison.slices)} slices regressed"
        + (f"; worst slice: {worst.name} {worst.points:+.1%}" if worst else ""),
        metadata={"regressed": list(comparison.regressed_slices), "changes": changes},
    )
