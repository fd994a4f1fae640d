"""`finetune train list | show | pause | resume | cancel`: training jobs at the terminal."""

import json
import re
import socket
from datetime import UTC, datetime

import dagster as dg
import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.orchestrator import OrchestratorDown
from finetune_pipeline.pipeline.jobs import JOB_TAG, note_made, note_progress, note_started
from finetune_pipeline.registry.training_jobs import (
    JobError,
    TrainingJob,
    UnknownJobError,
    add_run,
    create_job,
    find_job,
    new_job_id,
    update_job,
)
from finetune_pipeline.registry.trainings import record_training
from finetune_pipeline_tests.registry.test_trainings import training_of

LOOP = "aec_parser"
PROGRESS = {"step": 30, "steps": 40, "epoch": 1.5, "loss": 0.4321, "learning_rate": 1e-4, "tokens_per_second": 900.0,
            "seconds_left": 75.0, "elapsed_seconds": 200.0, "memory_bytes": 2**30, "validation_loss": None}  # fmt: skip


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, ["train", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def job(own_home):
    made = TrainingJob(
        id=new_job_id(), loop=LOOP, origin="api", created_by="ci", created_at=datetime(2026, 1, 1, tzinfo=UTC),
        settings={"training": {"seed": 7}},
    )  # fmt: skip
    return create_job(connect(), made)


@pytest.fixture
def training(job):
    add_run(connect(), job.id, "0" * 32)
    note_started(connect(), job.id)
    note_progress(connect(), job.id, PROGRESS, "training 75%")
    return job


@pytest.fixture
def no_dagster(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("FINETUNE_DAGSTER_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_a_job_in_training_is_listed_with_how_far_it_is(training):
    heading, line, *rest = run("list").splitlines()
    assert heading.split()[:2] == ["job", "created"]
    assert re.split(r"  +", line.strip()) == [
        training.id, "2026-01-01 00:00", "ci (api)", "running", "75%", "75 s", "0.432",
    ]  # fmt: skip
    assert rest == ["no training of loop aec_parser has finished; `finetune run` runs one"]
    (shown,) = json.loads(run("list", "--json"))["jobs"]
    assert (shown["status"], shown["percent"], shown["seconds_left"]) == ("running", 75.0, 75.0)
    assert shown["progress"]["loss"] == 0.4321 and shown["runs"] == ["0" * 32]


def test_the_newest_job_is_shown_with_its_progress_and_events(training):
    shown = run("show")
    assert shown.startswith(f"{training.id}\n  status             running\n")
    assert "training 75%, step 30 of 40, epoch 1.5, loss 0.432" in shown and "'seed': 7" in shown
    assert shown.splitlines()[-1].strip() == "training 75%"
    assert json.loads(run("show", training.id, "--json"))["percent"] == 75.0


def test_a_completed_job_is_shown_with_the_figures_of_its_training(training):
    record_training(connect(), training_of(id="a1", loop=LOOP))
    note_made(connect(), training.id, "trained", adapter="a1")
    update_job(connect(), training.id, {"status": "completed"})
    listed = run("list")
    assert re.search(rf"{training.id} .* completed .* a1 *\n", listed) and "1.500 -> 0.250" in listed
    assert "loss after         0.25\n" in run("show")
    shown = json.loads(run("show", "--json"))
    assert (shown["id"], shown["training"]["steps"], shown["seconds_left"]) == (training.id, 40, None)


def test_statuses_are_brought_up_to_date_without_a_webserver(training, no_dagster):
    with dg.DagsterInstance.from_config(environment()["DAGSTER_HOME"]) as instance:
        tagged = dg.DagsterRun(job_name="aec_parser_loop", run_id="0" * 32, tags={JOB_TAG: training.id})
        instance.add_run(tagged.with_status(dg.DagsterRunStatus.STARTED))
        update_job(connect(), training.id, {"status": "pending"})
        assert "running" in run("list")
        instance.report_run_canceled(tagged)
    assert "canceled" in run("list") and find_job(connect(), training.id).status == "canceled"


@pytest.mark.parametrize("action", ["pause", "resume", "cancel"])
def test_without_a_webserver_the_command_that_starts_it_is_named(training, no_dagster, action):
    if action == "resume":
        update_job(connect(), training.id, {"status": "paused"})
    with pytest.raises(OrchestratorDown, match="Start it with `finetune ui`"):
        run(action, training.id)
    asked = {"pause": ("running", "pause"), "resume": ("paused", None), "cancel": ("running", "cancel")}[action]
    assert (find_job(connect(), training.id).status, find_job(connect(), training.id).wanted) == asked
    if action == "pause":
        assert "running (pausing)" in run("list")


def test_a_paused_job_is_canceled_without_dagster(training, no_dagster):
    update_job(connect(), training.id, {"status": "paused"})
    assert run("cancel", training.id) == f"{training.id} is canceled\n"
    with pytest.raises(JobError, match="is canceled; it cannot be paused now"):
        run("pause", training.id)


def test_an_unknown_job_is_an_error(own_home):
    for action in ("show", "pause", "resume", "cancel"):
        with pytest.raises(UnknownJobError, match="there is no training job 'ftjob-x'; `finetune train list`"):
            run(action, "ftjob-x")
