"""Model files that nobody needs any more: which, why, and how they go.

Only folders of the stages gguf_model and base_gguf under `$FINETUNE_HOME/artifacts/<loop>` are ever looked at. A
version is marked deleted first, in a transaction that holds the loop's champion; then its folder is renamed, again
under that lock, if it is still not needed; then it goes. A kill on the way leaves a version that is marked deleted and
a folder that the next deletion takes, never a version that claims files that are gone.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    read,
    stage_folder,
    try_lock,
)
from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import champions, model_versions
from finetune_pipeline.manifests import BaseGgufManifest, GgufManifest, ReportManifest
from finetune_pipeline.registry.champion import Move, moving
from finetune_pipeline.registry.deployment_history import Deployment, history_in, stack_of
from finetune_pipeline.registry.model_versions import ModelVersion, models_in
from finetune_pipeline.settings import LoopSettings, home

_GOING = ".deleted-"
Judged = Literal["not judged", "passed", "rejected"]


@dataclass(frozen=True)
class ModelFolder:
    """The folder of one artifact with a model file.

    Attributes:
        base: it holds a base model (stage base_gguf), not a trained one.
        size: bytes of all its files.
        judged: what the newest report said of it.
        sha256: of a base model's GGUF.
        over: SHA-256 of the base's GGUF that its adapter goes over.
        reserved: why it has to stay whatever the registry says; empty if it need not.
        left: what an interrupted deletion left; it goes in any case.
    """

    path: Path
    base: bool
    size: int
    judged: Judged = "not judged"
    sha256: str = ""
    over: str | None = None
    reserved: str = ""
    left: bool = False


@dataclass(frozen=True)
class Fate:
    """Whether a folder stays, and why, in a sentence."""

    folder: ModelFolder
    stays: bool
    reason: str


@dataclass(frozen=True)
class Standing:
    """What the registry says of a loop.

    Attributes:
        moves: the champion's whole history, the oldest first.
    """

    champion_id: str | None
    models: Sequence[ModelVersion]
    moves: Sequence[Deployment]


def needed_models(standing: Standing, keep: int) -> dict[str, str]:
    """Registry ids of the versions whose files have to stay, each with its reason.

    Args:
        standing: of the loop.
        keep: what the last so many moves refer to stays.
    """
    needed: dict[str | None, str] = {}
    for move in standing.moves[-keep:]:
        for model_id in (move.model_id, move.previous_id):
            needed[model_id] = f"one of the last {keep} moves of the champion refers to it"
    stack = stack_of(standing.moves)
    if len(stack) > 1:
        needed[stack[-2]] = "previous: a rollback would bring it back"
    needed[standing.champion_id] = "champion: it serves"
    return {model.id: needed[model.id] for model in standing.models if model.id in needed and not model.deleted_at}


def decide_fates(folders: Sequence[ModelFolder], standing: Standing, keep: int) -> tuple[Fate, ...]:
    """What stays and what goes of these folders, and of each why; pure."""
    needed = needed_models(standing, keep)
    trained = [_fate(folder, standing.models, needed) for folder in folders if not folder.base]
    over = {fate.folder.over: fate.folder.path.name for fate in trained if fate.stays and fate.folder.over}
    bases = [_base_fate(folder, standing.models, needed, over) for folder in folders if folder.base]
    return (*trained, *bases)


def _fate(folder: ModelFolder, models: Sequence[ModelVersion], needed: Mapping[str, str]) -> Fate:
    certain = _certain_fate(folder, models, needed)
    if certain is not None:
        return certain
    versions = [model.version for model in models if _lies_in(model, folder)]
    if versions:
        return Fate(folder, False, f"{', '.join(versions)}: not champion, not previous, not in the last moves")
    if folder.judged == "rejected":
        return Fate(folder, False, "a challenger that the gate rejected")
    return Fate(folder, True, f"a challenger, {folder.judged}: it may yet be promoted")


def _base_fate(
    folder: ModelFolder, models: Sequence[ModelVersion], needed: Mapping[str, str], over: Mapping[str, str]
) -> Fate:
    certain = _certain_fate(folder, models, needed)
    if certain is not None:
        return certain
    if folder.sha256 in over:
        return Fate(folder, True, f"the adapter of gguf_model {over[folder.sha256]} goes over it")
    return Fate(folder, False, "a base model that nothing uses now")


def _certain_fate(folder: ModelFolder, models: Sequence[ModelVersion], needed: Mapping[str, str]) -> Fate | None:
    """What does not depend on the kind of folder."""
    if folder.left:
        return Fate(folder, False, "left by a deletion that was interrupted")
    for model in models:
        if model.id in needed and _lies_in(model, folder):
            return Fate(folder, True, f"{model.version}, {needed[model.id]}")
    return Fate(folder, True, folder.reserved) if folder.reserved else None


def _lies_in(model: ModelVersion, folder: ModelFolder) -> bool:
    return any(folder.path in path.parents for path in model.files)


def survey(db: Database, loop: LoopSettings, base_hash: str, keep: int) -> tuple[Fate, ...]:
    """What would stay and what would go now; changes nothing.

    Args:
        db: the registry's database.
        loop: whose models.
        base_hash: hash of the loop's base model, whose own GGUF stays.
        keep: what the last so many moves refer to stays.
    """
    with db.read() as connection:
        return _fates_in(connection, loop, base_hash, keep)


def delete(db: Database, loop: LoopSettings, base_hash: str, keep: int, doomed: Collection[Path]) -> list[Fate]:
    """Delete these folders, but for those that came to be needed since they were surveyed; returns what went.

    Raises:
        ArtifactBusyError: another deletion runs.
    """
    with try_lock(home() / "artifacts" / loop.name / ".deletion", "room among the model files"):
        left = [fate for fate in survey(db, loop, base_hash, keep) if fate.folder.left]
        _remove_put_aside(loop.name)
        with moving(db, loop.name) as move:
            going = [f for f in _fates_in(move.connection, loop, base_hash, keep) if f.folder.path in doomed]
            _mark_deleted(move, [fate.folder for fate in going if not fate.stays])
        # A second transaction: what is marked is safe from a switch, but may have been promoted anew meanwhile.
        with moving(db, loop.name) as move:
            going = [f for f in _fates_in(move.connection, loop, base_hash, keep) if f.folder.path in doomed]
            gone = [fate for fate in going if not fate.stays and _put_aside(fate.folder.path)]
        _remove_put_aside(loop.name)
    return [*left, *gone]


def _fates_in(connection: sa.Connection, loop: LoopSettings, base_hash: str, keep: int) -> tuple[Fate, ...]:
    champion_id = connection.execute(sa.select(champions.c.model_id).where(champions.c.loop == loop.name)).scalar()
    standing = Standing(champion_id, models_in(connection, loop.name), history_in(connection, loop.name))
    return decide_fates(tuple(_folders(loop, base_hash)), standing, keep)


def _mark_deleted(move: Move, folders: Sequence[ModelFolder]) -> None:
    for model in models_in(move.connection, move.loop):
        if not model.deleted_at and any(_lies_in(model, folder) for folder in folders):
            here = (model_versions.c.loop == move.loop, model_versions.c.id == model.id)
            move.connection.execute(sa.update(model_versions).where(*here).values(deleted_at=move.now))


def _put_aside(path: Path) -> bool:
    """Rename a folder, so that it is gone at once; False if a run makes it anew in this moment."""
    try:
        with try_lock(path.parent / f".draft-{path.name}", path.name):
            path.rename(path.with_name(f"{_GOING}{path.name}"))
            return True
    except ArtifactBusyError:
        return False


def _remove_put_aside(loop: str) -> None:
    for path in _put_aside_folders(loop):
        shutil.rmtree(path)


def _folders(loop: LoopSettings, base_hash: str) -> Iterator[ModelFolder]:
    judged = _judged(loop.name)
    newest = _newest(loop.name)
    for path in _version_folders(loop.name, GgufManifest.stage):
        reserved, over = _being_made(path), None
        if path.name == newest:
            reserved = "the newest export: promoted_model and eval_report would take it"
        try:
            over = read(GgufManifest, path).manifest.base_gguf_sha256
        except ArtifactError as error:
            reserved = f"left alone: {error}"
        verdict = judged.get(path.name, "not judged")
        yield ModelFolder(path, False, _size(path), verdict, over=over, reserved=reserved)
    yield from _base_folders(loop, base_hash)
    for path in _put_aside_folders(loop.name):
        yield ModelFolder(path, path.parent.name == BaseGgufManifest.stage, _size(path), left=True)


def _base_folders(loop: LoopSettings, base_hash: str) -> Iterator[ModelFolder]:
    found = []
    for path in _version_folders(loop.name, BaseGgufManifest.stage):
        try:
            found.append(read(BaseGgufManifest, path))
        except ArtifactError as error:
            yield ModelFolder(path, True, _size(path), reserved=f"left alone: {error}")
    own = (base_hash, loop.export.quantization)
    serving = [one for one in found if (one.manifest.base_hash, one.manifest.quantization) == own]
    # An engine's new version makes it anew; the one made last is what serves.
    last = max(serving, key=lambda one: one.manifest.created_at).path if serving else None
    for one in found:
        reserved = _being_made(one.path)
        if one.path == last:
            reserved = "the loop's base model: it serves without a champion, and takes over for one"
        sha256 = one.manifest.files[one.manifest.gguf].sha256
        yield ModelFolder(one.path, True, _size(one.path), sha256=sha256, reserved=reserved)


def _version_folders(loop: str, stage: str) -> list[Path]:
    """Complete or damaged versions; never drafts, locks or links to elsewhere."""
    folder = stage_folder(loop, stage)
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())


def _put_aside_folders(loop: str) -> list[Path]:
    stages = (GgufManifest.stage, BaseGgufManifest.stage)
    return sorted(path for stage in stages for path in stage_folder(loop, stage).glob(f"{_GOING}*"))


def _newest(loop: str) -> str | None:
    try:
        newest = get_latest(GgufManifest, loop)
    except ArtifactError:  # it was made and is gone or damaged: nobody can take it
        return None
    return newest.manifest.version if newest else None


def _being_made(path: Path) -> str:
    draft = path.with_name(f".draft-{path.name}")
    try:
        with try_lock(draft, path.name) if draft.with_name(f"{draft.name}.lock").exists() else nullcontext():
            return ""
    except ArtifactBusyError:
        return "a run makes it anew now"


def _judged(loop: str) -> dict[str, Judged]:
    """Version of a gguf_model -> what its newest report said."""
    reports = []
    for path in stage_folder(loop, ReportManifest.stage).glob(f"[!.]*/{MANIFEST}"):
        document = json.loads(path.read_bytes())
        reports.append((document["created_at"], document["inputs"]["gguf_model"], document["promote"]))
    return {version: "passed" if promote else "rejected" for _, version, promote in sorted(reports)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
