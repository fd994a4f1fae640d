"""Trained models by name: model versions, and challengers, which have no version before their promotion.

A challenger is named by its SHA-256, `loop@1f0c9a2b5d7e4830` or the first six digits of it or more. It can be asked,
compared and served like a version, whatever the gate said about it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import MANIFEST, Artifact, ArtifactError, model_sha256, read, stage_folder
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.metric_table import MetricRow
from finetune_pipeline.evaluation.report import HTML, JSON, ReportError, metrics_of_report
from finetune_pipeline.manifests import AdapterManifest, GgufManifest, ReportManifest
from finetune_pipeline.pipeline.export import gguf_identity, model_spec
from finetune_pipeline.registry.champion import resolve
from finetune_pipeline.registry.comparisons import ComparisonRecord, list_comparisons
from finetune_pipeline.registry.model_versions import CandidateModel, UnknownVersionError, list_models

_HASH = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True)
class Challenger:
    """A trained model that wants to become champion.

    Attributes:
        gguf: its newest artifact of gguf_model.
        comparison: its newest evaluation; None if it was not evaluated.
    """

    gguf: Artifact[GgufManifest]
    comparison: ComparisonRecord | None

    @property
    def sha256(self) -> str:
        """SHA-256 of the GGUF, or the combined one of base and adapter."""
        return gguf_identity(self.gguf)

    @property
    def name(self) -> str:
        """The full name: `loop@` and the first 16 digits of the SHA-256."""
        return f"{self.gguf.manifest.loop}@{self.sha256[:16]}"

    @property
    def scores(self) -> dict[str, Any]:
        """Its metrics in the newest report; empty if there is none."""
        return _report_scores(self.gguf.manifest.loop, self.comparison.id) if self.comparison else {}

    @property
    def created_at(self) -> datetime:
        """When it was exported."""
        return self.gguf.manifest.created_at

    @property
    def verdict(self) -> str:
        """What the gate said, in two or three words."""
        if self.comparison is None:
            return "not evaluated"
        decisions = {"promote": "accepted by the gate", "reject": "rejected by the gate"}
        return decisions.get(self.comparison.decision, self.comparison.decision)


def list_challengers(db: Database, loop: str) -> list[Challenger]:
    """Return the trained models of a loop that were never promoted and whose files exist, newest first."""
    promoted = {model.sha256 for model in list_models(db, loop)}
    return [one for one in _all_exported(db, loop) if one.sha256 not in promoted]


def find_challenger(db: Database, name: str, loop: str) -> Challenger:
    """Return the challenger that a name refers to; a model that was promoted before may be one again.

    Args:
        name: the first digits of its SHA-256, at least six, with or without "loop@".

    Raises:
        UnknownVersionError: there is none, or there are several; the message lists them.
    """
    named, _, digits = name.rpartition("@")
    everything = _all_exported(db, loop) if named in {"", loop} and _HASH.fullmatch(digits) else []
    found = [one for one in everything if one.sha256.startswith(digits)]
    if len(found) == 1:
        return found[0]
    for model in list_models(db, loop):
        if digits in {model.version, model.version[1:]}:
            raise UnknownVersionError(
                f"{model.name} was promoted already; `finetune model switch {model.name}` makes it the champion again"
            )
    raise _unknown(loop, name, found or list_challengers(db, loop), several=bool(found))


def _all_exported(db: Database, loop: str) -> list[Challenger]:
    """Return all trained models of a loop whose files exist, newest first."""
    compared: dict[str, ComparisonRecord] = {}
    for comparison in list_comparisons(db, loop):
        compared.setdefault(comparison.challenger_sha256, comparison)
    found: dict[str, Challenger] = {}
    for exported in sorted(_exported(loop), key=lambda one: one.created_at, reverse=True):
        if exported.sha256 in found:
            continue
        try:
            gguf = read(GgufManifest, exported.folder)
        except ArtifactError:  # damaged, or of an earlier version of the project
            continue
        found[exported.sha256] = Challenger(gguf, compared.get(exported.sha256))
    return list(found.values())


def find_trained(db: Database, name: str, loop: str) -> CandidateModel | None:
    """Return the model version or challenger that a name refers to; None is the loop's base model.

    Args:
        name: as in `registry.champion.resolve`, or the first digits of a model's SHA-256, at least six.

    Raises:
        UnknownVersionError: there is none, or there are several; the message lists the known ones.
        RegistryError: the name is "previous" and there is nothing to roll back to.
        ArtifactError: the challenger's base GGUF is missing or damaged.
    """
    named, _, digits = name.rpartition("@")
    loop = named or loop
    if not _HASH.fullmatch(digits):
        return resolve(db, name, loop)
    versions = [model for model in list_models(db, loop) if model.sha256.startswith(digits)]
    known = {model.sha256 for model in versions}
    # Requests to the gateway come here, so only the manifests that match are read as such.
    newest_last = sorted(_exported(loop), key=lambda one: one.created_at)
    folders = {one.sha256: one.folder for one in newest_last if one.sha256.startswith(digits)}
    challengers = {sha256: folder for sha256, folder in folders.items() if sha256 not in known}
    if len(versions) + len(challengers) != 1:
        matching = [one for one in list_challengers(db, loop) if not challengers or one.sha256 in challengers]
        raise _unknown(loop, name, matching, several=len(versions) + len(challengers) > 1)
    if versions:
        return versions[0]
    [(sha256, folder)] = challengers.items()
    compared = next((one for one in list_comparisons(db, loop) if one.challenger_sha256 == sha256), None)
    return candidate_of(read(GgufManifest, folder), compared.id if compared else None)


def candidate_of(gguf: Artifact[GgufManifest], report: str | None) -> CandidateModel:
    """Return an exported model as the registry takes it.

    Args:
        report: version of the eval_report on it; None if it was not evaluated.

    Raises:
        ArtifactError: the base's GGUF of an adapter is missing, or not the one that it was checked with.
    """
    manifest, spec = gguf.manifest, model_spec(gguf)
    file_sha256 = manifest.files[manifest.gguf].sha256
    files: dict[str, Any] = {"gguf_path": spec.gguf, "gguf_sha256": file_sha256}
    if spec.adapter is not None:
        files |= {"gguf_sha256": manifest.base_gguf_sha256}
        files |= {"adapter_path": spec.adapter, "adapter_sha256": file_sha256}
    lineage = {
        "base_model": manifest.base_model,
        AdapterManifest.stage: manifest.adapter_version,
        GgufManifest.stage: manifest.version,
        **({ReportManifest.stage: report} if report else {}),
        "watermark": manifest.watermark,
    }
    folder = stage_folder(manifest.loop, ReportManifest.stage) / report if report else gguf.path
    return CandidateModel(
        loop=manifest.loop,
        **files,
        base_hash=manifest.base_hash,
        mode=manifest.mode,
        lineage=lineage,
        scores=_report_scores(manifest.loop, report) if report else {},
        report_path=folder / HTML,
    )


def _report_scores(loop: str, report: str) -> dict[str, Any]:
    try:
        return scores_of(metrics_of_report(stage_folder(loop, ReportManifest.stage) / report / JSON).rows)
    except (ReportError, OSError):  # deleted, or of an earlier version of the project
        return {}


def scores_of(metrics: list[MetricRow]) -> dict[str, Any]:
    """Return the challenger's metrics for the registry, without speeds that were measured on a busy machine."""
    scores = {row.key: row.challenger for row in metrics if not row.flag}
    flag = next((row.flag for row in metrics if row.flag), None)
    return {**scores, "speed_flag": flag} if flag else scores


@dataclass(frozen=True)
class _Exported:
    """What identifies an exported model, from its manifest."""

    folder: Path
    sha256: str
    created_at: str


def _exported(loop: str) -> Iterator[_Exported]:
    for path in stage_folder(loop, GgufManifest.stage).glob(f"[!.]*/{MANIFEST}"):
        try:
            document = json.loads(path.read_bytes())
            file = document["files"][document["gguf"]]["sha256"]
            base = document.get("base_gguf_sha256")
            sha256 = file if base is None else model_sha256(base, file)
            yield _Exported(path.parent, sha256, str(document["created_at"]))
        except (OSError, ValueError, KeyError, TypeError):  # deleted at this moment, or damaged
            continue


def _unknown(loop: str, name: str, challengers: list[Challenger], *, several: bool) -> UnknownVersionError:
    names = ", ".join(one.name for one in challengers[:10]) or "none"
    if several:
        return UnknownVersionError(f"the SHA-256 of several models begins with {name}: {names}; give more digits of it")
    return UnknownVersionError(
        f"loop {loop} has no challenger {name!r}; there are: {names}. `finetune model list --all` shows all models"
    )
