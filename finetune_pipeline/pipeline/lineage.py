"""Lineage: what a model version was made from, and what was made from an interaction.

model version -> eval_report
              -> lora_adapter -> curated_dataset -> raw_logs

The manifests of the artifacts hold the chain. The registry's table of training jobs holds the step from an adapter to
its dataset too, so lineage outlives a deleted adapter.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune_pipeline.artifacts import MANIFEST, ArtifactError, find, stage_folder
from finetune_pipeline.curation.dataset_files import read_all
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.report import JSON, ReportError, metrics_of_report
from finetune_pipeline.export.base import hub_id
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    Manifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.pipeline.report_facts import convergence_of, use_of
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.model_card import ModelCard, render_model_card
from finetune_pipeline.registry.model_versions import ModelVersion, list_models
from finetune_pipeline.registry.trainings import Training, find_training
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings

M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class MadeWith:
    """Artifacts and models that hold, or were trained on, some interactions.

    A warm-started adapter was trained on its own dataset and on those of the adapter that it started from.

    Attributes:
        snapshots: folders of raw_logs artifacts that hold one of the interactions.
        datasets: folders of curated_dataset artifacts with an example of one of them, in either split.
        models: names (`loop@v1.2.0`) of the versions that were trained on such a dataset, deleted ones included.
        weights: folders of lora_adapter and gguf_model artifacts that were trained on such a dataset, promoted or not.
    """

    snapshots: tuple[Path, ...] = ()
    datasets: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[Path, ...] = ()


def made_with(database: Database, loop: LoopSettings, ids: Collection[str]) -> MadeWith:
    """Return the artifacts and models of a loop that hold, or were trained on, any of these interactions.

    Drafts are not searched. The content of a deleted dataset is unknown, so models and weights that were trained only
    on deleted datasets are not found.

    Args:
        ids: interaction ids, as text.

    Raises:
        ArtifactError: a snapshot or a dataset cannot be read; an incomplete answer would be wrong.
    """
    wanted = set(ids)
    if not wanted:
        return MadeWith()
    snapshots = tuple(path for path in _complete(loop.name, RawLogsManifest) if _snapshot_holds(path, wanted))
    datasets = tuple(path for path in _complete(loop.name, DatasetManifest) if _dataset_holds(path, wanted))
    versions = {path.name for path in datasets}

    def trained_on_them(adapter: str | None) -> bool:
        return bool(versions & _datasets_of(database, loop.name, adapter))

    models = [m.name for m in list_models(database, loop.name) if trained_on_them(m.lineage.get(AdapterManifest.stage))]
    weights = [path for path in _complete(loop.name, AdapterManifest) if trained_on_them(path.name)]
    weights += [p for p in _complete(loop.name, GgufManifest) if trained_on_them(_inputs(p).get(AdapterManifest.stage))]
    return MadeWith(snapshots, datasets, tuple(models), tuple(weights))


@dataclass(frozen=True)
class Lineage:
    """What one model version was made from. A manifest is None if its artifact was deleted or is damaged.

    Attributes:
        base_model: folder of the base model.
        adapter: version of the adapter.
        dataset: version of the dataset; None if neither the adapter nor its training job names it.
        events: the ingest offsets that the snapshot covers, "1..480".
        watermark: the last ingest offset that the training used.
    """

    base_model: str | None
    base_hash: str
    adapter: str | None
    dataset: str | None
    events: str | None
    watermark: int | None
    adapter_manifest: AdapterManifest | None
    dataset_manifest: DatasetManifest | None
    report_manifest: ReportManifest | None
    training: Training | None


def lineage(database: Database, model: ModelVersion) -> Lineage:
    """Return what a model version was made from; what was deleted since is None."""
    known = model.lineage
    adapter = known.get(AdapterManifest.stage)
    training = find_training(database, model.loop, adapter) if adapter else None
    dataset_version = _origin_of(model.loop, adapter, training)[0] if adapter else None
    dataset = _manifest(DatasetManifest, model.loop, dataset_version)
    logs = _manifest(RawLogsManifest, model.loop, dataset.inputs.get(RawLogsManifest.stage) if dataset else None)
    return Lineage(
        base_model=known.get("base_model"),
        base_hash=model.base_hash,
        adapter=adapter,
        dataset=dataset_version,
        events=logs.inputs.get("events") if logs else None,
        watermark=known.get("watermark"),
        adapter_manifest=_manifest(AdapterManifest, model.loop, adapter),
        dataset_manifest=dataset,
        report_manifest=_manifest(ReportManifest, model.loop, known.get(ReportManifest.stage)),
        training=training,
    )


def card(database: Database, loop: LoopSettings, model: ModelVersion) -> str:
    """Return the model card of a version in Markdown, without the sections whose artifacts were deleted."""
    made_from = lineage(database, model)
    dataset, training, report = made_from.dataset_manifest, made_from.training, made_from.report_manifest
    data_metrics: dict[str, Any] = {}
    if dataset:
        data_metrics = {
            "train": dataset.train,
            "validation": dataset.validation,
            "replayed": dataset.replayed,
            "left out": sum(dataset.left_out.values()),
            "redacted": sum(dataset.redacted.values()),
            "left out as near-duplicates of the benchmark": len(dataset.near_benchmark),
        }
    training_metrics: dict[str, Any] = {}
    if training:
        converged = convergence_of(model.loop, training.id)
        training_metrics = {
            "method": f"{training.method}, {training.mode}",
            "examples": training.examples,
            "steps": training.steps,
            "convergence": f"step {converged}" if converged is not None else "not measured",
            "validation loss": f"{training.loss_before:.3f} before, {training.loss_after:.3f} after",
            "speed": f"{training.tokens_per_second:,.0f} tokens/s",
            "time": f"{training.wall_seconds:.0f} s on {training.device}",
            "peak memory": f"{training.peak_memory_bytes / 1e6:,.0f} MB",
            "Dagster run": training.run_id,
        }
    with database.read() as connection:
        use = use_of(connection, model.loop, model.name)
    return render_model_card(
        ModelCard(
            name=model.name,
            loop=loop.name,
            description=loop.description,
            created_at=model.created_at,
            mode=model.mode,
            mode_reason=made_from.adapter_manifest.mode_reason if made_from.adapter_manifest else "",
            base_model=_base_name(made_from.base_model) if made_from.base_model else loop.base_model,
            base_hash=model.base_hash,
            files={path.name: sha256 for path, sha256 in model.files.items()},
            adapter=made_from.adapter,
            dataset=made_from.dataset,
            data=data_metrics,
            events=made_from.events,
            watermark=made_from.watermark,
            training=training_metrics,
            use=use,
            scores={key: value for key, value in model.scores.items() if isinstance(value, int | float)},
            metrics=_card_metrics(model.loop, report) if report else (),
            benchmark_sha256=report.benchmark_sha256 if report else None,
            verdict=_verdict(database, model),
        )
    )


def _base_name(folder: str) -> str:
    """Return the Hugging Face id of a downloaded base model, or the folder, relative to the project if inside."""
    path = Path(folder)
    if found := hub_id(path):
        return found
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else folder


def _verdict(database: Database, model: ModelVersion) -> str:
    """Return the gate's reason, and who deployed the version against it, if somebody did."""
    report = model.lineage.get(ReportManifest.stage)
    comparison = find_comparison(database, model.loop, report) if report else None
    reason = comparison.reason.replace("\n", "; ") if comparison else ""
    deployment = next((one for one in list_deployments(database, model.loop) if one.model_id == model.id), None)
    if deployment is None or deployment.action == "promote":
        return reason or (deployment.reason if deployment else "")
    by_hand = f"{deployment.action} by {deployment.actor}: {deployment.reason}"
    return f"{reason}; {by_hand}" if reason else by_hand


def _card_metrics(loop: str, report: ReportManifest) -> tuple[tuple[str, str, str], ...]:
    path = stage_folder(loop, report.stage) / report.version / JSON
    try:
        rows = metrics_of_report(path).rows
    except ReportError:  # another version of this project wrote it
        return ()
    return tuple((row.name, *row.cells[1:3]) for row in rows)


def _manifest(kind: type[M], loop: str, version: str | None) -> M | None:
    try:
        found = find(kind, loop, version) if version else None
    except ArtifactError:  # damaged
        return None
    return found.manifest if found else None


def _datasets_of(database: Database, loop: str, adapter: str | None) -> set[str]:
    """Return the datasets that an adapter was trained on, those of the adapters that it started from included."""
    datasets: dict[str, str | None] = {}
    while adapter is not None and adapter not in datasets:
        datasets[adapter], adapter = _origin_of(loop, adapter, find_training(database, loop, adapter))
    return {dataset for dataset in datasets.values() if dataset is not None}


def _origin_of(loop: str, adapter: str, training: Training | None) -> tuple[str | None, str | None]:
    """Return the dataset that an adapter was trained on and the adapter that it started from.

    They are read from the adapter's manifest, or from its training job if the adapter was deleted.
    """
    inputs = _inputs(stage_folder(loop, AdapterManifest.stage) / adapter)
    if not inputs and training is not None:
        return training.dataset, training.initial_adapter
    return inputs.get(DatasetManifest.stage), inputs.get("initial_adapter")


def _inputs(folder: Path) -> dict[str, str]:
    """Return the inputs in a manifest, of whatever version of the project; none if there is no manifest."""
    try:
        inputs: dict[str, str] = json.loads((folder / MANIFEST).read_bytes()).get("inputs", {})
    except (OSError, ValueError):
        return {}
    return inputs


def _complete(loop: str, kind: type[Manifest]) -> list[Path]:
    """Return the folders of a stage's complete artifacts, also of those that an older version of the project wrote."""
    return [path.parent for path in sorted(stage_folder(loop, kind.stage).glob(f"[!.]*/{MANIFEST}"))]


def _snapshot_holds(folder: Path, ids: set[str]) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pa.array(sorted(ids))
    for path in sorted(folder.rglob("*.parquet")):
        try:
            for batch in pq.ParquetFile(path).iter_batches(columns=["interaction_id"]):
                if pc.any(pc.is_in(batch.column(0), value_set=wanted)).as_py():
                    return True
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise ArtifactError(f"{path} cannot be read ({error}); delete {folder} and try again") from error
    return False


def _dataset_holds(folder: Path, ids: set[str]) -> bool:
    try:
        return any(row["interaction_id"] in ids for row in read_all(folder, ["interaction_id"]))
    except (OSError, ValueError, CurationError) as error:  # Arrow's errors are ValueErrors
        raise ArtifactError(f"{folder} cannot be read ({error}); delete it and try again") from error
