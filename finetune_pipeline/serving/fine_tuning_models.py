"""The fine-tuning API's models: list, deploy, roll back, approve and archive them, and the deployment history.

The routes call the same functions as `finetune model`. Whoever changes what serves needs the scope admin.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.config import JsonDict

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.feedback.statistics import use_statistics
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.pipeline.approval import name_of, pending_approval, reject_challenger
from finetune_pipeline.pipeline.challengers import find_challenger
from finetune_pipeline.pipeline.deploy import ConfigRefused
from finetune_pipeline.pipeline.model_actions import (
    ModelState,
    NotDeployedError,
    TrainedModel,
    deploy_model,
    find_trained_model,
    rollback_model,
    trained_models,
)
from finetune_pipeline.pipeline.promote import approve_challenger
from finetune_pipeline.records import ShortText, Text
from finetune_pipeline.registry.champion import archive, unarchive
from finetune_pipeline.registry.deployment_history import Action, Deployment, list_history
from finetune_pipeline.registry.model_versions import RegistryError, UnknownVersionError, list_models
from finetune_pipeline.serving import api
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.errors import BadRequest, Conflict, NotFound, Unavailable
from finetune_pipeline.serving.fine_tuning import Admin, Reader, page_of
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import get_gateway, json_body
from finetune_pipeline.serving.routing import without_suffix
from finetune_pipeline.settings import LoopSettings

MODELS_PATH, DEPLOYMENTS_PATH = "/v1/fine-tuning/models", "/v1/fine-tuning/deployments"
_MODEL_PATH = MODELS_PATH + "/{model_id}"

router = APIRouter()
ModelName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]*$", max_length=200)]
"""`loop@v1.2.0`, `loop@champion`, `loop@base`, or `loop@` and the first digits of a SHA-256, as a job names its model.

If one loop is served, `loop@` may be left out.
"""

Reason = Annotated[Text, Field(min_length=1, max_length=500)]

_log = logging.getLogger(__name__)


# --- Schemas ----------------------------------------------------------------------------------------------------------


_FORCE_WITHOUT_REASON: JsonDict = {
    "properties": {"force": {"const": True}, "reason": {"type": "null"}},
    "required": ["force"],
}


class DeployRequest(api.Request):
    """POST /v1/fine-tuning/models/{id}/deploy."""

    model_config = ConfigDict(json_schema_extra={"not": _FORCE_WITHOUT_REASON})

    deployment_config: dict[Annotated[ShortText, Field(min_length=1)], JsonValue] | None = Field(
        default=None,
        max_length=50,
        description="Settings of the servers by their own names, over the loop's deploy.config. They stay in effect "
        "until the loop's next deployment.",
    )
    reason: Reason | None = Field(default=None, description="Recorded in the history; needed with force.")
    notes: Reason | None = Field(default=None, description="Recorded in the history after the reason.")
    force: bool = Field(
        default=False,
        description="Deploy a challenger although the gate or a person did not accept it. Failed blocking checks of "
        "its dataset or GGUF still stop it.",
    )


class DecisionRequest(api.Request):
    """A decision about a model."""

    reason: Reason = Field(description="Recorded in the history, with the key's name.")


class RollbackRequest(api.Request):
    """POST /v1/fine-tuning/models/{id}/rollback."""

    reason: Reason = Field(default="rolled back through the API", description="Recorded in the history.")


class ApproveRequest(api.AdminRequest):
    """POST /admin/approve."""

    model: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="The challenger, `loop@` and digits of its SHA-256; default: the one that waits."
    )
    reason: Reason = Field(description="Recorded in the history, with the key's name.")


class ModelOnTarget(BaseModel):
    """Where a model stands at a deployment target."""

    target: str
    state: str = Field(description="pending, active, failed, rejected or drifted.")
    wanted: str = Field(description="Version that it should serve.")
    observed: str | None = Field(description="Version that it served when it was last asked.")
    last_error: str
    start_command: str | None = Field(description="Starts the server with the deployment's settings, if it needs that.")


class VotesOnModel(BaseModel):
    """Blind votes on pairs with an answer of the model."""

    won: int
    lost: int
    tied: int


class UseOfModel(BaseModel):
    """What was said about the model's answers in use."""

    answers: int
    won: int = Field(description="Confirmed, or rated above neutral.")
    lost: int = Field(description="Corrected, or rated below neutral.")
    tied: int
    win_rate: float | None = Field(description="Won of those that are not tied.")
    gold_star_rate: float | None = Field(description="Gold stars of all ratings.")
    average_rating: float | None
    average_reward: float | None


class FineTunedModel(BaseModel):
    """A model version, a challenger, or the base model."""

    id: str = Field(description="The name under which it answers.")
    object: Literal["fine_tuning.model"] = "fine_tuning.model"
    loop: str
    version: str | None
    sha256: str | None
    state: ModelState = Field(
        description="champion: serves; previous: a rollback restores it; version: promoted earlier; challenger: never "
        "promoted; base: the base model, if it does not serve."
    )
    serving: bool = Field(description="Whether this gateway answers with it by the loop's name now.")
    verdict: str = Field(description="What the gate, or a person, said about a challenger; empty for others.")
    reason: str = Field(description="Of the gate's verdict.")
    report: str | None = Field(description="Version of the report that judges it.")
    accuracy: float | None = Field(description="Score on the benchmark, 0 to 1.")
    scores: dict[str, Any]
    size_bytes: int | None
    win_rate: float | None = Field(description="Won blind votes of those that are not tied.")
    gold_star_rate: float | None = Field(description="Gold stars of all ratings of its answers.")
    votes: VotesOnModel
    use: UseOfModel
    targets: list[ModelOnTarget]
    created_at: datetime | None
    deployed_at: datetime | None
    retired_at: datetime | None
    archived_at: datetime | None
    deleted_at: datetime | None


class FineTunedModelList(BaseModel):
    """Models, challengers first, then versions, each newest first, then the base model; loop by loop."""

    object: Literal["list"] = "list"
    data: list[FineTunedModel]
    has_more: bool


class DeploymentEntry(BaseModel):
    """One change of a loop's champion, or a decision about a model."""

    id: int
    object: Literal["fine_tuning.deployment"] = "fine_tuning.deployment"
    loop: str
    action: Action
    model: str
    previous: str = Field(description="The champion before.")
    actor: str = Field(description="Who: the OS user, `gateway:` and the key's name, or dagster.")
    reason: str
    comparison_id: str | None
    created_at: datetime
    deployment_config: dict[str, Any] | None = Field(description="Settings of the servers with which it was made.")
    requested_config: dict[str, Any] | None = Field(description="The part of them that came with the request.")


class DeploymentList(BaseModel):
    """Deployments and decisions, newest first."""

    object: Literal["list"] = "list"
    data: list[DeploymentEntry]
    has_more: bool


class DeployedModel(BaseModel):
    """What serves after a deployment, a rollback or an approval."""

    model: FineTunedModel
    deployment: DeploymentEntry | None = Field(description="The newest entry of the history; null if there is none.")
    last_error: str | None = Field(description="Why this gateway does not serve it; null if it does.")


BODIES: dict[str, type[BaseModel]] = {
    f"{_MODEL_PATH}/deploy": DeployRequest,
    f"{_MODEL_PATH}/rollback": RollbackRequest,
    **{f"{_MODEL_PATH}/{decision}": DecisionRequest for decision in ("approve", "reject", "archive", "unarchive")},
    "/admin/approve": ApproveRequest,
}
"""The body of each POST."""


# --- Models -----------------------------------------------------------------------------------------------------------


@router.get(MODELS_PATH)
async def list_fine_tuned_models(
    request: Request,
    _: Reader,
    loop: Annotated[str | None, Query(max_length=60)] = None,
    state: ModelState | None = None,
    verdict: Annotated[str | None, Query(max_length=100)] = None,
    archived: bool = False,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> FineTunedModelList:
    """List the trained models with scores, win rate, gold stars, sizes and where they are deployed.

    `verdict` selects challengers, such as "accepted by the gate". Archived versions are listed with `archived=true`.
    """
    gateway = get_gateway(request)
    loops = [gateway.loop_named(loop)] if loop is not None else list(gateway.loops.values())

    def read() -> FineTunedModelList:
        found = [
            (settings, one)
            for settings in loops
            for one in trained_models(settings, gateway.database)
            if state in (None, one.state) and verdict in (None, one.verdict) and (archived or one.archived_at is None)
        ]
        page, has_more = page_of(found, after, limit, lambda pair: pair[1].name)
        return FineTunedModelList(data=[_model(gateway, *pair) for pair in page], has_more=has_more)

    return await asyncio.to_thread(read)


@router.get(_MODEL_PATH)
async def retrieve_fine_tuned_model(request: Request, _: Reader, model_id: ModelName) -> FineTunedModel:
    """Return one model."""
    gateway = get_gateway(request)

    def read() -> FineTunedModel:
        loop, name = named_model(gateway, model_id)
        with model_errors():
            return _model(gateway, loop, find_trained_model(loop, gateway.database, name))

    return await asyncio.to_thread(read)


@router.post(_MODEL_PATH + "/deploy")
async def deploy_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[DeployRequest, Depends(json_body(DeployRequest))],
) -> DeployedModel:
    """Make a model the champion; it serves when this returns, and the deployment targets follow.

    A challenger has to pass the gate and all blocking checks, or it is 409 with the reason; `force` with a reason
    overrules the gate. A version or the base model is deployed again as it is. A repeated request changes nothing.
    """
    if body.force and body.reason is None:
        raise BadRequest(
            "reason: is needed with force; the history records why the gate was overruled.", param="reason"
        )
    reason = "; ".join(filter(None, (body.reason, body.notes)))
    config = body.deployment_config or None

    def deploy(loop: LoopSettings, name: str) -> None:
        said = reason or "deployed through the API"
        deploy_model(loop, name, actor_of(caller), said, _log.info, config=config, force=body.force)

    return await _change(request, model_id, deploy)


@router.post(_MODEL_PATH + "/rollback")
async def roll_back_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[RollbackRequest, Depends(json_body(RollbackRequest))],
) -> DeployedModel:
    """Undo the deployment of the model that serves: the previous champion is restored and serves when this returns.

    409 if another model serves, so a repeated request does not go one more step back.
    """
    return await _change(
        request, model_id, lambda loop, name: rollback_model(loop, name, actor_of(caller), body.reason)
    )


@router.post(_MODEL_PATH + "/approve")
async def approve_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[DecisionRequest, Depends(json_body(DecisionRequest))],
) -> DeployedModel:
    """Approve a challenger that the gate accepted; it serves when this returns.

    409 if the gate did not accept it, or if something that the approval is for changed since it was evaluated.
    """
    return await _approve(request, caller, model_id, body.reason)


@router.post(_MODEL_PATH + "/reject")
async def reject_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[DecisionRequest, Depends(json_body(DecisionRequest))],
) -> FineTunedModel:
    """Reject a challenger that waits for approval; the champion stays."""
    gateway = get_gateway(request)

    def reject(loop: LoopSettings, name: str) -> None:
        challenger = find_challenger(gateway.database, name, loop.name)
        reject_challenger(gateway.database, loop, challenger, actor_of(caller), body.reason)

    return await _decide(gateway, model_id, reject)


@router.post(_MODEL_PATH + "/archive")
async def archive_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[DecisionRequest, Depends(json_body(DecisionRequest))],
) -> FineTunedModel:
    """Hide a version from lists; its files and history stay. 409 for the champion and what a rollback would restore."""
    gateway = get_gateway(request)
    return await _decide(
        gateway,
        model_id,
        lambda loop, name: archive(gateway.database, loop.name, name, actor_of(caller), body.reason),
    )


@router.post(_MODEL_PATH + "/unarchive")
async def unarchive_fine_tuned_model(
    request: Request,
    caller: Admin,
    model_id: ModelName,
    body: Annotated[DecisionRequest, Depends(json_body(DecisionRequest))],
) -> FineTunedModel:
    """Show an archived version in lists again."""
    gateway = get_gateway(request)
    return await _decide(
        gateway,
        model_id,
        lambda loop, name: unarchive(gateway.database, loop.name, name, actor_of(caller), body.reason),
    )


@router.get(DEPLOYMENTS_PATH)
async def list_fine_tuning_deployments(
    request: Request,
    _: Reader,
    loop: Annotated[str | None, Query(max_length=60)] = None,
    after: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DeploymentList:
    """List all deployments, and what people decided about models: who, when, why; newest first."""
    gateway = get_gateway(request)
    loops = [gateway.loop_named(loop)] if loop is not None else list(gateway.loops.values())

    def read() -> DeploymentList:
        found = [entry for settings in loops for entry in _entries(gateway, settings.name)]
        found.sort(key=lambda entry: -entry.id)
        page, has_more = page_of(found, after, limit)
        return DeploymentList(data=page, has_more=has_more)

    return await asyncio.to_thread(read)


@router.post("/admin/approve")
async def approve_waiting_model(
    request: Request, caller: Admin, body: Annotated[ApproveRequest, Depends(json_body(ApproveRequest))]
) -> DeployedModel:
    """Approve the challenger that waits, or the one that is named; it serves when this returns."""
    gateway = get_gateway(request)
    settings = gateway.loop_named(body.loop)

    def waiting() -> str:
        pending = pending_approval(settings, gateway.database)
        if pending is None:
            raise Conflict(f"No challenger of {settings.name} waits for approval; GET {MODELS_PATH} lists all models.")
        return name_of(pending.approval)

    named = body.model if body.model is not None else await asyncio.to_thread(waiting)
    loop_name = named.rpartition("@")[0]
    if loop_name and gateway.names.get(loop_name) != settings.name:
        raise NotFound(f"model: {named[:100]!r} is no model of {settings.name}.", param="model")
    return await _approve(request, caller, f"{settings.name}@{named.rpartition('@')[2]}", body.reason)


# --- Requests ---------------------------------------------------------------------------------------------------------


def actor_of(caller: Caller) -> str:
    """Return the name of a caller for the deployment history, which has the names of OS users too."""
    return f"gateway:{caller.name}"


def named_model(gateway: Gateway, model_id: str) -> tuple[LoopSettings, str]:
    """Return the loop of a model, and the model's name with the loop's.

    Raises:
        NotFound: the loop is not served, or several are and the name has none.
    """
    loop, _, label = model_id.rpartition("@")
    if not loop and len(gateway.loops) > 1:
        raise NotFound(
            f"{model_id[:100]!r} names no loop, and several are served ({', '.join(gateway.loops)}); name the model as "
            "LOOP@VERSION.",
            param="model_id",
        )
    settings = gateway.loop_named(loop or None)
    return settings, f"{settings.name}@{without_suffix(label)}"


@contextmanager
def model_errors() -> Iterator[None]:
    """Turn errors of the registry, artifacts and models into responses."""
    try:
        yield
    except UnknownVersionError as error:
        raise NotFound(f"{error}.", param="model_id") from error
    except ConfigRefused as error:
        param = f"deployment_config.{error.key}" if error.key else "deployment_config"
        raise BadRequest(f"deployment_config: {error}.", param=param[:200]) from error
    except NotDeployedError as error:
        reason = str(error).replace("\n", "; ")
        raise Conflict(f"{reason}. Send force: true with a reason to overrule that.") from error
    except (RegistryError, ArtifactError, ComparisonError) as error:
        raise Conflict(f"{error}.") from error
    except EngineError as error:
        raise Unavailable("The model cannot answer", detail=error, retry_after=30) from error


Deploy = Callable[[LoopSettings, str], Any]


async def _change(request: Request, model_id: str, change: Deploy) -> DeployedModel:
    """Change the champion, follow it, and return what serves then."""
    gateway = get_gateway(request)

    def apply() -> LoopSettings:
        loop, name = named_model(gateway, model_id)
        with model_errors():
            change(loop, name)
        return loop

    loop = await asyncio.to_thread(apply)
    await gateway.follow_champion(loop.name)

    def read() -> DeployedModel:
        serving = find_trained_model(loop, gateway.database, f"{loop.name}@champion")
        entries = _entries(gateway, loop.name)
        error = gateway.servers[loop.name].last_error
        return DeployedModel(
            model=_model(gateway, loop, serving),
            deployment=entries[-1] if entries else None,
            last_error=str(error) if error else None,
        )

    return await asyncio.to_thread(read)


async def _approve(request: Request, caller: Caller, model_id: str, reason: str) -> DeployedModel:
    def approve(loop: LoopSettings, name: str) -> None:
        challenger = find_challenger(get_gateway(request).database, name, loop.name)
        approve_challenger(loop, challenger, actor_of(caller), reason, _log.info)

    return await _change(request, model_id, approve)


async def _decide(gateway: Gateway, model_id: str, decide: Deploy) -> FineTunedModel:
    def apply() -> FineTunedModel:
        loop, name = named_model(gateway, model_id)
        with model_errors():
            decide(loop, name)
            return _model(gateway, loop, find_trained_model(loop, gateway.database, name))

    return await asyncio.to_thread(apply)


# --- Responses --------------------------------------------------------------------------------------------------------


def _model(gateway: Gateway, loop: LoopSettings, one: TrainedModel) -> FineTunedModel:
    with gateway.database.read() as connection:
        use = use_statistics(connection, loop.name, one.name)
    current = gateway.servers[loop.name].current
    fields = ("version", "sha256", "state", "verdict", "reason", "report", "size_bytes", "created_at", "deployed_at",
              "retired_at", "archived_at", "deleted_at")  # fmt: skip
    return FineTunedModel(
        id=one.name,
        loop=loop.name,
        serving=current is not None and current.name == one.name,
        accuracy=one.scores.get("accuracy"),
        scores=dict(one.scores),
        win_rate=one.votes.win_rate,
        gold_star_rate=use.gold_rate,
        votes=VotesOnModel(won=one.votes.won, lost=one.votes.lost, tied=one.votes.tied),
        use=UseOfModel(
            answers=use.answers,
            won=use.won,
            lost=use.lost,
            tied=use.tied,
            win_rate=use.win_rate,
            gold_star_rate=use.gold_rate,
            average_rating=use.average_rating,
            average_reward=use.average_reward,
        ),
        targets=[
            ModelOnTarget(
                **target.model_dump(include={"target", "state", "wanted", "observed", "last_error"}),
                start_command=target.facts.get("start_command"),
            )
            for target in one.targets
        ],
        **{name: getattr(one, name) for name in fields},
    )


def _entries(gateway: Gateway, loop: str) -> list[DeploymentEntry]:
    """Return a loop's history, oldest first."""
    names = {model.id: model.name for model in list_models(gateway.database, loop)}

    def name(id: str | None) -> str:
        return names.get(id or "", f"{loop}@{id or 'base'}")

    def entry(one: Deployment) -> DeploymentEntry:
        return DeploymentEntry(
            **one.model_dump(exclude={"model_id", "previous_id", "config"}),
            model=name(one.model_id),
            previous=name(one.previous_id),
            deployment_config=one.config,
        )

    return [entry(one) for one in list_history(gateway.database, loop)]
