"""The sensor that sends alerts about ended runs, and what is read from a run's events for them."""

import time
from collections import defaultdict
from datetime import UTC, datetime

import dagster as dg
from dagster import DagsterEventType as Kind

from finetune_pipeline.alerts import Alert, send
from finetune_pipeline.manifests import PromotionManifest, ReportManifest
from finetune_pipeline.orchestration.automation import is_of_loop
from finetune_pipeline.orchestration.checks import CHECKS_STEP
from finetune_pipeline.orchestration.resources import FinetuneHome
from finetune_pipeline.orchestration.run_events import CHECKS_FAILED, cause, run_failure_cause
from finetune_pipeline.pipeline.alert_texts import failure, promotion_or_rejection
from finetune_pipeline.pipeline.jobs import LOOP_TAG
from finetune_pipeline.pipeline.promote import NOT_PROMOTED
from finetune_pipeline.settings import LoopSettings, home

OVERLAP_SECONDS = 300
"""How far an evaluation looks back before the last one: clocks of machines differ, and a change is seen late."""


def alert_sensor(loop: LoopSettings) -> dg.SensorDefinition:
    """Return the sensor that sends the alerts about ended runs of a loop, also of runs that the daemon ended.

    It is on by default, since it starts nothing, and sends nothing that `finetune run` has sent.
    """

    @dg.sensor(
        name=f"{loop.name}_alerts",
        tags={LOOP_TAG: loop.name},
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Sends alerts about runs of the loop {loop.name}, as its setting `alerts` says.",
    )
    def alerts(context: dg.SensorEvaluationContext, finetune_home: FinetuneHome) -> dg.SkipReason:
        finetune_home.database()  # sets the variables that name the artifacts, too
        now = time.time()
        since = float(context.cursor) if context.cursor else now
        after = datetime.fromtimestamp(since - OVERLAP_SECONDS, UTC)
        ended = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS], updated_after=after)
        sent = []
        for run in reversed(context.instance.get_runs(ended)):
            if not is_of_loop(run, loop):
                continue
            try:
                alert = alert_of_run(loop, context.instance, run)
            except Exception:  # whatever it is, it must not hold up the alerts about later runs
                context.log.exception(f"the alert about run {run.run_id} could not be made")
                continue
            if alert is not None and send(loop, alert):
                context.log.info(f"{alert.title}\n{alert.text}")
                sent.append(alert.title)
        context.update_cursor(str(now))
        return dg.SkipReason(f"sent: {'; '.join(sent)}" if sent else "no run ended since that there is an alert about")

    return alerts


def alert_of_run(loop: LoopSettings, instance: dg.DagsterInstance, run: dg.DagsterRun) -> Alert | None:
    """Return what to tell people about a run that ended; None if it was canceled, or there is nothing to tell."""
    if run.status == dg.DagsterRunStatus.SUCCESS:
        return promotion_or_rejection(loop, run.run_id)
    if run.status != dg.DagsterRunStatus.FAILURE:
        return None
    failed_checks: dict[str, list[str]] = defaultdict(list)  # step -> why its blocking checks failed
    causes: dict[str, list[str]] = {}  # step -> why it failed; "" is the run
    by_gate: list[bool] = []  # of each failed step
    for entry in instance.all_logs(
        run.run_id, of_type={Kind.ASSET_CHECK_EVALUATION, Kind.STEP_FAILURE, Kind.RUN_FAILURE}
    ):
        event, step = entry.get_dagster_event(), entry.step_key or ""
        if event.event_type == Kind.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
                failed_checks[step].append(f"check {check.check_name}: {check.description or 'failed'}")
        elif event.event_type == Kind.STEP_FAILURE:
            reason = cause(event.step_failure_data.error)
            by_checks = reason.startswith(CHECKS_FAILED)
            causes[step] = failed_checks[step] if by_checks else [reason]
            asset = step.rpartition("__")[2]
            by_gate.append(
                (by_checks and asset == ReportManifest.stage + CHECKS_STEP)
                or (asset == PromotionManifest.stage and reason.startswith(NOT_PROMOTED))
            )
        elif not causes:  # outside of the steps: its process did not start, or it was killed
            causes[""] = [run_failure_cause(event)]
    if by_gate and all(by_gate) and (alert := promotion_or_rejection(loop, run.run_id, judged_before=True)):
        return alert
    first = next(iter(causes), "")
    log = next((home() / "logs").glob(f"{loop.name}-*-{run.run_id[:8]}.log"), "")  # of `finetune run`
    step = first.rpartition("__")[2].removesuffix(CHECKS_STEP)
    return failure(loop, run.run_id, step, causes.get(first, []), str(log))
