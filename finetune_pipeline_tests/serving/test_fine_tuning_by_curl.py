"""Our own fine-tuning paths over a real Dagster: the sequence of the docs, and faults that need its processes."""

import json
import subprocess

import pytest

from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.database import connect
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.orchestrator import Orchestrator
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.jobs import JOB_TAG
from finetune_pipeline.pipeline.snapshot import collect_logs
from finetune_pipeline.registry.training_jobs import list_jobs, runs_of
from finetune_pipeline_tests.pipeline.test_jobs import loop, own_home, server  # noqa: F401
from finetune_pipeline_tests.serving.conftest import free_port, process
from finetune_pipeline_tests.serving.slow_dagster import SlowDagster
from finetune_pipeline_tests.waiting import wait_until

# Dagster's webserver and daemon, a gateway, and several trainings: run by `make test-servers`.
pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(3600)]

PATH = "/v1/fine-tuning"


@pytest.fixture
def gateway(server, loop):  # noqa: F811
    """Run a gateway for the loop and the Dagster of this file."""
    base_gguf(loop, print)  # the gateway finds it
    where = {"FINETUNE_DAGSTER_URL": server.url}
    with process("--loop", loop.name, port=free_port(), **server.env, **where) as (running, _):
        yield running


def curl(url, body=None, *options):
    """Run curl as the docs do, and return its output."""
    command = ["curl", "-sS", "--fail-with-body", url, *(["--json", json.dumps(body)] if body is not None else [])]
    ended = subprocess.run([*command, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def story(url):
    return lambda: curl(url)


def ends_as(status, url):
    wait_until(lambda: json.loads(curl(url))["status"] == status, 1800, what=story(url), every=1)
    return json.loads(curl(url))


def test_a_dataset_is_exported_a_job_created_and_polled_its_model_deployed_and_rolled_back_by_curl(gateway, loop):  # noqa: F811
    url = gateway.url + PATH
    built = build_dataset(loop, collect_logs(loop, connect(), print).artifact).manifest
    set_latest(built, "run")
    exported = curl(f"{url}/datasets/export", {"format": "messages", "filters": {"min_reward": 0.1}})
    assert len(exported.splitlines()) == built.train and "person1 spoke" in exported

    body = {"suffix": "monday", "metadata": {"team": "tests"}}
    job = json.loads(curl(f"{url}/jobs", body, "-H", "Idempotency-Key: monday"))
    assert json.loads(curl(f"{url}/jobs", body, "-H", "Idempotency-Key: monday"))["id"] == job["id"]
    done = ends_as("completed", f"{url}/jobs/{job['id']}")
    assert (done["progress"]["percent"], done["dataset"], len(done["runs"])) == (100, built.version, 1)
    assert done["orchestrator_error"] is None and done["report"] and done["model"].endswith(":monday")
    events = curl(f"{url}/jobs/{job['id']}/events", None, "-N")
    assert events.startswith("id: 1\nevent: message\n") and "event: metrics" in events
    assert events.endswith('event: end\ndata: {"status": "completed"}\n\n')

    def answering():
        """Return the model that answers by the loop's name."""
        question = {"model": loop.name, "messages": [{"role": "user", "content": "please note what person1 said"}]}
        return json.loads(curl(f"{gateway.url}/v1/chat/completions", question))["model"]

    assert answering() == "notes@base", "a job promotes nothing"
    [model] = json.loads(curl(f"{url}/models?state=challenger"))["data"]
    assert model["verdict"] == "accepted by the gate", events
    deployed = json.loads(curl(f"{url}/models/{done['model']}/deploy", {"notes": "by curl"}))
    assert (deployed["model"]["id"], deployed["last_error"], answering()) == ("notes@v1.0.0", None, "notes@v1.0.0")
    back = json.loads(curl(f"{url}/models/notes@v1.0.0/rollback", {"reason": "worse"}))
    assert (back["model"]["id"], back["last_error"], answering()) == ("notes@base", None, "notes@base")
    history = json.loads(curl(f"{url}/deployments"))["data"]
    assert [(one["action"], one["model"]) for one in history] == [
        ("rollback", "notes@base"),
        ("promote", "notes@v1.0.0"),
    ]


def test_a_run_that_is_terminated_in_dagsters_ui_cancels_the_job_and_its_training_is_gone(gateway, server):  # noqa: F811
    url = gateway.url + PATH
    job = json.loads(curl(f"{url}/jobs", {"training": {"seed": 11}}))
    wait_until(lambda: server.trainings(), 900, what=story(f"{url}/jobs/{job['id']}"), every=0.2)
    Orchestrator(server.url).terminate(json.loads(curl(f"{url}/jobs/{job['id']}"))["runs"][0])
    wait_until(lambda: list_jobs(connect(), limit=1)[0].status == "canceled", 600, every=1)  # though nobody reads it
    wait_until(lambda: server.trainings() == [])


def test_a_gateway_that_is_killed_between_the_row_and_the_launch_launches_after_its_restart(server, loop):  # noqa: F811
    base_gguf(loop, print)
    orchestrator = Orchestrator(server.url)
    body = json.dumps({"training": {"num_train_epochs": 1, "seed": 12}})
    with SlowDagster(server.url) as dagster:
        where = {**server.env, "FINETUNE_DAGSTER_URL": dagster.url}
        with process("--loop", loop.name, port=free_port(), **where) as (running, gateway):
            sent = subprocess.Popen(["curl", "-s", f"{running.url}{PATH}/jobs", "--json", body])
            assert dagster.launching.wait(600)  # the row exists, and the launch does not reach Dagster
            gateway.kill()
            sent.wait(60)
    job = list_jobs(connect(), limit=1)[0]
    assert (job.status, job.wanted, runs_of(connect(), job.id)) == ("pending", "launch", [])
    with process("--loop", loop.name, port=free_port(), **where | {"FINETUNE_DAGSTER_URL": server.url}):
        wait_until(lambda: runs_of(connect(), job.id) != [], 900, every=1)  # a minute after the last event of the job
        wait_until(lambda: list_jobs(connect(), limit=1)[0].status == "completed", 1800, every=1)
    assert [run.id for run in orchestrator.runs({JOB_TAG: job.id})] == runs_of(connect(), job.id)


def test_a_daemon_that_is_down_keeps_the_job_until_it_is_back(gateway, server):  # noqa: F811
    url = f"{gateway.url}{PATH}/jobs"
    server.kill()
    refused = subprocess.run(["curl", "-s", url, "--json", "{}"], capture_output=True, text=True).stdout
    assert "Start it with `finetune ui`" in refused
    server.start()
    job = json.loads(curl(url, {"training": {"num_train_epochs": 1, "seed": 13}}))
    server.kill()  # its run waits in Dagster's queue
    down = json.loads(curl(f"{url}/{job['id']}"))
    assert down["status"] == "pending" and "Dagster does not answer" in down["orchestrator_error"]
    server.start()
    assert ends_as("completed", f"{url}/{job['id']}")["orchestrator_error"] is None
