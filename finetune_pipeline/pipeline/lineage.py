"""From what a model was made, and what was made from an interaction. Walks the manifests; knows nothing of Dagster.

model version -> report
              -> adapter -> dataset -> logs          training run (a row, which outlives the adapter)
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune_pipeline.artifacts import MANIFEST, ArtifactError, find, stage_folder
from finetune_pipeline.curation.dataset_files import read_all
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.report import JSON, ReportError, metrics_of_report
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    Manifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.model_card import Card, CardMetric, model_card
from finetune_pipeline.registry.model_versions import ModelVersion, list_models
from finetune_pipeline.registry.training_jobs import TrainingJob, find_training_job
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings

M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class MadeWith:
    """What holds, or was made with, some interactions.

    Attributes:
        snapshots: folders of raw_logs artifacts that hold one of them, each with one or more Parquet files.
        datasets: folders of curated_dataset artifacts with a row of one of them, to train on or to validate with.
        models: names (`loop@v1.2.0`) of the versions that learnt from such a dataset, also of deleted ones.
        weights: folders of lora_adapter and gguf_model artifacts that learnt from such a dataset, promoted or not.

    An adapter learnt from its own dataset and, if it was trained on top of another adapter, from all that this one did.
    """

    snapshots: tuple[Path, ...] = ()
    datasets: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[Path, ...] = ()


def made_with(database: Database, loop: LoopSettings, ids: Collection[str]) -> MadeWith:
    """Which artifacts and models of a loop hold, or were made with, any of these interactions.

    Drafts are not looked into. Of a dataset that was deleted nobody knows what it held, so its models and
    weights are not named.

    Args:
        ids: interaction ids, as text.

    Raises:
        ArtifactError: a snapshot or a dataset cannot be read; nothing is said rather than half of it.
    """
    wanted = set(ids)
    if not wanted:
        return MadeWith()
    snapshots = tuple(path for path in _complete(loop.name, RawLogsManifest) if _snapshot_holds(path, wanted))
    datasets = tuple(path for path in _complete(loop.name, DatasetManifest) if _dataset_holds(path, wanted))
    versions = {path.name for path in datasets}
    names = tuple(
        model.name
        for model in list_models(database, loop.name)
        if versions & _learnt_from(database, loop.name, model.lineage.get("lora_adapter"))
    )
    return MadeWith(snapshots, datasets, names, tuple(_weights(database, loop.name, versions)))


@dataclass(frozen=True)
class Lineage:
    """From what one model version was made. A manifest is None where its artifact is gone or damaged.

    Attributes:
        base_model: folder of the base model.
        adapter: version of the adapter.
        dataset: version of the dataset; None if neither the adapter nor the training's row knows it.
        events: the ingest sequences that the logs cover, "1..480".
        watermark: the last of them that the training saw.
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
    training: TrainingJob | None


def lineage(database: Database, model: ModelVersion) -> Lineage:
    """Walk back from a model version. What was deleted since is None, never an error."""
    known = model.lineage
    version = known.get("lora_adapter")
    adapter = _manifest(AdapterManifest, model.loop, version)
    training = find_training_job(database, model.loop, version) if version else None
    dataset_version, _ = _made_from(model.loop, version, training) if version else (None, None)
    dataset = _manifest(DatasetManifest, model.loop, dataset_version)
    logs = _manifest(RawLogsManifest, model.loop, dataset.inputs.get("raw_logs") if dataset else None)
    return Lineage(
        base_model=known.get("base_model"),
        base_hash=model.base_hash,
        adapter=version,
        dataset=dataset_version,
        events=logs.inputs.get("events") if logs else None,
        watermark=known.get("watermark"),
        adapter_manifest=adapter,
        dataset_manifest=dataset,
        report_manifest=_manifest(ReportManifest, model.loop, known.get("eval_report")),
        training=training,
    )


def card(database: Database, loop: LoopSettings, model: ModelVersion) -> str:
    """The model card of a version, in Markdown; parts whose artifacts are gone are left out."""
    made_from = lineage(database, model)
    dataset, training, report = made_from.dataset_manifest, made_from.training, made_from.report_manifest
    return model_card(
        Card(
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
            data=_data_figures(dataset) if dataset else {},
            events=made_from.events,
            watermark=made_from.watermark,
            training=_training_figures(training) if training else {},
            scores={key: value for key, value in model.scores.items() if isinstance(value, int | float)},
            metrics=_report_rows(model.loop, report) if report else (),
            benchmark_sha256=report.benchmark_sha256 if report else None,
            verdict=_verdict(database, model),
        )
    )


def _base_name(folder: str) -> str:
    """A base model as others know it: its Hugging Face id, or its path within the project."""
    path = Path(folder)
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    if cached:
        return cached.removeprefix("models--").replace("--", "/")
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else folder


def _verdict(database: Database, model: ModelVersion) -> str:
    """The gate's sentence, and who passed it over if somebody did."""
    report = model.lineage.get("eval_report")
    comparison = find_comparison(database, model.loop, report) if report else None
    said = comparison.reason if comparison else ""
    came = next((one for one in list_deployments(database, model.loop) if one.model_id == model.id), None)
    if came is None or came.action == "promote":
        return said or (came.reason if came else "")
    return "; ".join([*([said] if said else []), f"{came.action} by {came.actor}: {came.reason}"])


def _data_figures(manifest: DatasetManifest) -> dict[str, Any]:
    return {
        "train": manifest.train,
        "validation": manifest.validation,
        "replayed": manifest.replayed,
        "left out": sum(manifest.left_out.values()),
        "redacted": sum(manifest.redacted.values()),
        "near a benchmark question, taken out": len(manifest.near_benchmark),
    }


def _training_figures(training: TrainingJob) -> dict[str, Any]:
    return {
        "method": f"{training.method}, {training.mode}",
        "examples": training.examples,
        "steps": training.steps,
        "validation loss": f"{training.loss_before:.3f} before, {training.loss_after:.3f} after",
        "speed": f"{training.tokens_per_second:,.0f} tokens/s",
        "time": f"{training.wall_seconds:.0f} s on {training.device}",
        "peak memory": f"{training.peak_memory_bytes / 1e6:,.0f} MB",
        "Dagster run": training.run_id,
    }


def _report_rows(loop: str, report: ReportManifest) -> tuple[CardMetric, ...]:
    path = stage_folder(loop, report.stage) / report.version / JSON
    try:
        rows = metrics_of_report(path).rows
    except ReportError:  # another version of this project wrote it
        return ()
    return tuple(CardMetric(row.name, row.cells[0], row.cells[1]) for row in rows)


def _manifest(kind: type[M], loop: str, version: str | None) -> M | None:
    try:
        found = find(kind, loop, version) if version else None
    except ArtifactError:  # damaged: as good as gone
        return None
    return found.manifest if found else None


def _weights(database: Database, loop: str, datasets: set[str]) -> Iterator[Path]:
    """Folders of the adapters and model files that learnt from one of these datasets."""

    def trained(adapter: str | None) -> bool:
        return bool(datasets & _learnt_from(database, loop, adapter))

    yield from (path for path in _complete(loop, AdapterManifest) if trained(path.name))
    yield from (path for path in _complete(loop, GgufManifest) if trained(_inputs(path).get("lora_adapter")))


def _learnt_from(database: Database, loop: str, adapter: str | None) -> set[str]:
    """The datasets that an adapter was trained on, and those of the adapters that it was trained on top of."""
    datasets: dict[str, str | None] = {}
    while adapter is not None and adapter not in datasets:
        datasets[adapter], adapter = _made_from(loop, adapter, find_training_job(database, loop, adapter))
    return {dataset for dataset in datasets.values() if dataset is not None}


def _made_from(loop: str, adapter: str, training: TrainingJob | None) -> tuple[str | None, str | None]:
    """The dataset that an adapter was trained on, and the adapter that it was trained on top of.

    By its manifest, or by the training's row where that is gone.
    """
    inputs = _inputs(stage_folder(loop, AdapterManifest.stage) / adapter)
    if not inputs and training is not None:
        return training.dataset, training.initial_adapter
    return inputs.get("curated_dataset"), inputs.get("initial_adapter")


def _inputs(folder: Path) -> dict[str, str]:
    """What an artifact was made from, whichever version of the project wrote it; nothing where its manifest is gone."""
    try:
        inputs: dict[str, str] = json.loads((folder / MANIFEST).read_bytes()).get("inputs", {})
    except (OSError, ValueError):
        return {}
    return inputs


def _complete(loop: str, kind: type[Manifest]) -> Iterator[Path]:
    """Folders of the complete artifacts of a stage, also of those that an older version of the project wrote."""
    for path in sorted(stage_folder(loop, kind.stage).glob(f"[!.]*/{MANIFEST}")):
        yield path.parent


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
            raise ArtifactError(f"{path} cannot be read ({error}); delete {folder} and ask again") from error
    return False


def _dataset_holds(folder: Path, ids: set[str]) -> bool:
    try:
        return any(row["interaction_id"] in ids for row in read_all(folder, ["interaction_id"]))
    except (OSError, ValueError, CurationError) as error:  # Arrow's errors are ValueErrors
        raise ArtifactError(f"{folder} cannot be read ({error}); delete it and ask again") from error
