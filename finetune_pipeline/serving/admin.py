"""The routes of whoever runs the gateway: health, metrics, reload, rollback."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from finetune_pipeline.registry.champion import rollback as roll_back
from finetune_pipeline.registry.model_versions import RegistryError
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.api import AdminRequest, Health, LoopHealth, Moved
from finetune_pipeline.serving.errors import Conflict
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import allow, body_of, gateway_of

router = APIRouter()


@router.get("/healthz", response_model=Health, responses={503: {"model": Health, "description": "Nothing answers."}})
async def healthz(request: Request) -> Response:
    """Whether questions are answered: ok, degraded (not all of them, or not by the champion), unavailable."""
    gateway = gateway_of(request)
    loops = {
        name: LoopHealth(
            serving=server.answering,
            trouble=_in_public(gateway, server.problem),
            in_flight=sum(one.in_flight for one in server.served),
        )
        for name, server in gateway.servers.items()
    }
    recording = gateway.recorder.full or gateway.recorder.trouble or gateway.recorder.refused
    serving = [loop.serving is not None for loop in loops.values()]
    well = all(serving) and not recording and not any(loop.trouble for loop in loops.values())
    status = "ok" if well else "degraded" if any(serving) else "unavailable"
    health = Health(status=status, loops=loops, recording=_in_public(gateway, recording))
    return JSONResponse(health.model_dump(), 503 if status == "unavailable" else 200)


@router.get("/metrics", dependencies=[Depends(allow(None))], response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(gateway_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.post("/admin/reload-model", dependencies=[Depends(allow("admin"))])
async def reload_model(request: Request, asked: Annotated[AdminRequest, Depends(body_of(AdminRequest))]) -> list[Moved]:
    """Load the champion again, beside what serves, and change over: one loop's, or every loop's."""
    gateway = gateway_of(request)
    names = list(gateway.servers) if asked.loop is None else [gateway.loop_named(asked.loop).name]
    for name in names:
        await gateway.servers[name].reload()
    return [_moved(gateway, name) for name in names]


@router.post("/admin/rollback")
async def rollback(
    request: Request,
    caller: Annotated[Caller, Depends(allow("admin"))],
    asked: Annotated[AdminRequest, Depends(body_of(AdminRequest))],
) -> Moved:
    """Bring back the champion before this one; on return it serves."""
    gateway = gateway_of(request)
    loop = gateway.loop_named(asked.loop).name
    actor = f"gateway:{caller.name}"
    try:
        await asyncio.to_thread(roll_back, gateway.database, loop, actor, asked.reason)
    except RegistryError as error:
        raise Conflict(str(error)) from error
    await gateway.follow(loop)
    return _moved(gateway, loop)


def _moved(gateway: Gateway, name: str) -> Moved:
    server = gateway.servers[name]
    return Moved(loop=name, serving=server.current.name if server.current else "nothing", trouble=server.trouble)


def _in_public(gateway: Gateway, trouble: str | None) -> str | None:
    """Whoever may ask for health without a key does not read paths."""
    return trouble if trouble is None or gateway.access.open else "see the gateway's log"
