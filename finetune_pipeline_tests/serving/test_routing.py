"""The field `model`, fallbacks, and upstream servers."""

import shutil

import openai
import pytest

from finetune_pipeline.artifacts import draft, publish
from finetune_pipeline.database import connect
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline.manifests import GgufManifest
from finetune_pipeline.registry import champion
from finetune_pipeline.serving.errors import UnknownModel
from finetune_pipeline.serving.routing import loops_by_name, route
from finetune_pipeline.settings import SettingsError, UpstreamSettings
from finetune_pipeline_tests.serving.conftest import (
    events,
    free_port,
    make_loop,
    promote,
    serving,
)
from finetune_pipeline_tests.waiting import wait_until


@pytest.fixture(scope="module")
def two(own_home, ggufs):
    """Run a gateway with two loops, one of them with two versions."""
    promote(ggufs["Q8_0"], "walls")
    promote(ggufs["Q6_K"], "walls")
    walls = make_loop("walls", serving={"aliases": ["specialist_local", "org/walls:latest"]})
    with serving(walls, make_loop("doors")) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "model", "variant"),
    [
        ("walls", "walls@v1.1.0", "champion"),
        ("walls@champion", "walls@v1.1.0", "champion"),
        ("walls@v1.1.0", "walls@v1.1.0", "champion"),
        ("walls@v1.0.0", "walls@v1.0.0", "version"),
        ("walls@previous", "walls@v1.0.0", "version"),
        ("walls@base", "walls@base", "version"),
        ("specialist_local", "walls@v1.1.0", "champion"),
        ("org/walls:latest", "walls@v1.1.0", "champion"),
        ("specialist_local@v1.0.0", "walls@v1.0.0", "version"),
        ("doors", "doors@base", "champion"),
        ("doors@base", "doors@base", "champion"),
    ],
)
def test_a_name_is_a_loop_a_version_or_an_alias(two, name, model, variant):
    answer = two.ask(model=name).json()
    assert answer["model"] == model
    kept = two.interaction(answer["id"])["interaction"]
    assert (kept["loop"], kept["model"], kept["variant"]) == (model.partition("@")[0], model, variant)
    stream = events(two.ask(model=name, stream=True))
    assert {event["model"] for event in stream} == {model}


def test_a_challenger_answers_under_its_hash(two, ggufs):
    with draft("walls", "gguf_model", "f" * 16) as folder:
        shutil.copyfile(ggufs["Q4_K_M"], folder / "model.gguf")
        fields = {
            "loop": "walls", "version": "f" * 16, "inputs": {}, "settings": {}, "packages": {}, "gguf": "model.gguf",
            "quantization": "Q4_K_M", "base_model": "b", "base_hash": "b", "adapter_version": "a", "mode": "full",
            "watermark": 1,
        }  # fmt: skip
        sha256 = publish(folder, GgufManifest, fields).manifest.files["model.gguf"].sha256
    for name in (sha256[:16], sha256[:6], sha256):
        answer = two.ask(model=f"walls@{name}").json()
        assert answer["model"] == f"walls@{sha256[:16]}"
        kept = two.interaction(answer["id"])["interaction"]
        assert (kept["model"], kept["variant"]) == (answer["model"], "version")
    assert two.ask(model="walls").json()["model"] == "walls@v1.1.0"
    assert two.ask(model=f"doors@{sha256[:16]}").status_code == 404


@pytest.mark.parametrize(
    "name",
    ["gpt-4", "walls@v9.9.9", "@v1.0.0", "Walls", "walls@doors@v1.0.0", "walls@", "walls@ffffff0", "../walls", " "],
)
def test_an_unknown_name_is_not_found(two, name):
    response = two.ask(model=name)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert two.ask(model=name, stream=True).status_code == 404


def test_the_names_of_all_loops_are_listed(two):
    names = [model.id for model in two.openai().models.list()]
    assert names == ["doors", "org/walls:latest", "specialist_local", "walls"]
    card = two.http.get("/v1/models/org/walls:latest").json()
    assert (card["loop"], card["serving"]) == ("walls", "walls@v1.1.0")


def test_two_loops_cannot_have_the_same_name():
    with pytest.raises(SettingsError, match="Both a and b are served as 'fast'"):
        loops_by_name([make_loop("a", serving={"aliases": ["fast"]}), make_loop("b", serving={"aliases": ["fast"]})])
    with pytest.raises(SettingsError, match="Both a and b are served as 'a'"):
        loops_by_name([make_loop("a"), make_loop("b", serving={"aliases": ["a"]})])


def test_feedback_finds_the_loop_of_its_interaction(two):
    answer = two.ask(model="doors").json()
    given = two.http.post("/v1/feedback", json={"interaction_id": answer["id"], "kind": "thumbs_up"})
    assert given.json()["status"] == "recorded"
    assert two.http.get("/v1/feedback/stats", params={"loop": "doors"}).json()["by_kind"] == {"thumbs_up": 1}
    assert two.http.get("/v1/feedback/stats").status_code == 400
    assert two.http.get("/v1/feedback/stats", params={"loop": "windows"}).status_code == 404


# ---- fallbacks


def _gone(path):
    path.unlink()


def _truncated(path):
    path.write_bytes(path.read_bytes()[:100_000])


def _no_model(path):
    path.write_text("not a model")


@pytest.mark.parametrize("damage", [_gone, _truncated, _no_model])
def test_the_base_model_answers_if_the_champions_file_is_unusable(ggufs, damage):
    loop = f"hurt{damage.__name__}"
    damage(promote(ggufs["Q8_0"], loop).gguf_path)
    with serving(make_loop(loop)) as gateway:
        answer = gateway.ask(model=loop).json()
        assert answer["model"] == f"{loop}@base"
        assert gateway.interaction(answer["id"])["interaction"]["variant"] == "fallback"
        assert {event["model"] for event in events(gateway.ask(model=loop, stream=True))} == {f"{loop}@base"}
        health = gateway.health()
        assert (health["status"], health["loops"][loop]["serving"]) == ("degraded", f"{loop}@base")
        assert f"{loop}@v1.0.0 does not load; no other model is in service" in health["loops"][loop]["last_error"]
        assert gateway.metric("finetune_fallbacks_total", loop=loop) == 2
        assert gateway.metric("finetune_healthy", loop=loop) == 0


def test_without_a_fallback_the_request_gets_503(ggufs):
    _gone(promote(ggufs["Q8_0"], "alone").gguf_path)
    with serving(make_loop("alone", serving={"fallback": None})) as gateway:
        with pytest.raises(openai.InternalServerError, match=r"alone@v1\.0\.0 does not load") as refused:
            gateway.openai().chat.completions.create(model="alone", messages=[{"role": "user", "content": "x"}])
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert gateway.ask(model="alone", stream=True).status_code == 503
        assert gateway.http.get("/healthz").status_code == 503


def test_another_gateway_can_be_the_fallback(ggufs, two):
    _gone(promote(ggufs["Q8_0"], "handed_on").gguf_path)
    upstream = {"url": f"{two.url}/v1", "model": "walls"}
    with serving(make_loop("handed_on", serving={"fallback": upstream})) as gateway:
        answer = gateway.ask(model="handed_on").json()
        assert answer["model"] == "handed_on@walls"
        assert gateway.interaction(answer["id"])["interaction"]["variant"] == "fallback"


# ---- an upstream as the engine


@pytest.fixture(scope="module")
def upstream(two):
    """Run a gateway with another gateway as upstream."""
    serving_settings = {"upstream": {"url": f"{two.url}/v1", "model": "walls@v1.0.0"}, "fallback": None}
    with serving(make_loop("far", serving=serving_settings)) as running:
        yield running


def test_an_upstream_answers_as_without_the_gateway(upstream, two):
    near = two.ask(model="walls@v1.0.0", logprobs=True).json()
    far = upstream.ask(model="far", logprobs=True).json()
    assert far["choices"][0]["message"] == near["choices"][0]["message"]
    assert far["usage"] == near["usage"]
    tokens = [[t["token"] for t in answer["choices"][0]["logprobs"]["content"]] for answer in (near, far)]
    assert tokens[0] == tokens[1]
    assert far["confidence"] == pytest.approx(near["confidence"], rel=1e-3)
    assert far["model"] == "far@walls@v1.0.0"
    kept = upstream.interaction(far["id"])["interaction"]
    assert kept["confidence"] == far["confidence"]
    assert kept["output"] == near["choices"][0]["message"]["content"]


def test_an_upstreams_answer_is_streamed(upstream, two):
    near = two.ask(model="walls@v1.0.0").json()["choices"][0]["message"]["content"]
    stream = events(upstream.ask(model="far", stream=True))
    deltas = [event["choices"][0]["delta"].get("content") for event in stream]
    assert "".join(filter(None, deltas)) == near
    assert len(list(filter(None, deltas))) > 5


def test_a_request_that_the_upstream_refuses_gets_400(upstream):
    schema = {"name": "x", "schema": {"type": "array", "items": {"$ref": "https://example.com/x"}}}
    refused = upstream.ask(model="far", response_format={"type": "json_schema", "json_schema": schema})
    assert refused.status_code == 400
    assert "only references within it" in refused.json()["error"]["message"]


def test_a_gateway_detects_that_it_is_its_own_upstream():
    with serving(make_loop("circle", serving={"fallback": None})) as gateway:
        settings = UpstreamSettings(url=f"{gateway.url}/v1", model="circle")
        gateway.gateway.servers["circle"].current.runner = RemoteModel(settings, gateway.gateway.id)
        answer = gateway.ask(model="circle")
    assert answer.status_code == 503 and "This gateway is its own upstream" in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_down_is_named(stream):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with serving(make_loop("lost", serving={"upstream": {"url": url, "model": "x"}, "fallback": None})) as gateway:
        response = gateway.ask(model="lost", stream=stream)
        assert response.status_code == 503
        assert f"{url} does not answer" in response.json()["error"]["message"]


def test_the_base_model_is_the_fallback_for_an_upstream_that_is_down():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with serving(make_loop("lost_too", serving={"upstream": {"url": url, "model": "x"}})) as gateway:
        assert gateway.ask(model="lost_too").json()["model"] == "lost_too@base"


def test_an_upstream_that_is_down_degrades_health_until_it_answers(two):
    port = free_port()
    settings = {"upstream": {"url": f"http://127.0.0.1:{port}/v1", "model": "walls"}}
    with serving(make_loop("waiting", serving=settings)) as gateway:
        assert gateway.ask(model="waiting").json()["model"] == "waiting@base"
        assert "does not answer" in gateway.health()["loops"]["waiting"]["last_error"]
        server = gateway.gateway.servers["waiting"]
        server.current.runner = RemoteModel(UpstreamSettings(url=f"{two.url}/v1", model="walls"))
        assert gateway.ask(model="waiting").json()["model"] == "waiting@walls"
        assert gateway.health()["status"] == "ok"


def test_a_missing_upstream_key_is_reported_at_once(two, monkeypatch):
    upstream = {"url": f"{two.url}/v1", "model": "walls", "api_key_env": "KEY_OF_NOBODY"}
    with serving(make_loop("keyless", serving={"upstream": upstream, "fallback": None})) as gateway:
        assert "KEY_OF_NOBODY is not set" in gateway.health()["loops"]["keyless"]["last_error"]
        assert gateway.ask(model="keyless").status_code == 503


def test_the_error_for_a_deleted_version_names_its_file(two, ggufs):
    gone = promote(ggufs["Q4_K_M"], "walls")
    champion.rollback(connect(), "walls", "tests", "back")
    _gone(gone.gguf_path)
    response = two.ask(model=gone.name)
    assert response.status_code == 503
    assert f"{gone.name} cannot serve: its GGUF {gone.gguf_path} does not exist" in response.json()["error"]["message"]
    wait_until(lambda: two.ask(model="walls").json()["model"] == "walls@v1.1.0")


def test_a_version_cannot_name_another_loop():
    names = {"notes": "notes"}
    assert route("notes@v1.0.0", names).version == "v1.0.0"
    with pytest.raises(UnknownModel, match=r"There is no model 'notes@other@v1\.0\.0'"):
        route("notes@other@v1.0.0", names)
