"""The asset promoted_model: the gate asked again, then the champion moves, or stays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

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
from finetune_pipeline.evaluation.report import HTML, JSON, metrics_of_report, verdict_of_report
from finetune_pipeline.manifests import GgufManifest, PromotionManifest, ReportManifest
from finetune_pipeline.orchestration.io_manager import pointers_key, upstream
from finetune_pipeline.pipeline.evaluate import settings_hash
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.lineage import card
from finetune_pipeline.pipeline.loop_files import PACKAGES
from finetune_pipeline.pipeline.required_checks import check_passed, check_proven
from finetune_pipeline.registry.champion import champion, promote
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.model_card import MODEL_CARD
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.subprocess_lifetime import die_with_run

ACTOR = "dagster"


class NotMeasured(ArtifactError):
    """The report is not about what would be promoted; the message says what differs."""


class Rejected(RuntimeError):
    """The gate does not let the challenger through; the message says why."""


def promoted_model_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset promoted_model of a loop."""
    prefix = loop.prefix or None

    @dg.asset(
        key_prefix=prefix,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        ins={"eval_report": upstream(loop), "gguf_model": upstream(loop)},
        output_required=False,
        kinds={"sqlite"},
    )
    def promoted_model(
        context: dg.AssetExecutionContext,
        eval_report: Artifact[ReportManifest],
        gguf_model: Artifact[GgufManifest],
    ) -> Iterator[dg.MaterializeResult[Any]]:
        """The champion: the version in the registry that serves.

        Asks the gate again, on the report of exactly this file, benchmark, champion and settings, by hash, and refuses
        what was not measured; so materializing this asset alone is no way round the gate.
        """
        die_with_run()
        try:
            verdict = check_measured(loop, eval_report, gguf_model)
            if not verdict.promote:
                raise Rejected(f"not promoted: {verdict.reason}")
        except Rejected as rejected:
            if loop.gate.on_reject == "fail":
                raise dg.Failure(str(rejected), allow_retries=False) from None
            context.log.info(f"{rejected}; the champion stays")
            return
        model = _promote(loop, eval_report, gguf_model, verdict)
        artifact = _keep(loop, eval_report, model)
        context.log.info(f"{model.name} serves now: {model.gguf_path}")
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact, model, verdict))

    return promoted_model


def check_measured(loop: LoopSettings, report: Artifact[ReportManifest], gguf: Artifact[GgufManifest]) -> Verdict:
    """The gate's verdict on the report, which has to be about these very files under these very settings.

    The report's hash must be in the database, and three verdicts must agree: of the rule, applied again to the report's
    metrics, of its manifest, and of the database, which editing files does not change.

    Raises:
        NotMeasured: file (of a pair, either of them), report, benchmark, settings or champion are not those that were
            compared.
        NotProven: a blocking check of what the model was made from did not pass.
    """
    manifest = report.manifest
    now = champion(connect(), loop.name)
    files = model_spec(gguf)
    measured = model_sha256(hash_file(files.gguf), hash_file(files.adapter) if files.adapter else None)
    judged = find_comparison(connect(), loop.name, manifest.comparison_id)
    found = {
        "the GGUF": ((measured, gguf.manifest.version), (manifest.challenger_sha256, manifest.inputs["gguf_model"])),
        "the report": (find_alteration(report), None),
        "the report in the database": (judged.report_sha256 if judged else None, report.sha256),
        "base model, benchmark, schema, rules or gate settings": (settings_hash(loop), manifest.inputs["settings"]),
    }
    differing = [name for name, (is_now, then) in found.items() if is_now != then]
    challenger_serves = now is not None and now.sha256 == manifest.challenger_sha256
    if not challenger_serves and (now.id if now else None) != manifest.champion_id:
        differing.append("the champion")
    if differing or judged is None:
        raise NotMeasured(
            f"the report {manifest.version} was not made for what would be promoted now; changed since: "
            f"{', '.join(differing)}. Materialize eval_report again, then promoted_model"
        )
    verdict = verdict_of_report(report.path / JSON, loop.gate)
    said = {"the rule": verdict.promote, "its manifest": manifest.promote, "the database": judged.promote}
    if len(set(said.values())) > 1:
        each = ", ".join(f"{who} says {'promote' if promote else 'reject'}" for who, promote in said.items())
        raise NotMeasured(f"the verdicts on report {manifest.version} differ: {each}. Materialize eval_report again")
    check_proven(gguf)
    if verdict.promote:
        check_passed(loop.name, ReportManifest, manifest.version, report.sha256)
    return verdict


def _promote(
    loop: LoopSettings, report: Artifact[ReportManifest], gguf: Artifact[GgufManifest], verdict: Verdict
) -> ModelVersion:
    candidate = CandidateModel(
        loop=loop.name,
        **_files(gguf),
        base_hash=gguf.manifest.base_hash,
        mode=gguf.manifest.mode,
        lineage={
            "base_model": gguf.manifest.base_model,
            "lora_adapter": gguf.manifest.adapter_version,
            "gguf_model": gguf.manifest.version,
            "eval_report": report.manifest.version,
            "watermark": gguf.manifest.watermark,
        },
        scores=_scores(metrics_of_report(report.path / JSON).rows),
        report_path=report.path / HTML,
    )
    return promote(
        connect(), candidate, report.manifest.champion_id, ACTOR, verdict.reason, report.manifest.comparison_id
    )


def _scores(metrics: list[MetricRow]) -> dict[str, Any]:
    """Return the metrics of a report for the registry, without speeds that were measured on a busy machine."""
    scores = {row.key: row.challenger for row in metrics if not row.flag}
    flag = next((row.flag for row in metrics if row.flag), None)
    return {**scores, "speed_flag": flag} if flag else scores


def _files(gguf: Artifact[GgufManifest]) -> dict[str, Any]:
    """Paths and hashes of what serves, as the registry keeps them."""
    spec, sha256 = model_spec(gguf), gguf.manifest.files[gguf.manifest.gguf].sha256
    if spec.adapter is None:
        return {"gguf_path": spec.gguf, "gguf_sha256": sha256}
    base = {"gguf_path": spec.gguf, "gguf_sha256": gguf.manifest.base_gguf_sha256}
    return {**base, "adapter_path": spec.adapter, "adapter_sha256": sha256}


def _keep(loop: LoopSettings, report: Artifact[ReportManifest], model: ModelVersion) -> Artifact[PromotionManifest]:
    inputs = {"eval_report": report.manifest.version, "gguf": model.sha256}
    fields = {
        "inputs": inputs,
        "settings": loop.gate.model_dump(),
        "packages": package_versions(*PACKAGES),
        "model_id": model.id,
        "model": model.name,
        "gguf_path": str(model.gguf_path),
        "previous_id": report.manifest.champion_id,
    }
    version = version_of(inputs, {"model": model.name, "card": MODEL_CARD})

    def make(folder: Path) -> dict[str, Any]:
        write_text(folder / MODEL_CARD, card(connect(), loop, model))
        return fields

    return get_or_create(PromotionManifest, loop.name, version, make)


def _metadata(artifact: Artifact[PromotionManifest], model: ModelVersion, verdict: Verdict) -> dict[str, Any]:
    return {
        "model": model.name,
        "reason": verdict.reason,
        "gguf": dg.MetadataValue.path(model.gguf_path),
        "report": dg.MetadataValue.path(model.report_path),
        "model_card": dg.MetadataValue.path(artifact.path / MODEL_CARD),
        "gain_relative": verdict.relative_gain or 0.0,
        "path": dg.MetadataValue.path(artifact.path),
    }
