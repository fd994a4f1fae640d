"""What a training starts from: the base model and everything, or the champion's adapter and what is new."""

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

_ANSWERS = ("completion", "label", "chosen", "rejected")


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        adapter: of the champion, that is gone on from; None is the base model.
        rows: which rows of what the method trains on are taken; None is all.
        new: how many of them the champion was not trained on; what is replayed from outside the loop is never new.
        reason: why it is so, for people.
    """

    adapter: Artifact[AdapterManifest] | None
    rows: tuple[int, ...] | None
    new: int
    reason: str

    @property
    def mode(self) -> str:
        """As the manifest and the version number have it."""
        return "full" if self.adapter is None else "incremental"


def start(
    loop: LoopSettings, settings: TrainingSettings, dataset: Artifact[DatasetManifest], part: str, base: str
) -> Start:
    """Decide where a training starts. An incremental one that cannot be is a full one, and says why.

    Args:
        part: folder of the dataset that the method trains on.
        base: hash of the base model.
    """
    if settings.mode == "full":
        return _full("from the base model on everything")
    serving = champion(connect(), loop.name)
    if serving is None:
        return _full("no champion serves whose adapter could be gone on with")
    adapter = _found(AdapterManifest, loop.name, serving.lineage.get("lora_adapter"))
    if adapter is None:
        return _full(
            f"the adapter of {serving.name} is not there any more, or an earlier version of this project made it"
        )
    problem = obstacle_to_warm_start(
        settings.model_dump(mode="json"), base, adapter.manifest.settings, adapter.manifest.base_hash
    )
    if problem:
        return _full(f"the adapter of {serving.name} cannot be gone on with: {problem}")
    learnt = _found(DatasetManifest, loop.name, adapter.manifest.inputs.get("curated_dataset"))
    if learnt is None:
        return _full(f"the dataset of {serving.name} is not there any more, so nobody knows what is new")
    problem = _near_benchmark(loop, adapter)
    if problem:
        return _full(f"the adapter of {serving.name} cannot be gone on with: {problem}")
    known = {hash for hash, _ in _examples(learnt, part)}
    hashes: list[str] = []
    labels: list[bool] | None = [] if part == UNPAIRED_PREFERENCE else None
    for hash, label in _examples(dataset, part):
        hashes.append(hash)
        if labels is not None:
            labels.append(bool(label))
    if part == PROMPT_COMPLETION:
        known |= set(hashes[len(hashes) - dataset.manifest.replayed :])  # replay is at the end, and never new
    return _on_top(serving.name, adapter, known, hashes, labels, settings)


def write_subset(dataset: Path, rows: tuple[int, ...], folder: Path) -> Path:
    """Write a part of a dataset with only these rows to train on, and its validation split; returns its folder."""
    import datasets

    # As files: an empty split cannot be read and saved again. The tokens of all rows are none of these rows'.
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("train", ".*"), dirs_exist_ok=True)
    shutil.rmtree(folder / "train", ignore_errors=True)  # of a training that was killed
    datasets.load_from_disk(str(dataset / "train")).select(rows).save_to_disk(folder / "train", num_shards=1)
    return folder


def _on_top(
    name: str,
    adapter: Artifact[AdapterManifest],
    known: set[str],
    hashes: list[str],
    labels: list[bool] | None,
    settings: TrainingSettings,
) -> Start:
    rows = select_examples(hashes, known, settings.replay_ratio, str(settings.seed))
    if not rows:
        return _full(f"nothing is new since {name} was trained")
    if labels is not None:
        rows = with_both_labels(rows, hashes, labels, known, str(settings.seed))
        if len({labels[row] for row in rows}) == 1:
            return _full(f"what is new is all {'good' if labels[rows[0]] else 'bad'}, and kto needs both")
    new = sum(hashes[row] not in known for row in rows)
    reason = f"on top of {name}: {new} new examples, {len(rows) - new} older ones replayed"
    return Start(adapter, tuple(rows), new, reason)


def _full(reason: str) -> Start:
    return Start(None, None, 0, reason)


def _near_benchmark(loop: LoopSettings, adapter: Artifact[AdapterManifest]) -> str | None:
    """Return why an adapter may have been trained on the current benchmark's questions; None if it was not."""
    try:
        return near_benchmark(loop, adapter.manifest.datasets)
    except ArtifactError:
        return "a dataset that it was trained on is missing, so it cannot be compared with the benchmark"


def _found(kind: Any, loop: str, version: str | None) -> Any:
    try:
        return find_unaltered(kind, loop, version) if version else None
    except ArtifactError:  # damaged: as good as gone
        return None


def _examples(dataset: Artifact[DatasetManifest], dataset_type: str) -> Iterator[tuple[str, bool | None]]:
    """Yield the hash of each training example's text, and its label; only one batch is in memory at a time."""
    columns = [name for name in ("prompt", "history", *_ANSWERS) if name in COLUMNS[dataset_type]]
    for row in read_split(dataset.path, dataset_type, "train", columns):
        yield hash_of([row["prompt"], row["history"], *(row.get(name) for name in _ANSWERS)]), row.get("label")
