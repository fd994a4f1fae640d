"""The gateway as an ASGI application, and how it is run."""

import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from finetune_pipeline.database import DatabaseError
from finetune_pipeline.serving import admin, completions, feedback
from finetune_pipeline.serving.api import (
    AdminRequest,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    FeedbackIn,
    InteractionIn,
)
from finetune_pipeline.serving.errors import BadRequest, GatewayError, NotFound, Unavailable
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import ClientGone, Guard, error_response, gateway_of

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/feedback": FeedbackIn,
    "/v1/interactions": InteractionIn,
    "/admin/reload-model": AdminRequest,
    "/admin/rollback": AdminRequest,
}
"""What is read from the body of a POST; the routes read it themselves, strictly, so the description is made here."""

SWITCH_SECONDS = 0.001
"""After so long the thread that records lets the one that answers go on; Python's default is 0.005."""

REFERENCE = "#/components/schemas/{model}"


class MethodNotAllowed(GatewayError):
    """The path is there, for another method."""

    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


def create_app(gateway: Gateway) -> ASGIApp:
    """The application of a gateway, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    app = FastAPIOffline(
        title="finetune-pipeline gateway",
        description="OpenAI-compatible answers by the promoted models, and feedback on them.",
        version=metadata.version("finetune-pipeline"),
        lifespan=lifespan,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "Not answered, and why."}},
    )
    app.state.gateway = gateway
    for router in (completions.router, feedback.router, admin.router):
        app.include_router(router)
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    for kind in (DatabaseError, sa.exc.OperationalError, sa.exc.TimeoutError):
        app.add_exception_handler(kind, _database_away)
    app.add_exception_handler(Exception, _fault)
    app.openapi = _described(app)  # type: ignore[method-assign]
    return Guard(app, gateway)


def run(gateway: Gateway, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; answers that are being given then are waited for, up to 10 seconds.

    Args:
        bound: a socket with its address, not listening yet.

    Raises:
        SystemExit: the gateway did not start; the log says why.
    """
    import uvicorn

    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        create_app(gateway),
        lifespan="on",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[bound])
    if not server.started:
        sys.exit(3)


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return error_response(error, gateway_of(request))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return error_response(BadRequest(f"{where}: {first['msg']}", param=where), gateway_of(request))


async def _client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as proxies note it; nobody reads it


async def _database_away(request: Request, error: Exception) -> Response:
    return error_response(
        Unavailable(f"the store cannot be read now: {type(error).__name__}", retry_after=5), gateway_of(request)
    )


async def _fault(request: Request, error: Exception) -> Response:
    return error_response(
        GatewayError(f"the gateway failed: {type(error).__name__}; its log says more"), gateway_of(request)
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        response = error_response(
            MethodNotAllowed(f"{what}: this path is for another method; see /docs"), gateway_of(request)
        )
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return error_response(NotFound(f"{what}: there is nothing under this path; see /docs"), gateway_of(request))
    logging.getLogger(__name__).warning("%s: %s", what, error.detail)
    return error_response(BadRequest(str(error.detail)), gateway_of(request))


def _described(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """OpenAPI with the bodies that the routes read, and without what FastAPI would answer by itself."""
    usual = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = usual()
        _, schemas = models_json_schema([(model, "validation") for model in BODIES.values()], ref_template=REFERENCE)
        document["components"]["schemas"] |= schemas["$defs"]
        for path, model in BODIES.items():
            schema = {"$ref": REFERENCE.format(model=model.__name__)}
            body = {"required": True, "content": {"application/json": {"schema": schema}}}
            document["paths"][path]["post"]["requestBody"] = body
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        app.openapi_schema = document
        return document

    return described
