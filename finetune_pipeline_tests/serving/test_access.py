"""API keys, host checks and size limits; texts of requests are never paths, SQL or templates."""

import http.client
import json
import subprocess
import sys

import httpx
import openai
import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import ApiKeyError, create_key, list_keys, revoke_key
from finetune_pipeline.hosts import is_loopback
from finetune_pipeline.serving.access import Access
from finetune_pipeline.serving.gateway import REFRESH_SECONDS
from finetune_pipeline_tests.serving.conftest import PROMPT, free_port, make_loop, serving
from finetune_pipeline_tests.waiting import wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": "notes", "messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """Run a gateway with its own home and three keys."""
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    database = connect()
    keys = {
        "infer": create_key(database, "app", ["infer"]),
        "feedback": create_key(database, "people", ["feedback"]),
        "admin": create_key(database, "boss", ["admin"]),
    }
    with serving(make_loop()) as running:
        yield running, keys


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()}


# ---- without keys, only this machine is served


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::2]"])
def test_a_foreign_host_name_is_refused(notes, host):
    refused = notes.http.post(CHAT, json=BODY, headers={"Host": host})
    assert refused.status_code == 403
    assert "serves this machine only" in refused.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:8484", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8484"])
def test_names_of_this_machine_are_accepted(notes, host):
    assert notes.http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "http://evil.example:8484", "null", "x"]
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("POST", "/admin/rollback")])
def test_a_foreign_web_page_is_refused(notes, origin, method, path):
    refused = notes.http.request(method, path, json=BODY, headers={"Origin": origin})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
    assert "access-control-allow-origin" not in notes.http.options(CHAT, headers={"Origin": origin}).headers


def test_a_web_page_of_this_machine_is_accepted(notes):
    assert notes.http.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200
    assert notes.http.get("/v1/models", headers={"Origin": "http://[::1]:3000"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com", "", "127.0.0.1.example.com"])
def test_only_loopback_addresses_are_loopback(host):
    assert not is_loopback(host)
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost")


def test_other_addresses_are_not_served_without_keys(own_home):
    command = [
        sys.executable,
        "-m",
        "finetune_pipeline.cli.main",
        "serve",
        "--host",
        "0.0.0.0",
        "--port",
        str(free_port()),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "0.0.0.0 can be reached from other machines, and no API key exists" in ended.stdout + ended.stderr


# ---- with keys


def test_an_unknown_key_is_refused(locked):
    running, _ = locked
    with pytest.raises(openai.AuthenticationError, match="The API key is unknown"):
        running.openai(api_key="ft-wrong").chat.completions.create(**BODY)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/v1/feedback"),
        ("POST", "/v1/interactions"), ("GET", f"/v1/interactions/{'0' * 32}"), ("GET", "/v1/feedback/stats"),
        ("GET", "/metrics"), ("POST", "/admin/reload-model"), ("POST", "/admin/rollback"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": ""}, {"Authorization": "Basic eDp5"}, bearer("x y"), bearer("é")],
    ids=["none", "empty", "basic", "two words", "not ASCII"],
)
def test_without_a_known_key_every_route_is_refused(locked, method, path, headers):
    running, _ = locked
    refused = running.http.request(method, path, headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_key_allows_only_its_scopes(locked):
    running, keys = locked
    client = running.openai(api_key=keys["infer"])
    answer = client.chat.completions.create(**BODY)
    with pytest.raises(
        openai.PermissionDeniedError, match="The key 'people' has the scopes feedback, but this needs infer"
    ):
        running.openai(api_key=keys["feedback"]).chat.completions.create(**BODY)
    allowed = {
        ("GET", f"/v1/interactions/{answer.id}"): "feedback",
        ("GET", "/v1/feedback/stats"): "feedback",
        ("GET", "/v1/models"): "infer",
        ("POST", "/admin/reload-model"): "admin",
    }
    for (method, path), scope in allowed.items():
        for name, key in keys.items():
            status = running.http.request(
                method, path, headers=bearer(key), **({"json": {}} if method == "POST" else {})
            )
            assert (path, name, status.status_code) == (path, name, 200 if name == scope else 403)
    assert running.http.get("/metrics", headers=bearer(keys["infer"])).status_code == 200


def test_with_keys_any_host_name_is_accepted(locked):
    running, keys = locked
    headers = {**bearer(keys["infer"]), "Host": "gateway.example", "Origin": "https://app.example"}
    assert running.http.get("/v1/models", headers=headers).status_code == 200


def test_health_without_a_key_shows_no_paths(locked):
    running, _ = locked
    running.gateway.servers["notes"].last_error = "/secret/path/model.gguf does not exist"
    health = running.health()
    assert "/secret" not in json.dumps(health)
    assert health["loops"]["notes"]["last_error"] == "see the gateway's log"


def test_errors_show_no_paths_to_other_machines(locked):
    running, keys = locked
    server = running.gateway.servers["notes"]
    server.current, server.last_error, server.loop = (
        None,
        "/secret/path/model.gguf does not exist",
        make_loop(serving={"fallback": None}),
    )
    error = running.http.post(CHAT, json=BODY, headers=bearer(keys["infer"]))
    assert error.status_code == 503 and "/secret" not in error.text
    assert "notes cannot answer now. The gateway's log says why." in error.text


def test_two_keys_in_use_cannot_have_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    create_key(connect(), "twin", ["infer"])
    with pytest.raises(ApiKeyError, match="A key named 'twin' is in use"):
        create_key(connect(), "twin", ["admin"])
    assert revoke_key(connect(), "twin") == 1
    create_key(connect(), "twin", ["infer"])


def test_new_and_revoked_keys_take_effect_without_a_restart(locked):
    running, _ = locked
    secret = create_key(connect(), "late", ["infer"])
    wait_until(lambda: running.http.get("/v1/models", headers=bearer(secret)).status_code == 200)
    assert revoke_key(connect(), "late") == 1
    wait_until(lambda: running.http.get("/v1/models", headers=bearer(secret)).status_code == 401)
    assert REFRESH_SECONDS < 1  # how long that takes, apart from the query


def test_a_revoked_key_is_refused_while_a_model_loads(locked):
    running, keys = locked
    server = running.gateway.servers["notes"]
    loop = running.gateway._refreshing[0].get_loop()

    import asyncio

    asyncio.run_coroutine_threadsafe(server._change_lock.acquire(), loop).result(60)  # as while a large model loads
    try:
        wait_until(lambda: server._change_lock._waiters)  # the refresh of the loop
        revoke_key(connect(), "app")
        wait_until(lambda: running.http.get("/v1/models", headers=bearer(keys["infer"])).status_code == 401)
    finally:
        loop.call_soon_threadsafe(server._change_lock.release)


def test_revoking_the_last_key_does_not_open_the_gateway(locked):
    running, keys = locked
    for name in ("app", "people", "boss"):
        revoke_key(connect(), name)
    wait_until(lambda: running.http.get("/metrics", headers=bearer(keys["admin"])).status_code == 401)
    assert running.http.get("/v1/models").status_code == 401
    assert not Access(connect(), loopback=True).open


def test_the_database_holds_only_hashes_of_keys(locked):
    _, keys = locked
    with connect().read() as connection:
        rows = connection.execute(sa.text("SELECT * FROM api_keys")).all()
    assert len(rows) == len(list_keys(connect())) == 3
    assert not any(secret in str(row) for secret in keys.values() for row in rows)
    for path in connect().engine.url.database, f"{connect().engine.url.database}-wal":
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read()
        assert not any(secret.encode() in data for secret in keys.values())


# ---- bodies and texts


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_content_types_of_web_forms_are_refused(notes, kind):
    refused = notes.http.post(CHAT, content=json.dumps(BODY), headers={"Content-Type": kind})
    assert refused.status_code == 415


@pytest.mark.parametrize("path", [CHAT, "/v1/feedback", "/v1/interactions", "/admin/rollback"])
def test_ten_megabytes_are_refused(notes, path):
    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    assert _status(notes, path, body, {"Content-Length": str(len(body))}) == 413


def test_ten_megabytes_in_chunks_are_refused(notes):
    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    chunks = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    assert _status(notes, CHAT, chunks, {"Transfer-Encoding": "chunked"}) == 413


def _status(notes, path, body, headers):
    connection = http.client.HTTPConnection(notes.url.removeprefix("http://"), timeout=30)
    try:
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", path, body, headers, encode_chunked="Transfer-Encoding" in headers)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it responded before it had the complete body
    return connection.getresponse().status


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "x.jsonl", "' OR 1=1 --", "%00", "0" * 33]
)
def test_a_path_is_not_an_id(notes, id):
    response = notes.http.get(f"/v1/interactions/{id}")
    assert response.status_code in {400, 404}
    assert "root:" not in response.text
    given = notes.http.post("/v1/feedback", json={"interaction_id": id, "kind": "thumbs_up"})
    assert given.status_code == 400


SQL = "'; DROP TABLE interactions; --\" OR 1=1 /*"


def test_sql_in_every_text_stays_text(notes):
    metadata = {"domain": SQL, "kind": SQL, "retrieved_context": SQL}
    answer = notes.ask(SQL, user=SQL, metadata=metadata).json()
    kept = notes.interaction(answer["id"])["interaction"]
    assert [kept[name] for name in ("prompt", "user", "domain", "kind", "retrieved_context")] == [SQL] * 5
    given = {"interaction_id": answer["id"], "kind": "correction", "correction": SQL, "user": SQL}
    assert notes.http.post("/v1/feedback", json=given).json()["status"] == "recorded"
    found = notes.interaction(answer["id"])
    assert (found["target"], found["feedback"][0]["user"]) == (SQL, SQL)
    logged = {"loop": "notes", "prompt": SQL, "output": SQL, "model": SQL, "user": SQL, "variant": SQL, "flag": SQL}
    receipt = notes.http.post("/v1/interactions", json=logged).json()
    kept = notes.interaction(receipt["id"])["interaction"]
    assert {kept[name] for name in logged if name != "loop"} == {SQL}
    assert notes.http.post("/v1/interactions", json={**logged, "loop": SQL}).status_code == 404
    assert notes.http.get("/v1/feedback/stats", params={"loop": SQL}).status_code == 404
    assert notes.ask(model=SQL).status_code == 404


def test_references_in_a_schema_are_never_opened(notes):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "string"}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{elsewhere.server_port}/schema.json"
        schemas = [
            {"$ref": address},
            {"type": "object", "properties": {"a": {"$ref": address}}},
            {"anyOf": [{"type": "array", "items": {"$ref": "file:///etc/passwd"}}]},
            {"$id": address, "type": "object", "properties": {"a": {"$ref": "other.json"}}},
        ]
        for schema in schemas:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            refused = notes.ask(response_format=form)
            assert refused.status_code == 400, refused.text
            assert "only references within it" in refused.json()["error"]["message"]
        elsewhere.shutdown()
    assert asked == []


@pytest.mark.parametrize("text", ["{{7*7}}", "{% for x in y %}", "{{ messages }}", "{{ cycler.__init__.__globals__ }}"])
def test_a_template_in_a_message_is_text(notes, text):
    answer = notes.ask(text, max_tokens=4)
    assert answer.status_code == 200
    kept = notes.interaction(answer.json()["id"])["interaction"]
    assert kept["prompt"] == text


def test_a_template_in_a_message_is_not_rendered(notes):
    # If it were rendered, it would be as long as the number.
    lengths = [notes.ask(text, max_tokens=1).json()["usage"]["prompt_tokens"] for text in ("{{7*7}}", "49")]
    assert lengths[0] > lengths[1]


def test_two_keys_in_one_request_are_not_combined(locked):
    running, keys = locked
    headers = [("Authorization", f"Bearer {keys['infer']}"), ("Authorization", f"Bearer {keys['admin']}")]
    assert httpx.post(f"{running.url}/admin/reload-model", json={}, headers=headers).status_code in {401, 403}
