"""A proxy in front of Dagster's webserver that lets every request through but launches, which it never answers."""

import http.client
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SlowDagster:
    """Forwards GraphQL requests to Dagster, and keeps those that launch a run waiting.

    Attributes:
        launching: is set when a launch has arrived.
    """

    def __init__(self, url: str) -> None:
        self.launching = threading.Event()
        closed, launching, real = threading.Event(), self.launching, urllib.parse.urlsplit(url)
        self._closed = closed

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if b"launchRun" in body:
                    launching.set()
                    closed.wait()
                    return
                connection = http.client.HTTPConnection(real.hostname or "", real.port, timeout=120)
                connection.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "SlowDagster":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
