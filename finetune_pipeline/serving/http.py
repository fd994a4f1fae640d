"""HTTP around the routes: host checks, CORS, size limits, JSON bodies, disconnects, error responses, and timing."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from uuid import UUID

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune_pipeline.database.api_keys import Scope as KeyScope
from finetune_pipeline.hosts import is_loopback, without_port
from finetune_pipeline.inference.remote import VIA_HEADER
from finetune_pipeline.pipeline.uploaded_files import MAX_FILE_BYTES
from finetune_pipeline.serving.access import Access, Caller
from finetune_pipeline.serving.connections import MAX_HEAD, UPLOAD_PATHS, head_too_large
from finetune_pipeline.serving.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    GatewayError,
    Overloaded,
    TooLarge,
    WrongMediaType,
)
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.validation_messages import error_message, first_field

MAX_BODY = 2 * 2**20
"""Largest request body in bytes; longer prompts do not fit into the context of any model here."""

UPLOADS = dict.fromkeys(UPLOAD_PATHS, MAX_FILE_BYTES + 2**20)
"""Path of an upload -> its largest body in bytes."""

MAX_BODIES = 128 * 2**20
"""Bytes of the bodies of all requests that run or wait. They stay in memory until the answer, parsed as well."""

INTERACTION_HEADER = "X-Interaction-Id"
REQUEST_HEADER = "X-Request-Id"
CONFIDENCE_HEADER = "X-Confidence"
IGNORED_HEADER = "X-Ignored-Fields"
REPLAYED_HEADER = "Idempotent-Replayed"

EXPOSED = (
    INTERACTION_HEADER,
    REQUEST_HEADER,
    CONFIDENCE_HEADER,
    IGNORED_HEADER,
    REPLAYED_HEADER,
    "Server-Timing",
    "Retry-After",
)
"""Response headers that web pages may read."""

ID_HEADERS = "finetune.id_headers"
"""Key of the ASGI scope under which a route stores the headers with the id of its request, once it is known."""

ENGINE_SECONDS = "finetune.engine_seconds"
"""Key of the ASGI scope under which a route stores how long it waited for the model."""

_log = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


class Closable(Protocol):
    """Something that can be closed before its end."""

    async def aclose(self) -> None:
        """End it."""


class ClientDisconnected(Exception):
    """The client closed the connection before it had the response."""


class RequestGuard:
    """ASGI middleware that rejects forbidden requests, answers web pages of allowed origins, and measures requests.

    Args:
        versioned: first segments of the paths under `/v1`, which are also served without `/v1`.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway, versioned: frozenset[str]) -> None:
        self._app = app
        self._gateway = gateway
        self._versioned = versioned
        self._body_bytes = 0  # of all requests that are not answered yet
        self._cors = _Cors(self._limited, gateway.access)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        is_head, path = scope["method"] == "HEAD", scope["path"]
        if is_head:
            scope = {**scope, "method": "GET"}  # a copy: the server still sees HEAD, and sends no body
        if path[1:].partition("/")[0] in self._versioned:
            scope = {**scope, "path": f"/v1{path}", "raw_path": b"/v1" + scope["raw_path"]}
        response = _TimedResponse(send, scope, started)
        metrics = self._gateway.metrics
        try:
            headers = dict(scope["headers"])
            try:
                self._check_sender(headers)
            except Forbidden as error:  # not through CORS, so that the web page cannot read it
                await error_response(error, self._gateway, scope)(scope, receive, response)
            else:
                handle = self._cors if b"origin" in headers else self._limited
                await handle(scope, receive, response)
        except Exception:
            if not response.complete:
                raise
            # Starlette raises a bug again after its response; uvicorn would close the connection without notice.
            _log.exception("%s %s failed", scope["method"], path[:200])
        finally:
            route = getattr(scope.get("route"), "path", "none")
            metrics.requests.labels(route, str(response.status or "disconnected")).inc()
            if ENGINE_SECONDS in scope and response.complete:
                metrics.overhead.observe(time.perf_counter() - started - scope[ENGINE_SECONDS])

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        # A web page can send requests to this machine, even under its own domain that resolves to 127.0.0.1.
        if not self._gateway.access.open:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(without_port(host)):
            raise Forbidden(
                f"Without API keys this gateway serves this machine only: found the host {host[:100]!r}, expected "
                "localhost or a loopback address. To use another name, create a key with `finetune key create NAME`."
            )
        origin = headers.get(b"origin")
        if origin is not None and not self._gateway.access.allows_origin(origin.decode("latin-1")):
            raise Forbidden(
                f"Web pages of {origin.decode('latin-1')[:100]!r} may not use this gateway. Start it with "
                "`finetune serve --allow-origin ORIGIN` if they should."
            )

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request within the limits of its headers and its body, and of all bodies in memory."""
        try:
            self._check_head(scope)
        except GatewayError as error:
            await error_response(error, self._gateway, scope)(scope, receive, send)
            return
        size, largest = 0, _largest_body(scope)
        in_memory = largest == MAX_BODY

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            received = len(message.get("body", b""))
            size += received
            self._body_bytes += received * in_memory
            if size > largest:
                raise _too_large(largest)
            if self._body_bytes > MAX_BODIES:
                raise Overloaded(
                    f"The bodies of the requests in progress have more than {MAX_BODIES} bytes. Try again in a second.",
                    retry_after=1,
                )
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._body_bytes -= size * in_memory

    def _check_head(self, scope: Scope) -> None:
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            raise head_too_large()
        values = dict(scope["headers"])
        length = values.get(b"content-length", b"0")
        if length.isdigit() and int(length) > (largest := _largest_body(scope)):
            raise _too_large(largest)
        if values.get(VIA_HEADER.lower().encode()) == self._gateway.id.encode():
            raise Conflict("This gateway is its own upstream; correct serving.upstream or serving.fallback.")


class _Cors(CORSMiddleware):
    """Lets web pages of allowed origins send requests and read responses.

    A key is sent in the header Authorization, so pages need no permission for cookies.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        super().__init__(
            app,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),  # OpenAI's client sends a dozen of its own
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
        self._access = access

    def is_allowed_origin(self, origin: str) -> bool:
        """Return whether web pages of this origin may use the gateway."""
        return self._access.allows_origin(origin)


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
            raise BadRequest(describe_errors(error), param=first_field(error)[:200] or None) from error

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
    working, disconnected = asyncio.current_task(), False
    assert working is not None

    async def watch() -> None:
        nonlocal disconnected
        while (await receive())["type"] != "http.disconnect":
            continue
        disconnected = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not disconnected:
            raise
        working.uncancel()
        raise ClientDisconnected from None
    finally:
        watching.cancel()


class EventStream(Response):
    """A response of server-sent events; the events end when the client disconnects.

    Args:
        source: what the events are made from. It is closed at the end, also if no event was read; None if there is
            nothing to close.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], headers: dict[str, str], source: Closable | None = None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events
        self._source = source

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
            if self._source is not None:
                await self._source.aclose()


def given_id(scope: Scope) -> UUID | None:
    """Return the id that the client chose for the interaction in the header X-Interaction-Id, if any.

    Raises:
        ValueError: it is not a UUID; the message says what was found.
    """
    given = Headers(scope=scope).get(INTERACTION_HEADER)
    if given is None:
        return None
    try:
        return UUID(given)
    except ValueError:
        raise ValueError(f"found {given[:100]!r}, expected a UUID.") from None


def id_headers(id: UUID, *, recorded: bool) -> dict[str, str]:
    """Return the headers with the id of a request, which is an interaction's if that is recorded."""
    return {REQUEST_HEADER: str(id)} | ({INTERACTION_HEADER: str(id)} if recorded else {})


def _known_id_headers(scope: Scope) -> dict[str, str]:
    if ID_HEADERS in scope:
        return dict(scope[ID_HEADERS])
    with suppress(ValueError):  # the request failed before its id was read
        id = given_id(scope)
        return {} if id is None else id_headers(id, recorded=True)
    return {}


def error_response(error: GatewayError, gateway: Gateway, scope: Scope) -> JSONResponse:
    """Return the response for an error, with the request's id if it is known; log details the client does not get."""
    headers = _known_id_headers(scope)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.detail is not None and not gateway.access.open:
        _log.warning("%s", error)
    return JSONResponse(error.body(local=gateway.access.open), error.status, headers)


def describe_errors(error: ValidationError) -> str:
    """Return the first wrong fields and what is wrong with them, in one line."""
    return f"{error_message(error)}; see /docs for the format"


def _largest_body(scope: Scope) -> int:
    return UPLOADS.get(scope["path"], MAX_BODY) if scope["method"] == "POST" else MAX_BODY


def _too_large(largest: int) -> TooLarge:
    return TooLarge(f"The request body is larger than {largest} bytes; send less at once.")
