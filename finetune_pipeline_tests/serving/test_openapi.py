"""Schemathesis tests the gateway against its OpenAPI document and finds no error."""

import os
import subprocess
import sys

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline_tests.serving.conftest import make_loop, serving

OPERATIONS = [
    "GET /healthz",
    "GET /metrics",
    "GET /v1/feedback/stats",
    "GET /v1/interactions/{id}",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /admin/reload-model",
    "POST /admin/rollback",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/feedback",
    "POST /v1/interactions",
]


@pytest.fixture(scope="module")
def keyed(own_home):
    """Run a gateway with a key that has all scopes."""
    key = create_key(connect(), "tests", ["infer", "feedback", "admin"])
    with serving(make_loop()) as running:
        yield running, key


def test_every_operation_is_described(keyed):
    running, _ = keyed
    paths = running.http.get("/openapi.json").json()["paths"]
    found = sorted(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)
    assert found == OPERATIONS


HOOKS = """
import schemathesis


@schemathesis.hook
def map_body(context, body):
    # Use existing loops and a last message of the user's, which a schema cannot require.
    if isinstance(body, dict):
        for name in ("model", "loop"):
            if isinstance(body.get(name), str) and 0 < len(body[name]) <= 60:
                body[name] = "notes"
        messages = body.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and last.get("role") in {"system", "developer", "assistant"}:
            last["role"] = "user"
        if isinstance(last, dict) and last.get("content") in ("", []):
            last["content"] = "a wall"
    return body
"""


def test_schemathesis_finds_no_error(keyed, tmp_path):
    running, key = keyed
    (tmp_path / "hooks.py").write_text(HOOKS)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    program = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"]
    options = ["--header", f"Authorization: Bearer {key}", "--max-examples", "15", "--seed", "1", "--no-color"]
    options += ["--output-sanitize", "false"]
    ended = subprocess.run(
        [*program, *options, "--continue-on-failure"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert running.health()["status"] == "ok"
