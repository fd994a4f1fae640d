"""The asset eval_report: champion and challenger on the same questions, with the gate's check."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.comparison import Comparison
from finetune_pipeline.evaluation.gate import HEADLINES, Verdict
from finetune_pipeline.evaluation.metric_table import comparison_markdown, format_metric, metric_table
from finetune_pipeline.evaluation.plots import plot_png
from finetune_pipeline.evaluation.report import HTML
from finetune_pipeline.export.base import base_stamp
from finetune_pipeline.manifests import GgufManifest, ReportManifest
from finetune_pipeline.markdown_table import markdown_table
from finetune_pipeline.orchestration.job_steps import job_step
from finetune_pipeline.orchestration.resources import loop_asset, materialized, percent, picture
from finetune_pipeline.pipeline.evaluate import NothingToEvaluate, comparison_settings, evaluate
from finetune_pipeline.pipeline.sealed_benchmark import sealed_summary
from finetune_pipeline.settings import LoopSettings


def eval_report_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset eval_report of a loop."""

    @loop_asset(
        loop,
        ReportManifest,
        "gguf_model",
        depends_on=(base_stamp(loop.base_model), comparison_settings(loop)),
        files=(loop.evaluation.benchmark, loop.output_schema, loop.evaluation.compliance),
        output_required=False,
        kinds={"html"},
    )
    def eval_report(
        context: dg.AssetExecutionContext, gguf_model: Artifact[GgufManifest]
    ) -> Iterator[dg.MaterializeResult[Any]]:
        """The comparison of the challenger with the champion (or the base model) on the whole benchmark.

        If a check is red: open the report to see the questions that the challenger answers incorrectly, then correct
        such answers or log more feedback, and run the loop again. Only `gain` stops a promotion. No report is
        written if the challenger is the champion already.
        """
        with job_step(loop, context) as step:
            result = evaluate(step.loop, gguf_model, context.run.run_id, context.log.info)
            if isinstance(result, NothingToEvaluate):
                step.made(result.reason)
                step.completed()
                context.log.info(result.reason)
                return
            reason = result.verdict.reason.split("\n")[0]
            step.made(f"{result.verdict.decision}: {reason}", report=result.report.manifest.version)
            step.completed()
        comparison, verdict = result.comparison, result.verdict
        if comparison.contention:
            context.log.warning(
                f"{comparison.contention} while the latency was measured, so it is not recorded for the model version; "
                "evaluate again on an idle machine"
            )
        yield materialized(result.report, _metadata(loop, result.report, comparison, verdict))

    return eval_report


def _metadata(
    loop: LoopSettings, artifact: Artifact[ReportManifest], comparison: Comparison, verdict: Verdict
) -> dict[str, Any]:
    label, gain = {
        "relative": ("gain (%)", verdict.relative_gain),
        "points": ("gain (points)", verdict.points),
        "error_reduction": ("error reduction (%)", verdict.error_reduction),
    }[loop.gate.mode]
    if gain is None:  # the champion's score, or the number of its errors, is 0
        label, gain = "gain (points)", verdict.points
    regression = comparison.regression_test(loop.gate)
    table = metric_table(comparison)
    sides = list(comparison.models)
    fractions = [  # Dagster's page has no room for more, and shows no table of more than 1,000 characters
        (row.name, *(format_metric(getattr(row, side), row.unit) for side in sides)) for row in table if row.unit == "%"
    ]
    metrics: dict[str, Any] = {}
    for row in table:
        for side, value in (("challenger", row.challenger), ("champion", row.champion)):
            if value is not None and not row.flag:
                number = percent(value) if row.unit == "%" else round(value, 1)
                metrics[f"{row.name}, {side} ({row.unit})"] = number
    return {
        "verdict": verdict.decision,
        label: percent(gain),
        **dict(list(metrics.items())[:2]),  # the gate's metric of both models
        "p-value": float(f"{comparison.significance.p_value:.2g}"),
        "regressed slices": sum(one.status == "regressed" for one in comparison.slice_tests(loop.gate)),
        "comparison": dg.MetadataValue.md(markdown_table(["metric", *sides], fractions, "l" + "r" * len(sides))),
        "report": dg.MetadataValue.md(_report(artifact, comparison, verdict)),
        "reason": dg.MetadataValue.md(verdict.markdown),
        **metrics,
        **({} if regression is None else {"fixed corrections broken": regression.counts.broken}),
        **({} if verdict.tests_left is None else {"tests left in the error budget": verdict.tests_left}),
        **({} if verdict.more_questions is None else {"more questions needed": verdict.more_questions}),
        "correct, challenger": verdict.challenger_correct,
        "correct, champion": verdict.champion_correct,
        "correct, best constant answer": comparison.constant.correct,
        "correct, minimum": verdict.minimum_correct,
        "correct, possible": verdict.total,
        "valid unconstrained answers, challenger": verdict.valid,
        "unconstrained answers, challenger": verdict.answers,
        **({"sealed benchmark": sealed} if (sealed := sealed_summary(loop, connect())) else {}),
        "CPU contention": comparison.contention or "none",
    }


def _report(artifact: Artifact[ReportManifest], comparison: Comparison, verdict: Verdict) -> str:
    """Return the report without prompts and answers, which must not enter Dagster's database."""
    slices = [
        (
            one.name,
            f"{one.champion.correct:,}",
            f"{one.challenger.correct:,}",
            one.champion.total,
            format_metric(one.points, "%", signed=True),
        )
        for one in comparison.slices
    ]
    statement, *reasons = verdict.reason.split("\n")
    return "\n\n".join(
        [
            f"## {comparison.challenger.name} against {comparison.champion.name}",
            f"**{HEADLINES[verdict.decision]}**: {statement}",
            "\n".join(f"- {reason}" for reason in [*reasons, *comparison.problems]),
            comparison_markdown(comparison),
            picture(plot_png(comparison), "metrics and slices of champion and challenger"),
            markdown_table(["slice", "champion", "challenger", "possible", "change"], slices, "lrrrr"),
            f"The answers to every question are in `{artifact.path / HTML}`; open it in a browser.",
        ]
    )
