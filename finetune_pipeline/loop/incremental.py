"""What a training starts from: the base model and everything, or the champion's adapter and what is new."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import Artifact, ArtifactError, find, hash_of
from finetune_pipeline.curation.dataset import read_rows
from finetune_pipeline.database import connect
from finetune_pipeline.records import AdapterManifest, DatasetManifest
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.settings import LoopSettings, TrainingSettings
from finetune_pipeline.training.incremental import chosen, obstacle


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        adapter: of the champion, that is gone on from; None is the base model.
        rows: which rows of the dataset's training split are trained on; None is all.
        new: how many of them the champion was not trained on.
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


def start(loop: LoopSettings, settings: TrainingSettings, dataset: Artifact[DatasetManifest], base: str) -> Start:
    """Decide where a training starts. An incremental one that cannot be is a full one, and says why.

    Args:
        base: hash of the base model.
    """
    if settings.mode == "full":
        return _full("from the base model on everything")
    serving = champion(connect(), loop.name)
    if serving is None:
        return _full("no champion serves whose adapter could be gone on with")
    adapter = _found(AdapterManifest, loop.name, serving.lineage.get("lora_adapter"))
    if adapter is None:
        return _full(f"the adapter of {serving.name} is not there any more")
    problem = obstacle(settings.model_dump(mode="json"), base, adapter.manifest.settings, adapter.manifest.base_hash)
    if problem:
        return _full(f"the adapter of {serving.name} cannot be gone on with: {problem}")
    learnt = _found(DatasetManifest, loop.name, adapter.manifest.inputs.get("curated_dataset"))
    if learnt is None:
        return _full(f"the dataset of {serving.name} is not there any more, so nobody knows what is new")
    return _on_top(serving.name, adapter, _hashes(learnt), _hashes(dataset), settings, dataset.manifest.version)


def write_subset(dataset: Path, rows: tuple[int, ...], folder: Path) -> Path:
    """Write the dataset with only these rows to train on, and its whole validation split; returns its folder."""
    import datasets

    splits = datasets.load_from_disk(str(dataset))
    splits["train"] = splits["train"].select(rows)
    splits.save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))
    return folder


def _on_top(
    name: str,
    adapter: Artifact[AdapterManifest],
    learnt: list[str],
    hashes: list[str],
    settings: TrainingSettings,
    seed: str,
) -> Start:
    known = set(learnt)
    rows = chosen(hashes, known, settings.replay_older, seed)
    if not rows:
        return _full(f"nothing is new since {name} was trained")
    new = sum(hashes[row] not in known for row in rows)
    reason = f"on top of {name}: {new} new examples, {len(rows) - new} older ones replayed"
    return Start(adapter, tuple(rows), new, reason)


def _full(reason: str) -> Start:
    return Start(None, None, 0, reason)


def _found(kind: Any, loop: str, version: str | None) -> Any:
    try:
        return find(kind, loop, version) if version else None
    except ArtifactError:  # damaged: as good as gone
        return None


def _hashes(dataset: Artifact[DatasetManifest]) -> list[str]:
    """What tells the examples to train on apart; replayed ones of a file are known by their text."""
    return [
        row["content_hash"] or hash_of([row["prompt"], row["completion"]]) for row in read_rows(dataset.path, "train")
    ]
