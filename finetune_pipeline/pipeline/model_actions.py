"""What programs do with a trained model by its name: list it with everything known about it, deploy it, undo that.

A model version is deployed as `finetune model switch` does, a challenger as `finetune model promote` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from finetune_pipeline.database import Database, connect
from finetune_pipeline.deployment.target_state import TargetState
from finetune_pipeline.manifests import ReportManifest
from finetune_pipeline.pipeline.approval import name_of, pending_approval
from finetune_pipeline.pipeline.challengers import Challenger, find_challenger, find_trained, list_challengers
from finetune_pipeline.pipeline.deploy import check_config, deployment_states
from finetune_pipeline.pipeline.promote import (
    NotApproved,
    NotPromoted,
    force_challenger,
    promote_accepted,
)
from finetune_pipeline.registry.champion import BASE, champion, rollback, switch
from finetune_pipeline.registry.deployment_history import deployment_stack, list_deployments
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion, RegistryError, list_models
from finetune_pipeline.registry.requested_comparisons import ModelVotes, votes_by_model
from finetune_pipeline.settings import LoopSettings

ModelState = Literal["champion", "previous", "version", "challenger", "base"]


class NotDeployedError(RegistryError):
    """The gate, or a missing approval, keeps a challenger from being deployed; the message has the reason."""


@dataclass(frozen=True)
class TrainedModel:
    """A model version, a challenger or the base model, and what is known about it.

    Attributes:
        id: the registry's id; None for the base model.
        state: champion (serves), previous (a rollback restores it), version (promoted earlier), challenger (never
            promoted), or base (the base model, if it is none of the first two).
        verdict: what the gate, or a person, said about a challenger; empty for others.
        reason: of the gate's verdict on the newest comparison; empty if there is none.
        report: version of the newest report; None if there is none.
        targets: where it stands at the deployment targets: all of them for the champion, those that serve it for
            others.
    """

    name: str
    id: str | None
    version: str | None
    sha256: str | None
    state: ModelState
    verdict: str
    reason: str
    report: str | None
    scores: Mapping[str, Any]
    size_bytes: int | None
    created_at: datetime | None
    deployed_at: datetime | None
    retired_at: datetime | None
    archived_at: datetime | None
    deleted_at: datetime | None
    votes: ModelVotes
    targets: tuple[TargetState, ...]


def trained_models(loop: LoopSettings, db: Database) -> list[TrainedModel]:
    """Return all models of a loop: challengers, then versions, each newest first, then the base model."""
    serving = champion(db, loop.name)
    served = serving.id if serving else None
    stack = deployment_stack(list_deployments(db, loop.name))
    states: dict[str | None, ModelState] = {**dict.fromkeys(stack[-2:-1], "previous"), served: "champion"}
    votes, targets, pending = votes_by_model(db, loop.name), deployment_states(loop, db), pending_approval(loop, db)

    def at_targets(id: str | None, label: str) -> tuple[TargetState, ...]:
        return tuple(one for one in targets if id == served or one.observed == label)

    def of_challenger(one: Challenger) -> TrainedModel:
        id, compared = one.sha256[:16], one.comparison
        waits = pending is not None and pending.approval.challenger_sha256 == one.sha256
        return TrainedModel(
            name=one.name, id=id, version=None, sha256=one.sha256, state="challenger",
            verdict=pending.state if pending and waits else one.verdict, reason=compared.reason if compared else "",
            report=compared.id if compared else None, scores=one.scores,
            size_bytes=sum(file.size for file in one.gguf.manifest.files.values()), created_at=one.created_at,
            deployed_at=None, retired_at=None, archived_at=None, deleted_at=None,
            votes=votes.get(id, ModelVotes()), targets=at_targets(id, id),
        )  # fmt: skip

    def of_version(one: ModelVersion) -> TrainedModel:
        return TrainedModel(
            name=one.name, id=one.id, version=one.version, sha256=one.sha256, state=states.get(one.id, "version"),
            verdict="", reason="", report=one.lineage.get(ReportManifest.stage), scores=one.scores,
            size_bytes=one.size_bytes, created_at=one.created_at, deployed_at=one.deployed_at,
            retired_at=one.retired_at, archived_at=one.archived_at, deleted_at=one.deleted_at,
            votes=votes.get(one.id, ModelVotes()), targets=at_targets(one.id, one.version),
        )  # fmt: skip

    base = TrainedModel(
        name=f"{loop.name}@{BASE}", id=None, version=None, sha256=None, state=states.get(None, "base"), verdict="",
        reason="", report=None, scores={}, size_bytes=None, created_at=None, deployed_at=None, retired_at=None,
        archived_at=None, deleted_at=None, votes=votes.get(None, ModelVotes()), targets=at_targets(None, BASE),
    )  # fmt: skip
    challengers = [of_challenger(one) for one in list_challengers(db, loop.name)]
    return [*challengers, *(of_version(one) for one in list_models(db, loop.name)), base]


def find_trained_model(loop: LoopSettings, db: Database, name: str) -> TrainedModel:
    """Return the model that a name refers to, with what is known about it.

    Raises:
        UnknownVersionError: there is none; the message lists the known ones.
    """
    found = find_trained(db, name, loop.name)
    return next(one for one in trained_models(loop, db) if one.id == (found.id if found else None))


def deploy_model(
    loop: LoopSettings,
    name: str,
    actor: str,
    reason: str,
    log: Callable[[str], None],
    *,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> ModelVersion | None:
    """Make a model the champion: a challenger by the gate and all blocking checks, a version or the base as it is.

    A model that serves already, with this `config`, stays as it is.

    Args:
        name: as in `challengers.find_trained`.
        actor: who deploys, for the deployment history.
        reason: for the history; a promotion that the gate justifies has the gate's reason too.
        config: `deployment_config`, which stays in effect over `deploy.config` until the loop's next deployment.
        force: overrule the gate or a missing approval. Failed blocking checks still stop it.

    Returns:
        The champion; None for the base model.

    Raises:
        UnknownVersionError: there is no such model.
        ConfigRefused: a deployment target cannot apply a setting.
        NotDeployedError: the gate does not accept the challenger, or nobody approved it.
        ArtifactError, RegistryError: see `promote_accepted`, `force_challenger` and `switch`.
    """
    db = connect()
    found = find_trained(db, name, loop.name)
    check_config(loop, found, config or {})
    if found is None or isinstance(found, ModelVersion):
        return switch(db, loop.name, found.version if found else BASE, actor, reason, loop.deploy.config, config)
    challenger = find_challenger(db, found.id, loop.name)
    if force:
        return force_challenger(loop, challenger, actor, reason, config, log)
    result = promote_accepted(loop, challenger, actor, log, config, reason)
    if isinstance(result, NotPromoted):
        raise NotDeployedError(f"{challenger.name}: {result.reason}")
    if isinstance(result, NotApproved):
        asked = result.approval
        why = f": rejected by {asked.actor}: {asked.reason}" if asked.state == "rejected" else ""
        raise NotDeployedError(f"{name_of(asked)} needs an approval{why}")
    return result.model


def rollback_model(loop: LoopSettings, name: str, actor: str, reason: str) -> ModelVersion | None:
    """Undo the deployment of a model that serves, and return the restored champion; None for the base model.

    Raises:
        UnknownVersionError: there is no such model.
        ChampionChangedError: another model serves; nothing was changed.
        RegistryError: there is nothing to roll back to, or the files of the previous champion differ.
    """
    db = connect()
    found: CandidateModel | None = find_trained(db, name, loop.name)
    serving = found.name if found else f"{loop.name}@{BASE}"
    return rollback(db, loop.name, actor, reason, loop.deploy.config, serving)
