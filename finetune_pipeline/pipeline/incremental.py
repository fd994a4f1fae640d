"""Decide where training starts: at the base model with all examples, or at the champion's adapter with new ones."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, ArtifactError, find_unaltered, hash_of
from finetune_pipeline.curation.dataset_files import COLUMNS, PROMPT_COMPLETION, UNPAIRED_PREFERENCE, read_split
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest
from finetune_pipeline.pipeline.required_checks import near_benchmark
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.settings import LoopSettings, TrainingSettings
from finetune_pipeline.training.warm_start import obstacle_to_warm_start, select_examples, with_both_labels

_ANSWER_COLUMNS = ("completion", "label", "chosen", "rejected")


@dataclass(frozen=True)
class TrainingStart:
    """Where training starts, and with which examples.

    Attributes:
        adapter: the champion's adapter; None for the base model.
        rows: indices of the examples to train on; None for all.
        new: how many of them the champion was not trained on. Replay examples are never new.
        reason: why, for people.
    """

    adapter: Artifact[AdapterManifest] | None
    rows: tuple[int, ...] | None
    new: int
    reason: str

    @property
    def mode(self) -> str:
        """The mode in the manifest, which decides the version number."""
        return "full" if self.adapter is None else "incremental"


def training_start(
    loop: LoopSettings, settings: TrainingSettings, dataset: Artifact[DatasetManifest], dataset_type: str, base: str
) -> TrainingStart:
    """Return where training starts. Incremental training that is not possible becomes full training, with a reason.

    Only hashes and labels of the examples are held in memory.

    Args:
        base: hash of the base model.
    """
    if settings.mode == "full":
        return _full("from the base model on all examples")
    serving = champion(connect(), loop.name)
    if serving is None:
        return _full("there is no champion whose adapter it could start from")
    adapter = _find(AdapterManifest, loop.name, serving.lineage.get(AdapterManifest.stage))
    if adapter is None:
        return _full(
            f"the adapter of {serving.name} was deleted or edited, or an earlier version of this project created it"
        )
    problem = obstacle_to_warm_start(
        settings.model_dump(mode="json"), base, adapter.manifest.settings, adapter.manifest.base_hash
    )
    if problem:
        return _full(f"it cannot start from the adapter of {serving.name}: {problem}")
    earlier = _find(DatasetManifest, loop.name, adapter.manifest.inputs.get(DatasetManifest.stage))
    if earlier is None:
        return _full(f"the dataset of {serving.name} was deleted or edited, so it is unknown which examples are new")
    try:
        problem = near_benchmark(loop, adapter.manifest.datasets)
    except ArtifactError:
        problem = "a dataset that it was trained on is missing, so it cannot be compared with the benchmark"
    if problem:
        return _full(f"it cannot start from the adapter of {serving.name}: {problem}")

    known = {text_hash for text_hash, _ in _training_examples(earlier, dataset_type)}
    examples = list(_training_examples(dataset, dataset_type))
    hashes = [text_hash for text_hash, _ in examples]
    if dataset_type == PROMPT_COMPLETION:
        known |= set(hashes[len(hashes) - dataset.manifest.replayed :])  # replay examples are last, and never new
    seed = str(settings.seed)
    rows = select_examples(hashes, known, settings.incremental_replay_ratio, seed)
    if not rows:
        return _full(f"no example is new since {serving.name} was trained")
    if dataset_type == UNPAIRED_PREFERENCE:
        labels = [bool(label) for _, label in examples]
        rows = with_both_labels(rows, hashes, labels, known, seed)
        if len({labels[row] for row in rows}) == 1:
            kind = "desirable" if labels[rows[0]] else "undesirable"
            return _full(f"all new examples are {kind}, and kto needs both kinds")
    new = sum(hashes[row] not in known for row in rows)
    reason = f"warm-started from {serving.name}: {new} new examples, {len(rows) - new} older ones as replay"
    return TrainingStart(adapter, tuple(rows), new, reason)


def write_subset(dataset: Path, rows: tuple[int, ...], folder: Path) -> Path:
    """Write a dataset type with only these training rows and the whole validation split; return its folder."""
    import datasets

    # The files are copied, because `datasets` cannot save an empty split that it read. Hidden files are caches of the
    # tokens of all rows.
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("train", ".*"), dirs_exist_ok=True)
    shutil.rmtree(folder / "train", ignore_errors=True)  # left by a killed training run
    datasets.load_from_disk(str(dataset / "train")).select(rows).save_to_disk(folder / "train", num_shards=1)
    return folder


def _full(reason: str) -> TrainingStart:
    return TrainingStart(adapter=None, rows=None, new=0, reason=reason)


def _find(kind: Any, loop: str, version: str | None) -> Any:
    try:
        return find_unaltered(kind, loop, version) if version else None
    except ArtifactError:  # damaged
        return None


def _training_examples(dataset: Artifact[DatasetManifest], dataset_type: str) -> Iterator[tuple[str, bool | None]]:
    """Yield the hash of each training example's text, and its label; only one batch is in memory at a time."""
    columns = [name for name in ("prompt", "history", *_ANSWER_COLUMNS) if name in COLUMNS[dataset_type]]
    for row in read_split(dataset.path, dataset_type, "train", columns):
        yield hash_of([row["prompt"], row["history"], *(row.get(name) for name in _ANSWER_COLUMNS)]), row.get("label")
