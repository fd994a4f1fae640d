"""What starts a run by itself: the sensor, the nightly schedule that asks the same question, the yearly retraining."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition as Job
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.retrain_trigger import Attempt, decide
from finetune_pipeline.database import connect
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.registry.comparisons import judged_watermark
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ingest_ledger import UnreadFile, unread
from finetune_pipeline.sources.row_readers import readable

LOOP_TAG = "finetune/loop"
WATERMARK_TAG = "finetune/watermark"
SERIES_TAG = "finetune/series"
FILES_TAG = "finetune/files"
WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]

Answer = dg.RunRequest | dg.SkipReason


def automation(loop: LoopSettings) -> dg.Definitions:
    """The job, the sensor and the schedules of a loop."""
    job = dg.define_asset_job(
        f"{loop.name}_loop", selection=dg.AssetSelection.groups(loop.name), description=f"The whole loop {loop.name}."
    )
    return dg.Definitions(jobs=[job], sensors=[_sensor(loop, job)], schedules=[_nightly(loop, job), _yearly(loop, job)])


def _sensor(loop: LoopSettings, job: Job) -> dg.SensorDefinition:
    running = dg.DefaultSensorStatus.RUNNING if loop.trigger.running else dg.DefaultSensorStatus.STOPPED

    @dg.sensor(
        name=f"{loop.name}_new_examples",
        job=job,
        minimum_interval_seconds=loop.trigger.interval_seconds,
        default_status=running,
        description=f"Starts the loop when {loop.trigger.new_examples} new high-reward examples have arrived.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> Answer:
        return answer(loop, context.instance, datetime.now(UTC))

    return sensor


def _nightly(loop: LoopSettings, job: Job) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{loop.name}_nightly",
        job=job,
        cron_schedule=loop.trigger.nightly,
        description="Asks the sensor's question once a night, for those who prefer a clock.",
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> Answer:
        return answer(loop, context.instance, datetime.now(UTC))

    return nightly


def _yearly(loop: LoopSettings, job: Job) -> dg.ScheduleDefinition:
    running = dg.DefaultScheduleStatus.RUNNING if loop.trigger.running else dg.DefaultScheduleStatus.STOPPED

    @dg.schedule(
        name=f"{loop.name}_yearly",
        job=job,
        cron_schedule=loop.trigger.yearly,
        default_status=running,
        description="Trains from the base model on everything once a year, however little is new.",
    )
    def yearly(context: dg.ScheduleEvaluationContext) -> Answer:
        busy = in_progress(loop, context.instance, datetime.now(UTC))
        return _wait_for(busy) if busy else dg.RunRequest(tags={LOOP_TAG: loop.name}, run_config=_full_training(loop))

    return yearly


def _full_training(loop: LoopSettings) -> dict[str, Any]:
    step = "__".join([*loop.prefix, "lora_adapter"])
    return {"ops": {step: {"config": {"mode": "full"}}}}


def answer(loop: LoopSettings, instance: dg.DagsterInstance, now: datetime) -> Answer:
    """Whether to start a run, with the numbers. Read from the store and the runs; nothing is remembered here."""
    busy = in_progress(loop, instance, now)
    if busy is not None:
        return _wait_for(busy)
    database = connect()
    watermark = judged_watermark(database, loop.name)
    attempts = _attempts(loop, instance, watermark)
    trigger = decide(count_new(loop, database, watermark, attempts), attempts, loop.trigger, now)
    if not trigger.fire:
        with database.read() as connection:
            files = unread(connection, loop.name, loop.log_folders)
        return _read_files(loop, instance, files, trigger.reason) if files else dg.SkipReason(trigger.reason)
    # Enough is enough, whatever files wait: this run takes them in too.
    return dg.RunRequest(
        run_key=f"{loop.name}:{watermark}:{trigger.series}:attempt{trigger.attempt}",
        tags={LOOP_TAG: loop.name, WATERMARK_TAG: str(watermark), SERIES_TAG: str(trigger.series)},
    )


def _wait_for(run_id: str) -> dg.SkipReason:
    return dg.SkipReason(f"run {run_id[:8]} of this loop is in progress; the next look comes when it has ended")


def in_progress(loop: LoopSettings, instance: dg.DagsterInstance, now: datetime) -> str | None:
    """The id of a run that works on this loop now, however it was started."""
    runs = instance.get_runs(dg.RunsFilter(statuses=[*IN_PROGRESS_RUN_STATUSES, *WAITING]))
    for run in runs:
        if _concerns(loop, run) and not _silent(instance, run.run_id, now, loop.trigger.silent_minutes):
            return run.run_id
    return None


def _concerns(loop: LoopSettings, run: dg.DagsterRun) -> bool:
    if run.asset_selection is None:
        return run.job_name in {f"{loop.name}_loop", "__ASSET_JOB"}
    return any(list(key.path[:-1]) == loop.prefix for key in run.asset_selection)


def _silent(instance: dg.DagsterInstance, run_id: str, now: datetime, minutes: float) -> bool:
    # A run whose process was killed stays "in progress" for ever; one that lives writes to its log.
    records = instance.get_records_for_run(run_id, limit=1, ascending=False).records
    last = records[0].timestamp if records else now.timestamp()
    return now - datetime.fromtimestamp(last, UTC) > timedelta(minutes=minutes)


def _attempts(loop: LoopSettings, instance: dg.DagsterInstance, watermark: int) -> list[Attempt]:
    tags = {LOOP_TAG: loop.name, WATERMARK_TAG: str(watermark)}
    records = instance.get_run_records(dg.RunsFilter(tags=tags), ascending=True)
    return [
        Attempt(int(x.dagster_run.tags[SERIES_TAG]), datetime.fromtimestamp(x.end_time, UTC) if x.end_time else None)
        for x in records
    ]


def _read_files(loop: LoopSettings, instance: dg.DagsterInstance, files: Sequence[UnreadFile], numbers: str) -> Answer:
    """A run of raw_logs alone, for files that the ledger does not know; the count follows at a later look."""
    stats = [(readable(str(x.path)), x.inode, x.size, x.mtime_ns, x.ctime_ns) for x in files]
    fingerprint = hash_of(stats)[:16]
    tags = {LOOP_TAG: loop.name, FILES_TAG: fingerprint}
    tries = len(instance.get_runs(dg.RunsFilter(tags=tags), limit=loop.trigger.attempts))
    if tries >= loop.trigger.attempts:
        return dg.SkipReason(
            f"{numbers}; {len(files)} new files could not be read in {tries} runs: look at the last run of raw_logs, "
            "mend the cause and materialize raw_logs by hand"
        )
    return dg.RunRequest(
        run_key=f"{loop.name}:files:{fingerprint}:attempt{tries + 1}",
        tags=tags,
        asset_selection=[dg.AssetKey([*loop.prefix, "raw_logs"])],
    )
