"""The gateway as an ASGI application."""

import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata
from typing import Any

import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune_pipeline.database import DatabaseError
from finetune_pipeline.serving import (
    admin,
    completions,
    feedback,
    fine_tuning_comparisons,
    fine_tuning_datasets,
    fine_tuning_jobs,
    fine_tuning_models,
    openai_fine_tuning,
    responses_api,
)
from finetune_pipeline.serving.api import (
    AdminRequest,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    FeedbackIn,
    InteractionIn,
)
from finetune_pipeline.serving.connections import DATASET_UPLOAD_PATH, ConnectionLimits, LimitedProtocol
from finetune_pipeline.serving.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound, Unavailable
from finetune_pipeline.serving.fine_tuning_schema import FineTuningJobRequest
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import ClientDisconnected, RequestGuard, error_response, get_gateway
from finetune_pipeline.serving.responses_schema import ResponsesRequest
from finetune_pipeline.validation_messages import field_path, messages_of

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/feedback": FeedbackIn,
    "/v1/interactions": InteractionIn,
    openai_fine_tuning.JOBS_PATH: FineTuningJobRequest,
    fine_tuning_jobs.JOBS_PATH: fine_tuning_jobs.JobRequest,
    fine_tuning_datasets.EXPORT_PATH: fine_tuning_datasets.ExportRequest,
    **fine_tuning_models.BODIES,
    **fine_tuning_comparisons.BODIES,
    "/admin/reload-model": AdminRequest,
    "/admin/rollback": AdminRequest,
}
"""The body of each POST. The routes parse it themselves, strictly, so FastAPI does not know it for OpenAPI."""

FORMS = {
    openai_fine_tuning.UPLOAD_PATH: openai_fine_tuning.UPLOAD_BODY,
    DATASET_UPLOAD_PATH: fine_tuning_datasets.UPLOAD_BODY,
}
"""The form of each POST that takes a file."""

ROUTERS = (
    completions.router,
    responses_api.router,
    feedback.router,
    openai_fine_tuning.router,
    fine_tuning_datasets.router,
    fine_tuning_jobs.router,
    fine_tuning_models.router,
    fine_tuning_comparisons.router,
    admin.router,
)

SWITCH_SECONDS = 0.001
"""Python's thread switch interval (default 0.005); shorter, so that the recorder's thread does not delay answers."""

_EXPECTED = (
    GatewayError,
    RequestValidationError,
    HTTPException,
    ClientDisconnected,  # while it is answered
    ClientDisconnect,  # while its body is read
    DatabaseError,
    sa.exc.OperationalError,
    sa.exc.TimeoutError,
)
"""Exceptions that are no bugs."""

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
    for router in ROUTERS:
        app.include_router(router)
    for kind in (*_EXPECTED, Exception):
        app.add_exception_handler(kind, _error)
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    paths = [getattr(route, "path", "") for router in ROUTERS for route in router.routes]
    return RequestGuard(
        _Direct(app), gateway, frozenset(path.split("/")[2] for path in paths if path.startswith("/v1/"))
    )


class _Direct:
    """ASGI application in which the routes that generate skip FastAPI, which takes as long as the rest of the gateway.

    FastAPI documents these routes and handles all others. They read body and key themselves.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._routes = {
            route.path: route
            for route in (*completions.router.routes, *responses_api.router.routes)
            if isinstance(route, APIRoute) and route.methods == {"POST"}
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope.update(app=self._app, route=route)
        request, started = Request(scope, receive, send), False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            response = await route.endpoint(request)
            await response(scope, receive, note_start)
        except Exception as error:
            if started:
                raise
            await (await _error(request, error))(scope, receive, send)
            if not isinstance(error, _EXPECTED):
                raise  # a bug, which is logged with its traceback


def server_config(gateway: Gateway, limits: ConnectionLimits | None = None, **more: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for a gateway.

    Args:
        limits: of the connections; None: the default ones.
        more: further fields of the configuration.
    """
    limits = limits or ConnectionLimits()
    return uvicorn.Config(
        create_app(gateway),
        http=partial(LimitedProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        timeout_keep_alive=round(limits.seconds["idle"]),
        server_header=False,
        **more,
    )


class _Server(uvicorn.Server):
    """A server that says when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run(gateway: Gateway, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish running answers for up to 10 seconds.

    Args:
        bound: a bound socket that does not listen yet.
        on_ready: is called once, when requests are answered.

    Raises:
        SystemExit: the gateway did not start; the log says why.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    _raise_file_limit()
    server = _Server(server_config(gateway, timeout_graceful_shutdown=10), on_ready)
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:  # uvicorn has ended in order, and raises the signal again
        sys.exit(128 + signal.SIGINT)
    if not server.started:
        sys.exit(3)


def _raise_file_limit() -> None:
    """Allow as many open files as the connections need; many shells allow 1024 (Linux) or 256 (macOS)."""
    needed = 2 * ConnectionLimits().connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


async def _error(request: Request, error: Exception) -> Response:
    """Return the response for an exception, in OpenAI's format."""
    what = f"{request.method} {request.url.path[:200]}"
    match error:
        case GatewayError():
            found = error
        case RequestValidationError():  # of path, query or header; bodies are validated by the routes
            where, *_ = error.errors()[0]["loc"]
            errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
            message, param = "; ".join(messages_of(errors)), field_path(errors[0])
            if where == "header":  # their names are no identifiers
                param = str(errors[0]["loc"][0])
                message = f"{param}: {message}"
            found = BadRequest(message, param=param)
        case ClientDisconnected() | ClientDisconnect():
            return Response(status_code=499)  # nginx's status for this; nobody reads it
        case HTTPException(status_code=405):
            routes = (route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
            # The error names the methods of the first route only, and static files name none.
            methods = {
                name for route in routes if route.path_regex.match(request.url.path) for name in route.methods or ()
            }
            route_methods = ", ".join(sorted(methods)) or "GET"
            allowed = f"{route_methods}, {'HEAD, OPTIONS' if 'GET' in route_methods else 'OPTIONS'}"
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": allowed})
            found = MethodNotAllowed(f"{what}: the method {request.method} is not allowed; use {route_methods}.")
        case HTTPException(status_code=404):
            found = NotFound(f"{what}: there is no such path; see /docs.")
        case HTTPException():
            logging.getLogger(__name__).warning("%s: %s", what, error.detail)
            found = BadRequest(str(error.detail))
        case DatabaseError() | sa.exc.OperationalError() | sa.exc.TimeoutError():
            found = Unavailable(f"The database cannot be read now ({type(error).__name__}).", retry_after=5)
        case _:
            found = GatewayError(f"The gateway failed with {type(error).__name__}; its log has the traceback.")
    response = error_response(found, get_gateway(request), request.scope)
    if found.status == 405:
        response.headers["Allow"] = allowed
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
    for path, form in FORMS.items():
        content = {"multipart/form-data": {"schema": form}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    app.openapi_schema = document
    return document
