"""Where artifacts lie: `$FINETUNE_HOME/artifacts/<loop>/<stage>/<version>/`, each complete or not there at all.

A version is the hash of what went in, so the same inputs give the same folder and finished work is found again. Files
are written into a draft folder beside it, flushed, and renamed into place; `manifest.json` is the last file of the
draft. A kill leaves a draft that the next run takes away (or, for training, goes on with).
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from finetune_pipeline.records import FileRecord, Manifest
from finetune_pipeline.settings import home

MANIFEST = "manifest.json"
M = TypeVar("M", bound=Manifest)


class ArtifactError(RuntimeError):
    """An artifact is missing, damaged or cannot be written; the message says which, and what to do."""


class Damaged(ArtifactError):
    """A file of an artifact is missing or has another size than when it was published."""


class Busy(ArtifactError):
    """Another run works on the same artifact now."""


@dataclass(frozen=True)
class Artifact(Generic[M]):
    """A complete artifact: its folder, what its manifest says, and the SHA-256 of `manifest.json`.

    The manifest holds the hashes of all files, so its own hash identifies the complete artifact.
    """

    path: Path
    manifest: M
    sha256: str


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, the same for equal values whatever their order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_file_cached(path: Path, *, again: bool = False) -> str:
    """SHA-256 (hex) of a file's content; it is read only if its size, mtime, ctime or inode changed since it was last.

    Changes below the file system are not detected: read the file `again` if its hash decides what was measured.

    Hashes are kept in `$FINETUNE_HOME/cache`. If two processes write them at once, those of one are lost and computed
    again.

    Args:
        again: read the file in any case.
    """
    cache = home() / "cache" / "file_hashes.json"
    try:
        known: dict[str, list[str]] = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    real = path.resolve()
    stat = real.stat()
    # ctime too: unlike mtime, no program can set it back after an edit.
    stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    before = known.get(str(real))
    if before is not None and before[0] == stamp and not again:
        return before[1]
    entry = [stamp, hash_file(real)]
    if entry != before:
        with suppress(OSError):  # a full disk must keep nobody from a rollback
            write_text(cache, json.dumps({**known, str(real): entry}, indent=1, sort_keys=True) + "\n")
    return entry[1]


def check_content(path: Path, expected: str, remedy: str) -> None:
    """Refuse a file whose content changed since it was written; see `hash_file_cached` for when it is read.

    Raises:
        ArtifactError: its SHA-256 differs; the message gives both hashes and the remedy.
    """
    found = hash_file_cached(path)
    if found != expected:
        raise ArtifactError(
            f"{path} is damaged or was replaced: its SHA-256 is {found[:16]}..., expected {expected[:16]}...; {remedy}"
        )


def model_sha256(gguf_sha256: str, adapter_sha256: str | None) -> str:
    """The identity of what runs: the file's hash, or one hash of a base's and its adapter's."""
    return gguf_sha256 if adapter_sha256 is None else hash_of([gguf_sha256, adapter_sha256])


def package_versions(*names: str) -> dict[str, str]:
    """Versions of installed packages; one that is not installed is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def stage_folder(loop: str, stage: str) -> Path:
    """The folder of all versions of a stage."""
    return home() / "artifacts" / loop / stage


def version_of(inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The version that these inputs and settings give: 16 hex digits."""
    return hash_of({"inputs": dict(inputs), "settings": dict(settings)})[:16]


def find(kind: type[M], loop: str, version: str) -> Artifact[M] | None:
    """The artifact of this version if it is complete and its files have their size."""
    path = stage_folder(loop, kind.stage) / version
    return read(kind, path) if (path / MANIFEST).exists() else None


def find_unaltered(kind: type[M], loop: str, version: str) -> Artifact[M] | None:
    """Find an artifact like `find`, but return None for one that was edited or not published by a run."""
    found = find(kind, loop, version)
    return found if found is not None and alteration(found) is None else None


def read(kind: type[M], path: Path) -> Artifact[M]:
    """Open a complete artifact.

    Raises:
        ArtifactError: there is no manifest, it is of another form, or a file is missing or of another size.
    """
    remedy = f"materialize {kind.stage} again (delete {path} first)"
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = kind.model_validate_json(content)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not a complete artifact: it has no {MANIFEST}; {remedy}") from None
    except ValidationError as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read ({error.error_count()} errors); {remedy}") from error
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != record.size:
            raise Damaged(f"{path / name}: expected {record.size} bytes, found {size}; {remedy}")
    return Artifact(path, manifest, hashlib.sha256(content).hexdigest())


_HASHED_AGAIN = 16_000_000
"""Bytes up to which a file is hashed at every check; for larger files the cached hash is used."""


def alteration(artifact: Artifact[M]) -> str | None:
    """Return how an artifact differs from what a run published; None if it is unaltered.

    The hash of its manifest must be in the database, which editing files does not change, and its files must have the
    hashes in the manifest.
    """
    if not _is_recorded(artifact):
        return f"{artifact.path / MANIFEST} is not what a run wrote"
    recorded = artifact.manifest.files
    inside = [path.relative_to(artifact.path) for path in artifact.path.rglob("*") if path.is_file()]
    # Hidden files are not part of an artifact: training caches tokens there.
    found = {str(path) for path in inside if not any(part.startswith(".") for part in path.parts)} - {MANIFEST}
    if found != recorded.keys():
        names = ", ".join(sorted(found ^ recorded.keys())[:3])
        return f"files were added to or removed from {artifact.path}: {names}"
    for name, record in recorded.items():
        path = artifact.path / name
        if (hash_file_cached if record.size > _HASHED_AGAIN else hash_file)(path) != record.sha256:
            return f"{path} is damaged or was replaced: its SHA-256 differs from the one in the manifest"
    return None


def check_unaltered(artifact: Artifact[M]) -> None:
    """Refuse an artifact that differs from what a run published.

    Raises:
        ArtifactError: its manifest or one of its files was changed.
    """
    problem = alteration(artifact)
    if problem:
        raise ArtifactError(
            f"{problem}; materialize {artifact.manifest.stage} again (if an earlier version of this project made it, "
            "run the whole loop)"
        )


def _is_recorded(artifact: Artifact[M]) -> bool:
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.artifacts import is_made

    manifest = artifact.manifest
    there = (manifest.loop, manifest.stage, manifest.version)
    # A copy from another loop, or under another version, has a recorded hash, but not for this place.
    return artifact.path.parts[-3:] == there and is_made(connect(), *there, artifact.sha256)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold `path` for this process; the lock goes with the process, also by kill -9.

    Raises:
        Busy: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"another run is making {what} now ({path}); wait until it has finished, then run again") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def in_turn(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold `path` for this process, after waiting until nobody else does; the lock goes with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"another {what} runs on this machine; waiting for its end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def obtain(
    kind: type[M],
    loop: str,
    version: str,
    make: Callable[[Path], Mapping[str, Any]],
    *,
    keep: bool = False,
    usable: Callable[[Artifact[M]], bool] = lambda artifact: True,
) -> Artifact[M]:
    """Return the artifact of this version: an existing one if it is complete and unaltered, else a new one.

    Args:
        make: writes the files into a draft folder and returns the manifest's fields but loop, version, time and files.
        keep: see `draft`.
        usable: whether a complete one will do, or has to be made anew.

    Raises:
        Busy: another process is making it now.
        ArtifactError: the disk is full, or the manifest of an existing one has another form.
    """

    def known() -> Artifact[M] | None:
        try:
            found = find_unaltered(kind, loop, version)
        except Damaged:
            return None
        return found if found is not None and usable(found) else None

    found = known()
    if found is not None:
        return found
    with draft(loop, kind.stage, version, keep=keep) as folder:
        found = known()  # another process may have made it while this one came to the lock
        if found is not None:
            return found
        return publish(folder, kind, {"loop": loop, "version": version, **make(folder)})


@contextmanager
def draft(loop: str, stage: str, version: str, *, keep: bool = False) -> Iterator[Path]:
    """A folder to write an artifact into, alone; `publish` ends it.

    Args:
        keep: leave the folder after a fault and start from what an earlier one left (training resumes there).

    Raises:
        Busy: another process is making the same version.
        ArtifactError: the disk is full; nothing half-written is left.
    """
    path = stage_folder(loop, stage) / f".draft-{version}"
    try:
        with locked(path, f"{stage} {version} of {loop}"):
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            try:
                yield path
            except BaseException:
                if not keep:
                    shutil.rmtree(path, ignore_errors=True)
                raise
            shutil.rmtree(path, ignore_errors=True)  # published, it has another name; else it was not needed
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise disk_full(path, error) from error


_WORDS_OF_A_FULL_DISK = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "enforce fail at inline_container.cc",  # torch.save, whose archive came out shorter than what was written
    "requested and 0 written",  # numpy's tofile
)


def tells_of_full_disk(log: str) -> bool:
    """Whether what a child process wrote last means that the disk was full."""
    return any(words in log for words in _WORDS_OF_A_FULL_DISK)


def disk_full(path: Path, error: object) -> ArtifactError:
    """The error of a full disk, with what is free and what to do."""
    there = next(parent for parent in [path, *path.parents] if parent.exists())
    free = shutil.disk_usage(there).free / 1e6
    return ArtifactError(
        f"the disk is full: {path} could not be written ({free:.1f} MB free; {error}). Nothing that was complete is "
        "lost. Free some space or set FINETUNE_HOME to another disk, then run again"
    )


def publish(
    folder: Path, kind: type[M], fields: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None
) -> Artifact[M]:
    """Make a draft the artifact: hash and flush its files, write the manifest, rename the folder into place.

    Args:
        folder: the draft's folder.
        fields: the manifest's fields but `created_at` and `files`.
        known: files taken over from an older artifact as they were, whose hashes its manifest knows.
    """
    files = dict(known or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        if str(path.relative_to(folder)) in files:
            continue
        files[str(path.relative_to(folder))] = FileRecord(sha256=hash_file(path), size=path.stat().st_size)
        flush(path)
    manifest = kind.model_validate({**fields, "created_at": datetime.now(UTC), "files": files})
    content = manifest.model_dump_json(indent=2) + "\n"
    write_text(folder / MANIFEST, content)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    _record(manifest, sha256)  # before the rename: if the process is killed, no folder exists without its record
    final, old = folder.parent / manifest.version, folder.parent / f".old-{manifest.version}"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # damaged, or made anew: it goes only when the new one stands
        final.rename(old)
    folder.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return Artifact(final, manifest, sha256)


def _record(manifest: Manifest, sha256: str) -> None:
    # Imported here: most commands need no artifact, and importing SQLAlchemy takes 0.2 s.
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.artifacts import record_made

    record_made(connect(), manifest.loop, manifest.stage, manifest.version, sha256, manifest.created_at)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, force=True) as file:
        file.write(text)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[IO[str]]:
    """Open a text file for writing that is there whole or not at all: a kill or a fault leaves what was there before.

    Args:
        force: overwrite what is there.

    Raises:
        FileExistsError: it is there already, and not `force`.
        OSError: it cannot be written.
    """
    if path.exists() and not force:
        raise FileExistsError(errno.EEXIST, "is there already", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(manifest: Manifest, run: str) -> None:
    """Remember that this version is a run's own, and the latest of its stage."""
    for name in (run, "latest"):
        write_text(_pointer(manifest.loop, name, manifest.stage), json.dumps({"version": manifest.version}) + "\n")


def pointed(kind: type[M], loop: str, run: str = "latest") -> Artifact[M] | None:
    """The artifact that a run made of a stage (or the one made last), or None if it made none.

    Raises:
        ArtifactError: it was made but is gone or damaged.
    """
    path = _pointer(loop, run, kind.stage)
    if not path.exists():
        return None
    version = str(json.loads(path.read_text(encoding="utf-8"))["version"])
    return read(kind, stage_folder(loop, kind.stage) / version)


def _pointer(loop: str, run: str, stage: str) -> Path:
    return stage_folder(loop, "runs") / run / f"{stage}.json"
