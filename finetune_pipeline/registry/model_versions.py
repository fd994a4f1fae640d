"""Model versions: what was once promoted, under a name that never means another file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.artifacts import hash_file_cached, model_sha256
from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import model_versions
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.settings import home

_ID_LENGTH = 16
Number = tuple[int, int, int]


class RegistryError(RuntimeError):
    """The registry refuses; the message says why and what to do."""


class UnknownVersion(RegistryError):
    """No model has this name; the message lists those that there are."""


class CandidateModel(Record):
    """A GGUF, or a base's GGUF with an adapter's, that may become a model version."""

    loop: str
    gguf_path: Path = Field(description="The whole model; with an adapter, the base that it belongs to.")
    gguf_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    adapter_path: Path | None = Field(default=None, description="The LoRA adapter as GGUF, if it is not merged in.")
    adapter_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    base_hash: str = Field(description="Hash of the base model; another one begins a new major version.")
    mode: Literal["full", "incremental"]
    lineage: dict[str, Any] = Field(description="Versions of adapter, dataset and logs, and the watermark.")
    scores: dict[str, Any] = Field(description="Figures of the report, for lists.")
    report_path: Path

    @property
    def sha256(self) -> str:
        """The identity of what runs: of the file, or of both files of a pair."""
        return model_sha256(self.gguf_sha256, self.adapter_sha256)

    @property
    def id(self) -> str:
        """The registry's id of this model: the first 16 hex digits of its identity."""
        return self.sha256[:_ID_LENGTH]

    @property
    def files(self) -> dict[Path, str]:
        """Its files, each with the SHA-256 that it must have."""
        adapter = {self.adapter_path: self.adapter_sha256} if self.adapter_path and self.adapter_sha256 else {}
        return {self.gguf_path: self.gguf_sha256, **adapter}


class ModelVersion(CandidateModel):
    """A model that was promoted once, with its version."""

    version: str = Field(pattern=r"^v\d+\.\d+\.\d+$")
    created_at: UtcDatetime
    accuracy: float | None = Field(default=None, description="Quality: share right on the benchmark.")
    latency_ms: float | None = Field(default=None, description="Performance: median of an answer, when measured.")
    tokens_per_second: float | None = None
    size_bytes: int | None = None
    deployed_at: UtcDatetime | None = Field(default=None, description="When it last became champion.")
    retired_at: UtcDatetime | None = Field(default=None, description="When it last ceased to be champion.")
    deleted_at: UtcDatetime | None = Field(default=None, description="When its files were deleted.")

    @property
    def name(self) -> str:
        """Its full name, `loop@v1.2.0`."""
        return f"{self.loop}@{self.version}"


def list_models(db: Database, loop: str) -> list[ModelVersion]:
    """All versions of a loop, the newest first."""
    with db.read() as connection:
        return models_in(connection, loop)


def models_in(connection: sa.Connection, loop: str) -> list[ModelVersion]:
    """As `list_models`, within a transaction."""
    newest_first = (model_versions.c.major.desc(), model_versions.c.minor.desc(), model_versions.c.patch.desc())
    rows = connection.execute(sa.select(model_versions).where(model_versions.c.loop == loop).order_by(*newest_first))
    return [_from_row(row) for row in rows]


def model_in(connection: sa.Connection, loop: str, model_id: str) -> ModelVersion | None:
    """The model of this id, within a transaction."""
    row = connection.execute(
        sa.select(model_versions).where(model_versions.c.loop == loop, model_versions.c.id == model_id)
    ).first()
    return _from_row(row) if row else None


def version_in(connection: sa.Connection, loop: str, version: str) -> ModelVersion:
    """The model of this version ("v1.2.0", also "1.2.0"), within a transaction.

    Raises:
        UnknownVersion: there is none.
    """
    known = models_in(connection, loop)
    wanted = version if version.startswith("v") else f"v{version}"
    for model in known:
        if model.version == wanted:
            return model
    raise UnknownVersion(
        f"{loop} has no version {version!r}; there are: {_listed(model.version for model in known)}, and the names "
        "champion, previous and base"
    )


def register_in(connection: sa.Connection, candidate: CandidateModel, now: UtcDatetime) -> ModelVersion:
    """Give a candidate its version and keep it; the same file keeps the version that it has.

    Call it only while the loop's champion is locked: the next number is counted from what is there.
    """
    known = models_in(connection, candidate.loop)
    same = next((model for model in known if model.id == candidate.id), None)
    if same is None:
        number = next_number(known[0] if known else None, candidate)
        values = _to_row(candidate) | dict(zip(("major", "minor", "patch"), number, strict=True), created_at=now)
        connection.execute(sa.insert(model_versions).values(values))
        return model_in(connection, candidate.loop, candidate.id) or _vanished(candidate)
    if same.sha256 != candidate.sha256:
        raise RegistryError(f"two different GGUF files share the id {candidate.id}; export the new one again")
    # Measured again, perhaps exported to another folder: the newest evidence is the one to show.
    here = (model_versions.c.loop == candidate.loop, model_versions.c.id == candidate.id)
    values = {key: value for key, value in _to_row(candidate).items() if key in _RENEWED}
    connection.execute(sa.update(model_versions).where(*here).values(values | {"deleted_at": None}))
    return model_in(connection, candidate.loop, candidate.id) or _vanished(candidate)


def _vanished(candidate: CandidateModel) -> NoReturn:
    raise RegistryError(f"the row of {candidate.id} is not there after it was written; the database is not usable")


_RENEWED = (
    "gguf_path", "adapter_path", "scores", "report_path", "accuracy", "latency_ms", "tokens_per_second", "size_bytes"
)  # fmt: skip


def next_number(newest: ModelVersion | None, candidate: CandidateModel) -> Number:
    """The next semantic version: another base is a major step, a full training a minor one, an incremental a patch."""
    if newest is None:
        return (1, 0, 0)
    major, minor, patch = (int(part) for part in newest.version[1:].split("."))
    if candidate.base_hash != newest.base_hash:
        return (major + 1, 0, 0)
    return (major, minor + 1, 0) if candidate.mode == "full" else (major, minor, patch + 1)


def check_files(model: CandidateModel, *, again: bool = True) -> None:
    """Refuse a model whose file is not what was measured.

    Args:
        again: read the file in any case. Otherwise a file with the same size, times and inode as when it was last read
            counts as unchanged, since reading a model of several GB takes many seconds.

    Raises:
        RegistryError: it was deleted, a file of it is gone, or its content differs.
    """
    if isinstance(model, ModelVersion):
        check_not_deleted(model)
    for path, expected in model.files.items():
        try:
            found = hash_file_cached(path, force=again)
        except (FileNotFoundError, IsADirectoryError):  # or was deleted at this moment, by a run that makes room
            raise _gone(model, path) from None
        if found != expected:
            raise RegistryError(
                f"{_called(model)} cannot serve: {path} is damaged or was replaced: it is not the file that was "
                f"measured (SHA-256 {found[:16]}..., expected {expected[:16]}...); {_REMEDY}"
            )


def check_files_exist(model: CandidateModel) -> None:
    """Refuse a model without its files; looks only whether they are there.

    Raises:
        RegistryError: a file of it is gone.
    """
    for path in model.files:
        if not path.is_file():
            raise _gone(model, path)


def _gone(model: CandidateModel, path: Path) -> RegistryError:
    return RegistryError(f"{_called(model)} cannot serve: its GGUF {path} is not there; {_REMEDY}")


def check_not_deleted(model: ModelVersion) -> None:
    """Refuse a version whose files were deleted to make room.

    Raises:
        RegistryError: they were.
    """
    if model.deleted_at is not None:
        raise RegistryError(
            f"{model.name} cannot serve: its files were deleted on {model.deleted_at:%Y-%m-%d %H:%M} UTC; switch to a "
            "version that is there (`finetune model list` shows them) or to base, or train again"
        )


_REMEDY = "materialize gguf_model again, restore the file, or choose another version"


def _called(model: CandidateModel) -> str:
    return model.name if isinstance(model, ModelVersion) else f"the candidate {model.id}"


def _version(number: Number) -> str:
    return "v" + ".".join(map(str, number))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def stored_path(path: Path) -> str:
    """A path as the tables keep it: relative where it lies under `FINETUNE_HOME`, so that the folder can move."""
    path = path.expanduser().resolve()
    return str(path.relative_to(home())) if path.is_relative_to(home()) else str(path)


def located_path(text: str) -> Path:
    """The path that `stored_path` kept."""
    return home() / text


_PATHS = ("gguf_path", "adapter_path", "report_path")


def _to_row(candidate: CandidateModel) -> dict[str, Any]:
    row = candidate.model_dump(include=set(CandidateModel.model_fields))
    paths = {key: stored_path(row[key]) if row[key] else None for key in _PATHS}
    scores = candidate.scores
    figures = {
        "accuracy": scores.get("accuracy"),
        "latency_ms": scores.get("latency_p50_ms"),
        "tokens_per_second": scores.get("tokens_per_second"),
        "size_bytes": sum(path.stat().st_size for path in candidate.files if path.is_file()) or None,
    }
    return {"id": candidate.id, **row, **paths, **figures}


def _from_row(row: sa.Row[Any]) -> ModelVersion:
    values = dict(row._mapping)
    del values["id"]
    number = (values.pop("major"), values.pop("minor"), values.pop("patch"))
    paths = {key: located_path(values[key]) if values[key] else None for key in _PATHS}
    return ModelVersion(**{**values, **paths}, version=_version(number))
