"""Evaluate a challenger against the champion, write the report, and mark its data as judged."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
from finetune_pipeline.evaluation.comparison import Comparison, judge
from finetune_pipeline.evaluation.gate import BudgetState, Verdict
from finetune_pipeline.evaluation.report import HTML, write_report
from finetune_pipeline.evaluation.run import Contender, compare_models
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.feedback.store import mark_judged
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest, ReportManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.export import gguf_identity, model_spec
from finetune_pipeline.pipeline.judge_agreement import scorer_with_agreement
from finetune_pipeline.pipeline.regression_suite import ask_suite
from finetune_pipeline.pipeline.report_facts import Subject, collect_facts, subject_of
from finetune_pipeline.pipeline.required_checks import RequiredChecksError, check_proven, dataset_of, near_benchmark
from finetune_pipeline.pipeline.sealed_benchmark import sealed_summary
from finetune_pipeline.registry.champion import BASE, CurrentDeployment, current_deployment
from finetune_pipeline.registry.check_outcomes import record_outcomes_in
from finetune_pipeline.registry.comparisons import ComparisonRecord, extend_watermark_in, record_comparison_in
from finetune_pipeline.registry.error_budget import BudgetedBenchmark, BudgetTest, budget_test, spend_in
from finetune_pipeline.registry.model_versions import check_files
from finetune_pipeline.settings import BUDGET_TESTS, REPLAY, LoopSettings
from finetune_pipeline.wording import duration

PROGRESS_SECONDS = 10


@dataclass(frozen=True)
class Evaluation:
    """A written report, the comparison in it, and the gate's verdict."""

    report: Artifact[ReportManifest]
    comparison: Comparison
    verdict: Verdict


@dataclass(frozen=True)
class NothingToEvaluate:
    """The challenger is the champion already, so no report was written."""

    reason: str


def evaluate(
    loop: LoopSettings, gguf: Artifact[GgufManifest], run_id: str, log: Callable[[str], None]
) -> Evaluation | NothingToEvaluate:
    """Compare a challenger with the champion (or the base model), write the report, and mark its data as judged.

    Data counts as judged whatever the verdict, so that it does not start another run. If the challenger is the
    champion, by SHA-256, its data is marked as judged without a report.

    Raises:
        RequiredChecksError: a blocking check of what the challenger was made from did not pass, or the challenger was
            trained on near-duplicates of the benchmark.
        ArtifactError: the files that answered the benchmark are not those that passed the checks.
        MetricError: a metric failed, a judge does not answer, or the gate would count one that agrees with people too
            rarely.
        BudgetChangedError: another comparison spent the same part of the error budget at the same time.
    """
    check_proven(gguf)
    current = current_deployment(connect(), loop.name)
    if current.model is not None and current.model.sha256 == gguf_identity(gguf):
        contents = trained_contents(loop.name, gguf.manifest.adapter_version)
        with connect().write() as connection:
            extend_watermark_in(connection, loop.name, gguf_identity(gguf), gguf.manifest.watermark)
            mark_judged(connection, loop.name, contents)
        return NothingToEvaluate(
            f"nothing new to evaluate: the challenger is the champion {current.model.name}, by its SHA-256"
        )
    if current.model:
        check_files(current.model)  # a damaged champion would be easy to beat
    near = near_benchmark(loop, gguf.manifest.datasets)
    if near:
        raise RequiredChecksError(f"{near}; materialize curated_dataset and everything after it again")
    comparison = _compare(loop, gguf, current, log)
    if comparison.challenger.gguf_sha256 != gguf_identity(gguf):
        raise ArtifactError(
            f"the file that answered the benchmark is not the one that gguf_model {gguf.manifest.version} was checked "
            f"with; delete {gguf.path} and materialize gguf_model again"
        )
    test = _budget_test(loop, comparison)
    budget = BudgetState(test.number is not None, test.left) if test else None
    verdict = judge(comparison, loop.gate, budget)
    report = _write_report(loop, gguf, current, comparison, verdict, budget, run_id)
    manifest = report.manifest
    contents = trained_contents(loop.name, gguf.manifest.adapter_version)
    # One transaction: a comparison whose data is not judged would start the loop again on the same data, and one that
    # spent nothing could be repeated until it promotes by chance.
    with connect().write() as connection:
        record_comparison_in(
            connection,
            ComparisonRecord(
                **manifest.model_dump(include=set(ComparisonRecord.model_fields)),
                id=manifest.comparison_id,
                report_path=report.path / HTML,
                report_sha256=report.sha256,
                after_deployment=current.deployment_id,
                wins=len(comparison.won),
                losses=len(comparison.lost),
                ties=comparison.ties,
            ),
        )
        if test:
            spend_in(connection, loop.name, test, manifest.comparison_id)
        record_outcomes_in(connection, report, {"gain": manifest.promote}, run_id)
        mark_judged(connection, loop.name, contents)
    return Evaluation(report, comparison, verdict)


class ProgressLog:
    """Logs how many questions a model has answered: after its first and its last one, and every PROGRESS_SECONDS."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._first: dict[str, tuple[float, int]] = {}  # model -> time and count of its first report
        self._last = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        """Log the progress of one model if it is time to."""
        now = time.monotonic()
        began, before = self._first.setdefault(name, (now, done))
        if done == total:
            self._log(f"{name} answered {done} of {total} questions")
        elif done == before or now - self._last >= PROGRESS_SECONDS:
            left = ""
            if done > before:  # answers of a killed run were there before the first report
                left = f", {duration((now - began) / (done - before) * (total - done))} left"
            self._log(f"{name} answered {done} of {total} questions ({done / total:.0%}){left}")
        else:
            return
        self._last = now


def _compare(
    loop: LoopSettings, gguf: Artifact[GgufManifest], current: CurrentDeployment, log: Callable[[str], None]
) -> Comparison:
    served = ModelSpec(gguf=base_gguf(loop, log))
    base = champion = Contender(f"{loop.name}@base", served)
    if current.model:
        served = ModelSpec(gguf=current.model.gguf_path, adapter=current.model.adapter_path)
        champion = Contender(current.model.name, served)
    scorer, progress = scorer_with_agreement(loop, log), ProgressLog(log)
    loop_files.sealed_benchmark(loop)  # its errors now, and not after the verdict
    comparison = compare_models(
        champion,
        Contender("challenger", model_spec(gguf)),
        loop_files.benchmark(loop),
        scorer,
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        progress,
        base=base if current.model else None,
        constraint=loop_files.constraint(loop),
    )
    for judgement in comparison.judgements:
        log(str(judgement))
    return replace(comparison, regression=ask_suite(loop, served, model_spec(gguf), scorer, progress))


def _budget_test(loop: LoopSettings, comparison: Comparison) -> BudgetTest | None:
    """Return what the error budget allows this comparison; None if the gate does not require significance."""
    if loop.gate.significance == "shown":
        return None
    trial = {
        "challenger": comparison.challenger.gguf_sha256,
        "champion": comparison.champion.gguf_sha256,
        "settings": {key: value for key, value in comparison_settings(loop).items() if key != "gate"},
        **loop_files.judging_files(loop),
    }
    asked = {one.question.asked_hash[:16] for one in comparison.questions}
    return budget_test(
        connect(),
        loop.name,
        hash_of(trial),
        BudgetedBenchmark(comparison.benchmark_sha256, asked),
        tests=BUDGET_TESTS,
        confirm_days=loop.gate.confirm_days,
    )


def _write_report(
    loop: LoopSettings,
    gguf: Artifact[GgufManifest],
    current: CurrentDeployment,
    comparison: Comparison,
    verdict: Verdict,
    budget: BudgetState | None,
    run_id: str,
) -> Artifact[ReportManifest]:
    inputs = {
        GgufManifest.stage: gguf.manifest.version,
        "challenger": comparison.challenger.gguf_sha256,
        "champion": comparison.champion.gguf_sha256,
        "benchmark": comparison.benchmark_sha256,
        "settings": settings_hash(loop),
    }
    base, scored_by = Subject(served_as=f"{loop.name}@{BASE}"), loop_files.scored_by(loop)
    facts = collect_facts(
        loop.name,
        connect(),
        comparison,
        {
            "base": base,
            "champion": subject_of(current.model) if current.model else base,
            "challenger": Subject(adapter=gguf.manifest.adapter_version),
        },
        {GgufManifest.stage: gguf.manifest.version, **gguf.manifest.inputs, "settings": inputs["settings"]},
        scored_by,
        sealed_summary(loop, connect()),
    )
    # Speed is measured again each time, so every run has its own report.
    version = version_of(inputs, {"run": run_id})
    with draft(loop.name, ReportManifest.stage, version) as folder:
        rules = loop_files.rules(loop)
        confident = loop.curation.min_confidence
        write_report(
            folder,
            loop.name,
            comparison,
            verdict,
            loop.gate,
            confident,
            rules,
            facts=facts,
            budget=budget,
            scored_by=scored_by,
        )
        fields = {
            "loop": loop.name,
            "version": version,
            "inputs": inputs,
            "settings": comparison_settings(loop),
            "packages": package_versions(*loop_files.PACKAGES),
            "comparison_id": version,
            "challenger_sha256": comparison.challenger.gguf_sha256,
            "champion_id": current.model.id if current.model else None,
            "champion_sha256": comparison.champion.gguf_sha256,
            "benchmark_sha256": comparison.benchmark_sha256,
            "decision": verdict.decision,
            "reason": verdict.reason,
            "watermark": gguf.manifest.watermark,
        }
        return publish(folder, ReportManifest, fields)


def comparison_settings(loop: LoopSettings) -> dict[str, Any]:
    """Return the settings for which a comparison is valid; other settings need another comparison."""
    irrelevant = {"parallel", "price_per_hour", "sealed_benchmark", "sealed_every"}
    return {
        "evaluation": loop.evaluation.model_dump(exclude=irrelevant),
        "gate": loop.gate.model_dump(),
        "system_prompt": loop.system_prompt,
        "constrain": loop.constrain,
    }


def settings_hash(loop: LoopSettings) -> str:
    """Return the hash of `comparison_settings`, the benchmark, schema and rules, and the base model."""
    base = base_hash(resolve_base_model(loop.base_model))  # serves, and is compared with, if there is no champion
    return hash_of({**comparison_settings(loop), **loop_files.judging_files(loop), "base_model": base})


def trained_contents(loop: str, adapter_version: str) -> Iterator[str]:
    """Yield the content hashes of the examples that an adapter was trained and validated on, before redaction.

    The files are checked at the call and read while the caller iterates.

    Raises:
        ArtifactError: the adapter or its dataset is missing, or was edited.
    """
    adapter = read(AdapterManifest, stage_folder(loop, AdapterManifest.stage) / adapter_version)
    check_unaltered(adapter)
    dataset = dataset_of(loop, adapter.manifest.inputs[DatasetManifest.stage])
    columns = ["content_hash", "source"]
    return (
        row["content_hash"]
        for split in SPLITS
        for row in read_split(dataset.path, PROMPT_COMPLETION, split, columns)
        if row["source"] != REPLAY
    )
