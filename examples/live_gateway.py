"""The whole promise, live: an OpenAI client is answered, corrects, and is answered better, and nothing is restarted.

    .venv/bin/python examples/live_gateway.py

A deployment of its own (a copy of the project without the sample logs, under $FINETUNE_HOME/live_gateway, replaced each
time) runs `finetune serve` and `dagster dev`. An unmodified OpenAI client sends 60 requests of a firm to the starter
model; what is wrong comes back as a correction through the API, what is right as a thumbs-up. The sensor starts the
loop by itself, the model is trained, measured and promoted, the gateway changes over, and the very same client asks
again: the same 60, and 40 that nobody ever gave feedback on. About 2 minutes.
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
ASKED, HELD_OUT = 60, 40
PATIENCE_SECONDS = 600
PARTS = (
    "finetune_pipeline",
    "data/starter_model",
    "data/benchmarks",
    "pyproject.toml",
    "workspace.yaml",
    "dagster.yaml",
)


@dataclass(frozen=True)
class Case:
    """A request of the firm, and the answer that its people want."""

    prompt: str
    wanted: str


def main() -> None:
    """Run the proof; exit code 1 if something does not happen in time."""
    folder = home() / "live_gateway"
    project = deployment(folder)
    cases = firm_requests()
    asked, held_out = cases[:ASKED], cases[ASKED : ASKED + HELD_OUT]
    port = free_port()
    with running(folder, project, ["finetune_pipeline.cli.main", "serve", "--port", str(port)], "gateway.log"):
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="not needed on this machine")
        wait_for_gateway(port)
        before = [answers(client, group) for group in (asked, held_out)]
        say(f"60 requests answered by {before[0][0].model}: {score(asked, before[0])}")
        give_feedback(port, asked, before[0])
        with running(
            folder, project, ["dagster", "dev", "-w", "workspace.yaml", "-p", str(free_port())], "dagster.log"
        ):
            wait_for_promotion(port, folder, before[0][0].model)
        after = [answers(client, group) for group in (asked, held_out)]
        say(f"the same client, the same gateway: {after[0][0].model} answers now")
        for name, group, old, new in zip(
            ("60 requests with feedback", "40 others"), (asked, held_out), before, after, strict=True
        ):
            say(f"{name}: {score(group, old)} before, {score(group, new)} now")
        show(asked, before[0], after[0])
        say("GET /healthz: " + httpx.get(f"http://127.0.0.1:{port}/healthz").text)


def deployment(folder: Path) -> Path:
    """A copy of the project whose only source is the gateway, with the sensor on."""
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
    settings["training"]["num_train_epochs"] = 12  # 60 examples are few: more passes over them
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return project


@contextmanager
def running(folder: Path, project: Path, command: Sequence[str], log: str) -> Iterator[None]:
    """A process of the deployment, stopped at the end."""
    state = folder / "state"
    dagster_home = state / "dagster"
    dagster_home.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "FINETUNE_HOME": str(state), "DAGSTER_HOME": str(dagster_home), "PYTHONPATH": str(project)}
    # Started in the background of a script, this process and its children would ignore ctrl-c's signal.
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


def firm_requests() -> list[Case]:
    """Distinct requests of the sample logs for which the wanted answer is known, in an order of their own."""
    interactions: dict[str, dict[str, Any]] = {}
    wanted: dict[str, str] = {}
    for path in sorted((PROJECT_ROOT / "data" / "samples" / LOOP).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the samples hold a broken line on purpose
            if event.get("event") == "interaction":
                interactions[event["id"]] = event
            elif event.get("kind") == "correction":
                wanted[event["interaction_id"]] = event["correction"]
            elif event.get("kind") == "thumbs_up" and event["interaction_id"] in interactions:
                wanted.setdefault(event["interaction_id"], interactions[event["interaction_id"]]["output"])
    cases = {
        interactions[id]["prompt"]: Case(interactions[id]["prompt"], answer)
        for id, answer in wanted.items()
        if id in interactions
    }
    return sorted(cases.values(), key=lambda case: case.prompt[::-1])


@dataclass(frozen=True)
class Answer:
    """What the client got."""

    id: str
    model: str
    text: str


def answers(client: OpenAI, cases: Sequence[Case]) -> list[Answer]:
    """Ask them all."""
    found = []
    for case in cases:
        said = client.chat.completions.create(
            model=LOOP, messages=[{"role": "user", "content": case.prompt}], user="u07"
        )
        found.append(Answer(said.id, said.model, said.choices[0].message.content or ""))
    return found


def give_feedback(port: int, cases: Sequence[Case], given: Sequence[Answer]) -> None:
    """A correction for every wrong answer, a thumbs-up for every right one."""
    corrections = 0
    for case, answer in zip(cases, given, strict=True):
        body: dict[str, Any] = {"interaction_id": answer.id, "user": "u07"}
        if parameters(answer.text) == parameters(case.wanted):
            body |= {"kind": "thumbs_up"}
        else:
            corrections += 1
            body |= {"kind": "correction", "correction": case.wanted}
        httpx.post(f"http://127.0.0.1:{port}/v1/feedback", json=body).raise_for_status()
    say(f"{corrections} corrections and {len(cases) - corrections} thumbs-up sent to /v1/feedback")
    say("GET /v1/feedback/stats: " + httpx.get(f"http://127.0.0.1:{port}/v1/feedback/stats").text)


def wait_for_gateway(port: int) -> None:
    """Wait until questions are answered."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            health = httpx.get(f"http://127.0.0.1:{port}/healthz").json()
        except httpx.HTTPError:
            time.sleep(0.5)
            continue
        say(f"the gateway is up: {health['loops'][LOOP]['serving']} serves")
        return
    sys.exit("the gateway did not come up; see gateway.log")


def wait_for_promotion(port: int, folder: Path, old: str) -> None:
    """Tell what the sensor and the run say until the gateway serves another model."""
    deadline, told = time.monotonic() + PATIENCE_SECONDS, 0
    say("dagster dev is started; nobody touches anything from here on")
    while time.monotonic() < deadline:
        log = re.sub(r"\x1b\[[0-9;]*m", "", (folder / "dagster.log").read_text())
        lines = [line for line in log.splitlines() if interesting(line)]
        for line in lines[told:]:
            say("  " + re.sub(r"^\w+ - [0-9a-f-]{36} - (?:\d+ - )?", "", line.split(" - ", 3)[-1])[:130])
        told = len(lines)
        serving = httpx.get(f"http://127.0.0.1:{port}/healthz").json()["loops"][LOOP]["serving"]
        if serving and serving != old:
            return
        time.sleep(1)
    sys.exit("it did not happen in time; see dagster.log")


def interesting(line: str) -> bool:
    """A line of Dagster's log that tells the story."""
    words = (
        "new high-reward",
        "Launching run for",
        "training step",
        "promote:",
        "reject:",
        "serves now",
        "RUN_FAILURE",
    )
    return any(word in line for word in words)


def parameters(text: str) -> dict[str, Any]:
    """The parameters of an answer; none where it is no JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def score(cases: Sequence[Case], given: Sequence[Answer]) -> str:
    """How many parameters are right."""
    right = total = 0
    for case, answer in zip(cases, given, strict=True):
        wanted, got = parameters(case.wanted), parameters(answer.text)
        right += sum(got.get(name) == value for name, value in wanted.items())
        total += len(wanted)
    return f"{right} of {total} parameters right ({right / total:.1%})"


def show(cases: Sequence[Case], old: Sequence[Answer], new: Sequence[Answer]) -> None:
    """The first three answers that became right."""
    mended = [
        (case, before, after)
        for case, before, after in zip(cases, old, new, strict=True)
        if parameters(before.text) != parameters(case.wanted) == parameters(after.text)
    ]
    for case, before, after in mended[:3]:
        print(f"\n  {case.prompt!r}\n    {before.model:<22} {before.text}\n    {after.model:<22} {after.text}")
    print()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
