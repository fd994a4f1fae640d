"""What real clients of OpenAI's API can do with the gateway, each in an environment of its own.

Each client has a script with one function per capability. The environments are made on first use, below data/state.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.settings import PROJECT_ROOT

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

SCRIPTS = Path(__file__).parent
CLIENTS = {
    "openai": ("openai==3.57.0",),
    "langchain": ("langchain-openai==1.7.4",),
    "litellm": ("litellm==1.110.2",),
    "instructor": ("instructor==1.17.0",),
    "pydantic_ai": ("pydantic-ai-slim[openai]==2.68.0",),
    "openai_agents": ("openai-agents==0.24.0",),
    "ai_sdk": ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "zod@4.6.7"),
}
VARIANTS = [*CLIENTS, "pydantic_ai:chat"]
"""The clients in their default mode, and after a colon another one; the script gets its name."""


class NotSupportedYet(Exception):
    """The gateway refused a request because of something that it does not support yet."""


UUID = r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"


@pytest.fixture(scope="session")
def environment():
    """Return a function that gives the command of a client's interpreter, and installs the client on first use."""

    def made(client):
        folder = PROJECT_ROOT / "data" / "state" / "clients" / f"{client}-{hash_of(CLIENTS[client])[:8]}"
        if client == "ai_sdk" and shutil.which("npm") is None:
            pytest.skip("npm is not installed; install Node.js 20 or newer")
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if client == "ai_sdk":
                _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, *CLIENTS[client])
            else:
                uv = Path(sys.executable).with_name("uv")
                _run(uv, "venv", "--quiet", "--allow-existing", folder)
                _run(uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *CLIENTS[client])
            (folder / "complete").touch()
        if client == "ai_sdk":  # Node looks for packages beside the script
            return ["node", shutil.copy(SCRIPTS / "ai_sdk_client.mjs", folder)]
        return [folder / "bin" / "python", SCRIPTS / f"{client}_client.py"]

    return made


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def ask(environment, notes):
    """Return a function that has a client use a capability, and returns what the client got."""

    def with_client(client, capability):
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_BASE_URL")}
        variables |= {"GATEWAY_URL": notes.url, "GATEWAY_MODEL": "notes", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        name, *variant = client.split(":")
        done = subprocess.run(
            [*environment(name), capability, *variant], env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 and "not supported yet" in done.stderr:
            raise NotSupportedYet(done.stderr)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return with_client


def check_wall(value):
    value = json.loads(value) if isinstance(value, str) else value
    assert {"material", "thickness_mm"} <= value.keys()  # the schemas of some clients allow more
    assert value["material"] in ("brick", "concrete") and isinstance(value["thickness_mm"], int)


@pytest.mark.parametrize("client", VARIANTS)
def test_chat_with_feedback_by_the_id_that_the_client_has(ask, client, notes):
    answer = ask(client, "chat")
    assert notes.interaction(answer["id"])["interaction"]["output"] == answer["text"] != ""
    feedback = {"interaction_id": answer["id"], "kind": "thumbs_up"}
    assert notes.http.post("/v1/feedback", json=feedback).json()["status"] in ("recorded", "accepted")
    assert [one["kind"] for one in notes.interaction(answer["id"])["feedback"]] == ["thumbs_up"]


@pytest.mark.parametrize("client", VARIANTS)
def test_a_stream_is_the_same_answer_in_pieces(ask, client):
    answer = ask(client, "stream")
    if client == "instructor":  # streams objects only
        check_wall(answer["value"])
    else:
        assert answer["text"] == ask(client, "chat")["text"]
    assert answer["pieces"] > 1


@pytest.mark.parametrize("client", VARIANTS)
def test_structured_output_in_the_clients_default_mode(ask, client, notes):
    answer = ask(client, "structured")
    check_wall(answer["value"])
    check_wall(notes.interaction(answer["id"])["interaction"]["output"])


@pytest.mark.parametrize("client", VARIANTS)
def test_a_forced_tool(ask, client, notes):
    answer = ask(client, "forced_tool")
    assert answer["name"] == "add_wall"
    check_wall(answer["arguments"])
    check_wall(notes.interaction(answer["id"])["interaction"]["output"])


@pytest.mark.parametrize("client", ["openai_agents", "ai_sdk", "pydantic_ai"])
def test_a_conversation_continues_from_the_store(ask, client, notes):
    answer = ask(client, "second_turn")
    turns = notes.interaction(answer["id"])["interaction"]["history"]
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "Add a 150 mm brick wall"),
        ("assistant", answer["first"]),
    ]


@pytest.mark.xfail(strict=True, raises=NotSupportedYet, reason="tool_choice auto is not supported yet")
@pytest.mark.parametrize("client", VARIANTS)
def test_a_tool_that_the_model_chooses(ask, client):
    answer = ask(client, "auto_tool")
    assert answer["name"] == "add_wall"
    check_wall(answer["arguments"])
