"""The asset promoted_model: the challenger that the gate accepts becomes the champion."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.database import connect
from finetune_pipeline.deployment.target_state import TargetState
from finetune_pipeline.manifests import GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.orchestration.checks import APPROVED, check_specs
from finetune_pipeline.orchestration.resources import loop_asset, materialized, percent
from finetune_pipeline.pipeline.approval import name_of, pending_approval
from finetune_pipeline.pipeline.deploy import deployment_states, reconcile
from finetune_pipeline.pipeline.promote import NotApproved, NotPromoted, promote_challenger
from finetune_pipeline.registry.approvals import Approval, find_approval
from finetune_pipeline.registry.model_card import MODEL_CARD
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import without_values

ACTOR = "dagster"


def promoted_model_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset promoted_model of a loop."""
    days = loop.alerts.freshness_days
    freshness = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=days)) if days else None

    @loop_asset(
        loop,
        PromotionManifest,
        "eval_report",
        "gguf_model",
        depends_on=(loop.gate,),
        output_required=False,
        freshness_policy=freshness,
        check_specs=check_specs(loop, PromotionManifest.stage),
        kinds={"gguf"},
    )
    def promoted_model(
        context: dg.AssetExecutionContext,
        eval_report: Artifact[ReportManifest],
        gguf_model: Artifact[GgufManifest],
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """The champion: the model version that serves, if the gate, asked a second time, accepts exactly this file.

        If it fails: the gate rejected the challenger (see eval_report), or the message names what changed since the
        report was written, so materialize eval_report again. With `gate.on_reject: keep_champion` a rejected challenger
        does not fail the run.

        With `approval: required` the run ends with the check `approved` yellow: the challenger waits for
        `finetune model approve`, which promotes it at once; see docs/how-to/approve.md.

        Then each deployment target is brought to it. One that cannot be reached, or that serves it differently, makes
        the check `deployed` yellow and is tried again later; see docs/how-to/deploy.md.
        """
        result = promote_challenger(loop, eval_report, gguf_model, ACTOR, context.log.info)
        if isinstance(result, NotPromoted):
            if loop.gate.on_reject == "fail":
                raise dg.Failure(result.reason, allow_retries=False)
            context.log.info(f"{result.reason}; the champion stays")
            yield from _approved(loop, None)
            yield from _deployed(deployment_states(loop, connect()))
            return
        if isinstance(result, NotApproved):
            yield from _approved(loop, result.approval)
            yield from _deployed(deployment_states(loop, connect()))
            return
        model = result.model
        context.log.info(f"{model.name} is the champion now: {model.gguf_path}")
        card = (result.artifact.path / MODEL_CARD).read_text(encoding="utf-8")
        verdict = result.verdict
        metadata: dict[str, Any] = {
            "model": model.name,
            "correct, champion": verdict.challenger_correct,
            "correct, previous champion": verdict.champion_correct,
            "correct, possible": verdict.total,
            "gain (points)": percent(verdict.points),
            "model card": dg.MetadataValue.md(card[card.index("\n# ") :]),
            "corrections fixed": result.artifact.manifest.fixed,
            "reason": dg.MetadataValue.md(verdict.markdown),
        }
        if result.artifact.manifest.sealed:
            metadata["sealed benchmark"] = result.artifact.manifest.sealed
        yield materialized(result.artifact, metadata)
        yield from _approved(loop, find_approval(connect(), loop.name, eval_report.manifest.comparison_id))
        if loop.deploy.followers:  # after the promotion was recorded: an upload may take long, and be killed
            # Errors of a comparison quote prompts and answers, which must not enter Dagster's database.
            states = reconcile(loop, lambda line: context.log.info(without_values(line)))
            for problem in _problems(states):
                context.log.warning(f"the target {problem}")
            yield from _deployed(states)

    return promoted_model


def _approved(loop: LoopSettings, approval: Approval | None) -> Iterator[dg.AssetCheckResult]:
    """Yield the result of the check `approved`, if the loop needs approvals; None: nobody had to be asked."""
    if loop.approval == "required":
        pending = pending_approval(loop, connect())
        if approval is None:
            description, metadata = "nothing waits for approval", {}
        elif approval.state == "waiting" and pending:
            description = f"waiting for approval: {pending.summary}"
            metadata = {"challenger": pending.name, "approve with": pending.command, "verdict": pending.reason}
        else:
            by = f" by {approval.actor}" if approval.actor else ""
            description = f"{name_of(approval)} {approval.state}{by}: {approval.reason}"
            metadata = {"challenger": name_of(approval)}
        yield dg.AssetCheckResult(
            check_name=APPROVED,
            passed=approval is None or approval.state == "approved",
            severity=dg.AssetCheckSeverity.WARN,
            description=description,
            metadata=metadata,
        )


def _deployed(states: Sequence[TargetState]) -> Iterator[dg.AssetCheckResult]:
    """Yield the result of the check `deployed`, if the loop has targets."""
    if states:
        problems = _problems(states)
        yield dg.AssetCheckResult(
            check_name="deployed",
            passed=not problems,
            severity=dg.AssetCheckSeverity.WARN,
            description="; ".join(problems) or None,
            metadata={one.target: f"{one.state}, serves {one.observed or 'something else'}" for one in states},
        )


def _problems(states: Sequence[TargetState]) -> list[str]:
    others = [one for one in states if one.state != "active"]
    return [f"{one.summary}: {without_values(one.last_error)}".rstrip(": ") for one in others]
