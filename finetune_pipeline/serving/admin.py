"""The routes for operators: health, metrics, reload, rollback."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from finetune_pipeline.registry.champion import rollback as roll_back
from finetune_pipeline.registry.model_versions import RegistryError
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.api import AdminRequest, Health, LoopHealth, ModelInService
from finetune_pipeline.serving.errors import Conflict, Unavailable
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import get_gateway, json_body, require_scope

router = APIRouter()
Body = Annotated[AdminRequest, Depends(json_body(AdminRequest))]


@router.get("/health", include_in_schema=False)
@router.get("/healthz", response_model=Health, responses={503: {"model": Health, "description": "No model answers."}})
async def healthz(request: Request) -> Response:
    """Report ok, degraded (a loop does not answer, or not with its champion), or unavailable."""
    gateway = get_gateway(request)

    def public(error: str | None) -> str | None:
        # This route needs no key, so errors, which may contain paths, are shown only on this machine.
        return error if error is None or gateway.access.open else "see the gateway's log"

    loops = {
        name: LoopHealth(
            serving=server.serving,
            last_error=public(server.problem),
            in_flight=sum(model.in_flight for model in server.loaded),
        )
        for name, server in gateway.servers.items()
    }
    recording = gateway.recorder.disk_error or gateway.recorder.store_error or gateway.recorder.dead_letter
    serving = [loop.serving is not None for loop in loops.values()]
    healthy = all(serving) and not recording and not any(loop.last_error for loop in loops.values())
    status = "ok" if healthy else "degraded" if any(serving) else "unavailable"
    health = Health(status=status, loops=loops, recording=public(recording))
    return JSONResponse(health.model_dump(), 503 if status == "unavailable" else 200)


@router.get("/metrics", dependencies=[Depends(require_scope(None))], response_class=Response)
async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' text format."""
    return Response(get_gateway(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.post("/admin/reload-model", dependencies=[Depends(require_scope("admin"))])
async def reload_model(request: Request, body: Body) -> list[ModelInService]:
    """Load the champion of one loop, or of all loops, again and change to it; 503 if one does not load."""
    gateway = get_gateway(request)
    names = list(gateway.servers) if body.loop is None else [gateway.loop_named(body.loop).name]
    errors = [str(gateway.servers[name].last_error) for name in names if not await gateway.servers[name].reload()]
    if errors:
        raise Unavailable("; ".join(errors))
    return [_model_in_service(gateway, name) for name in names]


@router.post("/admin/rollback")
async def rollback(
    request: Request, caller: Annotated[Caller, Depends(require_scope("admin"))], body: Body
) -> ModelInService:
    """Roll back to the previous champion; it serves when this returns."""
    gateway = get_gateway(request)
    settings = gateway.loop_named(body.loop)
    loop, actor = settings.name, f"gateway:{caller.name}"
    try:
        await asyncio.to_thread(roll_back, gateway.database, loop, actor, body.reason, settings.deploy.config)
    except RegistryError as error:
        raise Conflict(str(error)) from error
    await gateway.follow_champion(loop)
    return _model_in_service(gateway, loop)


def _model_in_service(gateway: Gateway, name: str) -> ModelInService:
    server = gateway.servers[name]
    serving = server.current.name if server.current else None
    return ModelInService(loop=name, serving=serving, last_error=server.last_error)
