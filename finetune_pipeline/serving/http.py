"""HTTP around the routes: size limits, host checks, JSON bodies, disconnects, error responses, and timing."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune_pipeline.database.api_keys import Scope as KeyScope
from finetune_pipeline.inference.remote import VIA_HEADER
from finetune_pipeline.serving.access import Caller, is_loopback
from finetune_pipeline.serving.errors import BadRequest, Conflict, Forbidden, GatewayError, TooLarge, WrongMediaType
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.validation_messages import error_message, field_path

MAX_BODY = 2 * 2**20
"""Largest request body in bytes; longer prompts do not fit into the context of any model here."""

ENGINE_SECONDS = "finetune.engine_seconds"
"""Key of the ASGI scope under which a route stores how long it waited for the model."""

_log = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed the connection before it had the response."""


class RequestGuard:
    """ASGI middleware that rejects forbidden requests and measures the others."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        response = _TimedResponse(send, scope, started)
        metrics = self._gateway.metrics
        try:
            self._check(scope)
            await self._app(scope, _with_size_limit(receive), response)
        except GatewayError as error:
            if response.status is not None:  # a part of the response is sent; the connection can only be closed
                raise
            await error_response(error, self._gateway)(scope, receive, response)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            metrics.requests.labels(route, str(response.status or "disconnected")).inc()
            if ENGINE_SECONDS in scope and response.complete:
                metrics.overhead.observe(time.perf_counter() - started - scope[ENGINE_SECONDS])

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _too_large()
        if headers.get(VIA_HEADER.lower().encode()) == self._gateway.id:
            raise Conflict("This gateway is its own upstream; correct serving.upstream or serving.fallback.")
        # A web page can send requests to this machine, even under its own domain that resolves to 127.0.0.1.
        if self._gateway.access.open:
            host = headers.get(b"host", "")
            if not is_loopback(_without_port(host)):
                raise Forbidden(f"This gateway serves this machine only, under localhost, not as {host[:100]!r}.")
            origin = headers.get(b"origin")
            if origin is not None and not is_loopback(_without_port(origin.split("://", 1)[-1].split("/", 1)[0])):
                raise Forbidden(f"Web pages of {origin[:100]!r} may not use this gateway.")


class _TimedResponse:
    """Forwards a response, adds a Server-Timing header, and keeps its status and whether it was sent completely."""

    def __init__(self, send: Send, scope: Scope, started: float) -> None:
        self.status: int | None = None
        self.complete = False
        self._send = send
        self._scope = scope
        self._started = started

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if ENGINE_SECONDS in self._scope:
                engine = self._scope[ENGINE_SECONDS]
                gateway = time.perf_counter() - self._started - engine
                timing = f"engine;dur={1000 * engine:.2f}, gateway;dur={1000 * gateway:.2f}"
                message["headers"] = [*message["headers"], (b"server-timing", timing.encode())]
        elif not message.get("more_body"):
            self.complete = True
        await self._send(message)


def json_body(model: type[B]) -> Callable[[HttpRequest], Awaitable[B]]:
    """Return a dependency that reads and strictly validates a JSON body.

    Raises:
        WrongMediaType: the content type is not JSON.
        BadRequest: the body is not valid; the message names the first wrong fields.
    """

    async def read(request: HttpRequest) -> B:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise WrongMediaType(
                f"The content type is {kind or 'missing'}; send the body as Content-Type: application/json."
            )
        try:
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            raise BadRequest(describe_errors(error), param=field_path(error.errors()[0])[:200] or None) from error

    return read


def require_scope(scope: KeyScope | None) -> Callable[[HttpRequest], Awaitable[Caller]]:
    """Return a dependency that accepts only callers with this scope; None accepts any key."""

    async def check(request: HttpRequest) -> Caller:
        return get_gateway(request).access.check(request.headers.get("authorization"), scope)

    return check


def get_gateway(request: HttpRequest) -> Gateway:
    """Return the gateway that handles this request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and cancel it if the client disconnects.

    Args:
        receive: of the request, whose body was read.

    Raises:
        ClientDisconnected: the client disconnected.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    task, disconnected = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for one in (task, disconnected):
            one.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)  # wait until they are canceled


class EventStream(Response):
    """A response of server-sent events; the events end when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            with suppress(ClientDisconnected):
                await run_while_connected(receive, send_all())
        finally:
            await self._events.aclose()


def error_response(error: GatewayError, gateway: Gateway) -> JSONResponse:
    """Return the response for an error; log the detail if the client does not get it."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.detail is not None and not gateway.access.open:
        _log.warning("%s", error)
    return JSONResponse(error.body(local=gateway.access.open), error.status, headers)


def describe_errors(error: ValidationError) -> str:
    """Return the first wrong fields and what is wrong with them, in one line."""
    return f"{error_message(error)}; see /docs for the format"


def _with_size_limit(receive: Receive) -> Receive:
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise _too_large()
        return message

    return limited


def _too_large() -> TooLarge:
    return TooLarge(f"The request body is larger than {MAX_BODY} bytes; send less at once.")


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rsplit(":", 1)[0]  # a bare IPv6 address ends in a bracket
