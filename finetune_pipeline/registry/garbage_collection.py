"""Garbage collection of model artifacts: which folders to keep, which to delete, and why.

Only folders of the stages gguf_model, base_gguf and merged_model under `$FINETUNE_HOME/artifacts/<loop>` are
considered. A deletion has three steps, so that a kill at any moment never leaves a version in the registry that claims
missing files:

1. Mark the versions as deleted, in a transaction that locks the loop's champion.
2. Rename their folders, under a second lock, if they are still not needed.
3. Remove the renamed folders. What an interrupted deletion left is removed by the next one.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from finetune_pipeline.artifacts import (
    MANIFEST,
    ArtifactBusyError,
    ArtifactError,
    get_latest,
    model_sha256,
    read,
    stage_folder,
    try_lock,
)
from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import champions
from finetune_pipeline.manifests import BaseGgufManifest, GgufManifest, MergedManifest, ReportManifest
from finetune_pipeline.registry.approvals import open_approvals_in
from finetune_pipeline.registry.champion import lock_champion
from finetune_pipeline.registry.deployment_history import Deployment, deployment_stack, deployments_in
from finetune_pipeline.registry.model_versions import ModelVersion, model_id_of, models_in
from finetune_pipeline.registry.requested_comparisons import compared_in
from finetune_pipeline.settings import LoopSettings, home

_RENAMED = ".deleted-"
GateResult = Literal["not evaluated", "passed", "rejected"]


@dataclass(frozen=True)
class ModelFolder:
    """The folder of one artifact with a model file.

    Attributes:
        is_base: it holds a base model (stage base_gguf), not a trained one.
        size: bytes of all its files.
        gate: the verdict of the newest report on it.
        sha256: of the GGUF in a base model's folder, or of the trained model (with an adapter, the combined one).
        base_sha256: hash of the base's GGUF that an adapter is applied to.
        merged_adapter: version of the adapter whose merged weights it holds (stage merged_model).
        protected: why it is kept whatever the registry says; empty if nothing protects it.
        interrupted: an interrupted deletion left it; it is deleted in any case.
    """

    path: Path
    is_base: bool
    size: int
    gate: GateResult = "not evaluated"
    sha256: str = ""
    base_sha256: str | None = None
    merged_adapter: str | None = None
    protected: str = ""
    interrupted: bool = False


@dataclass(frozen=True)
class RetentionDecision:
    """Whether a folder is kept, and the reason."""

    folder: ModelFolder
    keep: bool
    reason: str


@dataclass(frozen=True)
class RegistryState:
    """The state of a loop.

    Attributes:
        champion_id: the champion; None is the base model.
        models: all model versions.
        deployments: all changes of the champion, oldest first.
        waiting: versions of gguf_model whose challenger waits for approval.
        compared: ids of models that an unfinished comparison needs.
    """

    champion_id: str | None
    models: Sequence[ModelVersion]
    deployments: Sequence[Deployment]
    waiting: Collection[str] = ()
    compared: Collection[str] = ()


def decide_retention(folders: Sequence[ModelFolder], state: RegistryState, keep: int) -> tuple[RetentionDecision, ...]:
    """Decide for each folder whether it is kept. Pure.

    Args:
        folders: all folders with models of a loop.
        state: of the loop in the registry.
        keep: models of this many newest deployments are kept.
    """
    # model id -> reason; later reasons overwrite weaker ones
    needed: dict[str | None, str] = dict.fromkeys(state.compared, "used by a comparison that has not ended")
    for deployment in state.deployments[-keep:]:
        for model_id in (deployment.model_id, deployment.previous_id):
            needed[model_id] = f"used by one of the last {keep} deployments"
    stack = deployment_stack(state.deployments)
    if len(stack) > 1:
        needed[stack[-2]] = "previous: the target of a rollback"
    needed[state.champion_id] = "champion: it serves"

    def decide(folder: ModelFolder, adapters: dict[str, str]) -> RetentionDecision:
        if folder.interrupted:
            return RetentionDecision(folder, False, "left by an interrupted deletion")
        versions = [model for model in state.models if _has_file_in(model, folder)]
        if folder.merged_adapter:
            versions = [one for one in state.models if one.lineage.get("lora_adapter") == folder.merged_adapter]
        for model in versions:
            if model.id in needed and not model.deleted_at:
                return RetentionDecision(folder, True, f"{model.version}, {needed[model.id]}")
        if folder.protected:
            return RetentionDecision(folder, True, folder.protected)
        if folder.path.name in state.waiting and not folder.is_base:
            return RetentionDecision(folder, True, "a challenger that waits for approval")
        if not folder.is_base and model_id_of(folder.sha256) in state.compared:
            return RetentionDecision(folder, True, "used by a comparison that has not ended")
        if folder.is_base:
            if folder.sha256 in adapters:
                return RetentionDecision(
                    folder, True, f"the base of the adapter in gguf_model {adapters[folder.sha256]}"
                )
            return RetentionDecision(folder, False, "a base model that nothing uses")
        if folder.merged_adapter:
            return RetentionDecision(folder, False, "merged weights that no deployed version needs")
        if versions:
            names = ", ".join(model.version for model in versions)
            return RetentionDecision(folder, False, f"{names}: not champion, not previous, not in the last deployments")
        if folder.gate == "rejected":
            return RetentionDecision(folder, False, "a challenger that the gate rejected")
        return RetentionDecision(folder, True, f"a challenger, {folder.gate}: it can still be promoted")

    trained = [decide(folder, {}) for folder in folders if not folder.is_base]
    kept = [one.folder for one in trained if one.keep]
    adapters = {folder.base_sha256: folder.path.name for folder in kept if folder.base_sha256}
    return (*trained, *(decide(folder, adapters) for folder in folders if folder.is_base))


def plan_deletion(db: Database, loop: LoopSettings, base_hash: str, keep: int) -> tuple[RetentionDecision, ...]:
    """Decide what would be kept and deleted now; changes nothing.

    Args:
        db: the registry's database.
        loop: the loop whose models are considered.
        base_hash: hash of the loop's base model, whose GGUF is kept.
        keep: models of this many newest deployments are kept.
    """
    with db.read() as connection:
        return _decisions_in(connection, loop, base_hash, keep)


def delete_models(
    db: Database, loop: LoopSettings, base_hash: str, keep: int, to_delete: Collection[Path], actor: str
) -> list[RetentionDecision]:
    """Delete these folders, except those that are needed by now; return the deleted ones.

    A version whose files are deleted is archived, with a row in the history.

    Args:
        db: the registry's database.
        loop: the loop whose models are considered.
        base_hash: hash of the loop's base model, whose GGUF is kept.
        keep: models of this many newest deployments are kept.
        to_delete: the folders.
        actor: who deletes them, for the history.

    Raises:
        ArtifactBusyError: another deletion is running.
    """

    def deletable(connection: sa.Connection) -> list[RetentionDecision]:
        decisions = _decisions_in(connection, loop, base_hash, keep)
        return [one for one in decisions if one.folder.path in to_delete and not one.keep]

    with try_lock(home() / "artifacts" / loop.name / ".deletion", "the deletion of model files"):
        interrupted = [one for one in plan_deletion(db, loop, base_hash, keep) if one.folder.interrupted]
        _remove_renamed(loop.name)
        with lock_champion(db, loop.name) as champion:
            decisions = deletable(champion.connection)
            for model in models_in(champion.connection, loop.name):
                reason = next((one.reason for one in decisions if _has_file_in(model, one.folder)), None)
                if reason and not model.deleted_at:
                    champion.update_model(model.id, deleted_at=champion.now)
                    champion.archive(model.id, actor, f"its files were deleted by garbage collection: {reason}")
        # A second transaction: a marked version cannot be switched to, but may have been promoted again meanwhile.
        with lock_champion(db, loop.name) as champion:
            deleted = [one for one in deletable(champion.connection) if _rename_folder(one.folder.path)]
        _remove_renamed(loop.name)
    return [*interrupted, *deleted]


def _decisions_in(
    connection: sa.Connection, loop: LoopSettings, base_hash: str, keep: int
) -> tuple[RetentionDecision, ...]:
    champion_id = connection.execute(sa.select(champions.c.model_id).where(champions.c.loop == loop.name)).scalar()
    state = RegistryState(
        champion_id,
        models_in(connection, loop.name),
        deployments_in(connection, loop.name),
        {one.gguf_version for one in open_approvals_in(connection, loop.name)},
        compared_in(connection, loop.name),
    )
    return decide_retention(tuple(_model_folders(loop, base_hash)), state, keep)


def _has_file_in(model: ModelVersion, folder: ModelFolder) -> bool:
    return any(folder.path in path.parents for path in model.files)


def _rename_folder(path: Path) -> bool:
    """Rename a folder, so that it is gone at once; return False if a run is making it again now."""
    try:
        with try_lock(path.parent / f".draft-{path.name}", path.name):
            path.rename(path.with_name(f"{_RENAMED}{path.name}"))
            return True
    except ArtifactBusyError:
        return False


def _remove_renamed(loop: str) -> None:
    for path in _renamed_folders(loop):
        shutil.rmtree(path)


def _renamed_folders(loop: str) -> list[Path]:
    stages = (GgufManifest.stage, BaseGgufManifest.stage, MergedManifest.stage)
    return sorted(path for stage in stages for path in stage_folder(loop, stage).glob(f"{_RENAMED}*"))


def _model_folders(loop: LoopSettings, base_hash: str) -> Iterator[ModelFolder]:
    gate_results = _gate_results(loop.name)
    try:
        newest = get_latest(GgufManifest, loop.name)
    except ArtifactError:  # deleted or damaged: no asset can take it
        newest = None
    for path in _version_folders(loop.name, GgufManifest.stage):
        protected, sha256, base_sha256 = _in_progress(path), "", None
        if newest and path.name == newest.manifest.version:
            protected = "the newest export: promoted_model and eval_report would take it"
        try:
            manifest = read(GgufManifest, path).manifest
            sha256, base_sha256 = manifest.files[manifest.gguf].sha256, manifest.base_gguf_sha256
            if base_sha256 is not None:
                sha256 = model_sha256(base_sha256, sha256)
        except ArtifactError as error:
            protected = f"not touched: {error}"
        gate = gate_results.get(path.name, "not evaluated")
        yield ModelFolder(path, False, _size(path), gate, sha256, base_sha256, protected=protected)
    yield from _base_folders(loop, base_hash)
    for path in _version_folders(loop.name, MergedManifest.stage):
        try:
            merged = read(MergedManifest, path).manifest
            yield ModelFolder(
                path, False, _size(path), merged_adapter=merged.adapter_version, protected=_in_progress(path)
            )
        except ArtifactError as error:
            yield ModelFolder(path, False, _size(path), protected=f"not touched: {error}")
    for path in _renamed_folders(loop.name):
        yield ModelFolder(path, path.parent.name == BaseGgufManifest.stage, _size(path), interrupted=True)


def _base_folders(loop: LoopSettings, base_hash: str) -> Iterator[ModelFolder]:
    found = []
    for path in _version_folders(loop.name, BaseGgufManifest.stage):
        try:
            found.append(read(BaseGgufManifest, path))
        except ArtifactError as error:
            yield ModelFolder(path, True, _size(path), protected=f"not touched: {error}")
    current = (base_hash, loop.base_quantization)
    usable = [one for one in found if (one.manifest.base_hash, one.manifest.quantization) == current]
    # Another version of the engine converts the base again; the newest conversion is the one that serves.
    serving = max(usable, key=lambda one: one.manifest.created_at).path if usable else None
    for one in found:
        protected = _in_progress(one.path)
        if one.path == serving:
            protected = "the loop's base model: it serves without a champion, and as its fallback"
        sha256 = one.manifest.files[one.manifest.gguf].sha256
        yield ModelFolder(one.path, True, _size(one.path), sha256=sha256, protected=protected)


def _version_folders(loop: str, stage: str) -> list[Path]:
    """Return complete or damaged versions; never drafts, locks or links to elsewhere."""
    folder = stage_folder(loop, stage)
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())


def _in_progress(path: Path) -> str:
    draft = path.with_name(f".draft-{path.name}")
    try:
        with try_lock(draft, path.name) if draft.with_name(f"{draft.name}.lock").exists() else nullcontext():
            return ""
    except ArtifactBusyError:
        return "a run is making it again now"


def _gate_results(loop: str) -> dict[str, GateResult]:
    """Return the verdict of the newest report on each version of gguf_model."""
    reports = []
    for path in stage_folder(loop, ReportManifest.stage).glob(f"[!.]*/{MANIFEST}"):
        document = json.loads(path.read_bytes())
        reports.append((document["created_at"], document["inputs"]["gguf_model"], document["decision"]))
    return {version: "passed" if decision == "promote" else "rejected" for _, version, decision in sorted(reports)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
