"""Training jobs over a real Dagster: its webserver, its daemon, and the small loop of the tiny model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from finetune_pipeline.artifacts import get_latest, hash_file, stage_folder
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.orchestrator import Orchestrator, OrchestratorDown
from finetune_pipeline.pipeline import jobs
from finetune_pipeline.pipeline.jobs import JOB_TAG, cancel, create, pause, resume, sync
from finetune_pipeline.registry.training_jobs import JobBusyError, events_of, find_job, list_jobs, runs_of
from finetune_pipeline.settings import COMPONENT_TYPE, PROJECT_ROOT, read_loop
from finetune_pipeline_tests.orchestration.conftest import ATTRIBUTES, BENCHMARK, corrected, write_events
from finetune_pipeline_tests.waiting import wait_until

# Dagster's webserver and daemon, and several trainings: run by `make test-servers`.
pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(3600)]

PEOPLE = [f"person{n}" for n in range(20)]
TRAINING = {"num_train_epochs": 10, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            "save_steps": 20, "max_length": 128}  # fmt: skip
"""Long enough to be interrupted, with a checkpoint every few seconds."""
SHORT = {"training": {"num_train_epochs": 1}}


class Server:
    """Dagster's webserver and daemon for a home, as `finetune ui` starts them.

    Args:
        folder: with `home` and, for loops of its own, `defs`.
        job: it is started when it knows this job.
    """

    def __init__(self, folder: Path, job: str = "notes_loop") -> None:
        self.folder = folder
        self.job = job
        self.env = {**os.environ, "FINETUNE_HOME": str(folder / "home"), "FINETUNE_LOOPS_DIR": str(folder / "defs")}
        self.env.pop("DAGSTER_HOME", None)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        log = (self.folder / "ui.log").open("ab")
        command = [sys.executable, "-c", "from finetune_pipeline.cli.entry_point import main; main()", "ui", "--port"]
        self.process = subprocess.Popen(
            [*command, str(self.port)], env=self.env, cwd=PROJECT_ROOT, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        wait_until(self.loaded, what=lambda: (self.folder / "ui.log").read_text(errors="replace")[-3000:])

    def loaded(self):
        assert self.process.poll() is None, (self.folder / "ui.log").read_text(errors="replace")[-3000:]
        query = f'{{ pipelineOrError(params: {{pipelineName: "{self.job}", repositoryName: "__repository__", '
        query += 'repositoryLocationName: "finetune_pipeline"}) { __typename } }'
        request = urllib.request.Request(
            f"{self.url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"]["pipelineOrError"]["__typename"] == "Pipeline"
        except OSError:
            return False

    def kill(self):
        """Kill it and all it started, as a crash of the machine does."""
        everything = [psutil.Process(self.process.pid)]
        everything += everything[0].children(recursive=True)
        for one in everything:
            with suppress(psutil.Error):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(everything)
        self.process.wait()

    def trainings(self):
        """Return the training processes of this home."""
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if "finetune_pipeline.training" in one.cmdline() and one.environ().get("FINETUNE_HOME") == self.home:
                    found.append(one)
        return found

    @property
    def home(self):
        return self.env["FINETUNE_HOME"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dagster")
    benchmark = folder / "benchmark.jsonl"
    # What the corrections teach, so that a model that learned a half of it passes the gate.
    questions = [{**row, "expected": row["prompt"].removeprefix("golden question ") + " spoke"} for row in BENCHMARK]
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in questions))
    attributes = {**ATTRIBUTES, "training": TRAINING, "gate": {"min_score": 0.0}}
    attributes["evaluation"] = {**attributes["evaluation"], "benchmark": str(benchmark)}
    (folder / "defs" / "notes").mkdir(parents=True)
    document = {"type": COMPONENT_TYPE, "attributes": attributes}
    (folder / "defs" / "notes" / "defs.yaml").write_text(yaml.safe_dump(document))
    one = Server(folder)
    one.start()
    yield one
    if one.process.poll() is None:
        one.kill()


@pytest.fixture(autouse=True)
def own_home(server, monkeypatch):
    """Use the server's home; the tests of this file share it, as they share the server."""
    monkeypatch.setenv("FINETUNE_HOME", server.home)
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", server.env["FINETUNE_LOOPS_DIR"])
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv("FINETUNE_DATABASE_URL", raising=False)


@pytest.fixture
def loop(server):
    one = read_loop(server.folder / "defs" / "notes" / "defs.yaml")
    if not (one.drop_folder / "log.jsonl").exists():
        write_events(one.drop_folder / "log.jsonl", *corrected(PEOPLE))
    return one


@pytest.fixture
def db():
    return connect()


@pytest.fixture
def orchestrator(server):
    return Orchestrator(server.url, timeout_seconds=120)


@pytest.fixture
def started(db, orchestrator, loop, server):
    """Create a job, and return it when its training has a checkpoint and progress."""

    def start(settings=None, **given):
        job = create(db, orchestrator, loop, settings or {}, origin="api", created_by="key", **given)
        wait_until(lambda: trains(db, orchestrator, loop, job), what=lambda: story(db, job))
        return sync(db, orchestrator, loop, job)

    return start


def trains(db, orchestrator, loop, job):
    job = sync(db, orchestrator, loop, job)
    assert job.status in ("pending", "running"), story(db, job)
    return job.progress.get("step", 0) > 1 and checkpoints(loop)


def checkpoints(loop):
    return sorted(stage_folder(loop.name, AdapterManifest.stage).glob(".*/checkpoints/checkpoint-*")) or sorted(
        stage_folder(loop.name, AdapterManifest.stage).rglob("checkpoint-*")
    )


def story(db, job):
    return f"{find_job(db, job.id)}\n" + "\n".join(event.message for event in events_of(db, job.id))


def ends_as(status, db, orchestrator, loop, job):
    """Wait until a job has a status, and return it."""
    wait_until(lambda: sync(db, orchestrator, loop, job).status == status, 1500, what=lambda: story(db, job))
    return find_job(db, job.id)


def test_a_job_is_paused_resumed_and_trains_what_an_uninterrupted_one_does(db, orchestrator, loop, server, started):
    job = started(idempotency_key="first")
    assert (job.status, len(runs_of(db, job.id))) == ("running", 1)
    assert job.progress["steps"] > job.progress["step"] and job.progress["loss"] > 0
    with pytest.raises(JobBusyError) as busy:
        create(db, orchestrator, loop, {}, origin="api", created_by="key")
    assert busy.value.running_id == job.id
    again = create(db, orchestrator, loop, {}, origin="api", created_by="key", idempotency_key="first")
    assert again.id == job.id

    pause(db, orchestrator, loop, job.id)
    held = ends_as("paused", db, orchestrator, loop, job)
    assert server.trainings() == [] and checkpoints(loop), story(db, job)
    assert held.dataset is not None and held.adapter is None

    resume(db, orchestrator, loop, job.id)
    done = ends_as("completed", db, orchestrator, loop, job)
    assert len(runs_of(db, job.id)) == 2 and done.adapter and done.model_sha256 and done.report, story(db, job)
    assert done.dataset == held.dataset and done.started_at == job.started_at
    folder = stage_folder(loop.name, AdapterManifest.stage) / done.adapter
    weights = hash_file(folder / "adapter" / "adapter_model.safetensors")

    shutil.rmtree(folder)
    other = create(db, orchestrator, loop, {}, origin="api", created_by="key", dataset=done.dataset)
    uninterrupted = ends_as("completed", db, orchestrator, loop, other)
    assert uninterrupted.adapter == done.adapter
    assert hash_file(folder / "adapter" / "adapter_model.safetensors") == weights
    made = get_latest(AdapterManifest, loop.name)
    assert made is not None and made.manifest.version == done.adapter


def test_a_canceled_job_leaves_its_checkpoint_and_no_process(db, orchestrator, loop, server, started):
    job = started({"training": {"seed": 2}})
    assert cancel(db, orchestrator, loop, job.id).wanted == "cancel"
    assert ends_as("canceled", db, orchestrator, loop, job).finished_at
    assert server.trainings() == [] and checkpoints(loop)


def test_a_run_that_is_terminated_in_dagsters_ui_cancels_its_job(db, orchestrator, loop, server, started):
    job = started({"training": {"seed": 3}})
    orchestrator.terminate(runs_of(db, job.id)[0])
    ends_as("canceled", db, orchestrator, loop, job)
    assert server.trainings() == []


class Killed(BaseException):
    """The server was killed at this point."""


@pytest.mark.parametrize("noted", ["not launched", "launched"])
def test_a_server_that_is_killed_while_it_creates_a_job(db, orchestrator, loop, monkeypatch, noted):
    launch = Orchestrator.launch

    def killed(*args):
        if noted == "launched":
            launch(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Orchestrator, "launch", killed)
        with pytest.raises(Killed):
            create(db, orchestrator, loop, SHORT, origin="api", created_by="key")
    job = list_jobs(db)[0]
    assert (job.status, job.wanted, runs_of(db, job.id)) == ("pending", "launch", [])
    monkeypatch.setattr(jobs, "LAUNCH_AGAIN", jobs.LAUNCH_AGAIN * 0)
    sync(db, orchestrator, loop, job)
    ends_as("completed", db, orchestrator, loop, job)
    assert [run.id for run in orchestrator.runs({JOB_TAG: job.id})] == runs_of(db, job.id)


def test_dagster_is_down_for_an_hour(db, orchestrator, loop, server, started):
    running = started({"training": {"seed": 4}})
    server.kill()
    with pytest.raises(OrchestratorDown, match="Start it with `finetune ui`"):
        sync(db, orchestrator, loop, running)
    with pytest.raises(OrchestratorDown):
        create(db, orchestrator, loop, {}, origin="api", created_by="key")
    assert list_jobs(db)[0].id == running.id and find_job(db, running.id).status == "running"
    with pytest.raises(OrchestratorDown):
        pause(db, orchestrator, loop, running.id)
    wait_until(lambda: server.trainings() == [])

    server.start()
    ends_as("paused", db, orchestrator, loop, running)
    assert resume(db, orchestrator, loop, running.id).status == "pending"
    server.kill()  # its run waits in Dagster's queue, which the daemon empties every five seconds
    assert find_job(db, running.id).status == "pending"
    server.start()
    wait_until(lambda: server.trainings(), what=lambda: story(db, running))
    assert sync(db, orchestrator, loop, running).status == "running"
    server.kill()
    server.start()
    failed = ends_as("failed", db, orchestrator, loop, running)
    assert failed.error == f"the process of the run {runs_of(db, running.id)[1]} was killed"
