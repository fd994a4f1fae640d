"""HTTP before and behind the routes: limits, hosts, bodies, errors, and the clock."""

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

from finetune_pipeline.inference.remote import VIA_HEADER
from finetune_pipeline.serving.access import Caller, is_loopback
from finetune_pipeline.serving.access import Scope as KeyScope
from finetune_pipeline.serving.errors import BadRequest, Conflict, Forbidden, GatewayError, TooLarge, WrongMediaType
from finetune_pipeline.serving.gateway import Gateway

MAX_BODY = 2 * 2**20
"""Bytes that a request may have. Longer prompts do not fit into the context of any model here."""

ENGINE = "finetune.engine_seconds"
"""Where a route leaves, in the request's scope, how long it waited for the model."""

_ERRORS_NAMED = 3
_log = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Guard:
    """Refuses what no route should see, and measures the rest."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        sent = _Sent(send, scope, started)
        try:
            self._check(scope)
            await self._app(scope, _limited(receive), sent)
        except GatewayError as error:
            if sent.status is not None:  # half an answer is out: it can only break off
                raise
            await error_response(error, self._gateway)(scope, receive, sent)
        finally:
            self._count(scope, sent, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _too_large()
        if headers.get(VIA_HEADER.lower().encode()) == self._gateway.id:
            raise Conflict("this gateway is its own upstream; correct serving.upstream or serving.fallback")
        # A web page may send requests to this machine, also under a name of its own that it has pointed here.
        if self._gateway.access.open:
            host = headers.get(b"host", "").rsplit(":", 1)[0] if not _bare_ipv6(headers) else headers[b"host"]
            if not is_loopback(host):
                raise Forbidden(f"this gateway serves this machine only, under localhost, not as {host[:100]!r}")
            if b"origin" in headers and not _local(headers[b"origin"]):
                raise Forbidden(f"web pages of {headers[b'origin'][:100]!r} may not use this gateway")

    def _count(self, scope: Scope, sent: "_Sent", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._gateway.metrics.requests.labels(route, str(sent.status or "gone")).inc()
        if ENGINE in scope and sent.whole:
            self._gateway.metrics.overhead.observe(seconds - scope[ENGINE])


class _Sent:
    """Passes an answer on, says how long it took, and remembers what it was."""

    def __init__(self, send: Send, scope: Scope, started: float) -> None:
        self.status: int | None = None
        self.whole = False
        self._send = send
        self._scope = scope
        self._started = started

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if ENGINE in self._scope:
                engine = self._scope[ENGINE]
                gateway = time.perf_counter() - self._started - engine
                timing = f"engine;dur={1000 * engine:.2f}, gateway;dur={1000 * gateway:.2f}"
                message["headers"] = [*message["headers"], (b"server-timing", timing.encode())]
        elif not message.get("more_body"):
            self.whole = True
        await self._send(message)


def body_of(model: type[B]) -> Callable[[HttpRequest], Awaitable[B]]:
    """A dependency that reads a JSON body of this form, strictly.

    Raises:
        WrongMediaType: it is not sent as JSON.
        BadRequest: it is not JSON in UTF-8, or not of this form; the message names the first fields that are wrong.
    """

    async def read(request: HttpRequest) -> B:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise WrongMediaType(f"the body is sent as {kind or 'nothing'}; send Content-Type: application/json")
        try:
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            raise BadRequest(what_is_wrong(error), param=_where(error.errors()[0])) from error

    return read


def allow(scope: KeyScope | None) -> Callable[[HttpRequest], Awaitable[Caller]]:
    """A dependency that lets only callers with this scope through."""

    async def check(request: HttpRequest) -> Caller:
        return gateway_of(request).access.check(request.headers.get("authorization"), scope)

    return check


def gateway_of(request: HttpRequest) -> Gateway:
    """The gateway that this request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client, and stop when it goes away.

    Args:
        receive: of the request, whose body was read.
        work: is cancelled then.

    Raises:
        ClientGone: it went away.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)  # what is being cancelled still runs


class EventStream(Response):
    """Server-sent events, made as they are sent: a slow client slows nobody, one that is gone ends them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of them."""
        try:
            with suppress(ClientGone):
                await unless_gone(receive, self._send(send))
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._events:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def error_response(error: GatewayError, gateway: Gateway) -> JSONResponse:
    """A refusal, as the client reads it."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.detail is not None and not gateway.access.open:
        _log.warning("%s", error)
    return JSONResponse(error.body(local=gateway.access.open), error.status, headers)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _limited(receive: Receive) -> Receive:
    taken = 0

    async def count() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY:
            raise _too_large()
        return message

    return count


def _too_large() -> TooLarge:
    return TooLarge(f"the request is larger than {MAX_BODY} bytes; send less at once")


def _bare_ipv6(headers: dict[bytes, str]) -> bool:
    return headers.get(b"host", "").endswith("]")


def _local(origin: str) -> bool:
    host = origin.split("://", 1)[-1].split("/", 1)[0]
    return is_loopback(host if host.endswith("]") else host.rsplit(":", 1)[0])


def what_is_wrong(error: ValidationError) -> str:
    """The first fields that are wrong, and why, in a line."""
    errors = error.errors(include_url=False)
    named = [f"{_where(one) or 'the body'}: {one['msg']}" for one in errors[:_ERRORS_NAMED]]
    more = f" (and {len(errors) - len(named)} more)" if len(errors) > len(named) else ""
    return f"{'; '.join(named)}{more}; see /docs for the form"


def _where(error: Any) -> str | None:
    # Which of several forms was tried stands there too, as "str" or "list[TextPart]"; it is no field of the request.
    parts = [str(part) for part in error["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return ".".join(parts)[:200] or None
