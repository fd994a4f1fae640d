"""Limits of a client's connection: the size of a request's head, and the time for each part of a request.

uvicorn limits neither. An endless header would grow in memory, and a client that sends nothing, or a byte now and
then, would keep its connection for ever. The size of bodies is limited in `http.py`.
"""

import asyncio
import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from finetune_pipeline.serving.errors import BadRequest, GatewayError, HeadTooLarge, Overloaded, RequestTimeout

MAX_HEAD = 64 * 2**10
"""Largest head of a request (its first line and headers) in bytes."""

UPLOAD_PATHS = FILES_PATH, DATASET_UPLOAD_PATH = "/v1/files", "/v1/fine-tuning/datasets/upload"
"""Paths of POSTs whose body goes to the disk piece by piece."""

MAX_PIPELINED = 16
"""Requests of one connection that may wait for the answer to an earlier one; no common client sends any."""

_NO_TRAILERS: deque[tuple[bytes, bytes]] = deque(maxlen=0)  # takes the headers after a body, and keeps none

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)

Phase = Literal["head", "body", "answer", "idle", "refused"]
"""What a connection waits for: the first line and headers, the rest of the request, the gateway, the next request, or
a client whose request was refused."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections.

    Attributes:
        connections: number of connections. One more closes the one that has waited for its client for the longest
            time, or is refused if all wait for answers.
        seconds: longest time in each phase. Idle connections are kept longer than in the pools of common clients (Go
            90 s, aiohttp 15 s, httpx 5 s), so that a client does not use one while it is closed.
        unsent_seconds: how long a client may read nothing of a response.
        watch_seconds: interval at which each connection is checked, and longest time by which it exceeds a limit.
    """

    connections: int = 1000
    seconds: Mapping[Phase, float] = field(default_factory=lambda: {"head": 30, "body": 60, "idle": 120, "refused": 2})
    unsent_seconds: float = 60
    watch_seconds: float = 1


class LimitedProtocol(HttpToolsProtocol):
    """One connection, with limits.

    Args:
        limits: of all connections.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        self._unsent = 0
        self._unsent_since = self.loop.time()
        self._enter("head")

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = self.loop.time()
        self._unparsed = 0  # bytes of the head, or of what is not a part of the body, such as trailers

    # ---- size

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent."""
        if self.phase == "refused":
            return
        if self.phase == "idle":
            self._enter("head")
        if self.phase == "head" and b"pgrade:" in data:
            # httptools ignores the body of a request with this header, and Java's HttpClient sends one to try HTTP/2.
            data = _UPGRADE.sub(b"\r\nx-upgrade:", data)
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD or len(self.pipeline) > MAX_PIPELINED:
            self._refuse(head_too_large())

    def on_message_begin(self) -> None:
        """Expect a head, unless it is expected since its first byte."""
        if self.phase != "head":
            self._enter("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start the request and expect its body."""
        self._enter("body")
        super().on_headers_complete()
        self.headers = _NO_TRAILERS  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Forward a part of the body."""
        self._unparsed = 0
        if f"/v1{self.scope['path'].removeprefix('/v1')}" in UPLOAD_PATHS:
            self.since = self.loop.time()  # an upload may take longer, as long as something arrives
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request; the response may be complete already, for instance if the body is too large."""
        self._enter("idle" if self.cycle.response_complete else "answer")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of a request, or for the next one."""
        answers_next = bool(self.pipeline)
        super().on_response_complete()
        if self.phase == "answer" and not answers_next:
            self._enter("idle")
        else:
            self.since = self.loop.time()  # until now, reading may have been paused

    # ---- time and number

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start watching the connection."""
        super().connection_made(transport)
        self._watch()
        connections = self.server_state.connections
        if len(connections) > self._limits.connections:
            others = [one for one in connections if isinstance(one, LimitedProtocol) and one is not self]
            waiting = [one for one in others if one.phase != "answer"]
            if waiting:
                longest = min(waiting, key=lambda one: one.since)
                connections.discard(longest)  # `connection_lost` does so too, but after further connections
                longest.transport.abort()
        if len(connections) > self._limits.connections:
            self._refuse(
                Overloaded(
                    f"The gateway has {self._limits.connections} connections that wait for answers, and takes no more. "
                    "Try again in a second.",
                    retry_after=1,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching the connection."""
        self._watcher.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Close the connection if it exceeds a limit of time, and check again later."""
        self._watcher = self.loop.call_later(self._limits.watch_seconds, self._watch)
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > self._limits.unsent_seconds:
            self.transport.abort()  # `close` would wait for the client to read the rest
            return
        seconds = self._limits.seconds.get(self.phase)
        if seconds is None or now - self.since <= seconds or self.flow.read_paused or self.transport.is_closing():
            return
        begun = self.phase == "head" and self._unparsed > 0
        if begun or (self.phase == "body" and not self.cycle.response_complete):
            self._refuse(RequestTimeout(f"The request was not complete within {seconds:g} seconds. Send it again."))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(BadRequest(f"{msg} Send HTTP/1.1 without TLS (http://, not https://)."))

    def _refuse(self, error: GatewayError) -> None:
        """Send an error response to an incomplete request, and ignore what else the client sends.

        The connection stays open for a moment: if it were closed while the client sends, TCP would reset it, and the
        client could not read the response.
        """
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started or self.pipeline:  # what follows would be read as a part of that response
                self.transport.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error.body(local=False)).encode()
        head = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if error.retry_after is not None:
            head.append(f"retry-after: {error.retry_after}")
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self._enter("refused")


def head_too_large() -> HeadTooLarge:
    """Return the error for a request whose first line and headers are too large."""
    return HeadTooLarge(f"The first line and headers of the request are larger than {MAX_HEAD} bytes; send less.")
