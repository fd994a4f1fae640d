"""Promote a challenger: apply the gate again to its report, then make it the champion."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_pipeline.alerts import send
from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    check_unaltered,
    find_alteration,
    get_or_create,
    hash_file,
    model_sha256,
    package_versions,
    read,
    stage_folder,
    version_of,
    wait_for_lock,
    write_text,
)
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.gate import Verdict
from finetune_pipeline.evaluation.report import JSON, findings_of_report
from finetune_pipeline.manifests import GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.alert_texts import promotion_by_person
from finetune_pipeline.pipeline.approval import (
    EVALUATE_AGAIN,
    ask_for_approval,
    check_actor_and_reason,
    decide,
    make_void,
    rejected,
)
from finetune_pipeline.pipeline.challengers import Challenger, candidate_of
from finetune_pipeline.pipeline.evaluate import ProgressLog, settings_hash
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.lineage import card
from finetune_pipeline.pipeline.regression_suite import fixed_corrections
from finetune_pipeline.pipeline.required_checks import check_passed, check_proven
from finetune_pipeline.pipeline.sealed_benchmark import sealed_findings, sealed_scores
from finetune_pipeline.registry.approvals import Approval, ApprovalError
from finetune_pipeline.registry.champion import champion, promote
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.deployment_history import PROMOTING, list_deployments
from finetune_pipeline.registry.model_card import MODEL_CARD
from finetune_pipeline.registry.model_versions import ModelVersion, RegistryError
from finetune_pipeline.registry.regression_questions import RegressionQuestion, questions_of_model
from finetune_pipeline.registry.sealed_looks import SealedScores
from finetune_pipeline.settings import LoopSettings

NOT_PROMOTED = "not promoted: "
"""How the reason of a rejection begins."""


class ReportMismatchError(ArtifactError):
    """The report does not describe what would be promoted; the message names what differs."""


@dataclass(frozen=True)
class Promotion:
    """A new champion, its artifact with the model card, and the verdict that justifies it.

    The artifact has the number of corrections that the promotion fixed.
    """

    artifact: Artifact[PromotionManifest]
    model: ModelVersion
    verdict: Verdict


@dataclass(frozen=True)
class NotPromoted:
    """The gate does not accept the challenger, so the champion stays."""

    reason: str


@dataclass(frozen=True)
class NotApproved:
    """The gate accepts the challenger, and the champion stays because no person has approved it."""

    approval: Approval


def promote_challenger(
    loop: LoopSettings,
    report: Artifact[ReportManifest],
    gguf: Artifact[GgufManifest],
    actor: str,
    log: Callable[[str], None],
    config: Mapping[str, Any] | None = None,
    note: str = "",
) -> Promotion | NotPromoted | NotApproved:
    """Make a challenger the champion if the gate accepts it, and a person too if `approval: required`.

    Otherwise ask for the approval; a later call promotes once it is there. The model card is written afterwards.

    The corrections that it fixes become questions of the regression suite in the transaction that moves the pointer,
    and so its scores on the sealed benchmark are recorded.

    Args:
        actor: who promotes, for the deployment history.
        config: `deployment_config` of a request, over `deploy.config`.
        note: what a person says about it, for the history, before the gate's reason.

    Raises:
        ReportMismatchError: the report is not about these files, settings or this champion.
        RequiredChecksError: a blocking check of what the challenger was made from did not pass.
        ChampionChangedError: another process changed the champion at the same time.
        EngineError: the challenger cannot answer the corrections or the sealed benchmark.
        ApprovalError: the champion changed since the comparison, so nobody is asked.
    """
    verdict = verify_report(loop, report, gguf)
    if not verdict.promote:
        return NotPromoted(f"{NOT_PROMOTED}{verdict.reason}")
    candidate = candidate_of(gguf, report.manifest.version)
    comparison_id, previous_id = report.manifest.comparison_id, report.manifest.champion_id
    reason = "; ".join(filter(None, (note, verdict.reason.split("\n")[0])))
    # Of two people who approve at once, one waits here: both would write the same answers and the same artifact.
    with _promotion_lock(loop, log):
        serving = champion(connect(), loop.name)
        is_new = serving is None or serving.sha256 != report.manifest.challenger_sha256
        action: Literal["promote", "approve"] = "promote"
        if loop.approval == "required" and is_new:
            approval = ask_for_approval(loop, report, gguf)
            if approval.state != "approved":
                return NotApproved(approval)
            action, actor, reason = "approve", approval.actor or actor, f"{approval.reason}; {reason}"
        # Of a model that serves, an earlier try that made it the champion recorded them.
        fixed, sealed = _findings(loop, report, gguf, log) if is_new else ([], None)
        model = promote(
            connect(),
            candidate,
            previous_id,
            actor,
            reason,
            comparison_id,
            action,
            loop.deploy.config,
            fixed=fixed,
            sealed=sealed,
            requested=config,
        )
        return Promotion(_record(loop, model, report.manifest.version, previous_id), model, verdict)


def _promotion_lock(loop: LoopSettings, log: Callable[[str], None]) -> AbstractContextManager[None]:
    return wait_for_lock(stage_folder(loop.name, PromotionManifest.stage) / ".promotion", "promotion", log)


def _findings(
    loop: LoopSettings, report: Artifact[ReportManifest], gguf: Artifact[GgufManifest], log: Callable[[str], None]
) -> tuple[list[RegressionQuestion], SealedScores | None]:
    """Return the corrections that a challenger fixes, and its scores on the sealed benchmark if this promotion asks."""
    scorer, progress = loop_files.scorer(loop), ProgressLog(log)
    fixed = fixed_corrections(loop, gguf, scorer, progress)
    return fixed, sealed_scores(loop, model_spec(gguf), report.path / JSON, scorer, progress)


def approve_challenger(
    loop: LoopSettings, challenger: Challenger, actor: str, reason: str, log: Callable[[str], None]
) -> Promotion:
    """Record that a person approves a challenger that the gate accepted, and make it the champion; send an alert.

    After a kill between the two, the same call, or the next materialization of promoted_model, does the rest.

    Args:
        actor: name of the person, for the deployment history.

    Raises:
        ApprovalError: it was not evaluated, the gate did not accept it, a person rejected it, or its approval is void;
            the message says what changed.
        RegistryError: its files differ, or the champion changed at the same time.
    """
    check_actor_and_reason("approve", actor, reason)
    compared = challenger.comparison
    if compared is None:
        raise ApprovalError(f"{challenger.name} was not evaluated; materialize eval_report first")
    if not compared.promote:
        verdict = compared.reason.replace("\n", "; ")
        raise ApprovalError(
            f"{challenger.name} cannot be approved: {challenger.verdict} ({verdict}). To overrule the gate: "
            f'`finetune model promote {challenger.name} --force --reason "..."`'
        )
    try:
        report = _report_of(challenger)
        verify_report(loop, report, challenger.gguf)
    except ArtifactError as error:
        make_void(loop, compared.id, str(error))
        raise ApprovalError(f"the approval of {challenger.name} is void: {error}") from error
    approval = ask_for_approval(loop, report, challenger.gguf)
    if approval.state == "void":
        raise ApprovalError(f"the approval of {challenger.name} is void: {approval.reason}; {EVALUATE_AGAIN}")
    if approval.state == "rejected":
        raise rejected(approval)
    decide(loop, approval, "approved", actor, reason)
    required = loop.model_copy(update={"approval": "required"})  # so that the history names the person in any case
    result = promote_challenger(required, report, challenger.gguf, actor, log)
    if not isinstance(result, Promotion):  # somebody rejected it, or it became void, since the decision above
        reason = result.approval.reason if isinstance(result, NotApproved) else result.reason
        raise ApprovalError(f"{challenger.name} was not promoted: {reason}")
    _tell(loop, result.model, actor)
    return result


def promote_accepted(
    loop: LoopSettings,
    challenger: Challenger,
    actor: str,
    log: Callable[[str], None],
    config: Mapping[str, Any] | None = None,
    note: str = "",
) -> Promotion | NotPromoted | NotApproved:
    """Promote a challenger as the asset promoted_model does, from its newest report; send an alert.

    Args:
        config, note: as in `promote_challenger`.

    Raises:
        ArtifactError: it was not evaluated, or see `promote_challenger`.
        ChampionChangedError: another process changed the champion at the same time.
    """
    result = promote_challenger(loop, _report_of(challenger), challenger.gguf, actor, log, config, note)
    if isinstance(result, Promotion):
        _tell(loop, result.model, actor)
    return result


def force_challenger(
    loop: LoopSettings,
    challenger: Challenger,
    actor: str,
    reason: str,
    config: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> ModelVersion:
    """Make a challenger the champion although the gate or a person did not accept it; send an alert.

    Its blocking checks must have passed, and its files must be what a run wrote. It replaces whatever serves now. The
    corrections that it fixes and its scores on the sealed benchmark are recorded as by `promote_challenger`.

    Args:
        config: `deployment_config` of a request, over `deploy.config`.

    Raises:
        RequiredChecksError: a blocking check of the model or of a dataset that it was trained on did not pass.
        ArtifactError: it was edited, or its report is missing.
        RegistryError: it was not evaluated, its files differ, or actor or reason is missing.
        EngineError: it cannot answer the corrections or the sealed benchmark.
    """
    if challenger.comparison is None:
        raise RegistryError(
            f"{challenger.name} was not evaluated, so there is no decision to overrule; materialize eval_report first"
        )
    check_actor_and_reason("force", actor, reason)
    check_unaltered(challenger.gguf)
    check_proven(challenger.gguf)
    report, compared, settings = _report_of(challenger), challenger.comparison.id, loop.deploy.config
    candidate = candidate_of(challenger.gguf, compared)
    with _promotion_lock(loop, log):  # of two people who force at once, both would write the same artifact
        serving = champion(connect(), loop.name)
        previous_id = serving.id if serving else None
        is_new = serving is None or serving.sha256 != challenger.sha256
        fixed, sealed = _findings(loop, report, challenger.gguf, log) if is_new else ([], None)
        model = promote(
            connect(),
            candidate,
            previous_id,
            actor,
            reason,
            compared,
            "force",
            settings,
            fixed=fixed,
            sealed=sealed,
            requested=config,
        )
        _record(loop, model, compared, previous_id)
    _tell(loop, model, actor)
    return model


def _tell(loop: LoopSettings, model: ModelVersion, actor: str) -> None:
    """Send the alert about a promotion by a person, once; a run of Dagster sends its own."""
    newest = list_deployments(connect(), loop.name)[-1]
    by_person = newest.action != "promote" or newest.actor == actor
    if newest.model_id == model.id and newest.action in PROMOTING and by_person:
        send(loop, promotion_by_person(loop, model, newest))


def _report_of(challenger: Challenger) -> Artifact[ReportManifest]:
    if challenger.comparison is None:
        raise ArtifactError(f"{challenger.name} was not evaluated; materialize eval_report first")
    loop = challenger.gguf.manifest.loop
    return read(ReportManifest, stage_folder(loop, ReportManifest.stage) / challenger.comparison.id)


def _record(
    loop: LoopSettings, model: ModelVersion, report: str, previous_id: str | None
) -> Artifact[PromotionManifest]:
    """Publish the artifact of a promotion, with the model card."""
    inputs = {ReportManifest.stage: report, "gguf": model.sha256}

    def make(folder: Path) -> dict[str, Any]:
        write_text(folder / MODEL_CARD, card(connect(), loop, model))
        return {
            "inputs": inputs,
            "settings": loop.gate.model_dump(),
            "packages": package_versions(*loop_files.PACKAGES),
            "model_id": model.id,
            "model": model.name,
            "gguf_path": str(model.gguf_path),
            "previous_id": previous_id,
            "fixed": questions_of_model(connect(), loop.name, model.id),
            "sealed": sealed_findings(connect(), loop.name).get(list_deployments(connect(), loop.name)[-1].id, ""),
        }

    version = version_of(inputs, {"model": model.name, "card": MODEL_CARD})
    return get_or_create(PromotionManifest, loop.name, version, make)


def verify_report(loop: LoopSettings, report: Artifact[ReportManifest], gguf: Artifact[GgufManifest]) -> Verdict:
    """Return the gate's verdict on a report after checking that it describes exactly what would be promoted.

    The report's hash must be in the database, and three verdicts must agree: that of the gate applied again to the
    report's metrics, that in its manifest, and that in the database, which editing files does not change.

    Raises:
        ReportMismatchError: a GGUF or adapter file, the report, the benchmark, the settings or the champion changed.
        RequiredChecksError: a blocking check of what the challenger was made from did not pass.
    """
    manifest = report.manifest
    serving = champion(connect(), loop.name)
    recorded = find_comparison(connect(), loop.name, manifest.comparison_id)
    spec = model_spec(gguf)
    challenger = model_sha256(hash_file(spec.gguf), hash_file(spec.adapter) if spec.adapter else None)
    expectations = {  # name -> as it is now, as it was when the report was written
        "the GGUF": (
            (challenger, gguf.manifest.version),
            (manifest.challenger_sha256, manifest.inputs[GgufManifest.stage]),
        ),
        "the report": (find_alteration(report), None),
        "the report in the database": (recorded.report_sha256 if recorded else None, report.sha256),
        "base model, benchmark, schema, rules, gate settings or serving.constrain": (
            settings_hash(loop),
            manifest.inputs["settings"],
        ),
    }
    differing = [name for name, (now, then) in expectations.items() if now != then]
    challenger_serves = serving is not None and serving.sha256 == manifest.challenger_sha256
    if not challenger_serves and (serving.id if serving else None) != manifest.champion_id:
        differing.append("the champion")
    if differing or recorded is None:
        raise ReportMismatchError(
            f"the report {manifest.version} was not made for what would be promoted now; changed since: "
            f"{', '.join(differing)}. Materialize eval_report again, then promoted_model"
        )
    verdict = findings_of_report(report.path / JSON, loop.gate).verdict
    verdicts = {"the gate": verdict.decision, "its manifest": manifest.decision, "the database": recorded.decision}
    if len(set(verdicts.values())) > 1:
        each = ", ".join(f"{name} says {decision}" for name, decision in verdicts.items())
        raise ReportMismatchError(
            f"the verdicts on report {manifest.version} differ: {each}. Materialize eval_report again"
        )
    check_proven(gguf)
    if verdict.promote:
        check_passed(loop.name, ReportManifest, manifest.version, report.sha256)
    return verdict
