"""A gateway brings deployment targets to the champion in the background."""

import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.deployment.target_state import target_states
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.registry import champion
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.serving import deployer, gateway
from finetune_pipeline.settings import home
from finetune_pipeline_tests.deployment.shelf import Shelf
from finetune_pipeline_tests.serving.conftest import STARTER, make_loop, serving
from finetune_pipeline_tests.waiting import wait_until

CHILD = """
from finetune_pipeline.deployment import target_state
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.serving.deployer import main
from finetune_pipeline_tests.deployment.shelf import Shelf
deploy.open_target = Shelf
target_state.LEASE_SECONDS = 1.0
main()
"""

GATEWAY = f"""
import asyncio, sys
from finetune_pipeline.database import connect
from finetune_pipeline.serving import deployer
from finetune_pipeline.settings import LoopSettings
deployer.COMMAND = [sys.executable, "-c", {CHILD!r}]
loop = LoopSettings.model_validate_json(sys.argv[1])
asyncio.run(deployer.deploy_due(loop, connect()))
"""


@pytest.fixture(autouse=True)
def with_shelves(monkeypatch):
    monkeypatch.setattr(deployer, "COMMAND", [sys.executable, "-c", CHILD])
    monkeypatch.setattr(gateway, "DEPLOY_SECONDS", 0.1)


@pytest.fixture
def declared(tmp_path, request):
    """Return a loop of the test's own with a shelf in the folder `shelf`."""
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"id": "q", "slice": "s", "prompt": "p", "expected": "e"}))
    (tmp_path / "shelf").mkdir()
    evaluation = {"benchmark": str(tmp_path / "benchmark.jsonl"), "metric": "rouge1", "max_tokens": 16, "context": 512}
    targets = [{"kind": "folder", "name": "shelf", "path": str(tmp_path / "shelf")}]
    name = request.node.name.replace("test_a_", "")[:30]
    return make_loop(name, evaluation=evaluation, deploy={"targets": targets})


def promoted(loop, gguf):
    folder = home() / "artifacts" / loop.name / "gguf_model" / gguf.stem
    folder.mkdir(parents=True)
    shutil.copyfile(gguf, folder / "model.gguf")
    now = champion.champion(connect(), loop.name)
    candidate = CandidateModel(
        loop=loop.name, gguf_path=folder / "model.gguf", gguf_sha256=hash_file(gguf), base_hash=base_hash(STARTER),
        mode="full", lineage={"base_model": str(STARTER)}, scores={"accuracy": 0.5}, report_path=folder,
    )  # fmt: skip
    expected = now.id if now else None
    return champion.promote(connect(), candidate, expected, "tests", "a test needs it", None, action="force")


def serves(folder, label):
    path = folder / "current"
    return path.exists() and path.read_text() == label


def is_active(loop):
    state = target_states(connect(), loop.name)["shelf"]
    return state.state == "active" and state.locked_by is None


def test_a_gateway_follows_promotions_and_answers_meanwhile(declared, ggufs, tmp_path):
    shelf = tmp_path / "shelf"
    promoted(declared, ggufs["Q8_0"])
    with serving(declared) as running:
        wait_until(lambda: serves(shelf, "v1.0.0"))
        wait_until(lambda: is_active(declared))
        (shelf / "pause-stage").touch()
        promoted(declared, ggufs["Q4_K_M"])
        wait_until(lambda: (shelf / "paused-stage").exists())
        wait_until(lambda: running.ask(model=declared.name).json()["model"].endswith("v1.1.0"))
        assert serves(shelf, "v1.0.0")
        (shelf / "pause-stage").unlink()
        wait_until(lambda: serves(shelf, "v1.1.0"))


def test_a_target_that_serves_the_champion_is_asked_without_a_process(declared, ggufs, tmp_path, monkeypatch):
    shelf = tmp_path / "shelf"
    monkeypatch.setattr(deploy, "open_target", Shelf)  # in this process, which asks
    monkeypatch.setattr(deploy, "OBSERVE_SECONDS", 0.0)
    promoted(declared, ggufs["Q8_0"])
    deploy.reconcile(declared, print)
    asked_at = target_states(connect(), declared.name)["shelf"].observed_at
    (tmp_path / "child").write_text("not started")
    child = f"from pathlib import Path\nPath({str(tmp_path / 'child')!r}).write_text('started')\n{CHILD}"
    monkeypatch.setattr(deployer, "COMMAND", [sys.executable, "-c", child])
    with serving(declared):
        wait_until(lambda: target_states(connect(), declared.name)["shelf"].observed_at > asked_at)
        asked = len((shelf / "calls-observe").read_text())
        wait_until(lambda: len((shelf / "calls-observe").read_text()) >= asked + 3)
        assert (tmp_path / "child").read_text() == "not started"
        (shelf / "v9.9.9.gguf").write_text("by hand")
        (shelf / "current").write_text("v9.9.9")
        wait_until(lambda: serves(shelf, "v1.0.0") and is_active(declared))  # which needs a process
        assert (tmp_path / "child").read_text() == "started"
    assert "drift" in target_states(connect(), declared.name)["shelf"].facts


def test_a_gateway_that_stops_gives_the_target_back(declared, ggufs, tmp_path):
    shelf = tmp_path / "shelf"
    promoted(declared, ggufs["Q8_0"])
    (shelf / "pause-stage").touch()
    with serving(declared):
        wait_until(lambda: (shelf / "paused-stage").exists())
    state = target_states(connect(), declared.name)["shelf"]
    assert (state.state, state.locked_by) == ("pending", None)
    assert not list(shelf.glob("*.gguf"))


def test_a_killed_gateway_takes_its_child_along_and_the_next_one_finishes(declared, ggufs, tmp_path):
    shelf = tmp_path / "shelf"
    promoted(declared, ggufs["Q8_0"])
    (shelf / "pause-stage").touch()
    command = [sys.executable, "-c", GATEWAY, declared.model_dump_json()]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    wait_until(lambda: (shelf / "paused-stage").exists() or process.poll() is not None)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    (shelf / "pause-stage").unlink()
    assert not list(shelf.glob("v*.gguf"))
    with serving(declared):
        wait_until(lambda: serves(shelf, "v1.0.0"))
