"""Each rule of the contract with Ollama is broken once: by a changed request, or by a client without a precaution.

Either the server refuses that, or its double notes it, or the client notices it by another check.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment import ollama
from finetune_pipeline.deployment.go_template import go_template
from finetune_pipeline.deployment.ollama import PARAMETERS, Ollama
from finetune_pipeline.deployment.target import TargetError
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.protocol import GenerateRequest
from finetune_pipeline.inference.remote_engine import RemoteEngine
from finetune_pipeline_tests.deployment.go_templates import TemplateError, render
from finetune_pipeline_tests.deployment.ollama_contract import RULES

STOCK = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}assistant:"
ZEROS = f"sha256:{'0' * 64}"


class Case:
    """A deployment by a client that breaks one rule."""

    def __init__(self, server, target, make_release, patch, tmp_path) -> None:
        self.server, self.target, self.make_release, self.patch = server, target, make_release, patch
        self.tmp_path = tmp_path
        self.release = make_release()

    def deploy(self) -> None:
        endpoint = self.target.stage(self.release)
        self.target.activate(self.release)
        assert self.target.observe(self.release).label == self.release.label
        message = [{"role": "user", "content": "A wall"}]
        with RemoteEngine(endpoint, 1, "the test") as remote:
            remote.submit(GenerateRequest(messages=message, max_tokens=2)).result()
        self.target.remove_old({self.release.label})

    def requests(self, change: Callable[[httpx.Request], httpx.Request]) -> None:
        """Change the requests that the client sends."""
        send = httpx.HTTPTransport.handle_request
        self.patch.setattr(httpx.HTTPTransport, "handle_request", lambda self, request: send(self, change(request)))

    def body(self, path: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the JSON of the requests to a path."""

        def changed(request: httpx.Request) -> httpx.Request:
            if request.url.path != path:
                return request
            body = json.loads(request.read())
            change(body)
            return httpx.Request(request.method, request.url, json=body, extensions=request.extensions)

        self.requests(changed)

    def parameter(self, name: str, kind: type, value: Any) -> None:
        """Let the client send a parameter without its own check."""
        self.patch.setitem(PARAMETERS, name, (kind,))
        self.release = self.make_release(config={name: value})


def moved(request: httpx.Request, path: str, to: str) -> httpx.Request:
    if request.url.path == path:
        request.url = request.url.copy_with(path=to)
    return request


def old_releases(case: Case) -> None:
    for number in range(1, 3):
        case.target.stage(case.make_release(f"v0.0.{number}", context=256))


def break_methods(case: Case) -> None:
    old_releases(case)

    def posted(request: httpx.Request) -> httpx.Request:
        request.method = "POST" if request.method == "DELETE" else request.method
        return request

    case.requests(posted)


def break_delete(case: Case) -> None:
    old_releases(case)
    case.body("/api/delete", lambda body: body.update(model=""))


def break_blob_head(case: Case) -> None:
    case.deploy()
    case.server.models.clear()
    path = f"/api/blobs/sha256:{case.release.gguf_sha256}"
    case.requests(lambda one: moved(one, path, f"/api/blobs/{ZEROS}") if one.method == "HEAD" else one)


def break_blob_digest(case: Case) -> None:
    path = f"/api/blobs/sha256:{case.release.gguf_sha256}"
    case.requests(lambda one: moved(one, path, f"/api/blobs/{ZEROS}") if one.method == "POST" else one)


def break_from(case: Case) -> None:
    case.body("/api/create", lambda body: (body.pop("files"), body.update({"from": "llama3"})))


def break_gguf(case: Case) -> None:
    path = case.tmp_path / "model.gguf"
    path.write_text("no model")
    case.release = case.make_release(gguf=path, gguf_sha256=hash_file(path))


def ignore_lines(case: Case, fault: str) -> None:
    """Let the client take every line of /api/create for success."""
    case.server.faults["/api/create"] = fault
    object_of = Ollama._object
    case.patch.setattr(
        Ollama,
        "_object",
        lambda self, text, path: {"status": "success"} if "create" in path else object_of(self, text, path),
    )


def break_stock_template(case: Case) -> None:
    case.server.stock_template = STOCK
    case.patch.setattr(Ollama, "_rendered", lambda *arguments: None)


def break_template(case: Case) -> None:
    case.server.stock_template = STOCK
    case.patch.setattr(ollama, "go_template", lambda *arguments: "{{ range .Messages }}{{ .Content }}")


def break_parser(case: Case) -> None:
    case.server.native_suffix, case.server.own_template_can_more = "<think>\n", True
    case.body("/api/create", lambda body: body.pop("parser", None))


def break_openai_temperature(case: Case) -> None:
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def without_temperature(self, request):
        body = json.loads(request.read())
        body.pop("temperature", None)
        return await send(self, httpx.Request(request.method, request.url, json=body, extensions=request.extensions))

    case.patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", without_temperature)


def swap(body: dict[str, Any]) -> None:
    body["source"], body["destination"] = body["destination"], body["source"]


def change_create(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], None]:
    return lambda case: case.body("/api/create", change)


BROKEN: dict[str, tuple[Callable[[Case], None], str | None]] = {
    # rule: what breaks it, and the error; None: the double notes it
    "version": (lambda case: case.requests(lambda one: moved(one, "/api/version", "/x")), "is not an Ollama server"),
    "methods": (break_methods, "status 405"),
    "name": (change_create(lambda body: body.update(model="not es:v1.0.0")), "invalid model name"),
    "blob-head": (break_blob_head, None),
    "blob-digest": (break_blob_digest, "digest mismatch"),
    "files": (change_create(lambda body: body.pop("files")), "neither 'from' or 'files'"),
    "from": (break_from, None),
    "blob-exists": (lambda case: case.patch.setattr(Ollama, "_upload", lambda *_: None), "no such file"),
    "gguf": (break_gguf, "invalid file magic"),
    "adapters": (change_create(lambda body: body.update(adapters={"a.gguf": ZEROS})), "LoRA adapters are no longer"),
    "quantize": (change_create(lambda body: body.update(quantize="q4_K_M")), "create-time quantization"),
    "typical_p": (lambda case: case.parameter("typical_p", float, 0.9), "typical_p is deprecated"),
    "error-line": (lambda case: ignore_lines(case, "error-line"), "has the GGUF none instead"),
    "success-last": (lambda case: ignore_lines(case, "no-success"), "has the GGUF none instead"),
    "unknown-parameter": (lambda case: case.parameter("max_model_len", int, 4096), None),
    "parameter-type": (lambda case: case.parameter("top_k", list, ["1"]), "must be of type integer"),
    "context": (change_create(lambda body: body["parameters"].pop("num_ctx")), None),
    "sampling": (change_create(lambda body: body["parameters"].pop("repeat_penalty")), None),
    "openai-temperature": (break_openai_temperature, None),
    "system": (change_create(lambda body: body.pop("system")), "renders prompts for notes@v1.0.0 in another way"),
    "copy": (lambda case: case.body("/api/copy", swap), "not found"),
    "digest": (
        lambda case: case.body("/api/copy", lambda body: body.update(destination="notes:other")),
        "/api/tags lists no such model",
    ),
    "delete": (break_delete, "cannot delete"),
    "stock-template": (break_stock_template, None),
    "template": (break_template, "template error"),
    "parser": (break_parser, "renders prompts for notes@v1.0.0 in another way"),
    "debug-render": (lambda case: case.body("/api/chat", lambda body: body.pop("_debug_render_only")), None),
}  # fmt: skip

NOTED_AS = {"stock-template": "debug-render"}
"""Rules whose breach is noted by another one."""


@pytest.fixture
def case(server, make_ollama, make_release, monkeypatch, tmp_path):
    return Case(server, make_ollama(server.url), make_release, monkeypatch, tmp_path)


def test_every_rule_has_a_source_and_is_broken_once():
    assert BROKEN.keys() == RULES.keys()
    for rule in RULES.values():
        assert re.match(r"\w+/\S+\.go@[0-9a-f]{12} [\w., ]+", rule.source) and rule.says.endswith(".")


@pytest.mark.parametrize("rule", RULES)
def test_a_client_that_breaks_a_rule_fails(case, rule):
    break_it, message = BROKEN[rule]
    break_it(case)
    if message is None:
        try:
            case.deploy()
        except TargetError:
            assert rule == "from"
        assert NOTED_AS.get(rule, rule) in {noted for noted, _ in case.server.violations}
    else:
        with pytest.raises(TargetError, match=re.escape(message)):
            case.deploy()


def test_the_client_breaks_none(case):
    old_releases(case)
    case.deploy()
    assert case.server.violations == []


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{- range .Messages }}<{{ .Role }}>{{ .Content }}\n{{ end }}>", "<system>s\n<user>u\n>"),
        ("a {{- if .System }} {{ .System }}{{ else }}none{{ end -}} b", "a sb"),
        (
            '{{ range $i, $m := .Messages }}{{ if eq $i 0 }}{{ "\\"\\n" }}{{ else if eq $m.Role "user" }}U{{ end }}'
            "{{ end }}",
            '"\nU',
        ),
        ("{{ if .Missing }}x{{ else if .System }}y{{ end }}", "y"),
    ],
)
def test_go_templates_are_rendered_as_go_does(template, text):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert render(template, {"Messages": messages, "System": "s"}) == text


@pytest.mark.parametrize("template", ["{{ if .System }}x", "{{ end }}", "{{ .System", "{{ $x }}", "{{ a b }}"])
def test_invalid_go_templates_are_refused(template):
    with pytest.raises(TemplateError):
        render(template, {"Messages": [], "System": "s"})


def test_a_made_template_has_what_the_tokenizers_template_writes():
    def gemma(messages):
        """Render like Gemma: a system prompt is the beginning of the user's message."""
        text, system = "<bos>", ""
        for message in messages:
            if message["role"] == "system":
                system = f"{message['content']}\n\n"
                continue
            role = "model" if message["role"] == "assistant" else "user"
            text += f"<start_of_turn>{role}\n{system}{message['content']}<end_of_turn>\n"
            system = ""
        return f"{text}<start_of_turn>model\n"

    template = go_template(gemma, "<bos>")
    conversations = [
        [{"role": "user", "content": 'q {{ .System }} "w"'}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "門"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "r"},
        ],
    ]
    for messages in conversations:
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        assert f"<bos>{render(template, {'Messages': messages, 'System': system})}" == gemma(messages)


def test_no_template_is_made_of_one_that_changes_messages():
    def shouting(messages):
        return "".join(f"{message['role']}: {message['content'].upper()}\n" for message in messages)

    with pytest.raises(RequestRefused, match="changes or leaves out messages"):
        go_template(shouting)
