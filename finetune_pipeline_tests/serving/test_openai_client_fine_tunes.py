"""The official client's whole flow: upload, create, events, pause, resume, chat; with a real gateway and Dagster."""

import os
import re
import subprocess
import sys

import httpx
import openai
import pytest
import yaml

from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.settings import COMPONENT_TYPE, PROJECT_ROOT, home, read_loop
from finetune_pipeline_tests.serving.conftest import free_port, process
from finetune_pipeline_tests.serving.test_openai_fine_tuning import BENCHMARK, NAMES, chat, jsonl
from finetune_pipeline_tests.waiting import wait_until

# Dagster's webserver and daemon, the gateway, and several trainings: run by `make test-servers`.
pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(3600)]

PAGE = PROJECT_ROOT / "docs" / "how-to" / "fine-tuning-api.md"
TREES = ["ash", "bay", "box", "elm", "fig", "fir", "gum", "may", "nut", "oak",
         "pine", "plum", "rowan", "rose", "sloe", "teak", "thorn", "vine", "willow", "yew"]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(own_home, tmp_path_factory):
    """Run Dagster and a gateway for one loop, as a user starts them."""
    loops = tmp_path_factory.mktemp("loops")
    (loops / "notes").mkdir()
    benchmark = loops / "notes" / "benchmark.jsonl"
    benchmark.write_bytes(jsonl(*BENCHMARK))
    attributes = {
        "name": "notes",
        "base_model": "data/starter_model",
        "curation": {"min_examples": 5, "validation_fraction": 0.2},
        "training": {"max_length": 128, "logging_steps": 1},
        "serving": {"aliases": ["gpt-4.1-nano-2025-04-14"]},
        "evaluation": {"benchmark": str(benchmark), "metric": "rouge1", "max_tokens": 24, "context": 192},
    }
    (loops / "notes" / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": attributes}))
    base_gguf(read_loop(loops / "notes" / "defs.yaml"), print)  # the gateway finds it
    port, address = free_port(), os.environ | {"FINETUNE_LOOPS_DIR": str(loops)}
    log = (home() / "dagster.log").open("w")
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "ui", "--port", str(port)]
    dagster = subprocess.Popen(command, env=address, stdout=log, stderr=log)
    try:
        wait_until(lambda: dagster.poll() is not None or _answers(f"http://127.0.0.1:{port}/server_info"), 900)
        assert dagster.poll() is None, (home() / "dagster.log").read_text()
        gateway_port = free_port()
        arguments = {"FINETUNE_LOOPS_DIR": str(loops), "FINETUNE_DAGSTER_URL": f"http://127.0.0.1:{port}"}
        with process("--loop", "notes", port=gateway_port, **arguments) as (running, _):
            yield running
    finally:
        dagster.terminate()
        dagster.wait(300)
        log.close()


@pytest.fixture
def client(gateway):
    return gateway.openai()


def _answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_the_official_client_fine_tunes_and_chats_with_the_result(client):
    rows = [chat(f"{name} {number}") for name in NAMES for number in range(3)]
    file = client.files.create(file=("training.jsonl", jsonl(*rows)), purpose="fine-tune")
    jobs = client.fine_tuning.jobs
    request = {
        "model": "notes",
        "training_file": file.id,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30, "batch_size": 1}}},
        "seed": 7,
        "metadata": {"team": "tests"},
        "extra_headers": {"Idempotency-Key": "one"},
    }
    job = jobs.create(**request)
    assert (job.model, job.training_file, job.seed, job.metadata) == ("notes", file.id, 7, {"team": "tests"})
    assert jobs.create(**request).id == job.id, "the same key is the same job"
    with pytest.raises(openai.ConflictError, match=job.id):  # the loop is busy
        jobs.create(**{**request, "extra_headers": {}})
    with pytest.raises(openai.ConflictError, match="was used for another request"):
        jobs.create(**{**request, "seed": 8})

    wait_until(lambda: any(event.type == "metrics" for event in jobs.list_events(job.id)), 1500, every=1)
    jobs.pause(job.id)
    wait_until(lambda: jobs.retrieve(job.id).status == "paused", 1500, every=1)
    assert jobs.checkpoints.list(job.id).data == []
    jobs.resume(job.id)
    wait_until(lambda: jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled"), 1500, every=1)

    done = jobs.retrieve(job.id)
    messages = [event.message for event in jobs.list_events(job.id)][::-1]
    assert done.status == "succeeded", (done.error, messages)
    assert messages.index("paused") < messages.index("resumed")
    assert [one.id for one in jobs.list(metadata={"team": "tests"})] == [job.id]
    assert list(jobs.list(metadata={"team": "others"})) == []
    [checkpoint] = jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == done.fine_tuned_model
    answer = client.chat.completions.create(model=done.fine_tuned_model, messages=chat("ash 1")["messages"][:1])
    assert (answer.model, bool(answer.choices[0].message.content)) == (done.fine_tuned_model, True)
    with pytest.raises(openai.ConflictError, match="completed"):
        jobs.cancel(job.id)


def test_the_script_of_the_docs_runs_unchanged_but_for_its_base_url(gateway, tmp_path):
    section = PAGE.read_text().partition("## OpenAI's client")[2]
    [script], [shown] = (re.findall(f"```{kind}\n(.*?)```", section, re.S)[:1] for kind in ("python", "text"))
    address = 'base_url="http://127.0.0.1:8484/v1"'
    assert script.count(address) == 1
    (tmp_path / "script.py").write_text(script.replace(address, f'base_url="{gateway.url}/v1"'))
    (tmp_path / "training.jsonl").write_bytes(jsonl(*map(chat, TREES)))
    command, key = [sys.executable, "script.py"], {"OPENAI_API_KEY": "none"}
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | key, capture_output=True, text=True, timeout=3000)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)  # for the docs, by `pytest -rP`
    assert steady(ended.stdout) == steady(shown)


def steady(output):
    """Return the lines of an output that depend on no time, hash or machine, without numbers."""
    lines = [line for line in output.splitlines() if not re.match(r"  (info: training |warn: |\.\.\.)", line)]
    varying = ((r"answer: .+", "answer"), (r"info: (reject|promote): .+", "verdict"))
    for pattern, name in (*varying, (r"\b[0-9a-f-]*[0-9][0-9a-f-]*\b", "#")):
        lines = [re.sub(pattern, name, line) for line in lines]
    return lines
