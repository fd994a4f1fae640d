"""The asset eval_report: champion and challenger on the same questions, with the gate's check."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.evaluation.comparison import Comparison
from finetune_pipeline.evaluation.gate import Verdict
from finetune_pipeline.evaluation.metric_table import comparison_markdown, metric_table
from finetune_pipeline.evaluation.plots import plot_png
from finetune_pipeline.evaluation.report import HTML
from finetune_pipeline.manifests import GgufManifest, ReportManifest
from finetune_pipeline.orchestration.resources import loop_asset, materialized, picture
from finetune_pipeline.pipeline.evaluate import NothingToEvaluate, evaluate
from finetune_pipeline.settings import LoopSettings


def eval_report_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset eval_report of a loop."""

    @loop_asset(
        loop,
        ReportManifest,
        "gguf_model",
        depends_on=(loop.system_prompt, loop.output_schema, loop.evaluation, loop.gate),
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
        result = evaluate(loop, gguf_model, context.run.run_id, context.log.info)
        if isinstance(result, NothingToEvaluate):
            context.log.info(result.reason)
            return
        comparison, verdict = result.comparison, result.verdict
        if comparison.contention:
            context.log.warning(
                f"{comparison.contention} while the latency was measured, so it is not recorded for the model version; "
                "evaluate again on an idle machine"
            )
        yield materialized(result.report, _metadata(result.report, comparison, verdict))

    return eval_report


def _metadata(artifact: Artifact[ReportManifest], comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for row in metric_table(comparison):
        for side, value in (("challenger", row.challenger), ("champion", row.champion)):
            if value is not None and not row.flag:
                metrics[f"{row.key}_{side}"] = float(value)
    return {
        "verdict": "promote" if verdict.promote else "reject",
        "reason": verdict.reason,
        "correct_challenger": verdict.challenger_correct,
        "correct_champion": verdict.champion_correct,
        "total": verdict.total,
        "best_constant_answer": comparison.constant.correct,
        "minimum_correct": verdict.minimum_correct,
        "valid_challenger": verdict.valid,
        "answers_challenger": verdict.answers,
        "comparison": dg.MetadataValue.md(comparison_markdown(comparison)),
        "plot": picture(plot_png(comparison), "champion and challenger"),
        "report": dg.MetadataValue.path(artifact.path / HTML),
        "p_value": float(comparison.significance.p_value),
        "contention": comparison.contention or "measured on a quiet machine",
        **metrics,
    }
