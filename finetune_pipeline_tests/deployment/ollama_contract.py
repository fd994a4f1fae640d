"""A server with Ollama's documented behavior, since Ollama itself is in no package registry.

`RULES` is the contract: what Ollama's source does, and where. `OllamaContract` behaves so over real HTTP, and notes in
`violations` what a client does that Ollama would accept and that breaks the deployment all the same. It checks the
digest of uploaded bytes, reads the GGUF, renders templates, and answers by the project's engine.

The commits are versions of github.com/ollama/ollama from 2025 and 2026; CREATE is later than release 0.34.1.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline_tests.deployment.go_templates import TemplateError, render

CREATE = "server/create.go@0029bb5af266"
ROUTES = "server/routes.go@00188139f12f"
TYPES = "api/types.go@00a4cb26ca09"
OPENAI = "openai/openai.go@00988753ff74"
TEMPLATE = "template/template.go@0097ef5ff1f3"
PROMPT = "server/prompt.go@0159e10a0eaf"
LAYER = "manifest/layer.go@34aeca4c20ed"
NAME = "types/model/name.go@12734c108a27"
PARSERS = "model/parsers/parsers.go@008a6caeac6c"


@dataclass(frozen=True)
class Rule:
    """One rule of the contract.

    Attributes:
        says: what the server does.
        source: file, commit and function in which it does so.
    """

    says: str
    source: str


RULES = {
    "version": Rule("GET /api/version answers {version}.", f"{ROUTES} GenerateRoutes"),
    "methods": Rule(
        "Another method of a path is answered with 405.", f"{ROUTES} GenerateRoutes, HandleMethodNotAllowed"
    ),
    "name": Rule(
        "A model name has letters, digits and . - _ only; another one is refused with 400.", f"{NAME} isValidByteFor"
    ),
    "blob-head": Rule("HEAD /api/blobs/DIGEST is 200 if the blob is there, else 404.", f"{ROUTES} HeadBlobHandler"),
    "blob-digest": Rule(
        "POST /api/blobs/DIGEST is 201 if the body has that SHA-256, else 400.",
        f"{ROUTES} CreateBlobHandler; {LAYER} NewLayer",
    ),
    "files": Rule(
        "/api/create makes a model of `files`: names and digests of blobs.",
        f"{CREATE} CreateHandler, convertModelFromFiles",
    ),
    "from": Rule(
        "`from` with a name that the server does not have is pulled from the internet.",
        f"{CREATE} CreateHandler; server/model.go@01811c176a43 parseFromModel",
    ),
    "blob-exists": Rule(
        "A file whose blob is missing is an error line of the stream.", f"{CREATE} ggufLayersWithMediaType"
    ),
    "gguf": Rule("A file that is no GGUF is an error line of the stream.", f"{CREATE} ggufLayersWithMediaType"),
    "adapters": Rule(
        "`adapters`, and a GGUF that is a LoRA adapter, are refused.",
        f"{CREATE} CreateHandler, ggufLayersWithMediaType",
    ),
    "quantize": Rule("`quantize` is refused for a GGUF.", f"{CREATE} validateCreateOptions"),
    "typical_p": Rule("The parameter typical_p is refused.", f"{CREATE} CreateHandler"),
    "error-line": Rule(
        "An error after the first line is a line {error} of a response with status 200.", f"{ROUTES} streamResponse"
    ),
    "success-last": Rule("A model exists when the last line is {status: success}.", f"{CREATE} CreateHandler"),
    "unknown-parameter": Rule("An unknown parameter is logged and ignored.", f"{TYPES} Options.FromMap"),
    "parameter-type": Rule(
        "A parameter of another type is an error when the model is loaded.", f"{TYPES} Options.FromMap"
    ),
    "context": Rule(
        "Without num_ctx the context is 4,096 tokens on a machine with less than 23 GiB of GPU memory.",
        f"{ROUTES} modelOptions, Serve",
    ),
    "sampling": Rule("Without parameters, temperature is 0.8 and repeat_penalty 1.1.", f"{TYPES} DefaultOptions"),
    "openai-temperature": Rule(
        "A request to /v1/chat/completions without temperature gets 1.0, whatever the model's parameter is.",
        f"{OPENAI} FromChatRequest",
    ),
    "system": Rule("The model's system prompt precedes messages that do not begin with one.", f"{ROUTES} ChatHandler"),
    "copy": Rule(
        "/api/copy overwrites the destination with the source's manifest; a missing source is 404.",
        f"{ROUTES} CopyHandler",
    ),
    "digest": Rule("/api/tags lists each name, with its tag, and the digest of its manifest.", f"{ROUTES} ListHandler"),
    "delete": Rule("DELETE /api/delete removes one name; a missing one is 404.", f"{ROUTES} DeleteHandler"),
    "stock-template": Rule(
        "Without TEMPLATE, the stock template within 100 edits of the GGUF's template is used.",
        f"{TEMPLATE} Named; {CREATE} convertModelFromFilesWithMediaType",
    ),
    "template": Rule(
        "A TEMPLATE is executed on the messages; consecutive ones of a role are one.",
        f"{TEMPLATE} Execute, collate; {PROMPT} renderPrompt",
    ),
    "parser": Rule(
        "The GGUF's template is preferred to a TEMPLATE if it can do more, such as tools, unless there is a parser.",
        f"{PARSERS} PassthroughParser; server/images.go (0.34) GetModel; server/routes.go (0.34) chatModeForModel",
    ),
    "debug-render": Rule(
        "/api/chat with _debug_render_only answers the prompt in _debug_info.", f"{ROUTES} ChatHandler"
    ),
}

_INT = (
    "num_ctx",
    "num_predict",
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "draft_num_predict",
    "seed",
    "top_k",
    "repeat_last_n",
)
_FLOAT = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "typical_p")
_KNOWN = {**dict.fromkeys(_INT, "integer"), **dict.fromkeys(_FLOAT, "float32"), "use_mmap": "boolean", "stop": "array"}
_METHODS = {
    "/api/version": {"GET", "HEAD"}, "/api/tags": {"GET", "HEAD"}, "/api/show": {"POST"}, "/api/create": {"POST"},
    "/api/copy": {"POST"}, "/api/delete": {"DELETE"}, "/api/chat": {"POST"}, "/v1/chat/completions": {"POST"},
}  # fmt: skip


class Refused(Exception):
    """The server answers a request with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class OllamaContract(ThreadingHTTPServer):
    """The server. Its attributes can be changed while it runs.

    Attributes:
        violations: a rule and what the client did against it, where Ollama itself would say nothing.
        stock_template: what the server finds similar to the GGUF's template, and uses if a model has none.
        native_suffix: how the server renders the GGUF's template differently.
        own_template_can_more: the GGUF's template can do more than the model's, such as tools.
        faults: path -> what goes wrong there: "reset", "hang", "full", "error-line", "no-success", "lie".
        on_request: called with method and path before each request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.version = "0.34.4"
        self.debug_rendering = True
        self.stock_template: str | None = None
        self.native_suffix = ""
        self.own_template_can_more = False
        self.key: str | None = None
        self.models: dict[str, bytes] = {}
        self.rendered: set[str] = set()
        self.uploads: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.violations: list[tuple[str, str]] = []
        self.faults: dict[str, str] = {}
        self.on_request: Callable[[str, str], None] = lambda method, path: None
        self.end_hanging = threading.Event()
        self._engines: dict[tuple[str, int], Engine] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up."""

    def note(self, rule: str, what: str) -> None:
        """Note that the client broke a rule."""
        assert rule in RULES
        self.violations.append((rule, what))

    def blob(self, digest: str) -> Path:
        """Return where a blob is."""
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise Refused(400, "invalid digest format")
        return self.folder / digest.replace(":", "-")

    def manifest(self, name: str) -> dict[str, Any]:
        """Return what a model is made of."""
        name = self.full_name(name)
        if name not in self.models:
            raise Refused(404, f"model '{name}' not found")
        manifest: dict[str, Any] = json.loads(self.models[name])
        return manifest

    def full_name(self, name: str) -> str:
        """Return a name with its tag."""
        name = name if ":" in name else f"{name}:latest"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?:[\w.-]+", name):
            raise Refused(400, f"invalid model name: {name!r}")
        return name

    def digest(self, name: str) -> str:
        """Return the digest of a model."""
        return hashlib.sha256(self.models[self.full_name(name)]).hexdigest()

    def engine(self, manifest: dict[str, Any]) -> Engine:
        """Return the loaded model; as in Ollama, names with one blob share it."""
        context = self.option(manifest, "num_ctx", 4096)
        key = manifest["blob"], context
        with self._lock:
            if key not in self._engines:
                try:
                    self._engines[key] = Engine(
                        ModelSpec(gguf=self.blob(manifest["blob"]), context=context, parallel=1)
                    )
                except EngineError as error:
                    raise Refused(500, f"unable to load model: {error}") from error
            return self._engines[key]

    def option(self, manifest: dict[str, Any], name: str, default: Any) -> Any:
        """Return a model's parameter; a value of another type is an error."""
        for given, value in manifest["parameters"].items():
            kind = _KNOWN.get(given)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = {
                "integer": number,
                "float32": number,
                "boolean": isinstance(value, bool),
                "array": isinstance(value, list),
            }
            if kind is None:
                self.note("unknown-parameter", given)
            elif not fits[kind]:
                raise Refused(500, f'option "{given}" must be of type {kind}')
        return manifest["parameters"].get(name, default)

    def prompt(self, manifest: dict[str, Any], messages: list[dict[str, Any]]) -> str:
        """Return the rendered prompt: by the model's template, or by the one in the GGUF."""
        if messages[0]["role"] != "system" and manifest["system"]:
            messages = [{"role": "system", "content": manifest["system"]}, *messages]
        engine = self.engine(manifest)
        prefers_own = self.own_template_can_more and not manifest["parser"]
        if not manifest["template"] or prefers_own:
            return engine.render(messages) + self.native_suffix
        collated: list[dict[str, Any]] = []
        for message in messages:
            if collated and collated[-1]["role"] == message["role"]:
                collated[-1]["content"] += f"\n\n{message['content']}"
            else:
                collated.append(dict(message))
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        return render(manifest["template"], {"Messages": collated, "System": system, "Response": ""})

    def create(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Make a model; what is known before the first line is raised, later errors are lines."""
        if "typical_p" in (body.get("parameters") or {}):
            raise Refused(400, "typical_p is deprecated and cannot be set as a model parameter")
        if body.get("adapters"):
            raise Refused(400, "LoRA adapters are no longer supported")
        files = body.get("files") or {}
        if body.get("quantize") and files:
            raise Refused(400, "create-time quantization is only supported for safetensors imports")
        name = self.full_name(body.get("model", ""))
        for digest in files.values():
            self.blob(digest)
        return self._create(name, body, files)

    def _create(self, name: str, body: dict[str, Any], files: dict[str, str]) -> Iterator[dict[str, Any]]:
        if body.get("from"):
            if self.full_name(body["from"]) not in self.models:
                self.note("from", f"{body['from']} would be pulled from the internet")
            yield {"status": "pulling manifest"}
            yield {"error": "pull model manifest: file does not exist"}
            return
        if not files:
            yield {"error": "neither 'from' or 'files' was specified"}
            return
        yield {"status": "parsing GGUF"}
        [(file, digest)] = files.items()
        if not self.blob(digest).exists():
            yield {"error": f"open {self.blob(digest)}: no such file or directory"}
            return
        try:
            from gguf import GGUFReader

            fields = GGUFReader(self.blob(digest)).fields
        except Exception as error:  # the reader raises anything for a damaged file
            yield {"error": f"invalid file magic: {error}"}
            return
        if "general.type" in fields and fields["general.type"].contents() == "adapter":
            yield {"error": f"LoRA adapters are no longer supported: {file} is a LoRA adapter"}
            return
        if self.faults.get("/api/create") == "error-line":
            yield {"error": "write /root/.ollama/models/manifests: no space left on device"}
            return
        parameters = body.get("parameters") or {}
        if "num_ctx" not in parameters:
            self.note("context", f"{name} would have 4,096 tokens")
        if not {"temperature", "repeat_penalty"} <= parameters.keys():
            self.note("sampling", f"{name} would answer at temperature 0.8 with a repeat penalty of 1.1")
        template = body.get("template") or self.stock_template or ""
        if body.get("template"):
            try:
                render(template, {"Messages": [], "System": "", "Response": ""})
            except TemplateError as error:
                yield {"error": f"template error: {error}"}
                return
        if self.faults.get("/api/create") == "lie":
            digest = f"sha256:{'0' * 64}"
        manifest = {
            "blob": digest,
            "system": body.get("system") or "",
            "parameters": parameters,
            "template": template,
            "parser": body.get("parser") or "",
        }
        yield {"status": f"using existing layer {digest}"}
        yield {"status": "writing manifest"}
        if self.faults.get("/api/create") == "no-success":
            return
        self.models[name] = json.dumps(manifest, sort_keys=True).encode()
        yield {"status": "success"}

    def show(self, name: str) -> dict[str, Any]:
        """Return what /api/show says."""
        manifest = self.manifest(name)
        lines = [
            f"{key:<30} {json.dumps(one, ensure_ascii=False)}"
            for key, value in manifest["parameters"].items()
            for one in (value if isinstance(value, list) else [value])
        ]
        modelfile = f'# Modelfile generated by "ollama show"\n# FROM {name}\n\nFROM {self.blob(manifest["blob"])}\n'
        return {
            "modelfile": modelfile,
            "parameters": "\n".join(lines),
            "template": manifest["template"],
            "system": manifest["system"],
        }

    def copy(self, source: str, destination: str) -> None:
        """Copy a manifest."""
        source, destination = self.full_name(source), self.full_name(destination)
        if source not in self.models:
            raise Refused(404, f'model "{source}" not found')
        deploys = re.search(r":v\d+\.\d+\.\d+$", source) and destination.endswith(":latest")
        if deploys and self.digest(source) not in self.rendered:
            self.note("debug-render", f"{source} gets requests, but its prompts were not compared")
        if self.faults.get("/api/copy") != "lie":
            self.models[destination] = self.models[source]

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer /api/chat, or return the prompt."""
        manifest = self.manifest(body["model"])
        text = self.prompt(manifest, body["messages"])
        if body.get("_debug_render_only"):
            self.rendered.add(self.digest(body["model"]))
            if self.debug_rendering:
                return {"model": body["model"], "_debug_info": {"rendered_template": text}}
        answer = self.engine(manifest).generate([GenerateRequest(prompt=text, max_tokens=1)])[0]
        return {"model": body["model"], "message": {"role": "assistant", "content": answer.text}, "done": True}

    def completion(self, body: dict[str, Any]) -> tuple[str, str]:
        """Return text and finish reason of a request in OpenAI's form."""
        manifest = self.manifest(body["model"])
        if "temperature" not in body:
            self.note("openai-temperature", f"{body['model']} answers at temperature 1.0")
        schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
        request = GenerateRequest(
            prompt=self.prompt(manifest, body["messages"]),
            max_tokens=body.get("max_tokens") or self.option(manifest, "num_predict", 128),
            temperature=body.get("temperature", 1.0),
            stop=self.option(manifest, "stop", []),
            json_schema=schema,
        )
        answer = self.engine(manifest).generate([request])[0]
        return answer.text, answer.finish_reason

    def server_close(self) -> None:
        """Close the port and the loaded models."""
        super().server_close()
        for engine in self._engines.values():
            engine.close()


class _Handler(BaseHTTPRequestHandler):
    server: OllamaContract
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((self.command, path))
        server.on_request(self.command, path)
        fault = server.faults.get(path.partition("/sha256")[0])
        if fault == "reset":
            # With a linger time of 0 the kernel sends RST instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            server.end_hanging.wait(60)
        try:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                raise Refused(401, "unauthorized")
            self._route(path, fault)
        except Refused as error:
            self._json({"error": str(error)}, error.status)

    do_GET = do_HEAD = do_POST = do_DELETE = _handle

    def _route(self, path: str, fault: str | None) -> None:
        server = self.server
        if path.startswith("/api/blobs/"):
            self._blob(path.removeprefix("/api/blobs/"), fault)
            return
        if path not in _METHODS:
            raise Refused(404, "404 page not found")
        if self.command not in _METHODS[path]:
            raise Refused(405, "405 method not allowed")
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        match path:
            case "/api/version":
                self._json({"version": server.version})
            case "/api/tags":
                self._json(
                    {"models": [{"name": name, "digest": server.digest(name)} for name in sorted(server.models)]}
                )
            case "/api/show":
                self._json(server.show(body["model"]))
            case "/api/create":
                self._lines(server.create(body))
            case "/api/copy":
                server.copy(body["source"], body["destination"])
                self._json(None)
            case "/api/delete":
                server.manifest(body["model"])
                del server.models[server.full_name(body["model"])]
                self._json(None)
            case "/api/chat":
                self._json(server.chat(body))
            case "/v1/chat/completions":
                self._events(*server.completion(body))

    def _blob(self, digest: str, fault: str | None) -> None:
        path = self.server.blob(digest)
        if self.command == "HEAD":
            there = path.exists() or fault == "lie"
            self.send_response(200 if there else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        length = int(self.headers["Content-Length"])
        if path.exists():
            self.server.note("blob-head", f"{digest} was sent again")
        partial = path.with_name(f"{path.name}-{threading.get_ident()}")
        found = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for _ in range(0, length, 1 << 16):
                    chunk = self.rfile.read(min(1 << 16, length - file.tell()))
                    found.update(chunk)
                    file.write(chunk)
                    if fault == "full" and file.tell() >= length // 2:
                        self.close_connection = True
                        raise Refused(500, "write sha256-1: no space left on device")
            if f"sha256:{found.hexdigest()}" != digest:
                raise Refused(400, f'digest mismatch, expected "{digest}", got "sha256:{found.hexdigest()}"')
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        self.server.uploads.append(digest)
        self._json(None, 201)

    def _json(self, value: Any, status: int = 200) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _lines(self, lines: Iterator[dict[str, Any]]) -> None:
        self._start("application/x-ndjson")
        for line in lines:
            self._chunk(json.dumps(line).encode() + b"\n")
        self._chunk(b"")

    def _events(self, text: str, reason: str) -> None:
        self._start("text/event-stream")
        for choice in ({"delta": {"content": text}}, {"delta": {}, "finish_reason": reason}):
            self._chunk(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _start(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        with suppress(OSError):
            self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def ollama_contract(folder: Path) -> Iterator[OllamaContract]:
    """Run the server on a free port of the loopback interface."""
    folder.mkdir(parents=True, exist_ok=True)
    server = OllamaContract(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end_hanging.set()
        server.shutdown()
        server.server_close()
        thread.join()
