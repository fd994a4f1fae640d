"""Real llama-servers follow the champion: the loop's registry, parity, promotion, rollback, and kills of the server."""

import shutil

import httpx
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.export.gguf import convert, convert_adapter
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline.deploy import reconcile
from finetune_pipeline.registry.champion import rollback
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.deployment.llama_servers import llama_server_at, with_program
from finetune_pipeline_tests.registry.conftest import STARTER, promote_gguf

# Building the server, on first use, counts as a part of the test that asks first.
pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]

PROMPT = "make a wall 200 mm thick"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return the starter model as GGUF, and two adapters that change its answers."""
    folder = tmp_path_factory.mktemp("models")
    convert(STARTER, folder / "base.gguf")
    for seed in (1, 2):
        write_adapter(STARTER, folder / f"a{seed}", seed, strength=0.4)
        convert_adapter(folder / f"a{seed}", STARTER, folder / f"a{seed}.gguf")
    return folder


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    with llama_server_at(tmp_path / "server" / "log") as running:
        yield running


@pytest.fixture
def make_deployed(make_loop, server, tmp_path):
    """Return a function that makes a loop with a target of a form."""

    def make(form):
        target = {"kind": "llama_server", "form": form, "url": server.url, "folder": str(tmp_path / "served")}
        target["timeout_seconds"] = 600  # on a busy machine
        evaluation = {"benchmark": "", "metric": "rouge1", "max_tokens": 16, "context": 256}
        return make_loop(base_model=str(STARTER), evaluation=evaluation, deploy={"targets": [target]})

    return make


@pytest.fixture
def promote_adapter(models, own_home):
    """Return a function that promotes the base with an adapter, or the base's GGUF as a merged model."""

    def promote(name=None):
        folder = own_home / "artifacts" / "notes" / "gguf_model" / str(name)
        folder.mkdir(parents=True)
        gguf, adapter = folder / "model.gguf", folder / "adapter.gguf" if name else None
        shutil.copyfile(models / "base.gguf", gguf)
        if adapter:
            shutil.copyfile(models / f"{name}.gguf", adapter)
        adapted = {"adapter_path": adapter, "adapter_sha256": hash_file(adapter)} if adapter else {}
        return promote_gguf(gguf, **adapted)

    return promote


def brought(loop, state="active"):
    lines = []
    [found] = reconcile(loop, lines.append, force=True)
    print("\n".join(lines))
    assert found.state == state, found.last_error
    return found


def test_a_chat_through_the_router_follows_promotion_and_rollback(make_deployed, server, promote_adapter, tmp_path):
    loop = make_deployed("router")
    promote_adapter()
    failed = brought(loop, "failed")
    server.start(with_program(failed.last_error.split("Its start command: ")[1], "built"))
    state = brought(loop)
    assert state.observed == "v1.0.0" and state.facts["tokens"]["differing"] == 0
    first = server.chat("notes", PROMPT)
    print("v1.0.0 answers", first)
    promote_adapter("a2")
    assert server.chat("notes", PROMPT) == first
    state = brought(loop)
    assert (state.observed, state.facts["answers"]["same"]) == ("v1.1.0", state.facts["answers"]["total"])
    second = server.chat("notes", PROMPT)
    print("v1.1.0 answers", second)
    assert second != first and server.chat("notes@v1.0.0", PROMPT) == first  # kept, and loaded when it is asked for
    rollback(connect(), "notes", "me", "worse")
    assert brought(loop).observed == "v1.0.0"
    assert server.chat("notes", PROMPT) == first
    command = failed.last_error.split("Its start command: ")[1]
    server.start(with_program(command, "built"))  # after a kill -9 it serves what it served
    assert server.chat("notes", PROMPT) == first and brought(loop).observed == "v1.0.0"
    presets, lora = tmp_path / "served" / "presets.ini", tmp_path / "served" / "notes-v1.1.0.lora"
    presets.write_text(presets.read_text().replace("[notes]", f"[notes]\nlora = {lora}"))
    httpx.get(f"{server.url}/models?reload=1", timeout=60).raise_for_status()
    assert server.chat("notes", PROMPT) == second
    assert "has not the content of v1.0.0" in brought(loop).facts["drift"]["found"]
    assert server.chat("notes", PROMPT) == first


@pytest.mark.parametrize("program", ["xllamacpp", "built"])
def test_a_chat_through_adapters_follows_promotion_and_rollback(make_deployed, server, promote_adapter, program):
    loop = make_deployed("adapter")
    promote_adapter("a1")
    failed = brought(loop, "failed")
    server.start(with_program(failed.last_error.split("Its start command: ")[1], program))
    assert brought(loop).observed == "v1.0.0"
    first = server.chat("notes", PROMPT)
    print("v1.0.0 answers", first)
    promote_adapter("a2")
    failed = brought(loop, "failed")  # llama-server loads adapters at its start only
    assert "Restart it with: " in failed.last_error and server.chat("notes", PROMPT) == first
    server.start(with_program(failed.last_error.split("Restart it with: ")[1], program))
    assert server.chat("notes", PROMPT) == first  # the restart alone switches nothing
    state = brought(loop)
    assert (state.observed, state.facts["answers"]["same"]) == ("v1.1.0", state.facts["answers"]["total"])
    second = server.chat("notes", PROMPT)
    print("v1.1.0 answers", second)
    assert second != first
    rollback(connect(), "notes", "me", "worse")  # without a restart
    assert brought(loop).observed == "v1.0.0" and server.chat("notes", PROMPT) == first
    messages = [{"role": "user", "content": PROMPT}]
    prompt = httpx.post(f"{server.url}/apply-template", json={"messages": messages}).json()["prompt"]
    body = {"content": prompt, "add_special": True, "parse_special": True}
    tokens = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    with Engine(ModelSpec(gguf=loop_gguf(loop), context=256, parallel=1)) as engine:
        assert engine.encode(messages) == tokens
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def loop_gguf(loop):
    """Return the base's GGUF in the folder of the loop's target."""
    from pathlib import Path

    return next(Path(loop.deploy.targets[0].folder).glob("notes-base-*.gguf"))
