"""Model versions: every promoted model, under a name that never refers to another file."""

from pathlib import Path
from typing import Any, Literal

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
    """The registry rejects an operation; the message names the reason and the remedy."""


class UnknownVersionError(RegistryError):
    """No model has this version; the message lists the known ones."""


def model_id_of(sha256: str) -> str:
    """Return the registry's id of a model with this hash."""
    return sha256[:_ID_LENGTH]


class CandidateModel(Record):
    """A GGUF, or a base's GGUF with an adapter's, that may become a model version."""

    loop: str
    gguf_path: Path = Field(description="The whole model; with an adapter, the base's GGUF.")
    gguf_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    adapter_path: Path | None = Field(default=None, description="The LoRA adapter as GGUF, if it is not merged.")
    adapter_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    base_hash: str = Field(description="Hash of the base model; another one starts a new major version.")
    mode: Literal["full", "incremental"]
    lineage: dict[str, Any] = Field(description="Versions of adapter, dataset and logs, and the watermark.")
    scores: dict[str, Any] = Field(description="Metrics of the report, for lists.")
    report_path: Path

    @property
    def sha256(self) -> str:
        """SHA-256 of the GGUF, or the combined one of base and adapter."""
        return model_sha256(self.gguf_sha256, self.adapter_sha256)

    @property
    def id(self) -> str:
        """The registry's id of this model: the first 16 hex digits of `sha256`."""
        return model_id_of(self.sha256)

    @property
    def name(self) -> str:
        """The full name, `loop@` and the id: it has no version before its promotion."""
        return f"{self.loop}@{self.id}"

    @property
    def files(self) -> dict[Path, str]:
        """The files, each with its expected SHA-256."""
        adapter = {self.adapter_path: self.adapter_sha256} if self.adapter_path and self.adapter_sha256 else {}
        return {self.gguf_path: self.gguf_sha256, **adapter}

    @property
    def display_name(self) -> str:
        """Name for messages."""
        return f"the candidate {self.id}"


class ModelVersion(CandidateModel):
    """A promoted model and its version."""

    version: str = Field(pattern=r"^v\d+\.\d+\.\d+$")
    created_at: UtcDatetime
    accuracy: float | None = Field(default=None, description="Score on the benchmark, 0 to 1.")
    latency_ms: float | None = Field(default=None, description="Median latency of an answer, if measured.")
    tokens_per_second: float | None = None
    size_bytes: int | None = None
    deployed_at: UtcDatetime | None = Field(default=None, description="When it last became champion.")
    retired_at: UtcDatetime | None = Field(default=None, description="When it last ceased to be champion.")
    deleted_at: UtcDatetime | None = Field(default=None, description="When its files were deleted.")
    archived_at: UtcDatetime | None = Field(default=None, description="When it was hidden from lists.")

    @property
    def name(self) -> str:
        """The full name, `loop@v1.2.0`."""
        return f"{self.loop}@{self.version}"

    @property
    def display_name(self) -> str:
        """Name for messages."""
        return self.name


def list_models(db: Database, loop: str) -> list[ModelVersion]:
    """Return all versions of a loop, newest first."""
    with db.read() as connection:
        return models_in(connection, loop)


def models_in(connection: sa.Connection, loop: str) -> list[ModelVersion]:
    """Return all versions of a loop, newest first, within a transaction."""
    newest_first = (model_versions.c.major.desc(), model_versions.c.minor.desc(), model_versions.c.patch.desc())
    rows = connection.execute(sa.select(model_versions).where(model_versions.c.loop == loop).order_by(*newest_first))
    return [_from_row(row) for row in rows]


def model_in(connection: sa.Connection, loop: str, model_id: str) -> ModelVersion | None:
    """Return the model with this id, within a transaction."""
    query = sa.select(model_versions).where(model_versions.c.loop == loop, model_versions.c.id == model_id)
    row = connection.execute(query).first()
    return _from_row(row) if row else None


def version_in(connection: sa.Connection, loop: str, version: str) -> ModelVersion:
    """Return the model with this version ("v1.2.0" or "1.2.0"), within a transaction.

    Raises:
        UnknownVersionError: there is none.
    """
    known = models_in(connection, loop)
    wanted = version if version.startswith("v") else f"v{version}"
    for model in known:
        if model.version == wanted:
            return model
    raise UnknownVersionError(
        f"loop {loop} has no version {version!r}; there are: {', '.join(model.version for model in known) or 'none'}, "
        "and the names champion, previous and base"
    )


def register_in(connection: sa.Connection, candidate: CandidateModel, now: UtcDatetime) -> ModelVersion:
    """Register a candidate under the next version; a registered model keeps its version.

    Call it only while the loop's champion is locked, so that no other transaction takes the same version.
    """
    known = models_in(connection, candidate.loop)
    same = next((model for model in known if model.id == candidate.id), None)
    row = _to_row(candidate)
    if same is None:
        number = next_number(known[0] if known else None, candidate)
        numbers = dict(zip(("major", "minor", "patch"), number, strict=True))
        connection.execute(sa.insert(model_versions).values({**row, **numbers, "created_at": now}))
    elif same.sha256 != candidate.sha256:
        raise RegistryError(f"two different GGUF files have the id {candidate.id}; export the new one again")
    else:
        # It was evaluated again, perhaps after an export to another folder: show the newest evaluation.
        here = (model_versions.c.loop == candidate.loop, model_versions.c.id == candidate.id)
        values = {key: value for key, value in row.items() if key in _UPDATED}
        connection.execute(sa.update(model_versions).where(*here).values({**values, "deleted_at": None}))
    model = model_in(connection, candidate.loop, candidate.id)
    if model is None:
        raise RegistryError(f"the row of {candidate.id} is missing after it was written; the database is not usable")
    return model


_UPDATED = (
    "gguf_path", "adapter_path", "scores", "report_path", "accuracy", "latency_ms", "tokens_per_second", "size_bytes"
)  # fmt: skip


def next_number(newest: ModelVersion | None, candidate: CandidateModel) -> Number:
    """Return the next semantic version: major for another base, minor for full, patch for incremental training."""
    if newest is None:
        return (1, 0, 0)
    major, minor, patch = (int(part) for part in newest.version[1:].split("."))
    if candidate.base_hash != newest.base_hash:
        return (major + 1, 0, 0)
    return (major, minor + 1, 0) if candidate.mode == "full" else (major, minor, patch + 1)


def check_files(model: CandidateModel, *, again: bool = True) -> None:
    """Raise an error unless the model's files are the evaluated ones.

    Args:
        again: hash the files in any case. Otherwise a file with unchanged size, times and inode is not read again,
            since reading a model of several GB takes many seconds.

    Raises:
        RegistryError: the model was deleted, or a file is missing or differs.
    """
    if isinstance(model, ModelVersion):
        check_not_deleted(model)
    for path, expected in model.files.items():
        try:
            found = hash_file_cached(path, force=again)
        except (FileNotFoundError, IsADirectoryError):  # perhaps deleted at this moment, by garbage collection
            raise _missing(model, path) from None
        if found != expected:
            raise RegistryError(
                f"{model.display_name} cannot serve: {path} is damaged or was replaced: its SHA-256 is "
                f"{found[:16]}..., expected {expected[:16]}... of the evaluated file; {_REMEDY}"
            )


def check_files_exist(model: CandidateModel) -> None:
    """Raise an error unless the model's files exist; does not read them.

    Raises:
        RegistryError: a file is missing.
    """
    for path in model.files:
        if not path.is_file():
            raise _missing(model, path)


def check_not_deleted(model: ModelVersion) -> None:
    """Raise an error if the model's files were deleted by garbage collection.

    Raises:
        RegistryError: they were deleted.
    """
    if model.deleted_at is not None:
        raise RegistryError(
            f"{model.name} cannot serve: its files were deleted on {model.deleted_at:%Y-%m-%d %H:%M} UTC; switch to an "
            "existing version (`finetune model list` shows them) or to base, or train again"
        )


_REMEDY = "materialize gguf_model again, restore the file, or choose another version"


def _missing(model: CandidateModel, path: Path) -> RegistryError:
    return RegistryError(f"{model.display_name} cannot serve: its GGUF {path} does not exist; {_REMEDY}")


def stored_path(path: Path) -> str:
    """Return a path as the tables store it: relative if it is under `FINETUNE_HOME`, so that the folder can move.

    A link stays one: the GGUF of a base model that is a GGUF itself is a link in its artifact's folder.
    """
    path = path.expanduser()
    path = path.parent.resolve() / path.name
    return str(path.relative_to(home())) if path.is_relative_to(home()) else str(path)


def absolute_path(text: str) -> Path:
    """Return the path that `stored_path` stored."""
    return home() / text


_PATHS = ("gguf_path", "adapter_path", "report_path")


def _to_row(candidate: CandidateModel) -> dict[str, Any]:
    row = candidate.model_dump(include=set(CandidateModel.model_fields))
    paths = {key: stored_path(row[key]) if row[key] else None for key in _PATHS}
    scores = candidate.scores
    metrics = {
        "accuracy": scores.get("accuracy"),
        "latency_ms": scores.get("latency_p50_ms"),
        "tokens_per_second": scores.get("tokens_per_second"),
        "size_bytes": sum(path.stat().st_size for path in candidate.files if path.is_file()) or None,
    }
    return {"id": candidate.id, **row, **paths, **metrics}


def _from_row(row: sa.Row[Any]) -> ModelVersion:
    values = dict(row._mapping)
    del values["id"]
    version = f"v{values.pop('major')}.{values.pop('minor')}.{values.pop('patch')}"
    paths = {key: absolute_path(values[key]) if values[key] else None for key in _PATHS}
    return ModelVersion(**{**values, **paths}, version=version)
