"""Collect what a report says about the compared models beside their answers: use, training, data, versions, hashes."""

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.artifacts import ArtifactError, find, stage_folder
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.comparison import Comparison, Role
from finetune_pipeline.evaluation.metric_table import MetricRow, Unit, format_metric
from finetune_pipeline.evaluation.report import JSON, ReportError, score_of_report
from finetune_pipeline.evaluation.report_facts import (
    ReportedData,
    ReportFacts,
    TrainingCurve,
    Trend,
    TrendPoint,
    convergence_step,
    gain_per_100_examples,
)
from finetune_pipeline.feedback.statistics import UseStatistics, use_statistics
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.registry.champion import BASE
from finetune_pipeline.registry.model_versions import CandidateModel, list_models
from finetune_pipeline.training.job import RESULT, TrainingResult

USE_METRICS: tuple[tuple[str, str, bool | None, Unit], ...] = (
    ("answers", "answers in use", None, ""),
    ("win_rate", "win rate", True, "%"),
    ("won", "won", None, ""),
    ("lost", "lost", None, ""),
    ("tied", "tied", None, ""),
    ("gold_rate", "gold stars", True, "%"),
    ("average_rating", "average rating", True, "stars"),
    ("rating_deviation", "consistency", False, "stars"),
    ("average_reward", "live reward", True, "reward"),
)
"""Attribute of UseStatistics, name, whether higher is better (None for counts), unit."""


@dataclass(frozen=True)
class Subject:
    """A compared model as the registry knows it.

    Attributes:
        served_as: the name in the interactions that it answered, `loop@v1.2.0` or `loop@base`; None if it never served.
        adapter: version of its adapter; None if it has none, or if it is unknown.
    """

    served_as: str | None = None
    adapter: str | None = None


def subject_of(model: CandidateModel) -> Subject:
    """Return what is known of a model version or challenger."""
    return Subject(served_as=model.name, adapter=model.lineage.get(AdapterManifest.stage))


def collect_facts(
    loop: str,
    database: Database,
    comparison: Comparison,
    subjects: Mapping[Role, Subject],
    hashes: Mapping[str, str],
    scored_by: str,
    sealed: str = "",
) -> ReportFacts:
    """Return what is known of the compared models; what was deleted or never measured is left out or None.

    Args:
        scored_by: hash of what decides a score, see `trend`.
        sealed: what is known of the sealed benchmark.
    """
    roles: tuple[Role, ...] = ("challenger", "champion")
    trained = [role for role in roles if subjects[role].adapter]
    names = {role: model.name for role, model in comparison.models.items()}
    curves = {role: _curve(loop, names[role], subjects[role].adapter) for role in trained}
    data = [_data(loop, names[role], subjects[role].adapter) for role in trained]
    return ReportFacts(
        use=_use(loop, database, comparison, subjects),
        training=_training(loop, comparison, subjects, curves) if trained else (),
        curves=[curve for curve in curves.values() if curve],
        data=[one for one in data if one],
        trend=trend(loop, database, comparison, scored_by),
        sealed=sealed,
        hashes=hashes,
    )


def trend(loop: str, database: Database, comparison: Comparison, scored_by: str) -> Trend:
    """Return the score of each promoted version on the benchmark of a comparison, by its metric.

    The score is that in the report of the version's promotion, so no version answers again. Scores on another version
    of the benchmark, by another metric or with other options of it are not comparable and are left out. A judge scores
    a version against the champion of its time, so by a judge there is no trend.

    Args:
        loop: name of the loop.
        database: with the versions.
        comparison: of the report.
        scored_by: hash of what decides a score in the comparison.
    """
    if comparison.metric.key in {one.key for one in comparison.judgements}:
        return Trend()
    points, left_out, gap = [], [], False
    for model in reversed(list_models(database, loop)):
        try:
            found = score_of_report(model.report_path.with_name(JSON))
        except ReportError:
            found = None
        if found and found.scored_by == scored_by:
            points.append(TrendPoint(model.version, found.score, model.created_at, gap))
            gap = False
        else:
            left_out.append(model.version)
            gap = bool(points)
    return Trend(tuple(points), tuple(left_out))


def use_of(connection: sa.Connection, loop: str, model: str) -> dict[str, str]:
    """Return what was said about one model's answers in use, by display name; empty if it answered nothing."""
    found = use_statistics(connection, loop, model)
    values = {name: (getattr(found, key), unit) for key, name, _, unit in USE_METRICS}
    shown = {
        name: "not measured" if value is None else format_metric(value, unit) for name, (value, unit) in values.items()
    }
    return shown if found.answers else {}


def convergence_of(loop: str, adapter: str) -> int | None:
    """Return the step at which the training of an adapter converged; None if that is not known."""
    curve = _curve(loop, "", adapter)
    return _convergence(curve) if curve else None


def _use(
    loop: str, database: Database, comparison: Comparison, subjects: Mapping[Role, Subject]
) -> tuple[MetricRow, ...]:
    with database.read() as connection:
        found: dict[Role, UseStatistics] = {
            role: use_statistics(connection, loop, name)
            for role in comparison.models
            if (name := subjects[role].served_as)
        }
    if not any(one.answers for one in found.values()):
        return ()

    def value(role: Role, key: str) -> float | None:
        return getattr(found[role], key) if role in found and found[role].answers else None

    return tuple(
        MetricRow(key, name, value("champion", key), value("challenger", key), higher, unit, value("base", key))
        for key, name, higher, unit in USE_METRICS
    )


def _training(
    loop: str,
    comparison: Comparison,
    subjects: Mapping[Role, Subject],
    curves: Mapping[Role, TrainingCurve | None],
) -> tuple[MetricRow, ...]:
    manifests = {role: _manifest(loop, subject.adapter) for role, subject in subjects.items()}

    def values(role: Role) -> dict[str, float | None]:
        manifest, curve = manifests.get(role), curves.get(role)
        return {
            "examples": manifest.examples if manifest else None,
            "steps": manifest.steps if manifest else None,
            "convergence": _convergence(curve) if curve else None,
            "efficiency": _efficiency(loop, role, manifest, comparison, subjects) if manifest else None,
        }

    champion, challenger = values("champion"), values("challenger")
    columns: list[tuple[str, str, bool | None, Unit]] = [
        ("examples", "training examples", None, ""),
        ("steps", "steps", None, "steps"),
        ("convergence", "convergence", None, "steps"),
        ("efficiency", "sample efficiency", True, "points per 100 examples"),
    ]
    return tuple(
        MetricRow(key, name, champion[key], challenger[key], higher, unit) for key, name, higher, unit in columns
    )


def _efficiency(
    loop: str, role: Role, manifest: AdapterManifest, comparison: Comparison, subjects: Mapping[Role, Subject]
) -> float | None:
    """Return the gain per 100 examples over the model that a training started from, if that model was compared too."""
    totals = {one: model.totals for one, model in comparison.models.items() if model.totals.total}
    scores = {one: found.correct / found.total for one, found in totals.items()}  # none of a model that is not judged
    initial = manifest.inputs.get("initial_adapter")
    if initial is None:
        examples = manifest.examples
        before = [one for one in scores if subjects[one].served_as == f"{loop}@{BASE}"]
    else:
        examples = manifest.new_examples
        before = [one for one in scores if subjects[one].adapter == initial]
    return gain_per_100_examples(scores[role], scores[before[0]], examples) if before else None


def _convergence(curve: TrainingCurve) -> int | None:
    """Return the step of convergence by the validation losses, or by the training losses if there are too few."""
    return convergence_step(curve.validation if len(curve.validation) > 2 else curve.training)


def _curve(loop: str, name: str, adapter: str | None) -> TrainingCurve | None:
    """Return the losses of the training that made an adapter; None if its files were deleted."""
    path = stage_folder(loop, AdapterManifest.stage) / (adapter or "") / RESULT
    try:
        result = TrainingResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    measured = {
        0: result.loss_before,
        **{point.step: point.loss for point in result.validation},
        result.best_step: result.loss_after,
    }
    return TrainingCurve(
        name,
        tuple((point.step, point.loss) for point in result.curve),
        tuple(sorted(measured.items())),
        result.best_step,
    )


def _data(loop: str, name: str, adapter: str | None) -> ReportedData | None:
    manifest = _manifest(loop, adapter)
    version = manifest.inputs.get(DatasetManifest.stage) if manifest else None
    try:
        found = find(DatasetManifest, loop, version) if version else None
    except ArtifactError:  # damaged
        found = None
    if found is None:
        return None
    dataset = found.manifest
    return ReportedData(
        name=name,
        train=dataset.train,
        validation=dataset.validation,
        replayed=dataset.replayed,
        corrections=dataset.preference_pairs,
        sources=dataset.sources,
        left_out=dataset.left_out,
        redacted=sum(dataset.redacted.values()),
        watermark=dataset.watermark,
    )


def _manifest(loop: str, adapter: str | None) -> AdapterManifest | None:
    try:
        found = find(AdapterManifest, loop, adapter) if adapter else None
    except ArtifactError:  # damaged
        return None
    return found.manifest if found else None
