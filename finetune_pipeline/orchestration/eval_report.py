"""The asset eval_report: champion and challenger on the same questions, and the gate's check."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    check_unaltered,
    draft,
    hash_of,
    package_versions,
    publish,
    read,
    stage_folder,
    version_of,
)
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION, SPLITS, read_split
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import Benchmark
from finetune_pipeline.evaluation.comparison import Comparison, judge
from finetune_pipeline.evaluation.gate import Verdict
from finetune_pipeline.evaluation.metric_table import comparison_markdown, metric_table
from finetune_pipeline.evaluation.plots import plot_png
from finetune_pipeline.evaluation.report import HTML, write_report
from finetune_pipeline.evaluation.run import Contender, compare_models
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.feedback.store import mark_judged
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import AdapterManifest, GgufManifest, ReportManifest
from finetune_pipeline.orchestration.gguf_model import identity, what_serves
from finetune_pipeline.orchestration.io_manager import picture, pointers_key, upstream
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.required_checks import NotProven, check_proven, dataset_of, near_benchmark
from finetune_pipeline.registry.champion import CurrentDeployment, current_deployment
from finetune_pipeline.registry.check_outcomes import record_outcomes_in
from finetune_pipeline.registry.comparisons import ComparisonRecord, extend_watermark_in, record_comparison_in
from finetune_pipeline.registry.model_versions import check_files
from finetune_pipeline.schemas import Rule
from finetune_pipeline.settings import REPLAY, LoopSettings
from finetune_pipeline.subprocess_lifetime import die_with_run


def eval_report_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset eval_report of a loop, with the gate's check (blocking unless on_reject is keep_champion)."""

    def check(name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
        key = [*loop.prefix, "eval_report"]
        return dg.AssetCheckSpec(name, asset=key, description=description, blocking=blocking)

    gate = f"The challenger gains at least {loop.gate.min_gain:.0%} ({loop.gate.mode}) over the champion."

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        ins={"gguf_model": upstream(loop)},
        check_specs=[
            check("gain", gate, blocking=loop.gate.on_reject == "fail"),
            check("significance", "The gain is more than luck by a paired test."),
            check("no_slice_regressed", "No slice of the benchmark has less right than before."),
        ],
        output_required=False,
        kinds={"html"},
    )
    def eval_report(
        context: dg.AssetExecutionContext, gguf_model: Artifact[GgufManifest]
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """Champion (or base model) and challenger on the whole benchmark, both as the file or pair that would serve.

        Answers that were generated before are reused by hash; speed is measured anew. Writing this report is what
        counts as judging the data, whatever the verdict. If the challenger is the champion, by hash, there is
        nothing to compare: no report is written, and the run ends without a promotion.
        """
        die_with_run()
        check_proven(gguf_model)
        now = current_deployment(connect(), loop.name)
        if now.model is not None and now.model.sha256 == identity(gguf_model):
            reason = f"nothing new to evaluate: the challenger is the champion {now.model.name}, by its SHA-256"
            context.log.info(reason)
            _judged_before(loop, gguf_model)
            yield from _nothing_new(reason)
            return
        artifact, comparison, verdict = report(loop, gguf_model, now, context.run.run_id, context.log.info)
        context.log.info(f"{'promote' if verdict.promote else 'reject'}: {verdict.reason}")
        if comparison.contention:
            context.log.warning(
                f"latency is not stored as the models' own: {comparison.contention}; evaluate again on a quiet machine"
            )
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact, comparison, verdict))
        yield from _checks(loop, comparison, verdict)

    return eval_report


def report(
    loop: LoopSettings, gguf: Artifact[GgufManifest], now: CurrentDeployment, run_id: str, tell: Callable[[str], None]
) -> tuple[Artifact[ReportManifest], Comparison, Verdict]:
    """Compare what would serve with what serves now, write the report, and remember that its data was judged.

    Raises:
        ArtifactError: the model that answered is not the one that the checks of gguf_model passed.
    """
    if now.model:
        check_files(now.model)  # a damaged champion would be easy to beat
    benchmark, rules = loop_files.benchmark(loop), loop_files.rules(loop)
    check_distinct(loop, gguf)
    comparison = _compare(loop, gguf, now, benchmark, rules, tell)
    if comparison.challenger.gguf_sha256 != identity(gguf):
        raise ArtifactError(
            f"the file that answered the benchmark is not the one that gguf_model {gguf.manifest.version} was checked "
            f"with; "
            f"delete {gguf.path} and materialize gguf_model again"
        )
    verdict = judge(comparison, loop.gate)
    inputs = {
        "gguf_model": gguf.manifest.version,
        "challenger": comparison.challenger.gguf_sha256,
        "champion": comparison.champion.gguf_sha256,
        "benchmark": benchmark.sha256,
        "settings": settings_hash(loop),
    }
    # Speed is measured anew each time, so every run has a report of its own.
    version = version_of(inputs, {"run": run_id})
    with draft(loop.name, ReportManifest.stage, version) as folder:
        write_report(folder, loop.name, comparison, verdict, loop.gate, loop.curation.min_confidence, rules)
        fields = {
            "loop": loop.name,
            "version": version,
            "inputs": inputs,
            "settings": judging_settings(loop),
            "packages": package_versions(*loop_files.PACKAGES),
            "comparison_id": version,
            "challenger_sha256": comparison.challenger.gguf_sha256,
            "champion_id": now.model.id if now.model else None,
            "champion_sha256": comparison.champion.gguf_sha256,
            "benchmark_sha256": benchmark.sha256,
            "promote": verdict.promote,
            "reason": verdict.reason,
            "watermark": gguf.manifest.watermark,
        }
        artifact = publish(folder, ReportManifest, fields)
    _mark_judged(loop, artifact, gguf, now.deployment_id, run_id)
    return artifact, comparison, verdict


def _compare(
    loop: LoopSettings,
    gguf: Artifact[GgufManifest],
    now: CurrentDeployment,
    benchmark: Benchmark,
    rules: Sequence[Rule],
    tell: Callable[[str], None],
) -> Comparison:
    if now.model:
        against = ModelSpec(gguf=now.model.gguf_path, adapter=now.model.adapter_path)
    else:
        against = ModelSpec(gguf=base_gguf(loop, tell))
    return compare_models(
        Contender(now.model.name if now.model else f"{loop.name}@base", against),
        Contender("challenger", what_serves(gguf)),
        benchmark,
        Scorer(loop.evaluation.metric, loop_files.output_schema(loop), rules),
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        _teller(tell),
    )


def judging_settings(loop: LoopSettings) -> dict[str, Any]:
    """The settings under which a comparison holds; another gate, benchmark or schema needs another comparison."""
    evaluation = loop.evaluation.model_dump(exclude={"parallel"})
    return {"evaluation": evaluation, "gate": loop.gate.model_dump(), "system_prompt": loop.system_prompt}


def settings_hash(loop: LoopSettings) -> str:
    """The hash of `judging_settings` and of the files that decide what is right."""
    base = base_hash(resolve_base_model(loop.base_model))  # what serves, and is compared with, without a champion
    return hash_of({**judging_settings(loop), **loop_files.judging_files(loop), "base_model": base})


def _mark_judged(
    loop: LoopSettings, artifact: Artifact[ReportManifest], gguf: Artifact[GgufManifest], move: int, run_id: str
) -> None:
    """Record the report and its check's outcome, and mark its data as judged, in one transaction."""
    manifest = artifact.manifest
    contents = _trained_contents(loop.name, gguf.manifest.adapter_version)
    with connect().write() as connection:
        record_comparison_in(
            connection,
            ComparisonRecord(
                id=manifest.comparison_id,
                loop=loop.name,
                challenger_sha256=manifest.challenger_sha256,
                champion_id=manifest.champion_id,
                champion_sha256=manifest.champion_sha256,
                benchmark_sha256=manifest.benchmark_sha256,
                promote=manifest.promote,
                reason=manifest.reason,
                watermark=manifest.watermark,
                report_path=artifact.path / HTML,
                created_at=manifest.created_at,
                report_sha256=artifact.sha256,
                after_deployment=move,
            ),
        )
        record_outcomes_in(connection, artifact, {"gain": manifest.promote}, run_id)
        mark_judged(connection, loop.name, contents)


def _judged_before(loop: LoopSettings, gguf: Artifact[GgufManifest]) -> None:
    """Mark the data of a challenger that is the champion as judged, since the model's verdict is known.

    Otherwise the same data would start the loop again and again.
    """
    contents = _trained_contents(loop.name, gguf.manifest.adapter_version)
    with connect().write() as connection:
        extend_watermark_in(connection, loop.name, identity(gguf), gguf.manifest.watermark)
        mark_judged(connection, loop.name, contents)


def check_distinct(loop: LoopSettings, gguf: Artifact[GgufManifest]) -> None:
    """Refuse a model that was trained, now or earlier, on near-duplicates of the current benchmark's questions.

    Raises:
        NotProven: the message names examples.
        ArtifactError: a dataset that it was trained on is missing, or was edited.
    """
    near = near_benchmark(loop, gguf.manifest.datasets)
    if near:
        raise NotProven(f"{near}; materialize curated_dataset and everything after it again")


def _trained_contents(loop: str, adapter_version: str) -> list[str]:
    """Content hashes of the examples that this adapter was trained and validated on, as they were before redaction."""
    adapter = read(AdapterManifest, stage_folder(loop, AdapterManifest.stage) / adapter_version)
    check_unaltered(adapter)
    dataset = dataset_of(loop, adapter.manifest.inputs["curated_dataset"])
    columns = ["content_hash", "source"]
    rows = chain.from_iterable(read_split(dataset.path, PROMPT_COMPLETION, split, columns) for split in SPLITS)
    return [row["content_hash"] for row in rows if row["source"] != REPLAY]


def _teller(tell: Callable[[str], None]) -> Callable[[str, int, int], None]:
    def on_progress(name: str, done: int, total: int) -> None:
        if done == total or done % max(1, total // 4) == 0:
            tell(f"{name} answered {done} of {total} questions")

    return on_progress


def _metadata(artifact: Artifact[ReportManifest], comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for figure in metric_table(comparison):
        for side, value in (("challenger", figure.challenger), ("champion", figure.champion)):
            if value is not None and not figure.flag:
                figures[f"{figure.key}_{side}"] = float(value)
    return {
        "verdict": "promote" if verdict.promote else "reject",
        "reason": verdict.reason,
        "correct_challenger": verdict.challenger_correct,
        "correct_champion": verdict.champion_correct,
        "of": verdict.total,
        "best_constant_answer": comparison.constant.correct,
        "score_above": verdict.minimum_correct,
        "valid_challenger": verdict.valid,
        "answers_challenger": verdict.answers,
        "comparison": dg.MetadataValue.md(comparison_markdown(comparison)),
        "plot": picture(plot_png(comparison), "champion and challenger"),
        "report": dg.MetadataValue.path(artifact.path / HTML),
        "p_value": float(comparison.significance.p_value),
        "speed": comparison.contention or "measured on a quiet machine",
        **figures,
    }


def _nothing_new(reason: str) -> Iterator[dg.AssetCheckResult]:
    # Dagster requires a result of each check of an asset, even if the asset is not materialized.
    for name in ("gain", "significance", "no_slice_regressed"):
        yield dg.AssetCheckResult(check_name=name, passed=True, description=reason)


def _checks(loop: LoopSettings, comparison: Comparison, verdict: Verdict) -> Iterator[dg.AssetCheckResult]:
    rejects = loop.gate.on_reject == "fail"
    yield dg.AssetCheckResult(
        check_name="gain",
        passed=verdict.promote,
        severity=dg.AssetCheckSeverity.ERROR if rejects else dg.AssetCheckSeverity.WARN,
        description=verdict.reason,
        metadata={
            "correct_challenger": verdict.challenger_correct,
            "correct_champion": verdict.champion_correct,
            "needed": verdict.required_correct,
            "of": verdict.total,
            "more_than": verdict.minimum_correct,
            "valid": verdict.valid,
            "answers": verdict.answers,
        },
    )
    significance = comparison.significance
    yield dg.AssetCheckResult(
        check_name="significance",
        passed=significance.p_value <= loop.gate.significance_level,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"p_value": float(significance.p_value), "method": significance.method},
    )
    changes = {group.name: f"{group.points:+.1%}" for group in comparison.slices}
    yield dg.AssetCheckResult(
        check_name="no_slice_regressed",
        passed=not comparison.regressed_slices,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"falling": list(comparison.regressed_slices), "changes": changes},
    )
