"""The fine-tuning API's models and deployments, over a real gateway, registry and models.

What needs a challenger that passed the gate is in `orchestration/test_fine_tuning_api.py`.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.deployment.target_state import target_states
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.pipeline.deploy import config_in_effect, release_of
from finetune_pipeline.registry import champion
from finetune_pipeline.registry.deployment_history import list_history
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.serving import gateway as gateway_module
from finetune_pipeline.settings import home
from finetune_pipeline_tests.serving.conftest import STARTER, make_loop, serving
from finetune_pipeline_tests.waiting import wait_until

MODELS, DEPLOYMENTS = "/v1/fine-tuning/models", "/v1/fine-tuning/deployments"
ENDPOINT = {"url": "http://127.0.0.1:9"}


@pytest.fixture
def name(request):
    """Return the name of the test's own loop."""
    return request.node.name.partition("[")[0].removeprefix("test_")[:40].rstrip("_")


def promoted(loop, *ggufs):
    """Promote copies of these files, one after the other, as a run does."""
    for gguf in ggufs:
        folder = home() / "artifacts" / loop.name / "gguf_model" / gguf.stem
        folder.mkdir(parents=True)
        shutil.copyfile(gguf, folder / "model.gguf")
        now = champion.champion(connect(), loop.name)
        candidate = CandidateModel(
            loop=loop.name, gguf_path=folder / "model.gguf", gguf_sha256=hash_file(gguf), base_hash=base_hash(STARTER),
            mode="full", lineage={"base_model": str(STARTER)}, scores={"accuracy": 0.5}, report_path=folder,
        )  # fmt: skip
        expected = now.id if now else None
        champion.promote(connect(), candidate, expected, "tests", "a test needs it", None, "force", loop.deploy.config)


def actions(loop):
    return [(row.action, row.actor, row.reason) for row in list_history(connect(), loop.name)]


def post(running, path, body=None, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return running.http.post(path, json=body or {}, headers=headers)


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_version_is_deployed_again_and_rolled_back(name, ggufs):
    loop = make_loop(name)
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"])
    with serving(loop) as running:
        first, second = f"{name}@v1.0.0", f"{name}@v1.1.0"
        done = post(running, f"{MODELS}/{first}/deploy", {"reason": "the customer", "notes": "asked for it"}).json()
        assert (done["model"]["id"], done["model"]["state"], done["model"]["serving"]) == (first, "champion", True)
        deployment = done["deployment"]
        assert (deployment["action"], deployment["model"], deployment["previous"]) == ("switch", first, second)
        assert (deployment["actor"], deployment["reason"]) == ("gateway:local", "the customer; asked for it")
        assert running.ask(model=name).json()["model"] == first
        again = post(running, f"{MODELS}/{first}/deploy", {"reason": "the customer", "notes": "asked for it"}).json()
        assert again["deployment"] == deployment, "a repeated request changes nothing"
        back = post(running, f"{MODELS}/{first}/rollback", {"reason": "worse"}).json()
        assert (back["model"]["id"], back["deployment"]["action"]) == (second, "rollback")
        assert running.ask(model=name).json()["model"] == second
        error = error_of(post(running, f"{MODELS}/{first}/rollback"), 409)
        assert f"{first} does not serve, but {second}" in error["message"], "a repeated rollback goes no step further"
        base = post(running, f"{MODELS}/{name}@base/deploy").json()
        assert base["model"]["id"] == f"{name}@base" and running.ask(model=name).json()["model"] == f"{name}@base"
    assert [row[0] for row in actions(loop)] == ["force", "force", "switch", "rollback", "switch"]


def test_two_rollbacks_at_once_go_one_step_back(name, ggufs):
    loop = make_loop(name)
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"], ggufs["Q4_K_M"])
    with serving(loop) as running, ThreadPoolExecutor(4) as pool:
        path = f"{MODELS}/{name}@v1.2.0/rollback"
        statuses = sorted(one.status_code for one in pool.map(lambda _: post(running, path), range(4)))
        assert statuses == [200, 409, 409, 409]
        deploys = pool.map(lambda _: post(running, f"{MODELS}/{name}@v1.0.0/deploy"), range(4))
        assert {one.status_code for one in deploys} == {200}
    assert [row[0] for row in actions(loop)] == ["force"] * 3 + ["rollback", "switch"]
    assert champion.champion(connect(), name).version == "v1.0.0"


def test_models_are_listed_with_filters_and_pages(name, ggufs):
    loop, other = make_loop(name), make_loop(f"{name}_2")
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"], ggufs["Q4_K_M"])
    with serving(loop, other) as running:
        listed = running.http.get(MODELS, params={"loop": name}).json()
        states = {one["id"]: one["state"] for one in listed["data"]}
        assert states == {
            f"{name}@v1.2.0": "champion",
            f"{name}@v1.1.0": "previous",
            f"{name}@v1.0.0": "version",
            f"{name}@base": "base",
        }
        newest = listed["data"][0]
        assert newest["size_bytes"] == ggufs["Q4_K_M"].stat().st_size and newest["accuracy"] == 0.5
        assert newest["serving"] and newest["win_rate"] is None and newest["gold_star_rate"] is None
        answered = running.ask(model=name).json()
        rating = {"interaction_id": answered["id"], "kind": "rating", "rating": "gold"}
        assert running.http.post("/v1/feedback", json=rating).json()["status"] == "recorded"
        [one] = running.http.get(MODELS, params={"loop": name, "state": "champion"}).json()["data"]
        assert (one["gold_star_rate"], one["use"]["answers"], one["use"]["win_rate"]) == (1.0, 1, 1.0)
        everything = [one["id"] for one in running.http.get(MODELS).json()["data"]]
        assert everything == [*states, f"{other.name}@base"]
        page = running.http.get(MODELS, params={"limit": 2}).json()
        assert [one["id"] for one in page["data"]] == everything[:2] and page["has_more"]
        rest = running.http.get(MODELS, params={"after": page["data"][-1]["id"]}).json()
        assert [one["id"] for one in rest["data"]] == everything[2:] and not rest["has_more"]
        assert "no 'x' in this list" in error_of(running.http.get(MODELS, params={"after": "x"}), 404)["message"]
        assert error_of(running.http.get(f"{MODELS}/{name}@v9.9.9"), 404)["param"] == "model_id"
        assert "names no loop" in error_of(running.http.get(f"{MODELS}/v1.0.0"), 404)["message"]
        assert running.http.get(f"{MODELS}/{name}@champion").json()["id"] == f"{name}@v1.2.0"


def test_a_version_is_archived_and_shown_again(name, ggufs):
    loop = make_loop(name)
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"], ggufs["Q4_K_M"])
    with serving(loop) as running:

        def listed(**parameters):
            return [one["id"] for one in running.http.get(MODELS, params=parameters).json()["data"]]

        old = f"{name}@v1.0.0"
        assert (
            "serves as champion"
            in error_of(post(running, f"{MODELS}/{name}@v1.2.0/archive", {"reason": "x"}), 409)["message"]
        )
        assert error_of(post(running, f"{MODELS}/{old}/archive"), 400)["param"] == "reason"
        assert post(running, f"{MODELS}/{old}/archive", {"reason": "curt"}).json()["archived_at"] is not None
        assert (
            "archived already" in error_of(post(running, f"{MODELS}/{old}/archive", {"reason": "curt"}), 409)["message"]
        )
        assert old not in listed() and old in listed(archived=True)
        assert post(running, f"{MODELS}/{old}/unarchive", {"reason": "fine"}).json()["archived_at"] is None
        assert old in listed()
        history = running.http.get(DEPLOYMENTS, params={"limit": 2}).json()
        assert [(one["action"], one["model"], one["reason"]) for one in history["data"]] == [
            ("unarchive", old, "fine"),
            ("archive", old, "curt"),
        ]
        assert history["has_more"]
        after = {"after": history["data"][-1]["id"]}
        assert len(running.http.get(DEPLOYMENTS, params=after).json()["data"]) == 3


def test_what_serves_is_changed_with_the_scope_admin(name, ggufs):
    loop = make_loop(name)
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"])
    reader, ann = create_key(connect(), "reader", ["infer", "feedback"]), create_key(connect(), "ann", ["admin"])
    try:
        with serving(loop) as running:
            path = f"{MODELS}/{name}@v1.0.0"
            for action in ("deploy", "rollback", "approve", "reject", "archive", "unarchive"):
                body = {"reason": "please", **({"force": True} if action == "deploy" else {})}
                assert "this needs admin" in error_of(post(running, f"{path}/{action}", body, reader), 403)["message"]
            assert error_of(post(running, "/admin/approve", {"reason": "please"}, reader), 403)
            assert error_of(running.http.get(MODELS), 401)
            headers = {"Authorization": f"Bearer {reader}"}
            assert len(running.http.get(MODELS, headers=headers).json()["data"]) == 3
            done = post(running, f"{path}/deploy", {}, ann).json()
            assert (done["deployment"]["actor"], done["deployment"]["reason"]) == (
                "gateway:ann",
                "deployed through the API",
            )
    finally:
        with connect().write() as connection:
            connection.exec_driver_sql("DELETE FROM api_keys")


def declared(name, tmp_path, *targets, **deploy):
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"id": "q", "slice": "s", "prompt": "p", "expected": "e"}))
    evaluation = {"benchmark": str(tmp_path / "benchmark.jsonl"), "metric": "rouge1", "max_tokens": 16, "context": 512}
    return make_loop(name, evaluation=evaluation, deploy={"targets": list(targets), **deploy})


TARGETS = {
    "vllm": {"kind": "vllm", **ENDPOINT},
    "ollama": {"kind": "ollama", **ENDPOINT},
    "router": {"kind": "llama_server", "folder": "FOLDER", **ENDPOINT},
    "adapters": {"kind": "llama_server", "form": "adapter", "folder": "FOLDER", **ENDPOINT},
    "releases": {"kind": "folder", "path": "FOLDER"},
}


@pytest.fixture(scope="module")
def targeted(own_home, tmp_path_factory):
    """Run a gateway with a loop for each kind of target, whose base model serves."""
    folder = tmp_path_factory.mktemp("targets")
    kinds = {
        kind: {key: str(folder / kind) if value == "FOLDER" else value for key, value in target.items()}
        for kind, target in TARGETS.items()
    }
    with serving(*(declared(kind, folder, target) for kind, target in kinds.items())) as running:
        yield running


@pytest.mark.parametrize(
    ("kind", "config", "param", "said"),
    [
        ("vllm", {"max_model_len": 1024, "temprature": 0.5}, ".temprature", "did you mean temperature?"),
        ("vllm", {"max_model_len": "long"}, ".max_model_len", "vLLM expects an integer"),
        ("vllm", {"max_model_len": 8}, ".max_model_len", "the loop's context is 512"),
        ("vllm", {"mirostat": 1}, ".mirostat", "(target vllm)"),
        ("ollama", {"num_cxt": 1024}, ".num_cxt", "did you mean num_ctx?"),
        ("router", {"gpu_layer": 9}, ".gpu_layer", "no option of llama-server"),
        ("router", {"chat_template": "a;b"}, ".chat_template", "cannot hold ';'"),
        ("adapters", {"threads": "2"}, ".threads", "llama-server expects an integer"),
    ],
)
def test_a_setting_that_a_target_cannot_apply_is_rejected_by_its_name(targeted, kind, config, param, said):
    error = error_of(post(targeted, f"{MODELS}/{kind}@base/deploy", {"deployment_config": config}), 400)
    assert error["param"] == f"deployment_config{param}" and said in error["message"]
    assert not list_history(connect(), kind)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ollama", {"num_ctx": 1024}),
        ("router", {"n_gpu_layers": 9}),
        ("adapters", {"threads": 2}),
        ("releases", {"anything": "goes"}),  # it is written down for whoever serves the folder
    ],
)
def test_each_kind_of_target_accepts_the_settings_that_it_has(targeted, kind, config):
    done = post(targeted, f"{MODELS}/{kind}@base/deploy", {"deployment_config": config})
    assert done.status_code == 200, done.text
    assert done.json()["deployment"]["requested_config"] == config


def test_without_targets_a_setting_is_rejected(name, ggufs):
    loop = make_loop(name)
    promoted(loop, ggufs["Q8_0"])
    with serving(loop) as running:
        error = error_of(post(running, f"{MODELS}/{name}@base/deploy", {"deployment_config": {"top_k": 1}}), 400)
        assert error["param"] == "deployment_config.top_k" and "has no deployment target" in error["message"]


@pytest.mark.slow  # a process that imports the deployment
def test_a_requested_config_is_in_effect_until_the_next_deployment(name, ggufs, tmp_path, monkeypatch):
    monkeypatch.setattr(gateway_module, "DEPLOY_SECONDS", 0.1)
    target = {"kind": "vllm", "form": "merged", **ENDPOINT, "timeout_seconds": 1}
    loop = declared(name, tmp_path, target, config={"max_num_seqs": 8})
    promoted(loop, ggufs["Q8_0"], ggufs["Q6_K"])
    with serving(loop) as running:
        asked = {"max_model_len": 1024, "max_num_seqs": 4}
        done = post(running, f"{MODELS}/{name}@base/deploy", {"deployment_config": asked}).json()
        assert done["deployment"]["deployment_config"] == done["deployment"]["requested_config"] == asked
        assert config_in_effect(loop, connect()) == asked
        assert release_of(loop, None).config == asked

        def start_command():
            [found] = running.http.get(f"{MODELS}/{name}@champion").json()["targets"]
            return found["start_command"] or ""

        # vLLM applies them only at its start, so they are in the printed command.
        wait_until(lambda: "--max-model-len 1024" in start_command() and "--max-num-seqs 4" in start_command())
        assert target_states(connect(), name)["vllm"].state == "failed"  # it does not run
        other = post(running, f"{MODELS}/{name}@base/deploy", {"deployment_config": {"max_num_seqs": 2}}).json()
        assert other["deployment"]["id"] != done["deployment"]["id"], "another config is another deployment"
        again = post(running, f"{MODELS}/{name}@base/deploy", {"deployment_config": {"max_num_seqs": 2}}).json()
        assert again["deployment"] == other["deployment"]
        assert config_in_effect(loop, connect()) == {"max_num_seqs": 2}
        back = post(running, f"{MODELS}/{name}@base/rollback").json()
        assert back["model"]["id"] == f"{name}@base" and back["deployment"]["deployment_config"] == asked
        assert config_in_effect(loop, connect()) == asked
        back = post(running, f"{MODELS}/{name}@base/rollback").json()
        assert back["model"]["id"] == f"{name}@v1.1.0"
        assert (back["deployment"]["deployment_config"], back["deployment"]["requested_config"]) == (
            {"max_num_seqs": 8},
            None,
        )
        assert config_in_effect(loop, connect()) == {"max_num_seqs": 8}
