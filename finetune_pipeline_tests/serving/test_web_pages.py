"""Web pages that use the gateway: preflights, allowed origins, and the same in a real browser."""

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.serving import http as serving_http
from finetune_pipeline.serving.access import parse_origin
from finetune_pipeline_tests.serving.conftest import PROMPT, make_loop, serving

CHAT = "/v1/chat/completions"
BODY = {"model": "notes", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
APP = "https://app.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-interaction-id,x-stainless-lang",
}
EXPOSED = {"x-interaction-id", "x-request-id", "x-confidence", "x-ignored-fields", "idempotent-replayed"}
EXPOSED |= {"server-timing", "retry-after"}


@pytest.fixture(scope="module")
def opened(notes):
    with serving(make_loop(), allow_origins=[APP, "null"]) as running:
        yield running


@pytest.mark.parametrize(
    "origin",
    [APP, "null", "http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443", "tauri://localhost"],
)
@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/v1/models", "/v1/feedback", "/healthz"])
def test_a_preflight_of_an_allowed_origin_is_answered(opened, origin, path):
    answer = opened.http.options(path, headers={**PREFLIGHT, "Origin": origin})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-private-network" not in answer.headers


def test_a_preflight_for_a_private_network_is_answered(opened):
    headers = {**PREFLIGHT, "Origin": APP, "Access-Control-Request-Private-Network": "true"}
    answer = opened.http.options(CHAT, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example", f"{APP}:8443", f"{APP}.evil.example"])
def test_a_preflight_of_another_origin_is_refused(opened, origin):
    refused = opened.http.options(CHAT, headers={**PREFLIGHT, "Origin": origin})
    assert refused.status_code == 403
    assert "finetune serve --allow-origin ORIGIN" in refused.json()["error"]["message"]
    assert not [name for name in refused.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000", "null"])
@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST"])
def test_a_foreign_host_name_is_refused_from_every_origin(opened, origin, method):
    headers = {**PREFLIGHT, "Origin": origin, "Host": "evil.example:8484"}
    refused = opened.http.request(method, CHAT, headers=headers)
    assert refused.status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_exposes_the_id_of_the_interaction(opened, stream):
    answer = opened.http.post(CHAT, json={**BODY, "stream": stream}, headers={"Origin": APP})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == APP
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed == EXPOSED
    assert "Origin" in answer.headers["vary"]


@pytest.fixture(scope="module")
def keyed(own_home, notes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(tmp_path_factory.mktemp("keyed")))
        key = create_key(connect(), "app", ["infer"])
        with serving(make_loop(), allow_origins=[APP]) as running:
            yield running, {"Authorization": f"Bearer {key}"}


def _break(*_):
    raise ZeroDivisionError


ERRORS = {
    "no key": (401, {"json": BODY}),
    "another scope": (403, {"url": "/admin/reload-model", "json": {}}),
    "wrong field": (400, {"json": {**BODY, "temperature": 9}}),
    "no such model": (404, {"json": {**BODY, "model": "x"}}),
    "no such path": (404, {"url": "/v1/x", "json": {}}),
    "no such method": (405, {"method": "GET"}),
    "large body": (413, {"content": b" " * (serving_http.MAX_BODY + 1)}),
    "large headers": (431, {"headers": {"X-Large": "x" * 65536}}),
    "no JSON": (415, {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "bug": (500, {"json": BODY}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_can_be_read_by_the_page(keyed, case, monkeypatch):
    running, key = keyed
    expected, request = ERRORS[case]
    if case == "bug":
        monkeypatch.setattr("finetune_pipeline.serving.completions.prepare", _break)
    headers = {"Origin": APP, **({} if case == "no key" else key), **request.get("headers", {})}
    fields = {"method": "POST", "url": CHAT, **request, "headers": headers}
    answer = running.http.request(**fields)
    assert answer.status_code == expected, answer.text
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.json()["error"]["message"]


def test_with_keys_a_preflight_needs_none_and_other_origins_get_no_permission(keyed):
    running, key = keyed
    allowed = running.http.options(CHAT, headers={**PREFLIGHT, "Origin": APP, "Host": "gateway.example"})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, APP)
    evil = {"Origin": "https://evil.example"}
    for refused in (
        running.http.options(CHAT, headers={**PREFLIGHT, **evil}),
        running.http.post(CHAT, json=BODY, headers={**evil, **key}),
    ):
        assert "access-control-allow-origin" not in refused.headers


# ---- the option


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("HTTPS://App.Example:443/", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_an_origin_is_compared_as_browsers_send_it(given, origin):
    assert parse_origin(given) == origin


@pytest.mark.parametrize("given", ["", "app.example", "https://", "https://app.example/chat", "https://*.example"])
def test_what_is_no_origin_is_wrong_usage(given):
    ended = CliRunner().invoke(finetune, ["serve", "--allow-origin", given])
    assert ended.exit_code == 2
    assert "is not the origin of a web page" in " ".join(ended.output.split())


def test_every_origin_is_allowed_only_with_keys(own_home, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    ended = CliRunner().invoke(finetune, ["serve", "--allow-origin", "*"])
    assert ended.exit_code == 1
    assert "Name the origins, or create a key" in str(ended.exception)


# ---- a browser

PAGE = """<!doctype html><title>page</title><script>
const [url, body] = %s;
const report = result => fetch("/result", {method: "POST", body: JSON.stringify(result)});
fetch(url, body && {
  method: "POST",
  headers: {"Content-Type": "application/json", "Authorization": "Bearer none", "X-Stainless-Lang": "js"},
  body: JSON.stringify(body),
}).then(
  async answer => report({
    status: answer.status, id: answer.headers.get("x-interaction-id"), text: await answer.text(),
  }),
  error => report({failed: String(error)}),
);
</script>"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def page_of(url: str, body: object) -> Iterator[tuple[int, "queue.Queue[dict]"]]:
    """Serve a page that fetches `url`, and yield its port and what the page reports."""
    results: queue.Queue[dict] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((PAGE % json.dumps([url, body])).encode())

        def do_POST(self):
            results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port, results
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize(
    ("page", "gateway", "body", "readable"),
    [
        ("http://127.0.0.1", "127.0.0.1", BODY, True),
        ("http://localhost", "127.0.0.1", {**BODY, "stream": True}, True),
        ("http://localhost", "127.0.0.1", {**BODY, "model": "x"}, True),  # an error
        ("http://app.example", "127.0.0.1", BODY, True),
        ("http://evil.example", "127.0.0.1", BODY, False),
        ("http://evil.example", "127.0.0.1", None, False),  # a GET without a preflight
        ("http://evil.example", "evil.example", None, False),  # its name resolves to this machine
    ],
)
def test_a_browser_gives_answers_to_allowed_pages_only(notes, tmp_path, page, gateway, body, readable):
    port = notes.url.rpartition(":")[2]
    path = CHAT if body else "/v1/models"
    answered = notes.metric("finetune_answers_total", loop="notes")
    with page_of(f"http://{gateway}:{port}{path}", body) as (page_port, results):
        notes.gateway.access._allow_origins = frozenset({f"http://app.example:{page_port}"})
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--host-resolver-rules=MAP *.example 127.0.0.1", "--no-first-run", "--no-proxy-server"]
        with subprocess.Popen(
            [*command, "--remote-debugging-port=0", f"{page}:{page_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as browser:
            try:
                result = results.get(timeout=240)
            finally:
                browser.terminate()
    if not readable:
        assert result == {"failed": "TypeError: Failed to fetch"}
        assert notes.metric("finetune_answers_total", loop="notes") == answered
    elif body["model"] == "notes":
        assert result["status"] == 200, result
        assert notes.interaction(result["id"])["interaction"]["prompt"] == PROMPT
        assert result["id"].replace("-", "") in result["text"].replace("-", "")
    else:
        assert result["status"] == 404
        assert "There is no model 'x'" in result["text"]
