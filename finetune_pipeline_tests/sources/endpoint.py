"""An OpenAI-compatible test endpoint over real HTTP: a script gives the answers, and all requests are recorded."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_pipeline.settings import TeacherSettings

Response = tuple[int, dict[str, str], bytes]


class Endpoint(ThreadingHTTPServer):
    """Answers each request with what `script` makes of its body and number, from 1."""

    daemon_threads = True

    def __init__(self, script: Callable[[dict[str, Any], int], Response]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.tokens = 0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def by_question(self) -> Counter[str]:
        """How often each question came."""
        return Counter(body["messages"][-1]["content"] for body in self.asked)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asks may hang up."""


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.asked)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            status, headers, content = self.server.script(body, number)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        with suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: str | None, finish: str = "stop", tokens: int = 100, **message: Any) -> Response:
    """A chat completion that says this, and that it cost so many tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": tokens - tokens // 2, "completion_tokens": tokens // 2, "total_tokens": tokens}
    document = {"id": "c1", "object": "chat.completion", "choices": [choice], "usage": usage}
    return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def error(status: int, message: str = "no", **headers: str) -> Response:
    """An error as OpenAI sends it."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@contextmanager
def teaching(script: Callable[[dict[str, Any], int], Response], **fields: Any) -> Iterator[tuple[Endpoint, Any]]:
    """An endpoint with this script, and the settings of a teacher that name it."""
    with Endpoint(script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            given = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "timeout_seconds": 5, **fields}
            yield server, TeacherSettings(**given)
        finally:
            server.shutdown()
            thread.join()
