"""The fine-tuning API over a real gateway, with challengers that passed or failed the gate.

Every test starts from a copy of one home, with a challenger that passed its checks and whose report promotes it.
"""

import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_pipeline.alerts import list_alerts
from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.manifests import GgufManifest
from finetune_pipeline.pipeline.challengers import list_challengers
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.registry.deployment_history import list_history
from finetune_pipeline_tests.orchestration.test_adapter_form import run
from finetune_pipeline_tests.orchestration.test_approval import VOIDED, another_champion, command
from finetune_pipeline_tests.orchestration.test_gate_bypass import (  # noqa: F401
    IMPOSSIBLE,
    benchmark,
    loop,
    run_softly,
    served,
    settled,
    template,
)
from finetune_pipeline_tests.serving.conftest import Running, free_port, serving
from finetune_pipeline_tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODELS, DEPLOYMENTS = "/v1/fine-tuning/models", "/v1/fine-tuning/deployments"


@pytest.fixture
def waiting(loop, settled, instance):  # noqa: F811
    """Return the loop with `approval: required`, whose challenger waits."""
    strict = settled(approval="required")
    assert run(strict, instance, "promoted_model").success
    return strict


@pytest.fixture
def rejected(loop, settled, instance):  # noqa: F811
    """Return a loop whose gate rejected the challenger."""
    strict = settled(gate=IMPOSSIBLE)
    assert not run_softly(strict, instance, "eval_report").success
    return strict


def challenger():
    [found] = list_challengers(connect(), "notes")
    return found.name


def post(running, path, body=None, key=None, status=200):
    response = running.http.post(path, json=body or {}, headers={"Authorization": f"Bearer {key}"} if key else {})
    assert response.status_code == status, response.text
    return response.json()


def message(running, path, body=None, key=None, status=409):
    return post(running, path, body, key, status)["error"]["message"]


def alert_titles(loop):  # noqa: F811
    return [one.title for one in list_alerts(connect(), loop.name) if one.kind == "promotion"]


def test_a_passing_challenger_is_deployed_once_and_rolled_back(loop, settled):  # noqa: F811
    name = challenger()
    with serving(loop) as running:
        [listed] = running.http.get(MODELS, params={"state": "challenger"}).json()["data"]
        assert (listed["id"], listed["verdict"], listed["serving"]) == (name, "accepted by the gate", False)
        assert listed["report"] and listed["accuracy"] is not None and listed["size_bytes"] > 0
        done = post(running, f"{MODELS}/{name}/deploy", {"notes": "asked it ten questions"})
        assert (done["model"]["id"], done["model"]["serving"], done["last_error"]) == ("notes@v1.0.0", True, None)
        deployment = done["deployment"]
        assert (deployment["action"], deployment["actor"]) == ("promote", "gateway:local")
        assert deployment["reason"].startswith("asked it ten questions; ") and deployment["comparison_id"]
        assert running.ask("golden question amber").json()["model"] == "notes@v1.0.0"
        for again in (name, "notes@v1.0.0", "notes@champion"):
            assert post(running, f"{MODELS}/{again}/deploy")["deployment"] == deployment
        assert alert_titles(loop) == ["notes@v1.0.0 is the champion now"]
        back = post(running, f"{MODELS}/notes@v1.0.0/rollback", {"reason": "worse"})
        assert (back["model"]["id"], running.ask("x").json()["model"]) == ("notes@base", "notes@base")
        history = running.http.get(DEPLOYMENTS).json()["data"]
        assert [(one["action"], one["model"], one["actor"]) for one in history] == [
            ("rollback", "notes@base", "gateway:local"),
            ("promote", "notes@v1.0.0", "gateway:local"),
        ]


def test_deploys_at_once_promote_once(loop):  # noqa: F811
    name = challenger()
    with serving(loop) as running, ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: post(running, f"{MODELS}/{name}/deploy"), range(4)))
    assert {one["model"]["id"] for one in done} == {"notes@v1.0.0"}
    [row] = list_history(connect(), "notes")
    assert row.action == "promote" and len(alert_titles(loop)) == 1


def test_a_rejected_challenger_is_deployed_only_by_force_with_a_reason(rejected):
    name = challenger()
    reader, ann = create_key(connect(), "reader", ["infer", "feedback"]), create_key(connect(), "ann", ["admin"])
    with serving(rejected) as running:
        path, forced = f"{MODELS}/{name}/deploy", {"force": True, "reason": "the customer waits"}
        said = message(running, path, {}, ann)
        assert "not promoted: " in said and "Send force: true with a reason" in said
        assert "reason: is needed with force" in message(running, path, {"force": True}, ann, 400)
        assert "this needs admin" in message(running, path, forced, reader, 403)
        assert served() is None and list_history(connect(), "notes") == []
        assert "cannot be approved" in message(running, f"{MODELS}/{name}/approve", {"reason": "good"}, ann)
        done = post(running, path, forced, ann)
        assert (done["deployment"]["action"], done["deployment"]["reason"]) == ("force", "the customer waits")
        assert post(running, path, forced, ann)["deployment"] == done["deployment"]
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor) == ("force", "gateway:ann")
    assert alert_titles(rejected) == ["notes@v1.0.0 is the champion now"]


def test_force_does_not_overrule_a_failed_blocking_check(rejected):
    gguf = get_latest(GgufManifest, "notes")
    passed = dict.fromkeys(GgufManifest.blocking_checks, True)
    failed = next(iter(passed))
    record_outcomes(connect(), gguf, {**passed, failed: False}, "run-1")
    with serving(rejected) as running:
        said = message(running, f"{MODELS}/{challenger()}/deploy", {"force": True, "reason": "now"})
        assert f"did not pass its blocking checks: {failed} failed" in said
    assert served() is None


@pytest.mark.parametrize("how", ["by its name", "as the one that waits"])
def test_a_challenger_that_waits_is_approved(waiting, how):
    name = challenger()
    with serving(waiting) as running:
        assert "needs an approval" in message(running, f"{MODELS}/{name}/deploy")
        [listed] = running.http.get(MODELS, params={"verdict": "waiting for approval"}).json()["data"]
        assert listed["id"] == name
        path = f"{MODELS}/{name}/approve" if how == "by its name" else "/admin/approve"
        for _ in range(2 if how == "by its name" else 1):  # a repeated request changes nothing
            done = post(running, path, {"reason": "looks good"})
            assert (done["model"]["id"], done["deployment"]["action"]) == ("notes@v1.0.0", "approve")
        if how != "by its name":
            assert "waits for approval" in message(running, path, {"reason": "looks good"})
        assert running.ask("x").json()["model"] == "notes@v1.0.0"
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor) == ("approve", "gateway:local") and row.reason.startswith("looks good; ")
    assert alert_titles(waiting) == ["notes@v1.0.0 is the champion now"]


@pytest.mark.parametrize(("change", "_"), VOIDED, ids=[change.__name__ for change, _ in VOIDED])
def test_a_change_makes_an_approval_by_the_api_void(waiting, instance, change, _):
    name = challenger()
    with serving(waiting) as running:
        change(waiting, instance)
        message(running, f"{MODELS}/{name}/approve", {"reason": "looks good"})
        if change is not another_champion:  # it was promoted then, so that it can be deployed again
            message(running, f"{MODELS}/{name}/deploy", {"reason": "looks good"})
            assert served() is None
    assert "approve" not in {row.action for row in list_history(connect(), "notes")}


def test_a_challenger_that_was_rejected_by_a_person_stays_rejected(waiting):
    name = challenger()
    with serving(waiting) as running:
        assert post(running, f"{MODELS}/{name}/reject", {"reason": "too curt"})["state"] == "challenger"
        assert "rejected by gateway:local: too curt" in message(running, f"{MODELS}/{name}/deploy")
        assert "too curt" in message(running, f"{MODELS}/{name}/approve", {"reason": "good"})
        assert "does not wait" in message(running, f"{MODELS}/{name}/reject", {"reason": "again"})
    assert served() is None


KILLED = """
import os, pickle, signal, socket, sys
from finetune_pipeline.database import connect
from finetune_pipeline.pipeline import promote
from finetune_pipeline.serving.app import run
from finetune_pipeline.serving.gateway import Gateway
loop = pickle.load(sys.stdin.buffer)
setattr(promote, sys.argv[2], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
bound = socket.create_server(("127.0.0.1", int(sys.argv[1])))
run(Gateway([loop], connect(), progress=lambda _: None), bound, lambda: print("ready", flush=True))
"""


@pytest.mark.parametrize("where", ["verify_report", "promote", "_record", "_tell"])
def test_a_gateway_that_is_killed_while_it_deploys_leaves_the_old_or_the_new_champion(loop, where):  # noqa: F811
    base_gguf(loop, print)
    name, port = challenger(), free_port()
    script = [sys.executable, "-c", KILLED, str(port), where]
    process = subprocess.Popen(script, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(pickle.dumps(loop))
    process.stdin.close()
    assert process.stdout.readline() == b"ready\n"
    running = Running(f"http://127.0.0.1:{port}")
    try:
        with pytest.raises(Exception, match=r"disconnected|reset|closed"):
            post(running, f"{MODELS}/{name}/deploy")
        process.wait(60)
    finally:
        process.kill()
        running.http.close()
    assert process.wait() == -signal.SIGKILL
    assert (served() is not None) == (where in {"_record", "_tell"})
    with serving(loop) as again:
        done = post(again, f"{MODELS}/{name}/deploy")
        assert done["model"]["id"] == "notes@v1.0.0" and again.ask("x").json()["model"] == "notes@v1.0.0"
    assert [row.action for row in list_history(connect(), "notes")] == ["promote"]


def test_the_commands_send_the_alert_too(waiting, monkeypatch):
    name = challenger()
    command(monkeypatch, waiting, "approve", name, "--reason", "looks good")
    [alert] = [one for one in list_alerts(connect(), "notes") if one.kind == "promotion"]
    assert alert.title == "notes@v1.0.0 is the champion now"
    assert alert.text.startswith("approved by ann: looks good; ") and "finetune model rollback" in alert.text


def test_the_command_that_forces_sends_the_alert_too(rejected, monkeypatch):
    command(monkeypatch, rejected, "promote", challenger(), "--force", "--reason", "the customer waits")
    [alert] = [one for one in list_alerts(connect(), "notes") if one.kind == "promotion"]
    assert alert.text.startswith("forced by ann: the customer waits\n")


def test_deploy_and_rollback_by_curl(loop):  # noqa: F811
    name = challenger()
    with serving(loop) as running:

        def curl(path, *arguments):
            done = subprocess.run(["curl", "-sS", f"{running.url}{path}", *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        json_body = ("-H", "Content-Type: application/json", "-d")
        assert f'"id":"{name}"' in curl(f"{MODELS}?state=challenger")
        assert '"id":"notes@v1.0.0"' in curl(f"{MODELS}/{name}/deploy", *json_body, '{"reason": "by curl"}')
        wait_until(lambda: '"serving":true' in curl(f"{MODELS}/notes@v1.0.0"))
        assert '"id":"notes@base"' in curl(f"{MODELS}/notes@v1.0.0/rollback", *json_body, "{}")
        assert '"action":"rollback"' in curl(DEPLOYMENTS)
