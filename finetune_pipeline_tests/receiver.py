"""A server that receives alerts over real HTTP, as a webhook or Slack does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(ThreadingHTTPServer):
    """Records each alert, and answers with a status; a `hang` keeps it from answering until the test ends."""

    daemon_threads = True

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None, hang: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.headers, self.hang = status, headers or {}, hang
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/T0/B0/topsecret"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever sends may hang up."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append(body)
        self.server.paths.append(self.path)
        if self.server.hang == "silent":
            self.server.ended.wait(60)
        with suppress(OSError):
            while self.server.hang == "drip" and not self.server.ended.wait(0.05):
                self.wfile.write(b"H")  # each byte within the time-out of a read
            self.send_response(self.server.status)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        self.server.paths.append(f"GET {self.path}")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiving(status: int = 200, headers: dict[str, str] | None = None, hang: str = "") -> Iterator[Receiver]:
    """Run a receiver for the block."""
    with Receiver(status, headers, hang) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
