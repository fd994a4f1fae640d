"""Artifacts on disk: `$FINETUNE_HOME/artifacts/<loop>/<stage>/<version>/`, each complete or absent.

A version is a hash of the inputs and settings, so equal inputs give the same folder and finished work is reused. Files
are written into a draft folder next to it, flushed, and renamed into place; `manifest.json` is written last. A kill
leaves a draft, which the next run deletes (a training run resumes from it).
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from finetune_pipeline.manifests import FileRecord, Manifest
from finetune_pipeline.settings import home

MANIFEST = "manifest.json"
M = TypeVar("M", bound=Manifest)


class ArtifactError(RuntimeError):
    """An artifact is missing, damaged or cannot be written; the message says which one and what to do."""


class DamagedArtifactError(ArtifactError):
    """A file of an artifact is missing, or its size differs from the manifest."""


class ArtifactBusyError(ArtifactError):
    """Another process is writing the same artifact."""


@dataclass(frozen=True)
class Artifact(Generic[M]):
    """A complete artifact: its folder, its manifest, and the SHA-256 of `manifest.json`.

    The manifest holds the hashes of all files, so its own hash identifies the whole artifact.
    """

    path: Path
    manifest: M
    sha256: str


def hash_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_file_cached(path: Path, *, force: bool = False) -> str:
    """Return the SHA-256 (hex) of a file, read again only if its size, mtime, ctime or inode changed.

    A change below the file system goes unnoticed: pass `force` where the hash decides what was measured.

    Hashes are cached in `$FINETUNE_HOME/cache`. If two processes write the cache at once, the entries of one are lost
    and computed again later.
    """
    cache = home() / "cache" / "file_hashes.json"
    try:
        known: dict[str, list[str]] = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    real = path.resolve()
    stat = real.stat()
    # ctime as well: unlike mtime, a program cannot set it back after an edit.
    stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    before = known.get(str(real))
    if before is not None and before[0] == stamp and not force:
        return before[1]
    entry = [stamp, hash_file(real)]
    if entry != before:
        with suppress(OSError):  # a full disk must not prevent a rollback
            write_text(cache, json.dumps({**known, str(real): entry}, indent=1, sort_keys=True) + "\n")
    return entry[1]


def check_content(path: Path, expected: str, remedy: str) -> None:
    """Raise unless a file still has the expected SHA-256 (see `hash_file_cached` for when it is read).

    Raises:
        ArtifactError: the hash differs; the message gives both hashes and the remedy.
    """
    found = hash_file_cached(path)
    if found != expected:
        raise ArtifactError(
            f"{path} is damaged or was replaced: its SHA-256 is {found[:16]}..., expected {expected[:16]}...; {remedy}"
        )


def model_sha256(gguf_sha256: str, adapter_sha256: str | None) -> str:
    """Return the identity of a served model: the GGUF's hash, or one hash over base GGUF and adapter GGUF."""
    return gguf_sha256 if adapter_sha256 is None else hash_of([gguf_sha256, adapter_sha256])


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages; packages that are not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def stage_folder(loop: str, stage: str) -> Path:
    """Return the folder that holds all versions of a stage."""
    return home() / "artifacts" / loop / stage


def version_of(inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Return the version for these inputs and settings: 16 hex digits."""
    return hash_of({"inputs": dict(inputs), "settings": dict(settings)})[:16]


def find(kind: type[M], loop: str, version: str) -> Artifact[M] | None:
    """Return the artifact of this version, or None if it is not complete.

    Raises:
        ArtifactError: the manifest cannot be read, or a file is missing or has another size.
    """
    path = stage_folder(loop, kind.stage) / version
    return read(kind, path) if (path / MANIFEST).exists() else None


def find_unaltered(kind: type[M], loop: str, version: str) -> Artifact[M] | None:
    """Return the artifact like `find`, but None if it was edited or not published by a run."""
    found = find(kind, loop, version)
    return found if found is not None and find_alteration(found) is None else None


def read(kind: type[M], path: Path) -> Artifact[M]:
    """Open a complete artifact.

    Raises:
        ArtifactError: the manifest is missing or has another format, or a file is missing or has another size.
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
            raise DamagedArtifactError(f"{path / name}: expected {record.size} bytes, found {size}; {remedy}")
    return Artifact(path, manifest, hashlib.sha256(content).hexdigest())


_ALWAYS_HASHED_BYTES = 16_000_000
"""Files up to this size are hashed at every check; larger files use the cached hash."""


def find_alteration(artifact: Artifact[M]) -> str | None:
    """Return how an artifact differs from what a run published; None if it does not differ.

    The database holds the hash of every published manifest, so edited files cannot hide; the manifest holds the hashes
    of the files.
    """
    from finetune_pipeline.database import connect  # importing SQLAlchemy takes 0.2 s, which most commands do not need
    from finetune_pipeline.database.artifacts import is_published

    manifest = artifact.manifest
    key = (manifest.loop, manifest.stage, manifest.version)
    # A copy in another loop or under another version has a known hash, but not for this key.
    if artifact.path.parts[-3:] != key or not is_published(connect(), *key, artifact.sha256):
        return f"{artifact.path / MANIFEST} is not what a run wrote"
    recorded = artifact.manifest.files
    inside = [path.relative_to(artifact.path) for path in artifact.path.rglob("*") if path.is_file()]
    # Hidden files are not part of an artifact: training caches token ids there.
    found = {str(path) for path in inside if not any(part.startswith(".") for part in path.parts)} - {MANIFEST}
    if found != recorded.keys():
        names = ", ".join(sorted(found ^ recorded.keys())[:3])
        return f"files were added to or removed from {artifact.path}: {names}"
    for name, record in recorded.items():
        path = artifact.path / name
        if (hash_file_cached if record.size > _ALWAYS_HASHED_BYTES else hash_file)(path) != record.sha256:
            return f"{path} is damaged or was replaced: its SHA-256 differs from the one in the manifest"
    return None


def check_unaltered(artifact: Artifact[M]) -> None:
    """Raise if an artifact differs from what a run published.

    Raises:
        ArtifactError: the manifest or a file was changed.
    """
    problem = find_alteration(artifact)
    if problem:
        raise ArtifactError(
            f"{problem}; materialize {artifact.manifest.stage} again (if an earlier version of this project made it, "
            "run the whole loop)"
        )


@contextmanager
def try_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of `path` for this process, without waiting; `kill -9` releases it too.

    Raises:
        ArtifactBusyError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(f"{path}.lock").acquire(timeout=0)
    except Timeout:
        raise ArtifactBusyError(
            f"another process is working on {what} ({path}); wait until it has finished, then run again"
        ) from None
    with held:
        yield


@contextmanager
def wait_for_lock(path: Path, what: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `path` for this process, waiting for it if needed; `kill -9` releases it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log(f"another {what} is running on this machine; waiting for it to finish")
        held = lock.acquire()
    with held:
        yield


def get_or_create(
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
        make: writes the files into a draft folder and returns the manifest's fields except loop, version, created_at
            and files.
        keep: see `draft`.
        usable: decides whether an existing artifact can be reused; otherwise it is made again.

    Raises:
        ArtifactBusyError: another process is making the same version.
        ArtifactError: the disk is full, or an existing manifest has another format.
    """

    def existing() -> Artifact[M] | None:
        try:
            found = find_unaltered(kind, loop, version)
        except DamagedArtifactError:
            return None
        return found if found is not None and usable(found) else None

    found = existing()
    if found is not None:
        return found
    with draft(loop, kind.stage, version, keep=keep) as folder:
        found = existing()  # another process may have made it before this one got the lock
        if found is not None:
            return found
        return publish(folder, kind, {"loop": loop, "version": version, **make(folder)})


@contextmanager
def draft(loop: str, stage: str, version: str, *, keep: bool = False) -> Iterator[Path]:
    """Open a locked draft folder for an artifact; `publish` turns it into the artifact.

    Args:
        keep: keep the folder after an error and start from its content next time (training resumes there).

    Raises:
        ArtifactBusyError: another process is making the same version.
        ArtifactError: the disk is full; no partial artifact remains.
    """
    path = stage_folder(loop, stage) / f".draft-{version}"
    try:
        with try_lock(path, f"{stage} {version} of {loop}"):
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            try:
                yield path
            except BaseException:
                if not keep:
                    shutil.rmtree(path, ignore_errors=True)
                raise
            shutil.rmtree(path, ignore_errors=True)  # after `publish` nothing is left here
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise disk_full(path, error) from error


_DISK_FULL_MESSAGES = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "enforce fail at inline_container.cc",  # torch.save: the archive is shorter than what was written
    "requested and 0 written",  # numpy's tofile
)


def is_disk_full_message(log: str) -> bool:
    """Return whether the last output of a child process says that the disk was full."""
    return any(message in log for message in _DISK_FULL_MESSAGES)


def disk_full(path: Path, error: object) -> ArtifactError:
    """Return the error for a full disk, with the free space and what to do."""
    there = next(parent for parent in [path, *path.parents] if parent.exists())
    free = shutil.disk_usage(there).free / 1e6
    return ArtifactError(
        f"the disk is full: {path} could not be written ({free:.1f} MB free; {error}). Nothing that was complete is "
        "lost. Free some space or set FINETUNE_HOME to another disk, then run again"
    )


def publish(
    folder: Path, kind: type[M], fields: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None
) -> Artifact[M]:
    """Turn a draft into the artifact: hash and flush its files, write the manifest, rename the folder.

    Args:
        fields: the manifest's fields except `created_at` and `files`.
        known: unchanged files of an older artifact, with their hashes, so that they are not hashed again.
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
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.artifacts import record_published

    # Before the rename, so that a killed process leaves no folder that the database does not know.
    record_published(connect(), manifest.loop, manifest.stage, manifest.version, sha256, manifest.created_at)
    final, old = folder.parent / manifest.version, folder.parent / f".old-{manifest.version}"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # damaged or made again: delete it only once the new one is in place
        final.rename(old)
    folder.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return Artifact(final, manifest, sha256)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a kill leaves the old content or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, force=True) as file:
        file.write(text)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[IO[str]]:
    """Open a text file that appears under its name only when complete; a kill or an error leaves the old file.

    Raises:
        FileExistsError: the file exists and `force` is false.
        OSError: the file cannot be written.
    """
    if path.exists() and not force:
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    # The thread too: two requests of the gateway may write the same file at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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
    """Call fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_latest(manifest: Manifest, run: str) -> None:
    """Point the run and the stage's `latest` pointer to this version."""
    for name in (run, "latest"):
        write_text(_pointer(manifest.loop, name, manifest.stage), json.dumps({"version": manifest.version}) + "\n")


def get_latest(kind: type[M], loop: str, run: str = "latest") -> Artifact[M] | None:
    """Return the artifact that a run made of a stage (by default the latest), or None if there is none.

    Raises:
        ArtifactError: the artifact is missing or damaged.
    """
    path = _pointer(loop, run, kind.stage)
    if not path.exists():
        return None
    version = str(json.loads(path.read_text(encoding="utf-8"))["version"])
    return read(kind, stage_folder(loop, kind.stage) / version)


def _pointer(loop: str, run: str, stage: str) -> Path:
    return stage_folder(loop, "runs") / run / f"{stage}.json"
