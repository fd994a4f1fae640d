"""Comparisons by the fine-tuning API, over a real gateway, its child process, and real models."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psutil
import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.database.tables import requested_comparisons as table
from finetune_pipeline.pipeline.comparisons import request_comparison
from finetune_pipeline.registry.comparisons import list_manual_comparisons
from finetune_pipeline.registry.requested_comparisons import (
    MAX_TRIES,
    claim_comparison,
    find_requested_comparison,
    pairs_of,
)
from finetune_pipeline.serving import comparer
from finetune_pipeline_tests.serving.conftest import make_loop, promote, serving
from finetune_pipeline_tests.waiting import wait_until

COMPARISONS, MODELS = "/v1/fine-tuning/comparisons", "/v1/fine-tuning/models"
QUESTIONS = [
    {"id": f"q{n}", "slice": "s", "prompt": f"Add a {n}00 mm brick wall", "expected": "a wall"} for n in range(1, 7)
]
PROMPTS = [f"Add a {n}50 mm concrete slab" for n in range(1, 5)]

PAUSED = """
import os, sys, time
from pathlib import Path
from finetune_pipeline.pipeline import comparisons
from finetune_pipeline.registry import requested_comparisons
from finetune_pipeline.pipeline.comparison_child import main
folder = Path(os.environ["PAUSE"])
requested_comparisons.LEASE_SECONDS = 1.0
comparisons.RENEW_SECONDS = 0.1
told = comparisons._Renewal.on_progress
def on_progress(self, model, answered, questions):
    told(self, model, answered, questions)
    if (folder / "pause").exists() and answered >= 2:
        (folder / "paused").touch()
        while (folder / "pause").exists():
            time.sleep(0.01)
            told(self, model, answered, questions)
comparisons._Renewal.on_progress = on_progress
main()
"""
"""The child, which waits after its second answer while the file `pause` exists, and whose lease holds a second."""

GATEWAY = f"""
import asyncio, json, sys
from finetune_pipeline.database import connect
from finetune_pipeline.serving import comparer
from finetune_pipeline.settings import LoopSettings
comparer.COMMAND = [sys.executable, "-c", {PAUSED!r}]
loop = LoopSettings.model_validate_json(sys.argv[1])
asyncio.run(comparer.compare_next({{loop.name: loop}}, connect()))
"""


@pytest.fixture
def name(request):
    return request.node.name.removeprefix("test_")[:40].rstrip("_")


@pytest.fixture
def loop(name, tmp_path, ggufs):
    """Return a loop of the test's own with a benchmark and two versions."""
    (tmp_path / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    evaluation = {"benchmark": str(tmp_path / "benchmark.jsonl"), "metric": "rouge1", "max_tokens": 12, "context": 512}
    made = make_loop(name, evaluation=evaluation)
    promote(ggufs["Q8_0"], name)
    promote(ggufs["Q4_K_M"], name)
    return made


@pytest.fixture
def paused(tmp_path, monkeypatch):
    """Let the child wait in the middle, and return the file that makes it wait."""
    monkeypatch.setenv("PAUSE", str(tmp_path))
    monkeypatch.setattr(comparer, "COMMAND", [sys.executable, "-c", PAUSED])
    (tmp_path / "pause").touch()
    return tmp_path / "pause"


def create(running, body, status=200, **headers):
    response = running.http.post(COMPARISONS, json=body, headers=headers)
    assert response.status_code == status, response.text
    return response.json()


def ended(running, id, **headers):
    def read():
        return running.http.get(f"{COMPARISONS}/{id}", headers=headers).json()

    wait_until(lambda: read()["status"] in ("completed", "failed", "canceled"), what=read)
    return read()


@pytest.mark.slow  # a process that imports the evaluation, and engines
def test_two_models_are_compared_on_the_benchmark(loop, name):
    with serving(loop) as running:
        created = create(running, {"tuned": f"{name}@champion", "base": f"{name}@previous"})
        assert (created["base"], created["tuned"]) == (f"{name}@v1.0.0", f"{name}@v1.1.0"), (
            "the names that they stand for"
        )
        assert (created["status"], created["questions"], created["created_by"]) == ("pending", "benchmark", "local")
        done = ended(running, created["id"])
        assert done["status"] == "completed", done
        scores = done["scores"]
        assert scores["base_wins"] + scores["tuned_wins"] + scores["ties"] == len(QUESTIONS)
        [record] = list_manual_comparisons(connect(), name)
        assert (record.id, record.wins, record.losses) == (scores["report"], scores["tuned_wins"], scores["base_wins"])
        assert record.report_path.is_file()
        assert done["progress"]["questions"] >= 2 and done["finished_at"] is not None
        pairs = running.http.get(f"{COMPARISONS}/{done['id']}/pairs").json()
        assert [one["prompt"] for one in pairs["data"]] == [row["prompt"] for row in QUESTIONS]
        [listed] = running.http.get(COMPARISONS, params={"loop": name, "status": "completed"}).json()["data"]
        assert listed == done
        assert running.http.get(COMPARISONS, params={"loop": name, "status": "failed"}).json()["data"] == []


def test_given_prompts_are_answered_and_blind_votes_count(loop, name):
    ann, bob = (create_key(connect(), who, ["feedback", "infer", "admin"]) for who in ("ann", "bob"))
    try:
        with serving(loop) as running:
            key = {who: {"Authorization": f"Bearer {secret}"} for who, secret in (("ann", ann), ("bob", bob))}
            body = {"tuned": f"{name}@v1.1.0", "prompts": PROMPTS}
            created = create(running, body, **key["ann"], **{"Idempotency-Key": "one"})
            assert create(running, body, **key["ann"], **{"Idempotency-Key": "one"})["id"] == created["id"]
            other = create(running, {**body, "prompts": ["x"]}, 409, **key["ann"], **{"Idempotency-Key": "one"})
            assert "was used for another request" in other["error"]["message"]
            done = ended(running, created["id"], **key["ann"])
            assert (done["status"], done["base"], done["scores"]) == ("completed", f"{name}@base", None), done
            path = f"{COMPARISONS}/{created['id']}"
            pairs = running.http.get(f"{path}/pairs", params={"limit": 3}, headers=key["ann"]).json()
            assert pairs["has_more"] and all(one["vote"] is None for one in pairs["data"])
            rest = running.http.get(f"{path}/pairs", params={"after": 3}, headers=key["ann"]).json()
            assert [one["prompt"] for one in [*pairs["data"], *rest["data"]]] == PROMPTS
            known = {one.number: one for one in pairs_of(connect(), created["id"])}
            for shown in pairs["data"]:
                pair = known[shown["number"]]
                assert {shown["a"], shown["b"]} == {pair.base_answer, pair.tuned_answer}
                assert "model" not in shown and shown["a"] == (pair.tuned_answer if pair.swapped else pair.base_answer)

            def vote(number, choice, who="ann", status=200):
                given = {"pair": number, "choice": choice}
                response = running.http.post(f"{path}/votes", json=given, headers=key[who])
                assert response.status_code == status, response.text
                return response.json()

            def tuned_side(number):
                return "a" if known[number].swapped else "b"

            def base_side(number):
                return "b" if known[number].swapped else "a"

            assert vote(1, tuned_side(1))["model"] == f"{name}@v1.1.0"
            assert vote(2, base_side(2))["model"] == f"{name}@base"
            assert vote(3, "tie")["model"] is None
            assert vote(4, tuned_side(4))["votes"] == {"base_wins": 1, "tuned_wins": 2, "ties": 1, "voters": ["ann"]}
            assert vote(1, tuned_side(1))["votes"]["tuned_wins"] == 2, "the same vote again"
            assert "ann voted otherwise on pair 1" in vote(1, base_side(1), status=409)["error"]["message"]
            assert "has no pair 9" in vote(9, "a", status=404)["error"]["message"]
            votes = vote(1, tuned_side(1), "bob")["votes"]
            assert votes == {"base_wins": 1, "tuned_wins": 3, "ties": 1, "voters": ["ann", "bob"]}
            mine = running.http.get(f"{path}/pairs", headers=key["bob"]).json()["data"]
            assert [one["vote"] for one in mine] == [tuned_side(1), None, None, None]
            models = {one["id"]: one for one in running.http.get(MODELS, headers=key["bob"]).json()["data"]}
            tuned, base = models[f"{name}@v1.1.0"], models[f"{name}@base"]
            assert (tuned["win_rate"], tuned["votes"]) == (0.75, {"won": 3, "lost": 1, "tied": 1})
            assert (base["win_rate"], base["votes"]) == (0.25, {"won": 1, "lost": 3, "tied": 1})
            assert models[f"{name}@v1.0.0"]["win_rate"] is None
    finally:
        with connect().write() as connection:
            connection.exec_driver_sql("DELETE FROM api_keys")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"tuned": "LOOP@champion", "base": "LOOP@v1.1.0"}, 400, "tuned"),
        ({"tuned": "LOOP@v9.0.0"}, 404, "model_id"),
        ({"tuned": "other@v1.0.0"}, 404, "loop"),
        ({"tuned": "/etc/passwd"}, 400, "tuned"),
        ({"tuned": "http://127.0.0.1:1/v1#model"}, 400, "tuned"),
        ({"tuned": "LOOP@v1.0.0", "prompts": []}, 400, "prompts"),
        ({"tuned": "LOOP@v1.0.0", "prompts": ["x"] * 201}, 400, "prompts"),
        ({"tuned": "LOOP@v1.0.0", "prompts": [""]}, 400, "prompts[0]"),
        ({"base": "LOOP@v1.0.0"}, 400, "tuned"),
    ],
)
def test_what_cannot_be_compared_is_refused(shared, body, status, param):
    error = create(
        shared, {k: v.replace("LOOP", "shared") if isinstance(v, str) else v for k, v in body.items()}, status
    )
    assert error["error"]["param"] == param, error


@pytest.fixture(scope="module")
def shared(own_home, ggufs):
    """Run a gateway with a loop that has two versions, and whose benchmark does not exist."""
    promote(ggufs["Q8_0"], "shared")
    promote(ggufs["Q4_K_M"], "shared")
    with serving(make_loop("shared")) as running:
        yield running


def test_a_loop_without_its_benchmark_is_refused_at_once(shared):
    assert "benchmark of shared cannot be used" in create(shared, {"tuned": "shared@v1.0.0"}, 409)["error"]["message"]


def test_unknown_comparisons_are_not_found(shared):
    path = f"{COMPARISONS}/cmp-000000000000000000000000"
    assert shared.http.get(path).status_code == shared.http.get(f"{path}/pairs").status_code == 404
    assert shared.http.post(f"{path}/cancel").status_code == 404
    assert shared.http.post(f"{path}/votes", json={"pair": 1, "choice": "a"}).status_code == 404


def test_a_comparison_that_fails_says_why(loop, name, tmp_path):
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(QUESTIONS[0]))
    with serving(loop) as running:
        request = {"tuned": f"{name}@v1.0.0", "prompts": ["Add a wall"]}
        with connect().write() as connection:
            connection.exec_driver_sql(
                "UPDATE model_versions SET gguf_sha256 = ? WHERE loop = ? AND minor = 0", ("0" * 64, name)
            )
        done = ended(running, create(running, request)["id"])
    assert done["status"] == "failed" and "is damaged or was replaced" in done["error"]


def test_a_comparison_shows_progress_and_is_canceled(loop, name, paused):
    with serving(loop) as running:
        id = create(running, {"tuned": f"{name}@v1.0.0", "prompts": PROMPTS})["id"]

        def read():
            return running.http.get(f"{COMPARISONS}/{id}").json()

        wait_until(lambda: (read()["progress"] or {}).get("answered") == 2, what=read)
        assert read()["status"] == "running" and read()["progress"]["questions"] == len(PROMPTS)
        vote = running.http.post(f"{COMPARISONS}/{id}/votes", json={"pair": 1, "choice": "a"})
        assert vote.status_code == 409 and "it has no answers to vote on" in vote.text
        running_ones = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
        [child] = [one for one in running_ones if id in one.cmdline()]
        assert running.http.post(f"{COMPARISONS}/{id}/cancel").json()["status"] == "canceled"
        assert running.http.post(f"{COMPARISONS}/{id}/cancel").json()["status"] == "canceled"
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        assert read()["status"] == "canceled" and pairs_of(connect(), id) == []
        paused.unlink()
        second = create(running, {"tuned": f"{name}@v1.0.0", "prompts": PROMPTS})["id"]
        assert ended(running, second)["status"] == "completed"
        canceled = running.http.post(f"{COMPARISONS}/{second}/cancel")
        assert canceled.status_code == 409 and "is completed; it cannot be canceled now" in canceled.text


@pytest.mark.slow  # a process that imports the evaluation, and engines
def test_a_killed_gateway_leaves_a_comparison_that_the_next_one_finishes(loop, name, paused, tmp_path):
    id = request_comparison(loop, f"{name}@base", f"{name}@v1.0.0", "ann", PROMPTS).id
    process = subprocess.Popen([sys.executable, "-c", GATEWAY, loop.model_dump_json()], env=os.environ)
    wait_until(lambda: (tmp_path / "paused").exists() or process.poll() is not None)
    assert find_requested_comparison(connect(), id).status == "running"
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in children))
    wait_until(lambda: find_requested_comparison(connect(), id).status == "pending")
    paused.unlink()
    with serving(loop) as running:
        done = ended(running, id)
        assert done["status"] == "completed", done
    found = find_requested_comparison(connect(), id)
    assert (found.tries, found.locked_by) == (2, None) and len(pairs_of(connect(), id)) == len(PROMPTS)


@pytest.mark.slow  # a process that imports the evaluation, and engines
def test_a_gateway_that_stops_gives_a_comparison_back(loop, name, paused, tmp_path):
    id = request_comparison(loop, f"{name}@base", f"{name}@v1.0.0", "ann", PROMPTS).id
    with serving(loop):
        wait_until(lambda: (tmp_path / "paused").exists())
    found = find_requested_comparison(connect(), id)
    assert (found.status, found.tries, found.locked_by) == ("pending", 0, None)


def test_a_comparison_whose_processes_are_killed_again_and_again_fails(loop, name):
    id = request_comparison(loop, f"{name}@base", f"{name}@v1.0.0", "ann", PROMPTS).id
    for _ in range(MAX_TRIES):
        assert claim_comparison(connect(), id) is not None
        assert claim_comparison(connect(), id) is None, "one process works on it"
        with connect().write() as connection:
            late = datetime.now(UTC) - timedelta(seconds=1)
            connection.execute(sa.update(table).where(table.c.id == id).values(locked_until=late))
        assert find_requested_comparison(connect(), id).status == "pending"
    assert claim_comparison(connect(), id) is None
    found = find_requested_comparison(connect(), id)
    assert found.status == "failed" and "3 processes that worked on it ended without a result" in found.error
