"""The progress of a run, read from Dagster's event log: steps, their durations, checks, messages and causes."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import dagster as dg
from dagster import DagsterEventType as Kind

from finetune_pipeline.orchestration.checks import APPROVED, CHECKS_STEP

if TYPE_CHECKING:
    from dagster_shared.error import SerializableErrorInfo

_BATCH = 500
_SAYS_NOTHING = ("Dependencies for step ", "Skipping step ", "Data version mismatch for asset ")
"""How messages of Dagster begin that tell a user nothing: the first failure and skipped steps are shown anyway, and
manifests, not data versions, say what an artifact was made from."""
INTERRUPTED = "it was interrupted"
"""The cause of a step that was canceled."""

CHECKS_FAILED = "DagsterAssetCheckFailedError"
"""How the cause of a step begins whose blocking checks failed."""

_MESSAGE_COLUMN = 26  # of a printed line, after time and step
_INTERRUPTS = ("DagsterExecutionInterruptedError", "KeyboardInterrupt")


class RunEvents:
    """Reads the events of one run as they are written.

    Attributes:
        started: the run exists and its first event was written.
        canceling: somebody asked to end the run, for example in the UI.
        canceled_step: name of the step that was interrupted; empty if none was.
        warnings: failed checks that did not block.
    """

    def __init__(self, instance: dg.DagsterInstance, run_id: str, began: float) -> None:
        """Make a reader of a run's events.

        Args:
            began: time from which the seconds on each line count.
        """
        self.started = self.canceling = False
        self.canceled_step = ""
        self.warnings: list[str] = []
        self._instance, self._run_id, self._began = instance, run_id, began
        self._cursor: str | None = None
        self._step_started: dict[str, float] = {}
        self._step_failed = False
        self._failed_checks: dict[str, list[str]] = {}  # step -> why its blocking checks failed
        self._running: dict[str, float] = {}  # step -> time of its last event

    def still_running(self, now: float, silent: float) -> Iterator[str]:
        """Yield a line for each step that runs and has logged nothing for some seconds.

        Args:
            now: the current time in seconds since the epoch.
            silent: seconds without an event, or without a line of this method, after which a step is named.
        """
        for step, last in self._running.items():
            if now - last >= silent:
                self._running[step] = now
                name = step.rpartition("__")[2].removesuffix(CHECKS_STEP)
                yield f"[{now - self._began:4.0f} s] {name:<16} running for {now - self._step_started[step]:.0f} s"

    def read(self) -> Iterator[str]:
        """Yield a line for each new event that a person wants to see."""
        if not self.started:
            run = self._instance.get_run_by_id(self._run_id)
            # Reading earlier could create the run's event database while the run's own process creates it.
            if run is None or run.status == dg.DagsterRunStatus.NOT_STARTED:
                return
            self.started = True
        more = True
        while more:
            page = self._instance.get_records_for_run(self._run_id, self._cursor, limit=_BATCH)
            self._cursor, more = page.cursor, page.has_more
            for record in page.records:
                line = self._line(record.event_log_entry)
                if line:
                    text = line.replace("\n", "\n" + " " * _MESSAGE_COLUMN)
                    yield f"[{record.event_log_entry.timestamp - self._began:4.0f} s] {text}"

    def _line(self, entry: dg.EventLogEntry) -> str | None:
        name = (entry.step_key or "").rpartition("__")[2]  # without the key prefix of the loop
        checks_alone = name.endswith(CHECKS_STEP)  # a step that only runs the checks of an asset
        step = f"{name.removesuffix(CHECKS_STEP):<16}"
        event = entry.dagster_event
        if entry.step_key in self._running:
            self._running[entry.step_key] = entry.timestamp
        if event is None:
            shown = entry.step_key and int(entry.level) >= logging.INFO
            return (
                f"{step} {entry.user_message}" if shown and not entry.user_message.startswith(_SAYS_NOTHING) else None
            )
        seconds = entry.timestamp - self._step_started.get(entry.step_key or "", entry.timestamp)
        if event.event_type in (Kind.STEP_SUCCESS, Kind.STEP_FAILURE):
            self._running.pop(entry.step_key or "", None)
        match event.event_type:
            case Kind.STEP_START:
                self._step_started[entry.step_key or ""] = self._running[entry.step_key or ""] = entry.timestamp
                return None if checks_alone else f"{step} started"
            case Kind.STEP_SUCCESS if not checks_alone:
                return f"{step} {click.style('done', fg='green')} in {seconds:.1f} s"
            case Kind.STEP_SKIPPED if not checks_alone:
                return f"{step} skipped"
            case Kind.STEP_FAILURE:
                self._step_failed = True
                reason = cause(event.step_failure_data.error)
                if reason.startswith(CHECKS_FAILED):  # and names them without a reason
                    reason = "; ".join(self._failed_checks[entry.step_key or ""])
                if reason == INTERRUPTED:
                    self.canceled_step = name
                    return f"{step} {click.style('canceled', fg='yellow')} after {seconds:.1f} s"
                return f"{step} {click.style('failed', fg='red')} after {seconds:.1f} s: {reason}"
            case Kind.ASSET_CHECK_EVALUATION:
                check = event.asset_check_evaluation_data
                lines = [line for line in (check.description or "").split("\n") if line]  # Markdown
                if check.passed:
                    result = click.style("passed", fg="green")
                elif check.check_name == APPROVED:
                    result = click.style("not passed yet", fg="yellow")
                elif check.severity == dg.AssetCheckSeverity.ERROR:
                    result = click.style("failed", fg="red")
                    # All lines were just shown: the numbers, the first reason, others.
                    numbers, *reasons = lines or ["failed"]
                    self._failed_checks.setdefault(entry.step_key or "", []).append(
                        f"check {check.check_name}: {reasons[0].removeprefix('- ') if reasons else numbers}"
                    )
                else:
                    result = click.style("failed (warning, does not block)", fg="yellow")
                description = ": " + "\n".join(lines) if lines else ""
                headline = f": {lines[0]}" if lines else ""
                if not check.passed and check.severity == dg.AssetCheckSeverity.WARN and check.check_name != APPROVED:
                    self.warnings.append(f"check {check.check_name} of {name} failed{headline}")
                return f"{step} check {check.check_name} {result}{description}"
            case Kind.RUN_FAILURE if not self._step_failed:  # for example, the executor failed
                return f"{step} {click.style('the run failed', fg='red')}: {run_failure_cause(event)}"
            case Kind.RUN_CANCELING | Kind.RUN_CANCELED:
                self.canceling = True
        return None


def run_failure_cause(event: dg.DagsterEvent) -> str:
    """Return why a run failed outside of its steps: an exception, or what Dagster's daemon says about the process."""
    error = getattr(event.event_specific_data, "error", None)  # there is no data if the daemon reported it
    return cause(error) if error else event.message or cause(None)


def cause(error: "SerializableErrorInfo | None") -> str:
    """Return the message of the exception that a step raised, without what Dagster wraps around it and the traceback.

    This project's exceptions and `dg.Failure` say what happened and what to do. Others keep the name of their class.
    """
    if error is None:
        return "Dagster recorded no error"
    while error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    if error.cls_name in _INTERRUPTS:
        return INTERRUPTED
    name, _, message = error.message.strip().partition(": ")
    ours = name.startswith("finetune_pipeline.") or name.endswith(".Failure")
    return message if ours and message else f"{error.cls_name}: {message}".removesuffix(": ")
