"""What other programs try first: health checks, HEAD, OPTIONS, and paths without /v1."""

import http.client

import pytest

from finetune_pipeline_tests.serving.conftest import PROMPT, make_loop, promote, serving

BODY = {"model": "notes", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
GETS = ["/healthz", "/health", "/metrics", "/v1/models", "/v1/models/notes", "/v1/feedback/stats", "/docs"]


@pytest.mark.parametrize("path", ["/health", "/healthz"])
def test_health_has_two_paths(notes, path):
    assert notes.http.get(path).json() == notes.health()


@pytest.mark.parametrize("path", [*GETS, "/models", "/v1/models/nothing", "/nothing", "/v1/chat/completions"])
def test_head_has_the_headers_of_get_and_no_body(notes, path):
    connection = http.client.HTTPConnection(notes.url.removeprefix("http://"), timeout=60)
    found = []
    for method in ("HEAD", "GET", "HEAD"):  # on one connection, so that a body would be read as the next response
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        assert bool(body) is (method == "GET")
        dynamic = {"date", "server-timing"} | ({"content-length"} if path == "/metrics" else set())
        found.append((response.status, [one for one in response.getheaders() if one[0] not in dynamic]))
    assert found[0] == found[1] == found[2]
    connection.close()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [(path, {"GET", "HEAD", "OPTIONS"}) for path in [*GETS, "/models"]]
    + [(path, {"POST", "OPTIONS"}) for path in ["/v1/chat/completions", "/completions", "/admin/rollback"]],
)
def test_options_names_the_methods(notes, path, allowed):
    response = notes.http.options(path)
    assert (response.status_code, response.content) == (204, b"")
    assert set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/completions", "/docs", "/static-offline-docs/x.js"])
def test_another_method_is_405_and_names_the_same_methods_as_options(notes, method, path):
    refused = notes.http.request(method, path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
    assert refused.headers["allow"] == notes.http.options(path).headers["allow"]


def test_options_of_an_unknown_path_is_404(notes):
    assert notes.http.options("/v1/nothing").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models", None),
        ("GET", "/models/notes", None),
        ("GET", "/models/nothing", None),
        ("GET", "/feedback/stats", None),
        ("GET", "/interactions/nothing", None),
        ("GET", "/chat/nothing", None),
        ("POST", "/chat/completions", {**BODY, "temperature": 3}),
        ("POST", "/completions", {"model": "nothing", "prompt": "x"}),
        ("POST", "/feedback", {}),
        ("POST", "/interactions", {}),
    ],
)
def test_paths_without_v1_are_the_same_routes(notes, method, path, body):
    with_, without = (notes.http.request(method, f"{prefix}{path}", json=body) for prefix in ("/v1", ""))
    assert (with_.status_code, with_.json()) == (without.status_code, without.json())


def test_the_official_client_needs_no_v1(notes):
    client = notes.openai(base_url=notes.url)
    before = notes.metric("finetune_requests_total", route="/v1/chat/completions", status="200")
    answer = client.chat.completions.create(**BODY)
    assert answer.choices[0].message.content
    assert {model.id for model in client.models.list()} == {"notes"}
    assert notes.interaction(answer.id)["interaction"]["prompt"] == PROMPT
    assert notes.metric("finetune_requests_total", route="/v1/chat/completions", status="200") == before + 1


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/modelsx", "/v1/v1/models", "/%2fmodels", "/healthz/x"])
def test_other_paths_do_not_exist(notes, path):
    assert notes.http.get(path).status_code == 404


@pytest.mark.parametrize("fallback", ["base", None])
def test_a_reload_that_fails_is_503(ggufs, tmp_path, fallback):
    loop = f"half_{fallback}".lower()
    half = tmp_path / "half.gguf"
    half.write_bytes(ggufs["Q6_K"].read_bytes()[:200_000])
    version = promote(half, loop)
    with serving(make_loop(), make_loop(loop, serving={"fallback": fallback})) as running:
        for body in ({}, {"loop": loop}):
            refused = running.http.post("/admin/reload-model", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert f"{version.name} does not load" in refused.json()["error"]["message"]
        assert running.http.post("/admin/reload-model", json={"loop": "notes"}).json()[0]["serving"] == "notes@base"
