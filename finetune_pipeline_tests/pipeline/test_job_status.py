"""Training jobs over a recording of Dagster: faults that a real one shows only at a moment that no test can choose.

`test_jobs.py` has the tests with Dagster itself.
"""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.orchestrator import DagsterRun, Orchestrator, OrchestratorDown, OrchestratorError
from finetune_pipeline.pipeline import jobs
from finetune_pipeline.pipeline.jobs import (
    JOB_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    cancel,
    create,
    job_of_run,
    note_completed,
    note_failed,
    note_made,
    note_started,
    pause,
    refresh,
    resume,
    sync,
    this_process,
)
from finetune_pipeline.registry.training_jobs import (
    JobBusyError,
    JobError,
    TrainingJob,
    UnknownJobError,
    create_job,
    events_of,
    find_job,
    list_jobs,
    new_job_id,
    runs_of,
)


class Killed(BaseException):
    """The process was killed at this point."""


class RecordedDagster(Orchestrator):
    """Runs that the test moves on.

    Attributes:
        recorded: id -> run.
        launched: assets and config of each launched run, by its id.
    """

    def __init__(self):
        super().__init__("http://dagster.invalid")
        self.recorded, self.launched, self.terminated, self.down, self.fault = {}, {}, [], False, None

    def check(self, job):
        if self.down:
            raise OrchestratorDown("Dagster does not answer")

    def runs(self, tags):
        self.check("")
        return [run for run in reversed(self.recorded.values()) if tags.items() <= run.tags.items()]

    def run(self, id):
        return self.recorded.get(id)

    def launch(self, job, assets, run_config, tags):
        if self.fault:
            raise self.fault
        run = self.add(f"run-{len(self.recorded) + 1}", tags, assets=frozenset(map(tuple, assets)), config=run_config)
        self.launched[run.id] = [key[-1] for key in assets]
        return run.id

    def add(self, id, tags=None, *, assets=None, config=None):
        at = datetime.now(UTC)
        self.recorded[id] = DagsterRun(id, "QUEUED", at, None, None, dict(tags or {}), assets, config or {})
        return self.recorded[id]

    def terminate(self, id):
        self.terminated.append(id)
        self.move(id, "CANCELING")

    def move(self, id, status, **tags):
        run = self.recorded[id]
        self.recorded[id] = replace(run, status=status, tags={**run.tags, **tags})


@pytest.fixture
def dagster():
    return RecordedDagster()


@pytest.fixture
def db():
    return connect()


@pytest.fixture
def job(db, dagster, loop):
    return create(db, dagster, loop, {}, origin="api", created_by="key")


@pytest.fixture
def at_once(monkeypatch):
    """Let `sync` launch a run again, and take a run as lost, without waiting."""
    monkeypatch.setattr(jobs, "LAUNCH_AGAIN", timedelta())
    monkeypatch.setattr(jobs, "LOST", timedelta())


def paused(db, dagster, loop, job):
    pause(db, dagster, loop, job.id)
    dagster.move(runs_of(db, job.id)[-1], "CANCELED")
    assert sync(db, dagster, loop, job).status == "paused"


def test_a_created_job_is_pending_with_a_run_that_never_promotes(db, dagster, loop, job):
    assert (job.status, job.wanted, runs_of(db, job.id)) == ("pending", None, ["run-1"])
    assert dagster.launched == {"run-1": ["raw_logs", "curated_dataset", "lora_adapter", "gguf_model", "eval_report"]}
    assert dagster.recorded["run-1"].tags == {JOB_TAG: job.id, "finetune/loop": "notes"}
    for status, expected in (("STARTING", "pending"), ("STARTED", "running"), ("SUCCESS", "completed")):
        dagster.move("run-1", status)
        assert sync(db, dagster, loop, job).status == expected
    ended = find_job(db, job.id)
    assert ended.started_at and ended.finished_at and ended.error == ""


def test_without_dagster_no_job_is_created(db, dagster, loop):
    dagster.down = True
    with pytest.raises(OrchestratorDown):
        create(db, dagster, loop, {}, origin="api", created_by="key")
    assert list_jobs(db) == []


def test_a_job_of_a_server_that_was_killed_before_the_launch_is_launched_once(db, dagster, loop, monkeypatch):
    dagster.fault = Killed()
    with pytest.raises(Killed):
        create(db, dagster, loop, {}, origin="api", created_by="key")
    (job,) = list_jobs(db)
    dagster.fault = None
    assert sync(db, dagster, loop, job).wanted == "launch", "another server may be launching it now"
    assert dagster.launched == {}
    monkeypatch.setattr(jobs, "LAUNCH_AGAIN", timedelta())
    assert [sync(db, dagster, loop, job).wanted for _ in range(2)] == [None, None]
    assert runs_of(db, job.id) == ["run-1"] == list(dagster.launched)


def test_a_run_that_was_launched_but_not_noted_is_found_by_its_tag(db, dagster, loop, monkeypatch, at_once):
    launch = dagster.launch

    def then_killed(*args):
        launch(*args)
        raise Killed

    monkeypatch.setattr(dagster, "launch", then_killed)
    with pytest.raises(Killed):
        create(db, dagster, loop, {}, origin="api", created_by="key")
    (job,) = list_jobs(db)
    dagster.move("run-1", "STARTED")
    assert sync(db, dagster, loop, job).status == "running"
    assert runs_of(db, job.id) == ["run-1"] == list(dagster.recorded)


def test_a_request_that_timed_out_is_not_launched_twice(db, dagster, loop, at_once):
    dagster.fault = OrchestratorDown("no answer within 30 s")
    job = create(db, dagster, loop, {}, origin="api", created_by="key")
    assert (job.status, job.wanted) == ("pending", "launch")
    dagster.add("late", {JOB_TAG: job.id})  # Dagster launched it all the same
    assert sync(db, dagster, loop, job).wanted is None and runs_of(db, job.id) == ["late"]


def test_a_rejected_launch_fails_the_job(db, dagster, loop):
    dagster.fault = OrchestratorError("Dagster did not launch notes_loop: unknown job")
    with pytest.raises(OrchestratorError, match="unknown job"):
        create(db, dagster, loop, {}, origin="api", created_by="key")
    (job,) = list_jobs(db)
    assert (job.status, job.error) == ("failed", "Dagster did not launch notes_loop: unknown job")


def test_a_job_that_is_canceled_while_it_is_launched_ends_its_run(db, dagster, loop, monkeypatch):
    launch = dagster.launch

    def canceled_meanwhile(*args):
        cancel(db, dagster, loop, list_jobs(db)[0].id)
        return launch(*args)

    monkeypatch.setattr(dagster, "launch", canceled_meanwhile)
    job = create(db, dagster, loop, {}, origin="api", created_by="key")
    assert (job.status, dagster.terminated) == ("canceled", ["run-1"])
    with pytest.raises(JobError, match=f"the job {job.id} waits for no run: it is canceled"):  # its first step
        job_of_run(db, "notes", "run-1", dagster.recorded["run-1"].tags)


def test_an_ended_run_frees_the_loop_although_nobody_looked(db, dagster, loop, job):
    dagster.move("run-1", "STARTED")
    with pytest.raises(JobBusyError) as busy:
        create(db, dagster, loop, {}, origin="api", created_by="key")
    assert busy.value.running_id == job.id
    dagster.move("run-1", "CANCELED")
    assert create(db, dagster, loop, {}, origin="api", created_by="key").id != job.id
    assert find_job(db, job.id).status == "canceled"


def test_a_repeated_request_returns_the_job(db, dagster, loop):
    ask = {"origin": "api", "created_by": "key", "idempotency_key": "k"}
    job = create(db, dagster, loop, {"training": {"seed": 7}}, **ask)
    assert create(db, dagster, loop, {"training": {"seed": 7}}, **ask) == job
    with pytest.raises(JobError, match="'k' was used for another request"):
        create(db, dagster, loop, {"training": {"seed": 8}}, **ask)
    assert list(dagster.launched) == ["run-1"]


def test_while_dagster_is_down_the_row_stays_as_last_written(db, dagster, loop, job):
    note_started(db, job.id)
    dagster.down = True
    for act in (lambda: sync(db, dagster, loop, job), lambda: pause(db, dagster, loop, job.id)):
        with pytest.raises(OrchestratorDown):
            act()
        assert find_job(db, job.id).status == "running"
    dagster.down = False
    dagster.move("run-1", "STARTED")
    assert sync(db, dagster, loop, job).status == "running" and dagster.terminated == ["run-1"]
    dagster.move("run-1", "CANCELED")
    assert sync(db, dagster, loop, job).status == "paused"


def test_a_server_that_is_killed_while_it_resumes_launches_the_run_later(db, dagster, loop, job, at_once):
    note_made(db, job.id, "built", dataset="d1")
    paused(db, dagster, loop, job)
    dagster.fault = Killed()
    with pytest.raises(Killed):
        resume(db, dagster, loop, job.id)
    assert refresh(db, dagster, find_job(db, job.id)).status == "pending", "the canceled run is the one before"
    dagster.fault = None
    assert sync(db, dagster, loop, job).wanted is None
    assert runs_of(db, job.id) == ["run-1", "run-2"]
    assert dagster.launched["run-2"] == ["lora_adapter", "gguf_model", "eval_report"], "the dataset stays"
    dagster.move("run-2", "SUCCESS")
    assert sync(db, dagster, loop, job).status == "completed"


def test_a_resumed_run_has_the_steps_and_the_settings_of_the_first(db, dagster, loop):
    mode = {"__".join([*loop.prefix, "lora_adapter"]): {"config": {"mode": "full"}}}
    dagster.add("ui", config={"ops": {**mode, "raw_logs": {}}})  # all assets, from the launchpad
    job = job_of_run(db, "notes", "ui", {})
    note_started(db, job.id)
    note_made(db, job.id, "built", dataset="d1")
    paused(db, dagster, loop, job)
    resume(db, dagster, loop, job.id)
    assert dagster.launched["run-2"] == ["lora_adapter", "gguf_model", "eval_report", "promoted_model"]
    assert dagster.recorded["run-2"].config == {"ops": mode}


def test_only_a_paused_job_of_this_loop_is_resumed(db, dagster, loop, make_loop, job):
    with pytest.raises(JobError, match=f"the job {job.id} is pending; only a paused job can be resumed"):
        resume(db, dagster, loop, job.id)
    with pytest.raises(UnknownJobError, match=f"the job {job.id} belongs to the loop notes, not to other"):
        resume(db, dagster, make_loop(name="other"), job.id)
    paused(db, dagster, loop, job)
    other = create(db, dagster, loop, {}, origin="api", created_by="key")
    with pytest.raises(JobBusyError) as busy:
        resume(db, dagster, loop, job.id)
    assert busy.value.running_id == other.id
    assert cancel(db, dagster, loop, job.id).status == "canceled", "a paused job has no run to wait for"
    with pytest.raises(JobError, match="is canceled; it cannot be canceled now"):
        cancel(db, dagster, loop, job.id)


def test_a_job_whose_loop_is_gone_is_canceled_but_not_launched(db, dagster, loop, job, at_once):
    dagster.move("run-1", "STARTED")
    assert cancel(db, dagster, None, job.id).wanted == "cancel"
    dagster.move("run-1", "CANCELED")
    assert sync(db, dagster, None, job).status == "canceled"
    dagster.fault = OrchestratorDown("")
    other = create(db, dagster, loop, {}, origin="api", created_by="key")
    assert sync(db, dagster, None, other).error == "there is no loop notes any more"


def test_a_run_that_was_deleted_fails_the_job_after_an_hour(db, dagster, loop, job, monkeypatch):
    dagster.recorded.clear()
    assert sync(db, dagster, loop, job).status == "pending", "it may be the run of another Dagster"
    monkeypatch.setattr(jobs, "LOST", timedelta())
    failed = sync(db, dagster, loop, job)
    assert (failed.status, failed.error) == (
        "failed", "Dagster does not have the run run-1; it was deleted. Create the job again",
    )  # fmt: skip


def test_a_job_whose_run_was_deleted_is_canceled_at_once(db, dagster, loop, job):
    dagster.recorded.clear()
    assert cancel(db, dagster, loop, job.id).status == "canceled"


def test_a_job_of_the_sensor_that_was_never_launched_fails(db, dagster, loop, at_once):
    job = TrainingJob(
        id=new_job_id(), loop="notes", origin="sensor", created_by="notes_new_examples", created_at=datetime.now(UTC)
    )
    create_job(db, job, exclusive=False)
    assert sync(db, dagster, loop, job).error == "Dagster does not have a run of it. Create the job again"
    assert dagster.launched == {}, "only the daemon launches it"


@pytest.mark.parametrize(("wanted", "status"), [(None, "failed"), ("pause", "paused"), ("cancel", "canceled")])
def test_a_killed_process_ends_the_job_although_dagster_does_not_notice(db, dagster, loop, job, wanted, status):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        created = psutil.Process(process.pid).create_time()
        host = this_process().partition(":")[0]
        dagster.move("run-1", "STARTED", **{PROCESS_TAG: f"{host}:{process.pid}:{created}"})
        assert sync(db, dagster, loop, job).status == "running"
        process.kill()
    if wanted:
        {"pause": pause, "cancel": cancel}[wanted](db, dagster, loop, job.id)
    ended = sync(db, dagster, loop, job)
    assert ended.status == status
    assert ended.error == ("the process of the run run-1 was killed" if wanted is None else "")


def test_a_process_on_another_machine_is_not_judged(db, dagster, loop, job):
    dagster.move("run-1", "STARTED", **{PROCESS_TAG: "elsewhere:1:1.0"})
    assert sync(db, dagster, loop, job).status == "running"


def test_the_first_reason_of_a_failure_stays(db, dagster, loop, job):
    note_failed(db, job.id, "lora_adapter: out of memory")
    dagster.move("run-1", "FAILURE")
    assert sync(db, dagster, loop, job).error == "lora_adapter: out of memory"


def test_a_step_that_fails_because_it_was_interrupted_does_not_fail_the_job(db, dagster, loop, job):
    pause(db, dagster, loop, job.id)
    note_failed(db, job.id, "lora_adapter: the training process was terminated")
    dagster.move("run-1", "FAILURE")
    assert sync(db, dagster, loop, job).status == "paused"


def test_a_completed_job_stays_completed_whatever_becomes_of_the_run(db, dagster, loop, job):
    dagster.move("run-1", "STARTED")
    note_completed(db, job.id)
    dagster.move("run-1", "FAILURE")  # in promoted_model
    assert sync(db, dagster, loop, job).status == "completed"
    note_failed(db, job.id, "promoted_model: the gate")
    assert sync(db, dagster, loop, job).status == "completed"
    with pytest.raises(JobError, match="is completed; it cannot be paused now"):
        pause(db, dagster, loop, job.id)


def test_a_run_of_the_ui_has_one_job(db):
    first, second = (job_of_run(db, "notes", "run", {}) for _ in range(2))
    assert first == second and (first.origin, first.created_by) == ("ui", "dagster")
    assert runs_of(db, first.id) == ["run"] and events_of(db, first.id)[-1].message.startswith("run run of Dagster")


def test_a_run_that_is_executed_again_in_the_ui_is_a_job_of_its_own(db, dagster, loop):
    job = create(db, dagster, loop, {"training": {"seed": 7}}, origin="api", created_by="key", suffix="x")
    dagster.move("run-1", "FAILURE")
    assert sync(db, dagster, loop, job).status == "failed"
    again = {JOB_TAG: job.id, PARENT_TAG: "run-1"}  # Dagster copies the tags
    dagster.add("run-2", again)
    other = job_of_run(db, "notes", "run-2", again)
    assert (other.id != job.id, other.settings, other.suffix) == (True, {"training": {"seed": 7}}, "x")
    assert runs_of(db, job.id) == ["run-1"] and job_of_run(db, "notes", "run-2", again).id == other.id


def test_a_second_run_of_a_job_does_not_begin(db, dagster, loop, job):
    with pytest.raises(JobError, match=f"the job {job.id} waits for no run: it is pending"):
        job_of_run(db, "notes", "other", {JOB_TAG: job.id})


def test_a_run_of_a_job_of_another_database_gets_one(db):
    assert job_of_run(db, "notes", "run", {JOB_TAG: new_job_id()}).origin == "ui"
