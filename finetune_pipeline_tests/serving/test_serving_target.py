"""A gateway that asks a deployment target and follows it; the target's server is another gateway."""

import json

import pytest
from pydantic import ValidationError

from finetune_pipeline.database import connect
from finetune_pipeline.deployment.llama_server import PRESETS
from finetune_pipeline.deployment.target_state import ActiveRelease, take_lease
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.pipeline.deploy import reconcile
from finetune_pipeline.settings import UpstreamSettings
from finetune_pipeline_tests.deployment.llama_server_double import faking
from finetune_pipeline_tests.serving.conftest import STARTER, make_loop, promote, serving
from finetune_pipeline_tests.waiting import wait_until

TARGET = {"targets": [{"kind": "vllm", "name": "far", "url": "http://127.0.0.1:1"}]}


def deployed(loop, label, url, model):
    """Write into the target's row that this release is active, as `reconcile` does."""
    active = ActiveRelease(label=label, upstream=UpstreamSettings(url=f"{url}/v1", model=model, timeout_seconds=5))
    with take_lease(connect(), loop, "far") as lease:
        lease.update(state="active", observed=label, facts={"active": active.model_dump(mode="json")})


@pytest.fixture(scope="module")
def far(own_home, ggufs):
    """Run the target's server with two models."""
    loop = make_loop("far")
    promote(ggufs["F16"], "far")
    promote(ggufs["Q8_0"], "far")
    with serving(loop) as running:
        yield running


def test_the_gateway_follows_the_release_that_is_active_on_the_target(far, ggufs):
    loop = make_loop("near", serving={"target": "far"}, deploy=TARGET)
    loop = loop.model_copy(update={"deploy": loop.deploy.model_copy(update={"targets": ()})})  # nothing deploys here
    first = promote(ggufs["F16"], "near")
    with serving(loop) as near:
        assert near.ask(model="near").json()["model"] == "near@base"  # the fallback
        assert "nothing was deployed to far yet" in near.health()["loops"]["near"]["last_error"]
        deployed("near", first.version, far.url, "far@v1.0.0")
        wait_until(lambda: near.ask(model="near").json()["model"] == "near@v1.0.0")
        answer = near.ask(model="near").json()
        expected = far.ask(model="far@v1.0.0").json()
        assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
        kept = near.interaction(answer["id"])["interaction"]
        assert (kept["model"], kept["variant"]) == ("near@v1.0.0", "champion")
        assert near.health()["loops"]["near"]["last_error"] is None

        # A promotion alone changes nothing: the target does not serve that version yet.
        second = promote(ggufs["Q8_0"], "near")
        near.http.post("/admin/reload")
        assert near.ask(model="near").json()["model"] == "near@v1.0.0"
        deployed("near", second.version, far.url, "far@v1.1.0")
        wait_until(lambda: near.ask(model="near").json()["model"] == "near@v1.1.0")
        assert near.ask(model="near@v1.1.0").json()["model"] == "near@v1.1.0"
        assert [model.name for model in near.gateway.servers["near"].loaded] == ["near@v1.1.0"]  # no local copy

        deployed("near", second.version, "http://127.0.0.1:1", "far@v1.1.0")  # the server is down
        wait_until(lambda: near.ask(model="near").json()["model"] == "near@base")
        assert "does not answer" in near.health()["loops"]["near"]["last_error"]


@pytest.mark.parametrize("form", ["router", "adapter"])
def test_a_llama_server_is_asked_by_the_loops_name(ggufs, adapters, form, tmp_path, monkeypatch):
    """By the release's own name a router would load it a second time; adapters get other ids at a restart."""
    monkeypatch.setattr(deploy, "check_parity", lambda *_: {})  # which test_deploy_llama_server does
    name, folder = f"asks_{form}", tmp_path / "llama"
    given = {} if form == "router" else {"adapter": adapters[0]}
    question = {"id": "q", "slice": "s", "prompt": "p", "expected": "e"}
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(question))
    evaluation = {"benchmark": str(tmp_path / "benchmark.jsonl"), "metric": "rouge1", "max_tokens": 64, "context": 512}
    with faking(folder / PRESETS) as fake:
        target = {"kind": "llama_server", "name": "far", "form": form, "url": fake.url, "folder": str(folder)}
        loop = make_loop(name, evaluation=evaluation, serving={"target": "far"}, deploy={"targets": [target]})
        lineage = {"base_model": str(STARTER)}
        model = promote(ggufs["F16"], name, base_hash=base_hash(STARTER), lineage=lineage, **given)
        fake.model_path = "/elsewhere/base.gguf"
        [state] = reconcile(loop, print)
        if form == "adapter":
            fake.start(state.facts["start_command"])
            [state] = reconcile(loop, print, force=True)
        assert (state.state, state.observed) == ("active", "v1.0.0"), state.last_error
        with serving(loop) as near:
            answer = wait_until(lambda: (found := near.ask(model=name).json())["model"] == model.name and found)
            text = answer["choices"][0]["message"]["content"]
            assert text == (f"{name}-v1.0.0.gguf" if form == "router" else f"{name}-v1.0.0.lora")
            asked = [body for _, path, body, _ in fake.requests if path == "/v1/chat/completions"]
            assert {body["model"] for body in asked} == {name} and not any("lora" in body for body in asked)
            if form == "router":
                assert {one: status for one, (status, _) in fake.models.items()} == {
                    name: "loaded",
                    f"{name}@v1.0.0": "unloaded",
                }
            else:  # after a restart, the adapter has another number
                fake.adapters = [("/elsewhere/other.lora", 0.0), *fake.adapters]
                reply = near.ask(model=name).json()
                assert reply["choices"][0]["message"]["content"] == f"{name}-v1.0.0.lora"


@pytest.mark.parametrize(
    ("serving", "deploy", "message"),
    [
        ({"target": "far", "upstream": {"url": "http://a/v1", "model": "m"}}, TARGET, "both name the server"),
        ({"target": "near"}, TARGET, "near is no server of deploy.targets; there are: far"),
        ({"target": "folder"}, {"targets": [{"kind": "folder", "path": "x"}]}, "there are: none"),
        ({"target": "vllm"}, {"targets": [{"kind": "vllm", "url": "http://a", "keep": 1}]}, "set keep to at least 2"),
    ],
)
def test_a_target_that_cannot_answer_is_refused(serving, deploy, message):
    with pytest.raises(ValidationError, match=message):
        make_loop(serving=serving, deploy=deploy)
