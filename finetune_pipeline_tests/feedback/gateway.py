"""A fake gateway for tests: real HTTP, and the responses that the feedback API documents."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeGateway(ThreadingHTTPServer):
    """Stores the events it receives, by path and id."""

    key = "secret"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: dict[str, dict[str, dict]] = {"/v1/interactions": {}, "/v1/feedback": {}}
        self.status: str | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def interactions(self) -> list[dict]:
        return list(self.events["/v1/interactions"].values())

    @property
    def feedback(self) -> list[dict]:
        return list(self.events["/v1/feedback"].values())


class _Handler(BaseHTTPRequestHandler):
    server: FakeGateway
    protocol_version = "HTTP/1.1"
    # Otherwise the body waits for the acknowledgment of the headers.
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return None
        if self.path not in self.server.events:
            return self._answer(404, b"<html>nothing here</html>")
        with self.server.lock:
            events = self.server.events[self.path]
            known = body["id"] in events
            first = events.setdefault(body["id"], body)
            other = any(body[name] != value for name, value in first.items() if name in body and name != "created_at")
            waiting = (
                self.path == "/v1/feedback" and body["interaction_id"] not in self.server.events["/v1/interactions"]
            )
        if other:
            error = {"message": f"{body['id']} already exists with different content", "code": "id_taken"}
            return self._answer(409, {"error": error})
        status = self.server.status or ("duplicate" if known else "unmatched" if waiting else "recorded")
        return self._answer(200, {"id": body["id"], "status": status})

    def do_GET(self):
        if self._allowed():
            kinds = Counter(item["kind"] for item in self.server.feedback)
            counts = {"loop": "notes", "interactions": len(self.server.interactions), "feedback": kinds.total(),
                      "by_kind": kinds, "flagged": 0, "pending_bytes": 12}  # fmt: skip
            self._answer(200, counts if self.path == "/v1/feedback/stats?loop=notes" else {})

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        error = {"message": "this needs an API key with the scope feedback", "type": "auth", "code": "no_key"}
        self._answer(401, {"error": error})
        return False

    def _answer(self, status: int, body):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@contextmanager
def running_gateway() -> Iterator[FakeGateway]:
    """Run a fake gateway on a free port of the loopback address."""
    with FakeGateway() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
