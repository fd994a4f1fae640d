"""`finetune run` without a server: progress from the event log, the run's job, cancellation."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import click
import dagster as dg
import psutil
import pytest
import sqlalchemy as sa
import yaml
from dagster._core.execution.plan.objects import StepFailureData
from dagster_shared.error import SerializableErrorInfo

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.run import new_run
from finetune_pipeline.database import connect
from finetune_pipeline.orchestration.local_run import run_loop
from finetune_pipeline.orchestration.run_events import RunEvents, cause
from finetune_pipeline.orchestration.stored_runs import StoredRuns
from finetune_pipeline.pipeline.jobs import JOB_TAG, refresh
from finetune_pipeline.registry.training_jobs import list_jobs, runs_of
from finetune_pipeline.settings import home
from finetune_pipeline_tests.orchestration.test_alerts import evaluate
from finetune_pipeline_tests.processes import descendants
from finetune_pipeline_tests.receiver import receiving
from finetune_pipeline_tests.waiting import wait_until

LOCATION = Path(__file__).with_name("small_location.py")


@pytest.fixture
def workspace(tmp_path, own_home, monkeypatch):
    """Return a workspace with the small location; Dagster's home is the test's own."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "workspace.yaml"
    path.write_text(
        yaml.safe_dump({"load_from": [{"python_file": {"relative_path": str(LOCATION), "location_name": "small"}}]})
    )
    return path


def the_run():
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        return run


def the_job():
    (job,) = list_jobs(connect(), "notes")
    return job


def started_run(instance):
    return next((run for run in instance.get_runs() if run.status == dg.DagsterRunStatus.STARTED), None)


def run_and_read(loop, workspace, **options):
    """Return the exit code of a run, and what it showed without colors and times."""
    shown = []
    run_id = str(uuid.uuid4())
    code = run_loop(loop, run_id, home() / f"{run_id}.log", shown.append, workspace=workspace, **options)
    return code, [re.sub(r"^\[ *\d+ s\] ", "", click.unstyle(line)) for line in shown]


def test_a_run_of_the_code_locations_job_shows_steps_checks_and_messages(loop, workspace):
    code, lines = run_and_read(loop, workspace)
    assert code == 0, lines
    assert lines[-2:] == [f"home      {home()}", "warning   check doubtful of first failed: 1 of 3"]
    outcome, _, log = lines[-3].strip().rpartition(" ")
    assert Path(log).is_file() and re.fullmatch(r"the run succeeded; it took \d+ s; the complete log is in", outcome)
    assert [re.sub(r"\d+\.\d", "0.1", line) for line in lines[:-3]] == [
        "first            started",
        "first            3 files",
        "first            check fine passed",
        "first            check doubtful failed (warning, does not block): 1 of 3",
        "first            done in 0.1 s",
        "second           started",
        "second           done in 0.1 s",
        "third            started",
        "third            done in 0.1 s",
    ]
    run = the_run()
    origin = run.remote_job_origin.repository_origin
    assert (run.job_name, origin.get_label()) == ("notes_loop", "__repository__@small")
    assert run.tags["finetune/loop"] == "notes"
    job = the_job()
    assert (job.status, job.origin, job.created_by) == ("completed", "cli", "cli")
    assert run.tags[JOB_TAG] == job.id and runs_of(connect(), job.id) == [run.run_id]
    label = {".dagster/repository": "__repository__@small"}  # the filter of a job's page in the UI
    with dg.DagsterInstance.get() as instance:
        assert instance.get_runs(dg.RunsFilter(job_name="notes_loop", tags=label)) == [run]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("busy", "another run creates it now; wait"),
        pytest.param("bug", "KeyError: 'prompt'", marks=pytest.mark.slow),
        pytest.param("gate", "not promoted: 5% needed", marks=pytest.mark.slow),
    ],
)
def test_a_failed_step_shows_its_cause(loop, workspace, monkeypatch, second, reason):
    monkeypatch.setenv("SECOND", second)
    code, lines = run_and_read(loop, workspace)
    assert code == 1 and the_run().status == dg.DagsterRunStatus.FAILURE
    assert re.fullmatch(rf"second           failed after \d+\.\d s: {re.escape(reason)}", lines[-5])
    log = Path(lines[-4].strip().rpartition(" ")[2])
    assert lines[-4].startswith("the run did not succeed") and "STEP_FAILURE" in log.read_text()
    assert (the_job().status, the_job().error) == ("failed", f"the run failed; its log is {log}")
    assert lines[-2] == "next      fix the cause, then `finetune run --loop notes`; finished work is reused"


def test_a_failed_run_is_told_once_with_its_log(make_loop, workspace, monkeypatch):
    monkeypatch.setenv("SECOND", "busy")
    with receiving() as receiver:
        monkeypatch.setenv("HOOK_URL", receiver.url)
        loop = make_loop(alerts={"webhook_env": "HOOK_URL"})
        run_id, log = new_run(loop)
        assert run_loop(loop, run_id, log, str, workspace=workspace) == 1
        with dg.DagsterInstance.get() as instance:  # the daemon sees the run too
            assert evaluate(loop, instance)[0] == "no run ended since that there is an alert about"
    (body,) = receiver.got
    assert (body["kind"], body["title"]) == ("failure", "notes: the run failed in second")
    assert body["text"].startswith("another run creates it now; wait\nnext: fix the cause")
    assert body["link"] == str(log)


@pytest.mark.slow
def test_a_step_whose_blocking_check_fails_shows_its_first_reason(loop, workspace, monkeypatch):
    monkeypatch.setenv("SECOND", "rejected")
    code, lines = run_and_read(loop, workspace)
    assert code == 1
    shown = "\n".join(lines)
    more = "\n" + " " * 26
    assert f"first            check fine failed: 1 of 3 correct{more}- it needs more than 2{more}- most" in shown
    assert re.search(r"first            failed after \d+\.\d s: check fine: it needs more than 2\n", shown)
    assert "DagsterAssetCheckFailedError" not in shown


QUERY = """{
  repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "small"}) {
    ... on Repository { pipelines { name runs(limit: 5) { runId } } }
  }
  runsOrError { ... on Runs {
    results { runId pipelineName status repositoryOrigin { repositoryName repositoryLocationName } }
  } }
}"""


@pytest.mark.slow
def test_the_ui_lists_the_run_under_its_job_and_on_the_timeline(loop, workspace):
    """The timeline groups runs by repositoryOrigin and pipelineName, and leaves out runs without an origin."""
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster_graphql.test.utils import execute_dagster_graphql

    assert run_and_read(loop, workspace)[0] == 0
    target = WorkspaceFileTarget([str(workspace)])
    with dg.DagsterInstance.get() as instance, WorkspaceProcessContext(instance, target) as context:
        data = execute_dagster_graphql(context.create_request_context(), QUERY).data
    run_id = the_run().run_id
    jobs = {job["name"]: [run["runId"] for run in job["runs"]] for job in data["repositoryOrError"]["pipelines"]}
    assert jobs["notes_loop"] == [run_id]
    origin = {"repositoryName": "__repository__", "repositoryLocationName": "small"}
    listed = {"runId": run_id, "pipelineName": "notes_loop", "status": "SUCCESS", "repositoryOrigin": origin}
    assert data["runsOrError"]["results"] == [listed]


RUN = """
import sys, uuid
from pathlib import Path
from finetune_pipeline.orchestration.local_run import run_loop
from finetune_pipeline.settings import home, load_loop
loop = load_loop("aec_parser").model_copy(update={{"name": "notes"}})
run_id, log = str(uuid.uuid4()), home() / "run.log"
sys.exit(run_loop(loop, run_id, log, lambda line: print(line, flush=True), workspace=Path({workspace!r})))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_and_its_children(workspace, tmp_path, number):
    environ = {**os.environ, "SECOND": "sleep", "CLEANED_UP": str(tmp_path / "cleaned_up")}
    command = [sys.executable, "-c", RUN.format(workspace=str(workspace))]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "sleeping" in line:
            break
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    rest = click.unstyle(rest)
    assert "stopping the run" in rest and "failed" not in rest
    assert re.search(r"second           canceled after \d+\.\d s\n", rest)
    assert "canceled, nothing was promoted; the complete log is in" in rest
    assert "run it again with `finetune run --loop notes`: finished work is reused" in rest
    assert the_run().status == dg.DagsterRunStatus.CANCELED
    assert (tmp_path / "cleaned_up").exists()
    assert the_job().status == "canceled"


def test_a_run_whose_command_was_killed_fails_its_job(workspace, tmp_path):
    """Dagster has the run as started for ever: nobody reports its end."""
    environ = {**os.environ, "SECOND": "sleep", "CLEANED_UP": str(tmp_path / "cleaned_up")}
    command = [sys.executable, "-c", RUN.format(workspace=str(workspace))]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if "sleeping" in line)
    with dg.DagsterInstance.get() as instance:
        assert refresh(connect(), StoredRuns(instance), the_job()).status == "running"
        (run,) = descendants("orchestration.run_job", psutil.Process(process.pid))
        process.kill()
        process.communicate()
        psutil.wait_procs([run])
        job = refresh(connect(), StoredRuns(instance), the_job())
    assert (job.status, job.error) == ("failed", f"the process of the run {the_run().run_id} was killed")
    assert the_run().status == dg.DagsterRunStatus.STARTED


@pytest.mark.slow
def test_a_run_that_is_canceled_elsewhere_ends(loop, workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("SECOND", "sleep")
    monkeypatch.setenv("CLEANED_UP", str(tmp_path / "cleaned_up"))

    def cancel():
        with dg.DagsterInstance.get() as instance:
            instance.report_run_canceling(wait_until(lambda: started_run(instance)))

    thread = threading.Thread(target=cancel)
    thread.start()
    code, lines = run_and_read(loop, workspace)
    thread.join()
    assert code == 1 and "stopping the run; press Ctrl-C again to kill it" in lines
    assert lines[-2].startswith("canceled, nothing was promoted") and "finished work is reused" in lines[-1]
    assert the_run().status == dg.DagsterRunStatus.CANCELED
    assert the_job().status == "canceled"


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_marked_as_failed(loop, workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("SECOND", "sleep")
    monkeypatch.setenv("CLEANED_UP", str(tmp_path / "cleaned_up"))

    def kill():
        with dg.DagsterInstance.get() as instance:
            wait_until(lambda: started_run(instance))
        descendants("notes_loop")[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    code, lines = run_and_read(loop, workspace)
    thread.join()
    assert code == 1 and lines[-3].startswith("the run did not succeed")
    assert the_run().status == dg.DagsterRunStatus.FAILURE


@pytest.mark.parametrize(
    ("step", "raised", "said"),
    [
        ("lora_adapter", "DagsterExecutionInterruptedError", "lora_adapter     canceled after 2.0 s"),
        ("notes__lora_adapter", "KeyboardInterrupt", "lora_adapter     canceled after 2.0 s"),
        ("lora_adapter", "ValueError", "lora_adapter     failed after 2.0 s: ValueError"),
    ],
)
def test_an_interrupted_step_is_not_a_failure(step, raised, said):
    """A training step that was interrupted resumes, so the run's last line says so."""
    events = RunEvents(None, "run", 0.0)

    def entry(kind, seconds, data=None):
        event = dg.DagsterEvent(kind.value, "notes_loop", event_specific_data=data, step_key=step)
        return dg.EventLogEntry(
            error_info=None, level=20, user_message="", run_id="run", timestamp=seconds, step_key=step,
            job_name="notes_loop", dagster_event=event,
        )  # fmt: skip

    error = SerializableErrorInfo(f"{raised}\n", [], raised)
    failure = StepFailureData(error=error, user_failure_data=None)
    events._line(entry(dg.DagsterEventType.STEP_START, 1.0))
    assert click.unstyle(events._line(entry(dg.DagsterEventType.STEP_FAILURE, 3.0, failure))) == said
    assert events.canceled_step == ("" if "failed" in said else "lora_adapter")


def test_a_run_whose_storage_fails_ends_with_a_sentence(loop, workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("SECOND", "sleep")
    monkeypatch.setenv("CLEANED_UP", str(tmp_path / "cleaned_up"))

    def fail(line):  # as SQLite does where the disk is full
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error"))

    with pytest.raises(ArtifactError, match=r"Dagster's storage in .* cannot be read or written \(disk I/O error\)"):
        run_loop(loop, str(uuid.uuid4()), home() / "run.log", fail, workspace=workspace)
    assert descendants("run_job") == []


def test_definitions_that_do_not_load_are_shown(loop, workspace):
    content = {"load_from": [{"python_module": {"module_name": "finetune_pipeline.no_such_module"}}]}
    workspace.write_text(yaml.safe_dump(content))
    code, lines = run_and_read(loop, workspace)
    assert code == 1 and any("no_such_module" in line for line in lines)
    assert the_job().status == "failed"
    assert "the complete log is in" in lines[-3]


@pytest.mark.parametrize(
    ("name", "message", "shown"),
    [
        ("ArtifactBusyError", "finetune_pipeline.artifacts.ArtifactBusyError: wait: it is busy\n", "wait: it is busy"),
        ("Failure", "dagster._core.definitions.events.Failure: not promoted\n", "not promoted"),
        ("ValueError", "ValueError: from elsewhere\n", "ValueError: from elsewhere"),
        ("AssertionError", "AssertionError\n", "AssertionError"),
        (
            "DagsterExecutionInterruptedError",
            "dagster._core.errors.DagsterExecutionInterruptedError\n",
            "it was interrupted",
        ),
    ],
)
def test_the_cause_is_the_exception_of_the_step(name, message, shown):
    raised = SerializableErrorInfo(message, [], name)
    assert cause(raised) == shown
    assert (
        cause(SerializableErrorInfo("dagster: wrapped", [], "DagsterExecutionStepExecutionError", cause=raised))
        == shown
    )


def test_a_silent_step_is_named_from_time_to_time():
    def event(kind, step, at, data=None):
        found = dg.DagsterEvent(kind.value, "job", event_specific_data=data, step_key=step)
        return dg.EventLogEntry(
            error_info=None, level=20, user_message="", run_id="run", timestamp=at, step_key=step, job_name="job",
            dagster_event=found,
        )  # fmt: skip

    events = RunEvents(None, "run", 100.0)
    events._line(event(dg.DagsterEventType.STEP_START, "notes__gguf_model", 110.0))
    assert list(events.still_running(124.0, 15)) == []
    assert list(events.still_running(125.0, 15)) == ["[  25 s] gguf_model       running for 15 s"]
    assert list(events.still_running(139.0, 15)) == []
    assert list(events.still_running(140.0, 15)) == ["[  40 s] gguf_model       running for 30 s"]
    failed = StepFailureData(error=None, user_failure_data=None)
    events._line(event(dg.DagsterEventType.STEP_FAILURE, "notes__gguf_model", 150.0, failed))
    assert list(events.still_running(200.0, 15)) == []
