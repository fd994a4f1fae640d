"""Promote a challenger: apply the gate again to its report, then make it the champion."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    find_alteration,
    get_or_create,
    hash_file,
    model_sha256,
    package_versions,
    version_of,
    write_text,
)
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.gate import Verdict
from finetune_pipeline.evaluation.metric_table import MetricRow
from finetune_pipeline.evaluation.report import HTML, JSON, findings_of_report, metrics_of_report
from finetune_pipeline.manifests import AdapterManifest, GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.evaluate import ProgressLog, settings_hash
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.lineage import card
from finetune_pipeline.pipeline.regression_suite import fixed_corrections
from finetune_pipeline.pipeline.required_checks import check_passed, check_proven
from finetune_pipeline.registry.champion import champion, promote
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.model_card import MODEL_CARD
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion
from finetune_pipeline.registry.regression_questions import questions_of_model
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


def promote_challenger(
    loop: LoopSettings,
    report: Artifact[ReportManifest],
    gguf: Artifact[GgufManifest],
    actor: str,
    log: Callable[[str], None],
) -> Promotion | NotPromoted:
    """Make a challenger the champion if the gate accepts it, and write its model card.

    The corrections that it fixes become questions of the regression suite in the transaction that moves the pointer.

    Args:
        actor: who promotes, for the deployment history.

    Raises:
        ReportMismatchError: the report is not about these files, settings or this champion.
        RequiredChecksError: a blocking check of what the challenger was made from did not pass.
        ChampionChangedError: another process changed the champion at the same time.
        EngineError: the challenger cannot answer the corrections.
    """
    verdict = verify_report(loop, report, gguf)
    if not verdict.promote:
        return NotPromoted(f"{NOT_PROMOTED}{verdict.reason}")
    spec, gguf_manifest = model_spec(gguf), gguf.manifest
    file_sha256 = gguf_manifest.files[gguf_manifest.gguf].sha256
    files: dict[str, Any] = {"gguf_path": spec.gguf, "gguf_sha256": file_sha256}
    if spec.adapter is not None:
        files |= {"gguf_sha256": gguf_manifest.base_gguf_sha256}
        files |= {"adapter_path": spec.adapter, "adapter_sha256": file_sha256}
    candidate = CandidateModel(
        loop=loop.name,
        **files,
        base_hash=gguf_manifest.base_hash,
        mode=gguf_manifest.mode,
        lineage={
            "base_model": gguf_manifest.base_model,
            AdapterManifest.stage: gguf_manifest.adapter_version,
            GgufManifest.stage: gguf_manifest.version,
            ReportManifest.stage: report.manifest.version,
            "watermark": gguf_manifest.watermark,
        },
        scores=scores_of(metrics_of_report(report.path / JSON).rows),
        report_path=report.path / HTML,
    )
    comparison_id, previous_id = report.manifest.comparison_id, report.manifest.champion_id
    reason = verdict.reason.split("\n")[0]
    serving, fixed = champion(connect(), loop.name), []
    if serving is None or serving.sha256 != report.manifest.challenger_sha256:  # else an earlier try recorded them
        fixed = fixed_corrections(loop, gguf, loop_files.scorer(loop), ProgressLog(log))
    model = promote(
        connect(), candidate, previous_id, actor, reason, comparison_id, config=loop.deploy.config, fixed=fixed
    )

    inputs = {ReportManifest.stage: report.manifest.version, "gguf": model.sha256}

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
        }

    version = version_of(inputs, {"model": model.name, "card": MODEL_CARD})
    return Promotion(get_or_create(PromotionManifest, loop.name, version, make), model, verdict)


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


def scores_of(metrics: list[MetricRow]) -> dict[str, Any]:
    """Return the challenger's metrics for the registry, without speeds that were measured on a busy machine."""
    scores = {row.key: row.challenger for row in metrics if not row.flag}
    flag = next((row.flag for row in metrics if row.flag), None)
    return {**scores, "speed_flag": flag} if flag else scores
