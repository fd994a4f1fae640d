"""The gateway as an ASGI application."""

import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
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
from finetune_pipeline.serving.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound, Unavailable
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import ClientDisconnected, RequestGuard, error_response, get_gateway
from finetune_pipeline.validation_messages import field_path, messages_of

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/feedback": FeedbackIn,
    "/v1/interactions": InteractionIn,
    "/admin/reload-model": AdminRequest,
    "/admin/rollback": AdminRequest,
}
"""The body of each POST. The routes parse it themselves, strictly, so FastAPI does not know it for OpenAPI."""

SWITCH_SECONDS = 0.001
"""Python's thread switch interval (default 0.005); shorter, so that the recorder's thread does not delay answers."""

REFERENCE = "#/components/schemas/{model}"


def create_app(gateway: Gateway) -> ASGIApp:
    """Return the application, which starts and stops the gateway in its lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    app = FastAPIOffline(
        title="finetune-pipeline gateway",
        description="An OpenAI-compatible API for the promoted models, and an API for feedback on their answers.",
        version=metadata.version("finetune-pipeline"),
        lifespan=lifespan,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "The request failed."}},
    )
    app.state.gateway = gateway
    for router in (completions.router, feedback.router, admin.router):
        app.include_router(router)
    database_errors = (DatabaseError, sa.exc.OperationalError, sa.exc.TimeoutError)
    for kind in (GatewayError, RequestValidationError, HTTPException, ClientDisconnected, *database_errors, Exception):
        app.add_exception_handler(kind, _error)
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    return RequestGuard(app, gateway)


def run(gateway: Gateway, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then finish running answers for up to 10 seconds.

    Args:
        bound: a bound socket that does not listen yet.

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


async def _error(request: Request, error: Exception) -> Response:
    """Return the response for an exception, in OpenAI's format."""
    what = f"{request.method} {request.url.path[:200]}"
    match error:
        case GatewayError():
            found = error
        case RequestValidationError():  # of path or query; bodies are validated by the routes
            errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]  # "path" or "query" comes first
            found = BadRequest("; ".join(messages_of(errors)), param=field_path(errors[0]))
        case ClientDisconnected():
            return Response(status_code=499)  # nginx's status for this; nobody reads it
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            use = f"; use {allowed}" if allowed else ""
            found = MethodNotAllowed(f"{what}: the method {request.method} is not allowed{use}.")
        case HTTPException(status_code=404):
            found = NotFound(f"{what}: there is no such path; see /docs.")
        case HTTPException():
            logging.getLogger(__name__).warning("%s: %s", what, error.detail)
            found = BadRequest(str(error.detail))
        case DatabaseError() | sa.exc.OperationalError() | sa.exc.TimeoutError():
            found = Unavailable(f"The database cannot be read now ({type(error).__name__}).", retry_after=5)
        case _:
            found = GatewayError(f"The gateway failed with {type(error).__name__}; its log has the traceback.")
    response = error_response(found, get_gateway(request))
    if isinstance(error, HTTPException) and found.status == 405:
        response.headers.update(error.headers or {})  # Allow
    return response


def _openapi(app: FastAPI, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with the request bodies, and without its own validation errors."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = generate()
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
