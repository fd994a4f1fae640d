"""The asset checks: those of a step, from what it has at hand, and those that read an artifact and can run alone.

The inputs of checks are artifacts; they are typed as Any, because Dagster cannot check a generic type.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import dagster as dg

from finetune_pipeline.evaluation.gate import slices_text
from finetune_pipeline.evaluation.report import JSON, ReportFindings, findings_of_report
from finetune_pipeline.manifests import (
    DatasetManifest,
    GgufManifest,
    PromotionManifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.orchestration.job_steps import note_checks
from finetune_pipeline.orchestration.resources import percent
from finetune_pipeline.pipeline.build_dataset import check_and_record
from finetune_pipeline.pipeline.export import ModelCheck, score_equivalence
from finetune_pipeline.pipeline.snapshot import CollectedLogs
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import without_values

CHECKS_STEP = "_checks"
"""End of the name of a step that only runs the checks of an asset."""

APPROVED = "approved"
"""Name of the check that a person approved the challenger. Until then it is not passed, which is no fault."""


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
            "tokenizer_parity": "llama.cpp reads the same tokens as training did, in conversations of every kind.",
            "agreement": f"At least {agreement} of answers equal those of the base with its unmerged adapter.",
            "score_equivalence": "The score equals that of the base with its unmerged adapter, within "
            f"{100 * loop.export.equivalence_margin:g} points.",
        },
        ReportManifest.stage: {
            "gain": f"The challenger gains at least {loop.gate.min_gain:.0%} ({loop.gate.mode.replace('_', ' ')}) over "
            "the champion.",
            "significance": "The gain is significant by a paired test.",
            "no_slice_regressed": f"No slice lost significantly more than {loop.gate.slice_margin:.0%}.",
            "fixed_corrections_held": "Not significantly more than "
            f"{loop.gate.regression_tolerance:.0%} of the corrections that promotions fixed are broken.",
        },
        PromotionManifest.stage: {
            **({APPROVED: "A person approved the challenger."} if loop.approval == "required" else {}),
            **({"deployed": "Every deployment target serves the champion."} if loop.deploy.followers else {}),
        },
    }[stage]
    blocking = {*DatasetManifest.blocking_checks, *GgufManifest.blocking_checks}
    if loop.gate.on_reject == "fail":
        blocking |= {*ReportManifest.blocking_checks}
    return [
        dg.AssetCheckSpec(name, asset=[*loop.prefix, stage], description=text, blocking=name in blocking)
        for name, text in descriptions.items()
    ]


def raw_logs_results(loop: LoopSettings, logs: CollectedLogs) -> list[dg.AssetCheckResult]:
    """Return the results of the checks of raw_logs."""
    read, ingested = logs.files_read, logs.ingested
    fraction = read.rejected / read.lines if read.lines else 0.0
    failed = [f"{source.name}: {without_values(source.error)}" for source in logs.sources if source.error]
    rejected = (f"{row.path}:{row.line}: {without_values(row.reason)}" for row in logs.rejected)
    return [
        dg.AssetCheckResult(
            check_name="rejected_lines",
            passed=fraction <= loop.ingest.max_rejected_fraction and not ingested.unreadable,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "rejected lines (%)": percent(fraction),
                "rejected lines": read.rejected,
                "lines": read.lines,
                "files": read.files,
                "files with an unfinished last line": read.unfinished,
                "id conflicts": ingested.conflicts,
                "conflicts": ingested.conflicting,
                "offenders": [*ingested.unreadable, *rejected],
            },
        ),
        dg.AssetCheckResult(
            check_name="sources_read",
            passed=not failed,
            description="; ".join(failed) or None,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"sources": len(logs.sources), "failed": len(failed), "offenders": failed},
        ),
    ]


def gguf_model_results(loop: LoopSettings, checks: list[ModelCheck]) -> list[dg.AssetCheckResult]:
    """Return the results of the checks of gguf_model."""
    results = []
    for check in checks:
        blocking = check.name in GgufManifest.blocking_checks
        metrics = dict(check.metrics)
        if "offenders" in metrics:  # prompts of people; they are in the artifact's checks.json
            metrics["offenders"] = len(metrics["offenders"])
        description = metrics.get("error") or metrics.get("skipped")
        if metrics.get("differing"):
            kinds = ", ".join(f"{name} ({number})" for name, number in metrics["differing"].items())
            description = f"conversations with other tokens in llama.cpp than in training: {kinds}"
        if "fraction" in metrics:
            fraction = metrics.pop("fraction")
            description = (
                f"{metrics['same']} of {metrics['total']} answers equal those of the unmerged adapter "
                f"({fraction:.0%}), at least {loop.export.min_agreement:.0%} needed"
            )
            metrics = {"agreement (%)": percent(fraction), **metrics}
        if "difference" in metrics:
            found = score_equivalence(loop, check)
            description = found.sentence
            metrics = {
                "prompts": metrics["prompts"],
                "score (%)": percent(metrics["score"]),
                "score of the trained model (%)": percent(metrics["reference_score"]),
                "difference (points)": percent(metrics["difference"]),
                "90% interval (points)": [percent(bound) for bound in found.interval],
                "margin (points)": percent(found.margin),
                "p-value (TOST)": float(f"{found.p_value:.2g}"),
            }
        results.append(
            dg.AssetCheckResult(
                check_name=check.name,
                passed=check.passed,
                severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
                description=description,
                metadata=metrics,
            )
        )
    return results


def curated_dataset_checks(loop: LoopSettings) -> dg.AssetChecksDefinition:
    """Return the blocking checks of curated_dataset, which read the dataset's files."""

    @dg.multi_asset_check(
        name="__".join([*loop.prefix, f"{DatasetManifest.stage}{CHECKS_STEP}"]),
        specs=check_specs(loop, DatasetManifest.stage),
        ins={DatasetManifest.stage: dg.AssetIn(key=[*loop.prefix, DatasetManifest.stage])},
        can_subset=True,
    )
    def checks(
        context: dg.AssetCheckExecutionContext,
        curated_dataset: Any,  # an Artifact[DatasetManifest]; Dagster cannot check a generic type
    ) -> Iterator[dg.AssetCheckResult]:
        selected = {key.name for key in context.selected_asset_check_keys}
        checks = check_and_record(loop, curated_dataset, context.run.run_id)
        results = [
            dg.AssetCheckResult(
                check_name=check.name,
                passed=check.passed,
                description=check.description or None,
                metadata=check.metadata,
            )
            for check in checks
            if check.name in selected
        ]
        note_checks(context.run.run_id, results)
        yield from results

    return checks


def eval_report_results(loop: LoopSettings, found: ReportFindings) -> dict[str, dg.AssetCheckResult]:
    """Return the results of the checks of eval_report by name."""
    verdict, significance, gate = found.verdict, found.significance, loop.gate
    blocking = dg.AssetCheckSeverity.ERROR if gate.on_reject == "fail" else dg.AssetCheckSeverity.WARN
    regression, required = found.regression, gate.regression == "required"
    regressed = [one.name for one in found.slices if one.status == "regressed"]
    budget = {} if verdict.tests_left is None else {"tests left in the error budget": verdict.tests_left}
    more = {} if verdict.more_questions is None else {"more questions needed": verdict.more_questions}
    return {
        "gain": dg.AssetCheckResult(
            check_name="gain",
            passed=verdict.promote,
            severity=blocking,
            description=f"{verdict.decision}: {verdict.markdown}",
            metadata={
                "decision": verdict.decision,
                "correct, challenger": verdict.challenger_correct,
                "correct, champion": verdict.champion_correct,
                "correct, required": verdict.required_correct,
                "correct, possible": verdict.total,
                "correct, minimum": verdict.minimum_correct,
                "valid unconstrained answers, challenger": verdict.valid,
                "unconstrained answers, challenger": verdict.answers,
            },
        ),
        "significance": dg.AssetCheckResult(
            check_name="significance",
            passed=significance.p_value <= gate.test_level,
            severity=dg.AssetCheckSeverity.WARN,
            description=verdict.evidence,
            metadata={
                "p-value": float(f"{significance.p_value:.2g}"),
                "method": significance.method,
                "questions won": significance.wins,
                "questions lost": significance.losses,
                "questions equal": significance.ties,
                **more,
                **budget,
            },
        ),
        "no_slice_regressed": dg.AssetCheckResult(
            check_name="no_slice_regressed",
            passed=not regressed,
            severity=dg.AssetCheckSeverity.WARN,
            description=slices_text(found.slices, gate),
            metadata={
                "regressed slices": regressed,
                "slices too small to tell": [one.name for one in found.slices if one.status == "too small"],
                "changes": {one.name: f"{one.points:+.1%}" for one in found.slices},
            },
        ),
        "fixed_corrections_held": dg.AssetCheckResult(
            check_name="fixed_corrections_held",
            passed=not (regression and regression.exceeded),
            severity=blocking if required else dg.AssetCheckSeverity.WARN,
            description=regression.text if regression else "no promotion has fixed a correction yet",
            metadata={**asdict(regression.counts), "p-value": float(f"{regression.p_value:.2g}")} if regression else {},
        ),
    }


def eval_report_checks(loop: LoopSettings) -> dg.AssetChecksDefinition:
    """Return the checks of eval_report, which read the report; `gain` blocks unless on_reject is keep_champion."""

    @dg.multi_asset_check(
        name="__".join([*loop.prefix, f"{ReportManifest.stage}{CHECKS_STEP}"]),
        specs=check_specs(loop, ReportManifest.stage),
        ins={ReportManifest.stage: dg.AssetIn(key=[*loop.prefix, ReportManifest.stage])},
        can_subset=True,
    )
    def checks(
        context: dg.AssetCheckExecutionContext,
        eval_report: Any,  # an Artifact[ReportManifest]; Dagster cannot check a generic type
    ) -> Iterator[dg.AssetCheckResult]:
        results = eval_report_results(loop, findings_of_report(eval_report.path / JSON, loop.gate))
        selected = {key.name for key in context.selected_asset_check_keys}
        yield from (result for name, result in results.items() if name in selected)

    return checks
