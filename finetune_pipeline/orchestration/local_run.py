"""Run a loop's job from a terminal: start it in a separate process, show its events, end it on Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import sqlalchemy as sa

from finetune_pipeline.alerts import send
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.orchestration.alerts import alert_of_run
from finetune_pipeline.orchestration.run_events import RunEvents
from finetune_pipeline.orchestration.storage import storage_errors
from finetune_pipeline.orchestration.stored_runs import StoredRuns
from finetune_pipeline.pipeline.alert_texts import failure
from finetune_pipeline.pipeline.jobs import job_id_of, note_canceling, note_failed, refresh
from finetune_pipeline.pipeline.summary import run_summary
from finetune_pipeline.registry.training_jobs import TrainingJob, create_job, find_job
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, with_loop

WORKSPACE = PROJECT_ROOT / "workspace.yaml"
POLL_SECONDS = 0.3
STOP_SECONDS = 30.0
"""How long an interrupted run may take to end its steps before it is killed."""
SILENT_SECONDS = 15.0
"""After so long without an event, a line says which step is running."""

_WAIT_FOR_TAIL = {"DAGSTER_COMPUTE_LOG_TAIL_WAIT_AFTER_FINISH": "1"}
"""Dagster copies the output of steps by `tail`, and would end it before the last lines; see its issue 23336."""

_LOG_TAIL = 15  # lines of the log that are shown if the run could not be created


def run_loop(
    loop: LoopSettings,
    run_id: str,
    log: Path,
    echo: Callable[[str], None],
    *,
    created_by: str = "cli",
    verbose: bool = False,
    workspace: Path = WORKSPACE,
) -> int:
    """Run the job of a loop, show its progress, and end with a summary.

    DAGSTER_HOME has to be set. The run ends with this process, however this process ends: otherwise an orphan could
    promote a model that nobody waits for.

    Args:
        run_id: the id that the run gets in Dagster.
        log: file for the complete log; it must not exist.
        echo: shows a line.
        created_by: who starts it, for its training job.
        verbose: show Dagster's complete log.
        workspace: names the code location, as for Dagster's servers.

    Returns:
        0 if the run succeeded, 1 if it failed, was canceled elsewhere, or the gate rejected the challenger, 128 plus
        the signal's number if a signal ended it.
    """
    began = time.time()
    db = connect()
    training_job = TrainingJob(
        id=job_id_of(run_id), loop=loop.name, origin="cli", created_by=created_by, created_at=datetime.now(UTC)
    )
    create_job(db, training_job, exclusive=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    tied = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    job = [sys.executable, "-m", "finetune_pipeline.orchestration.run_job", str(workspace), loop.job_name]
    with storage_errors(os.environ["DAGSTER_HOME"]), _signals() as received, dg.DagsterInstance.get() as instance:
        with log.open("xb") as file:
            # A new session: Ctrl-C reaches only this process, which then marks the run as canceled.
            process = subprocess.Popen(
                [*tied, *job, loop.name, run_id, training_job.id], cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**_WAIT_FOR_TAIL, **os.environ},
            )  # fmt: skip
        events = RunEvents(instance, run_id, began)
        try:
            with log.open(encoding="utf-8", errors="replace") as written:
                running = True
                while running:
                    running = process.poll() is None  # asked first, so that the last events are shown too
                    lines = list(events.read())
                    for line in written if verbose else lines:
                        echo(line.rstrip("\n"))
                    if running and not verbose:
                        for line in events.still_running(time.time(), SILENT_SECONDS):
                            echo(line)
                    if running and (received or events.canceling):
                        echo("stopping the run; press Ctrl-C again to kill it")
                        note_canceling(db, training_job.id)
                        _stop(instance, process, run_id, received)
                    elif running:
                        time.sleep(POLL_SECONDS)
        except sa.exc.DBAPIError:  # what the run does could neither be read nor recorded
            if process.poll() is None:
                _kill(process)
            raise
        finally:
            if process.poll() is None:  # for example, because the output's reader is gone
                note_canceling(db, training_job.id)
                _stop(instance, process, run_id, received)
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:  # the process was killed and could not do it
            instance.report_run_failed(run, f"The run's process ended with exit code {process.returncode}.")
        canceled = bool(received) or (run is not None and run.status == dg.DagsterRunStatus.CANCELED)
        ended = instance.get_run_by_id(run_id)
        if not canceled and (ended is None or ended.status == dg.DagsterRunStatus.FAILURE):
            note_failed(db, training_job.id, f"the run failed; its log is {log}")
        refresh(db, StoredRuns(instance), find_job(db, training_job.id))
        if ended is None:
            alert = None if canceled else failure(loop, run_id, "", ["the run could not be created"], str(log))
        else:
            alert = alert_of_run(loop, instance, ended)
    if canceled:
        trained = events.canceled_step == AdapterManifest.stage
        reused = "training resumes from its last checkpoint, if it has one" if trained else "finished work is reused"
        echo(f"canceled, nothing was promoted; the complete log is in {log}")
        echo(f"run it again with `{with_loop('finetune run', loop)}`: {reused}")
        return 128 + received[0] if received else 1
    succeeded = not process.returncode
    if not events.started:
        for line in log.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")[-_LOG_TAIL:]:
            echo(line)
    outcome = "succeeded" if succeeded else "did not succeed, nothing was promoted"
    echo(f"the run {outcome}; it took {time.time() - began:.0f} s; the complete log is in {log}\n")
    for line in run_summary(loop, run_id, succeeded=succeeded):
        echo(line)
    for warning in events.warnings:
        echo(f"warning   {warning}".replace("\n", "\n          "))
    if alert is not None:
        send(loop, alert)
    return 0 if succeeded else 1


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of ending the process."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stop(instance: dg.DagsterInstance, process: "subprocess.Popen[bytes]", run_id: str, received: list[int]) -> None:
    """Cancel the run and wait until its steps have ended; kill them after `STOP_SECONDS` or at the next signal."""
    signals, deadline = len(received), time.monotonic() + STOP_SECONDS
    terminated = False
    while process.poll() is None:
        run = instance.get_run_by_id(run_id)
        # Marked first, and again if the run is created meanwhile: Dagster records an interrupted run as failed unless
        # it is being canceled.
        if run is not None and not run.is_finished and run.status != dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceling(run)
        if not terminated:
            process.terminate()
            terminated = True
        if time.monotonic() > deadline or len(received) > signals:
            _kill(process)
        time.sleep(POLL_SECONDS / 3)
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished:
        instance.report_run_canceled(run)
