"""The texts of alerts: about an ended run, a promotion by a person, and a deployment target."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from finetune_pipeline.alerts import Alert
from finetune_pipeline.artifacts import ArtifactError, get_latest
from finetune_pipeline.deployment.target_state import TargetState
from finetune_pipeline.evaluation.report import HTML
from finetune_pipeline.manifests import PromotionManifest, ReportManifest
from finetune_pipeline.pipeline.summary import approval_of, next_after_verdict
from finetune_pipeline.registry.deployment_history import Deployment
from finetune_pipeline.registry.model_versions import ModelVersion
from finetune_pipeline.settings import LoopSettings, with_loop
from finetune_pipeline.validation_messages import without_values
from finetune_pipeline.wording import first_line


def promotion_or_rejection(loop: LoopSettings, run_id: str, *, judged_before: bool = False) -> Alert | None:
    """Return the alert about a run's verdict; None if it judged no challenger, or its promotion failed.

    Args:
        loop: the loop of the run.
        run_id: the Dagster run.
        judged_before: the run did not evaluate, and stopped at the verdict of the loop's newest report.
    """
    promotion = report = None
    with suppress(ArtifactError):  # it was damaged or deleted since
        promotion = get_latest(PromotionManifest, loop.name, run_id)
        report = get_latest(ReportManifest, loop.name, run_id)
        if judged_before and report is None:
            report = get_latest(ReportManifest, loop.name)
    if report is None:
        return None
    manifest, key, link = report.manifest, _key(run_id), str(report.path / HTML)
    if promotion is not None:
        return _promotion(loop, key, promotion.manifest.model, manifest.reason, link)
    if pending := approval_of(loop, manifest.comparison_id):
        text = f"{manifest.reason}\nnext: {pending.summary}"
        return Alert("approval", key, f"{pending.name} waits for approval", text, link)
    if manifest.promote:
        return None
    inconclusive = manifest.decision == "inconclusive"
    result = "the comparison is inconclusive" if inconclusive else "the challenger was evaluated and not promoted"
    text = f"{manifest.reason}\nnext: {next_after_verdict(manifest.decision)}"
    return Alert("rejection", key, f"{loop.name}: {result}", text, link)


def promotion_by_person(loop: LoopSettings, model: ModelVersion, deployment: Deployment) -> Alert:
    """Return the alert about a promotion that a person approved, forced or started."""
    by = {"approve": "approved by", "force": "forced by"}.get(deployment.action, "promoted by")
    reason = f"{by} {deployment.actor}: {deployment.reason}"
    return _promotion(loop, f"deployment {deployment.id}", model.name, reason, str(model.report_path))


def _promotion(loop: LoopSettings, key: str, model: str, reason: str, link: str) -> Alert:
    undo = with_loop("finetune model rollback", loop)
    text = f"{reason}\nnext: it serves from now on; undo it with `{undo}`"
    return Alert("promotion", key, f"{model} is the champion now", text, link)


def failure(loop: LoopSettings, run_id: str, step: str, causes: Sequence[str], log: str = "") -> Alert:
    """Return the alert about a run that failed.

    Args:
        loop: the loop of the run.
        run_id: the Dagster run.
        step: name of the step that failed; empty if the run failed outside of its steps.
        causes: why; messages of exceptions. What they quote is left out, since it may be of an example.
        log: path of the complete log; empty if there is none.
    """
    # What follows the first line of a library's message may be the data that it was called with.
    shown = [first_line(without_values(cause)) for cause in causes]
    with suppress(ArtifactError):
        if promotion := get_latest(PromotionManifest, loop.name, run_id):
            shown.append(f"{promotion.manifest.model} had been promoted before that, and stays the champion")
    again = f"next: fix the cause, then `{with_loop('finetune run', loop)}`; finished work is reused"
    details = f"run {run_id} in Dagster's UI has the details"
    title = f"{loop.name}: the run failed" + (f" in {step}" if step else "")
    return Alert("failure", _key(run_id), title, "\n".join([*shown, again, details]), log)


def deployment(loop: LoopSettings, state: TargetState) -> Alert:
    """Return the alert about a target that failed for the first time, was rejected, or drifted."""
    wanted = f"{loop.name}@{state.wanted}"
    title, todo = {
        "drifted": ("somebody changed what {target} serves", "it is brought back to {wanted}"),
        "rejected": ("{target} was not switched to {wanted}", "fix the cause; it is not tried again by itself"),
    }.get(state.state, ("{target} could not be brought to {wanted}", "it is tried again by itself"))
    names = {"target": state.target, "wanted": wanted}
    command = with_loop("finetune deploy status", loop)
    cause = first_line(without_values(state.last_error))
    text = f"{cause}\nnext: {todo.format(**names)}; `{command}` shows where it stands"
    key = f"target {state.target} {datetime.now(UTC).isoformat()}"  # told at each change of the target's state
    return Alert("deployment", key, f"{loop.name}: {title.format(**names)}", text)


def _key(run_id: str) -> str:
    return f"run {run_id}"
