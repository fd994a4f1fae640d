"""A loop whose champion is deployed to Ollama: tokens, answers, rollback and faults, through the registry."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.pipeline.deploy import reconcile
from finetune_pipeline.registry.champion import champion, rollback
from finetune_pipeline_tests.deployment.conftest import ggufs  # noqa: F401
from finetune_pipeline_tests.deployment.ollama_contract import ollama_contract
from finetune_pipeline_tests.registry.conftest import STARTER, promote_gguf


@pytest.fixture
def server(tmp_path):
    with ollama_contract(tmp_path / "ollama") as running:
        yield running


@pytest.fixture
def ollama_loop(make_loop, server, tmp_path):
    target = {"kind": "ollama", "url": server.url}
    modelfiles = {"path": str(tmp_path / "modelfiles")}
    evaluation = {"benchmark": "", "metric": "rouge1", "max_tokens": 16, "context": 256}
    return make_loop(
        base_model=str(STARTER), evaluation=evaluation, deploy={"targets": [target], "modelfiles": modelfiles}
    )


def test_ollama_and_the_modelfiles_follow_the_champion(ollama_loop, server, ggufs):  # noqa: F811
    promote_gguf(ggufs["F16"])
    lines = []
    server.faults["/api/copy"] = "reset"
    ollama, modelfiles = reconcile(ollama_loop, lines.append)
    assert (ollama.state, ollama.tries) == ("failed", 1) and "broke off during POST /api/copy" in ollama.last_error
    assert modelfiles.state == "active"
    assert champion(connect(), "notes").version == "v1.0.0"
    server.faults.clear()
    ollama, modelfiles = reconcile(ollama_loop, lines.append, force=True)
    assert (ollama.state, ollama.observed) == ("active", "v1.0.0"), "\n".join(lines)
    answers = ollama.facts["answers"]
    assert answers["same"] == answers["total"] > 0 and answers["score"] == answers["judged_score"]
    promote_gguf(ggufs["Q8_0"])
    ollama, modelfiles = reconcile(ollama_loop, lines.append)
    assert (ollama.observed, modelfiles.observed) == ("v1.1.0", "v1.1.0")
    rollback(connect(), "notes", "me", "worse")
    ollama, modelfiles = reconcile(ollama_loop, lines.append)
    assert (ollama.state, ollama.observed, modelfiles.observed) == ("active", "v1.0.0", "v1.0.0")
    assert len(server.uploads) == 2 and server.violations == []
    server.models["notes:latest"] = server.models["notes:v1.1.0"]
    reconcile(ollama_loop, lines.append, force=True)
    assert "ollama: serves v1.1.0 instead of v1.0.0, which was active; it is brought back" in lines
    assert server.digest("notes") == server.digest("notes:v1.0.0")


def test_a_server_that_prompts_differently_is_not_switched(ollama_loop, server, ggufs):  # noqa: F811
    promote_gguf(ggufs["F16"])
    server.debug_rendering, server.native_suffix = False, "{"  # so only the answers can tell
    ollama, _ = reconcile(ollama_loop, lambda line: None)
    assert ollama.state == "rejected" and "answers equal the judged model's" in ollama.last_error
    assert "notes:latest" not in server.models
    server.debug_rendering, server.stock_template = True, "{{ range .Messages }}{{ .Content }}{{ end }}"
    ollama, _ = reconcile(ollama_loop, lambda line: None, force=True)
    assert ollama.state == "active"  # by a template of the tokenizer's
