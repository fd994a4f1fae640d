"""A llama-server in both forms, as its source says, without a model: for faults that the real server cannot show.

`pipeline/test_deploy_llama_server.py` runs the same steps against real servers.
"""

import json
import shlex
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class FakeServer(ThreadingHTTPServer):
    """A router, and a server with adapters, that does what llama-server's source says, and faults on request.

    Attributes:
        presets: the file that the router reads.
        models: status and section of each model.
        adapters: path and scale of each adapter.
        faults: path -> "reset", "silent", "text", or a status and a body.
    """

    daemon_threads = True

    def __init__(self, presets):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.presets, self.models, self.adapters, self.model_path = presets, {}, [], ""
        self.faults, self.requests, self.ended, self.cached = {}, [], threading.Event(), 0

    def start(self, command):
        """Start the form with adapters as a printed command says."""
        words = shlex.split(command)
        assert words[0] == "llama-server"
        flags = dict(zip(words[1::2], words[2::2], strict=False))
        self.model_path = flags["--model"]
        scaled = [one.rpartition(":") for one in flags.get("--lora-scaled", "").split(",") if one]
        self.adapters = [(path, float(scale)) for path, _, scale in scaled]
        self.cached = 0 if "--no-cache-prompt" in words else 7

    def answer(self, method, path, query, body):
        match method, path:
            case "GET", "/models":
                if "reload" in query:
                    self.reload()
                listed = [
                    {"id": name, "aliases": [], "status": {"value": status, "preset": text}}
                    for name, (status, text) in self.models.items()
                ]
                return 200, {"data": listed}
            case "POST", "/models/load":
                status, text = self.models[body["model"]]
                if status == "loaded":
                    return 400, {"error": {"code": 400, "message": "model is already running"}}
                self.models[body["model"]] = ("loaded", text)
                return 200, {"success": True}
            case "POST", "/models/unload":
                self.models[body["model"]] = ("unloaded", self.models[body["model"]][1])
                return 200, {"success": True}
            case "GET", "/slots":
                return 200, [{"is_processing": False}]
            case "GET", "/lora-adapters":
                return 200, [{"id": n, "path": path, "scale": s} for n, (path, s) in enumerate(self.adapters)]
            case "POST", "/lora-adapters":
                scales = {one["id"]: one["scale"] for one in body}
                self.adapters = [(path, scales.get(n, 0)) for n, (path, _) in enumerate(self.adapters)]
                return 200, {"success": True}
            case "GET", "/props":
                return 200, {"model_path": self.model_path}
            case "POST", "/completion":
                return 200, {"content": "", "timings": {"cache_n": self.cached}}
            case "POST", "/v1/chat/completions":
                return 200, self.chunks(body)
            case "POST", "/apply-template":
                return 200, {"prompt": "<s>" + "".join(one["content"] for one in body["messages"])}
            case "POST", "/tokenize":
                return 200, {"tokens": [*body["content"].encode()]}
        return 404, {"error": {"code": 404, "message": "File Not Found"}}

    def chunks(self, body):
        """Return an answer as server-sent events; its text is the file that would answer: a model, or an adapter."""
        if self.adapters:
            given = {one["id"]: one["scale"] for one in body.get("lora", ())}
            applied = [path for n, (path, scale) in enumerate(self.adapters) if given.get(n, 0 if given else scale)]
            text = Path(applied[0]).name
        else:
            text = Path(self.models[body["model"]][1].partition("model = ")[2].partition("\n")[0]).name
            self.models[body["model"]] = ("loaded", self.models[body["model"]][1])
        chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
        return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"

    def reload(self):
        """Read the file as llama-server does: a model whose section changed is unloaded."""
        sections = {}
        for part in self.presets.read_text().split("\n[")[1:] if self.presets.exists() else []:
            name, _, text = part.partition("]\n")
            sections[name] = text.strip()
        for name, text in sections.items():
            if self.models.get(name, ("", ""))[1] != text:
                self.models[name] = ("unloaded", text)
        self.models = {name: value for name, value in self.models.items() if name in sections}

    def handle_error(self, request, client_address):
        """Whoever asks may hang up."""


class _Handler(BaseHTTPRequestHandler):
    def answer(self):
        parts = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        self.server.requests.append((self.command, parts.path, body, dict(self.headers)))
        fault = self.server.faults.get(f"{parts.path}?reload" if "reload" in parts.query else parts.path)
        fault = fault or self.server.faults.get(parts.path)
        if fault == "reset":
            self.close_connection = True  # without a response
            return
        if fault == "silent":
            self.server.ended.wait(60)
            return
        status, value = fault if isinstance(fault, tuple) else (None, None)
        if status is None:
            status, value = self.server.answer(self.command, parts.path, parse_qs(parts.query), body)
        text = "<html>a proxy</html>" if fault == "text" else value if isinstance(value, str) else json.dumps(value)
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@contextmanager
def faking(presets):
    with FakeServer(presets) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
