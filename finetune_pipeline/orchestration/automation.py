"""What starts runs: the loop's job, the sensor on new examples, the nightly schedule and the yearly retraining."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.retrain_trigger import Attempt, decide, describe
from finetune_pipeline.database import Database
from finetune_pipeline.manifests import AdapterManifest, RawLogsManifest
from finetune_pipeline.orchestration.resources import STAGES, FinetuneHome
from finetune_pipeline.orchestration.storage import storage_errors
from finetune_pipeline.orchestrator import HEARTBEAT_SECONDS
from finetune_pipeline.pipeline.implicit_acceptance import accept_unrated
from finetune_pipeline.pipeline.jobs import JOB_TAG, LOOP_TAG, job_id_of
from finetune_pipeline.pipeline.pending import find_new
from finetune_pipeline.registry.comparisons import judged_watermark
from finetune_pipeline.registry.training_jobs import Origin, TrainingJob, create_job
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ingest_ledger import UnreadFile, unread
from finetune_pipeline.sources.text_files import printable
from finetune_pipeline.wording import counted

WATERMARK_TAG = "finetune/watermark"
FIRST_ATTEMPT_TAG = "finetune/new_at_first_attempt"
FILES_TAG = "finetune/files"

CODE_LOCATION = "finetune_pipeline"
"""The name in workspace.yaml."""

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
    dg.DagsterRunStatus.SUSPENDED,
]

Context = dg.SensorEvaluationContext | dg.ScheduleEvaluationContext
RequestOrSkip = dg.RunRequest | dg.SkipReason


def automation(loop: LoopSettings) -> dg.Definitions:
    """Return the job, the sensor and the schedules of a loop."""
    tags = {LOOP_TAG: loop.name}
    purpose = f" {loop.description}" if loop.description else ""
    job = dg.define_asset_job(
        loop.job_name,
        selection=dg.AssetSelection.assets(*asset_keys(loop)),
        tags=tags,
        description=f"Runs the whole loop {loop.name}, from the logs to a promoted model.{purpose}",
    )
    enabled = loop.trigger.running

    def evaluate(context: Context, database: Database, origin: Origin, name: str) -> RequestOrSkip:
        instance, now = context.instance, datetime.now(UTC)
        accept_unrated(loop, database, now)  # so that the next evaluation need not look at these answers again
        request = next_run(loop, database, instance, now)
        if isinstance(request, dg.SkipReason) or FILES_TAG in request.tags or _is_test(context):
            return request
        return _with_job(loop, database, request, origin, name, str(request.run_key))

    @dg.sensor(
        name=f"{loop.name}_new_examples",
        job=job,
        tags=tags,
        minimum_interval_seconds=loop.trigger.interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if enabled else dg.DefaultSensorStatus.STOPPED,
        description=f"Runs the loop when there are {loop.trigger.new_examples} new high-reward examples.",
    )
    def new_examples(context: dg.SensorEvaluationContext, finetune_home: FinetuneHome) -> RequestOrSkip:
        return evaluate(context, finetune_home.database(), "sensor", context.sensor_name)

    schedule_status = dg.DefaultScheduleStatus.RUNNING if enabled else dg.DefaultScheduleStatus.STOPPED

    @dg.schedule(
        name=f"{loop.name}_nightly",
        job=job,
        cron_schedule=loop.trigger.nightly,
        execution_timezone=loop.trigger.timezone,
        tags=tags,
        default_status=schedule_status,
        description="Evaluates the sensor's condition once a night; alone, for training at night only.",
    )
    def nightly(context: dg.ScheduleEvaluationContext, finetune_home: FinetuneHome) -> RequestOrSkip:
        return evaluate(context, finetune_home.database(), "schedule", f"{loop.name}_nightly")

    @dg.schedule(
        name=f"{loop.name}_yearly",
        job=job,
        cron_schedule=loop.trigger.yearly,
        execution_timezone=loop.trigger.timezone,
        tags=tags,
        default_status=schedule_status,
        description="Trains from the base model on all examples once a year, even if few are new.",
    )
    def yearly(context: dg.ScheduleEvaluationContext, finetune_home: FinetuneHome) -> RequestOrSkip:
        run_id = unfinished_run(loop, context.instance, datetime.now(UTC))
        if run_id is not None:
            return _skip_during(run_id)
        step = "__".join([*loop.prefix, AdapterManifest.stage])
        full_training = {"ops": {step: {"config": {"mode": "full"}}}}
        request = dg.RunRequest(tags={LOOP_TAG: loop.name}, run_config=full_training)
        if _is_test(context):
            return request
        tick = context.scheduled_execution_time.isoformat()
        return _with_job(loop, finetune_home.database(), request, "schedule", f"{loop.name}_yearly", tick)

    return dg.Definitions(jobs=[job], sensors=[new_examples], schedules=[nightly, yearly])


def _is_test(context: Context) -> bool:
    """Return whether "Test sensor" or "Test schedule" of Dagster's UI asks, which may launch nothing.

    Its tick is not stored, so the key of its log ends with a time (20260101_000000) instead of the number of a tick.
    """
    return context.log_key is not None and "_" in context.log_key[-1]


def _with_job(
    loop: LoopSettings, database: Database, request: dg.RunRequest, origin: Origin, name: str, key: str
) -> dg.RunRequest:
    """Return a request with the tag of a new training job.

    Args:
        name: of the sensor or schedule.
        key: tells the request from others of it; the same request again has the same job.
    """
    job = TrainingJob(
        id=job_id_of(f"{name} {key}"), loop=loop.name, origin=origin, created_by=name, created_at=datetime.now(UTC)
    )
    create_job(database, job, exclusive=False)
    tags = {**request.tags, JOB_TAG: job.id}
    return dg.RunRequest(run_key=request.run_key, run_config=request.run_config, tags=tags)


def next_run(loop: LoopSettings, database: Database, instance: dg.DagsterInstance, now: datetime) -> RequestOrSkip:
    """Return the run to start now, or why none starts, with the number of new examples.

    The decision depends only on the database, the log folders and Dagster's runs; it keeps no other state.
    """
    run_id = unfinished_run(loop, instance, now)
    if run_id is not None:
        return _skip_during(run_id)
    watermark = judged_watermark(database, loop.name)
    tags = {LOOP_TAG: loop.name, WATERMARK_TAG: str(watermark)}
    attempts = [
        Attempt(
            new_at_first_attempt=int(record.dagster_run.tags[FIRST_ATTEMPT_TAG]),
            ended=datetime.fromtimestamp(record.end_time, UTC) if record.end_time else None,
        )
        for record in instance.get_run_records(dg.RunsFilter(tags=tags), ascending=True)
    ]
    new = find_new(loop, database, watermark, attempts)
    trigger = decide(new.count, attempts, loop.trigger, now, at_least=new.at_least)
    if trigger.fire:  # whatever files are unread: the run reads them
        return dg.RunRequest(
            run_key=f"{loop.name}:{watermark}:{trigger.new_at_first_attempt}:attempt{trigger.attempt}",
            tags={**tags, FIRST_ATTEMPT_TAG: str(trigger.new_at_first_attempt)},
        )
    with database.read() as connection:
        files = unread(connection, loop.name, loop.log_folders)
    return _read_files(loop, instance, files, trigger.reason) if files else dg.SkipReason(trigger.reason)


@dataclass(frozen=True)
class AutomationState:
    """What would start runs of a loop by itself.

    Attributes:
        waits_for: what the sensor would answer now.
        switched_on: name of the sensor or schedule -> whether it is on. One that is on in a code location other than
            that of workspace.yaml has its name added.
        daemon: Dagster's daemon, which evaluates them, is running.
    """

    waits_for: str
    switched_on: Mapping[str, bool]
    daemon: bool


def automation_state(loop: LoopSettings, database: Database, dagster_home: str) -> AutomationState:
    """Return what would start runs of a loop by itself, and what the sensor waits for, in a home of Dagster."""
    names = [f"{loop.name}_{name}" for name in ("new_examples", "nightly", "yearly")]
    switched_on = dict.fromkeys(names, loop.trigger.running)
    with storage_errors(dagster_home), dg.DagsterInstance.from_config(dagster_home) as instance:
        answer = next_run(loop, database, instance, datetime.now(UTC))
        for state in instance.all_instigator_state():  # has only those that somebody switched, or that were evaluated
            location = state.origin.repository_origin.code_location_origin.location_name
            if state.instigator_name in names and location == CODE_LOCATION:
                switched_on[state.instigator_name] = state.is_running
            elif state.instigator_name in names and state.is_running:
                switched_on[f"{state.instigator_name} (code location {location})"] = True
        heartbeats = [
            status.last_heartbeat for status in instance.get_daemon_statuses(["SENSOR", "SCHEDULER"]).values()
        ]
    if isinstance(answer, dg.SkipReason):
        waits_for = answer.skip_message or ""
    elif FILES_TAG in answer.tags:
        waits_for = "the sensor would start a run of raw_logs now, which reads new files"
    else:
        waits_for = "the sensor would start a run now"
    # Dagster calls a daemon healthy for half an hour after it ended.
    alive = all(beat is not None and time.time() - beat.timestamp < HEARTBEAT_SECONDS for beat in heartbeats)
    return AutomationState(waits_for, switched_on, alive)


def run_is_due(loop: LoopSettings, database: Database, dagster_home: str) -> tuple[bool, str]:
    """Return whether the sensor would start a run of the whole loop now, and the numbers or what it waits for."""
    with storage_errors(dagster_home), dg.DagsterInstance.from_config(dagster_home) as instance:
        answer = next_run(loop, database, instance, datetime.now(UTC))
    if isinstance(answer, dg.SkipReason):
        return False, answer.skip_message or ""
    if FIRST_ATTEMPT_TAG in answer.tags:
        new = find_new(loop, database, judged_watermark(database, loop.name))
        return True, describe(new.count, loop.trigger, at_least=new.at_least)
    return False, "some event files cannot be read; `finetune ingest` says why"


def unfinished_run(loop: LoopSettings, instance: dg.DagsterInstance, now: datetime) -> str | None:
    """Return the id of a run that works on this loop now, however it was started.

    A run whose process was killed stays unfinished forever. It is ignored once it has logged nothing for
    `trigger.stalled_minutes`: a healthy run logs more often.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if is_of_loop(run, loop):
            last = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
            logged_at = datetime.fromtimestamp(last[0].timestamp, UTC) if last else now
            if now - logged_at <= timedelta(minutes=loop.trigger.stalled_minutes):
                return run.run_id
    return None


def is_of_loop(run: dg.DagsterRun, loop: LoopSettings) -> bool:
    """Return whether a run works on this loop, however it was started."""
    keys = set(asset_keys(loop))
    checked = {key.asset_key for key in run.asset_check_selection or ()}
    return run.tags.get(LOOP_TAG) == loop.name or bool(keys & ((run.asset_selection or set()) | checked))


def asset_keys(loop: LoopSettings) -> list[dg.AssetKey]:
    """Return the keys of the loop's six assets, in their order."""
    return [dg.AssetKey([*loop.prefix, stage]) for stage in STAGES]


def _skip_during(run_id: str) -> dg.SkipReason:
    return dg.SkipReason(f"run {run_id[:8]} of this loop is in progress")


def _read_files(
    loop: LoopSettings, instance: dg.DagsterInstance, files: Sequence[UnreadFile], numbers: str
) -> RequestOrSkip:
    """Return a run of raw_logs alone, which ingests unread files; a later evaluation counts their examples."""
    stats = [(printable(str(x.path)), x.inode, x.size, x.mtime_ns, x.ctime_ns) for x in files]
    fingerprint = hash_of(stats)[:16]
    tags = {LOOP_TAG: loop.name, FILES_TAG: fingerprint}
    tries = len(instance.get_runs(dg.RunsFilter(tags=tags), limit=loop.trigger.max_attempts))
    if tries >= loop.trigger.max_attempts:
        return dg.SkipReason(
            f"{numbers}; {counted(len(files), 'new file')} could not be read in {counted(tries, 'run')}: look at the "
            "last run of raw_logs, fix the cause and materialize raw_logs by hand"
        )
    return dg.RunRequest(
        run_key=f"{loop.name}:files:{fingerprint}:attempt{tries + 1}",
        tags=tags,
        asset_selection=[dg.AssetKey([*loop.prefix, RawLogsManifest.stage])],
    )
