"""The whole loop live: an OpenAI client sends feedback, and the gateway improves without a restart.

    .venv/bin/python examples/live_gateway.py

A separate deployment (a copy of the project without the sample logs, in
$FINETUNE_HOME/live_gateway, replaced each time) runs `finetune serve` and `dagster dev`. An
unmodified OpenAI client sends 60 requests to the starter model. Wrong answers get a correction
through the API, correct ones a thumbs-up. The sensor starts the loop, which trains, evaluates and
promotes a new model. The gateway swaps to it, and the same client sends the 60 requests again, and
40 others without feedback.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from openai import OpenAI

from finetune_pipeline.settings import PROJECT_ROOT, home

LOOP = "aec_parser"
ASKED, OTHERS = 60, 40
TIMEOUT_SECONDS = 600
SHOWN = (
    "new high-reward",
    "Launching run for",
    "%, step ",
    "check 'gain'",
    "is the champion now",
    "in service",
    "RUN_FAILURE",
)
"""Lines of Dagster's log that are printed contain one of these."""

PARTS = (
    "finetune_pipeline",
    "data/starter_model",
    "data/benchmarks",
    "pyproject.toml",
    "workspace.yaml",
    "dagster.yaml",
)


@dataclass(frozen=True)
class Example:
    """A request and its expected answer."""

    prompt: str
    expected: str


def main() -> None:
    """Run the example; exit with status 1 if a step takes too long."""
    folder = home() / "live_gateway"
    project = copy_project(folder)
    examples = sample_examples()
    asked, others = examples[:ASKED], examples[ASKED : ASKED + OTHERS]
    port = free_port()
    with running(folder, project, ["finetune_pipeline.cli.main", "serve", "--port", str(port)], "gateway.log"):
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="not needed on this machine")
        wait_for_gateway(port)
        before = [ask_all(client, group) for group in (asked, others)]
        say(f"60 requests answered by {before[0][0].model}: {score(asked, before[0])}")
        give_feedback(port, asked, before[0])
        with running(
            folder, project, ["dagster", "dev", "-w", "workspace.yaml", "-p", str(free_port())], "dagster.log"
        ):
            wait_for_promotion(port, folder, before[0][0].model)
        after = [ask_all(client, group) for group in (asked, others)]
        say(f"same client, same gateway: {after[0][0].model} answers now")
        for name, group, old, new in zip(
            ("60 requests with feedback", "40 others"), (asked, others), before, after, strict=True
        ):
            say(f"{name}: {score(group, old)} before, {score(group, new)} now")
        show(asked, before[0], after[0])
        say("GET /healthz: " + httpx.get(f"http://127.0.0.1:{port}/healthz").text)


def copy_project(folder: Path) -> Path:
    """Copy the project; its only source of interactions is the gateway, and its sensor is on."""
    shutil.rmtree(folder, ignore_errors=True)
    project = folder / "project"
    for part in PARTS:
        copy = shutil.copytree if (PROJECT_ROOT / part).is_dir() else shutil.copy
        (project / part).parent.mkdir(parents=True, exist_ok=True)
        copy(PROJECT_ROOT / part, project / part)
    path = project / "finetune_pipeline" / "defs" / LOOP / "defs.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = document["attributes"]
    settings["ingest"] = {"folders": []}
    settings["trigger"] = {"new_examples": 50, "interval_seconds": 5, "running": True}
    settings["training"]["num_train_epochs"] = 12  # more epochs, because there are only 60 examples
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return project


@contextmanager
def running(folder: Path, project: Path, command: Sequence[str], log: str) -> Iterator[None]:
    """Run a process of the deployment and stop it at the end."""
    state = folder / "state"
    dagster_home = state / "dagster"
    dagster_home.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "FINETUNE_HOME": str(state), "DAGSTER_HOME": str(dagster_home), "PYTHONPATH": str(project)}
    # If a script starts this in the background, it and its children would otherwise ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / log).open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=project, env=env, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def sample_examples() -> list[Example]:
    """Return the distinct requests of the sample logs whose expected answer is known, in a fixed order."""
    interactions: dict[str, dict[str, Any]] = {}
    expected: dict[str, str] = {}
    for path in sorted((PROJECT_ROOT / "data" / "samples" / LOOP).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the samples contain an invalid line on purpose
            if event.get("event") == "interaction":
                interactions[event["id"]] = event
            elif event.get("kind") == "correction":
                expected[event["interaction_id"]] = event["correction"]
            elif event.get("kind") == "thumbs_up" and event["interaction_id"] in interactions:
                expected.setdefault(event["interaction_id"], interactions[event["interaction_id"]]["output"])
    examples = {
        interactions[id]["prompt"]: Example(interactions[id]["prompt"], answer)
        for id, answer in expected.items()
        if id in interactions
    }
    return sorted(examples.values(), key=lambda example: example.prompt[::-1])


@dataclass(frozen=True)
class Answer:
    """What the client received."""

    id: str
    model: str
    text: str


def ask_all(client: OpenAI, examples: Sequence[Example]) -> list[Answer]:
    """Return the answers to all examples."""
    answers = []
    for example in examples:
        response = client.chat.completions.create(
            model=LOOP, messages=[{"role": "user", "content": example.prompt}], user="u07"
        )
        answers.append(Answer(response.id, response.model, response.choices[0].message.content or ""))
    return answers


def give_feedback(port: int, examples: Sequence[Example], given: Sequence[Answer]) -> None:
    """Send a correction for every wrong answer and a thumbs-up for every correct one."""
    corrections = 0
    for example, answer in zip(examples, given, strict=True):
        body: dict[str, Any] = {"interaction_id": answer.id, "user": "u07"}
        if parameters(answer.text) == parameters(example.expected):
            body |= {"kind": "thumbs_up"}
        else:
            corrections += 1
            body |= {"kind": "correction", "correction": example.expected}
        httpx.post(f"http://127.0.0.1:{port}/v1/feedback", json=body).raise_for_status()
    say(f"{corrections} corrections and {len(examples) - corrections} thumbs-up sent to /v1/feedback")
    say("GET /v1/feedback/stats: " + httpx.get(f"http://127.0.0.1:{port}/v1/feedback/stats").text)


def wait_for_gateway(port: int) -> None:
    """Wait until the gateway answers."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            health = httpx.get(f"http://127.0.0.1:{port}/healthz").json()
        except httpx.HTTPError:
            time.sleep(0.5)
            continue
        say(f"the gateway is up: {health['loops'][LOOP]['serving']} is in service")
        return
    sys.exit("the gateway did not start; see gateway.log")


def wait_for_promotion(port: int, folder: Path, old: str) -> None:
    """Print the progress of sensor and run until the gateway serves another model."""
    deadline, printed = time.monotonic() + TIMEOUT_SECONDS, 0
    say("dagster dev is started; everything from here on is automatic")
    while time.monotonic() < deadline:
        log = re.sub(r"\x1b\[[0-9;]*m", "", (folder / "dagster.log").read_text())
        lines = [line for line in log.splitlines() if any(words in line for words in SHOWN)]
        for line in lines[printed:]:
            say("  " + re.sub(r"^\w+ - [0-9a-f-]{36} - (?:\d+ - )?", "", line.split(" - ", 3)[-1])[:130])
        printed = len(lines)
        serving = httpx.get(f"http://127.0.0.1:{port}/healthz").json()["loops"][LOOP]["serving"]
        if serving and serving != old:
            return
        time.sleep(1)
    sys.exit("no model was promoted in time; see dagster.log")


def parameters(text: str) -> dict[str, Any]:
    """Return the parameters of an answer; none if it is not a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def score(examples: Sequence[Example], given: Sequence[Answer]) -> str:
    """Return the number of correct parameters as text."""
    correct = total = 0
    for example, answer in zip(examples, given, strict=True):
        expected, given_values = parameters(example.expected), parameters(answer.text)
        correct += sum(given_values.get(name) == value for name, value in expected.items())
        total += len(expected)
    return f"{correct} of {total} parameters correct ({correct / total:.1%})"


def show(examples: Sequence[Example], old: Sequence[Answer], new: Sequence[Answer]) -> None:
    """Print the first three answers that became correct."""
    fixed = [
        (example, before, after)
        for example, before, after in zip(examples, old, new, strict=True)
        if parameters(before.text) != parameters(example.expected) == parameters(after.text)
    ]
    for example, before, after in fixed[:3]:
        print(f"\n  {example.prompt!r}\n    {before.model:<22} {before.text}\n    {after.model:<22} {after.text}")
    print()


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
