"""The HTTP interface of vLLM 0.32 that a deployment uses, without a model, for faults that the real server cannot show.

`serving/test_vllm_server.py` runs the same steps against the real server.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RUNTIME_UPDATES, LORA = "runtime updates", "lora"


class VllmDouble(ThreadingHTTPServer):
    """Lists, loads and unloads adapters.

    Attributes:
        adapters: name -> path, in the order in which they were loaded.
        dropped: adapters whose weights made room for others; unloading them fails until they are asked.
        faults: path -> "reset", "silent", "error inside" or "lie"; all but "error inside" do what was asked.
        options: what the server was started with, of RUNTIME_UPDATES and LORA.
        requests: path and body of each request.
        reached: set when a request has met "silent".
    """

    daemon_threads = True

    def __init__(self, root: str, name: str = "base") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bases = {name: root}
        self.adapters: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.faults: dict[str, str] = {}
        self.options = {RUNTIME_UPDATES, LORA}
        self.max_lora_rank = 16
        self.max_model_len = 4096
        self.requests: list[tuple[str, Any]] = []
        self.reached, self.stopped = threading.Event(), threading.Event()

    def restart(self) -> None:
        """Lose what a restart of the server loses."""
        self.adapters.clear()
        self.dropped.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up in some tests."""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Return status and content, a text or a JSON value."""
        match path:
            case "/v1/models":
                base = next(iter(self.bases), None)
                cards = [
                    {"id": name, "root": root, "parent": None, "max_model_len": self.max_model_len}
                    for name, root in self.bases.items()
                ]
                cards += [{"id": name, "root": root, "parent": base} for name, root in self.adapters.items()]
                return 200, {"object": "list", "data": cards}
            case "/v1/load_lora_adapter" if RUNTIME_UPDATES in self.options:
                return self._load(body["lora_name"], body["lora_path"])
            case "/v1/unload_lora_adapter" if RUNTIME_UPDATES in self.options:
                return self._unload(body["lora_name"])
            case "/v1/completions":
                if body["model"] not in {*self.bases, *self.adapters}:
                    return _error(404, f"The model `{body['model']}` does not exist.")
                self.dropped.discard(body["model"])
                return 200, {"choices": [{"text": "b"}]}
            case "/tokenize":
                if body["messages"][0]["role"] == "tool":
                    return _error(400, "unexpected role")
                return 200, {"count": 2, "tokens": [1, len(body["messages"])]}
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if LORA not in self.options:
            return _error(500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_text())
        except OSError:
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        if config["r"] > self.max_lora_rank:
            return _error(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        if "k_proj_of_nobody" in config["target_modules"]:
            return _error(500, f"While loading {path}, expected target modules in {{'q_proj'}} but received others")
        if self.faults.get("/v1/load_lora_adapter") != "lie":
            self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, Any]:
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        if name in self.dropped:
            return _error(500, f"Failed to remove lora adapter '{name}' from the engine.")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."


class _Handler(BaseHTTPRequestHandler):
    server: VllmDouble
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.requests.append((self.path, body))
        fault = self.server.faults.get(self.path, "")
        status, content = 200, {"error": {"message": "EngineDeadError", "code": 500}}
        if fault != "error inside":
            status, content = self.server.answer(self.path, body)  # also before a reset, or a time-out
        if fault == "silent":
            self.server.reached.set()
            self.server.stopped.wait()
        if fault in {"reset", "silent"}:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": status}}


@contextmanager
def vllm_double(root: str, name: str = "base") -> Iterator[VllmDouble]:
    """Run the double for one base model."""
    server = VllmDouble(root, name)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
