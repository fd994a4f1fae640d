"""What the sensor starts, on a real Dagster instance and a real store."""

import os
import uuid
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._grpc.impl import get_external_schedule_execution, get_external_sensor_execution

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.feedback.store import mark_judged, newest_offset
from finetune_pipeline.orchestration.automation import FIRST_ATTEMPT_TAG, WATERMARK_TAG, next_run
from finetune_pipeline.orchestration.resources import FinetuneHome
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.jobs import JOB_TAG, LOOP_TAG, job_of_run
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.registry.comparisons import ComparisonRecord
from finetune_pipeline.registry.training_jobs import list_jobs, runs_of
from finetune_pipeline.settings import home
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events
from finetune_pipeline_tests.registry.conftest import record_comparison
from finetune_pipeline_tests.sources.test_files import write_as

NOW = datetime.now(UTC)


def ingest_events(loop, *events):
    write_events(loop.drop_folder / "log.jsonl", *events)
    ingest(loop, connect(), lambda text: None)


def judge(loop, promote=True):
    with connect().read() as connection:
        watermark = newest_offset(connection)
    record_comparison(
        connect(),
        ComparisonRecord(
            id=f"report-{watermark}", loop=loop.name, challenger_sha256="a" * 64, champion_id=None,
            champion_sha256="b" * 64, benchmark_sha256="c" * 64, decision="promote" if promote else "reject",
            reason="because", watermark=watermark, report_path="/report.html", created_at=NOW,
        ),
    )  # fmt: skip


def add_run(instance, loop, request, status, ended=NOW):
    """Add a run as the daemon would launch it for a request."""
    run = dg.DagsterRun(job_name="notes_loop", run_id=str(uuid.uuid4()), tags=request.tags)
    instance.add_run(run.with_status(status))
    return run


def test_the_skip_message_counts_new_examples(loop, instance):
    assert next_run(loop, connect(), instance, NOW).skip_message == "0 new high-reward examples, 10 needed"
    ingest_events(loop, *corrected(["ash", "birch", "cedar"]))
    assert next_run(loop, connect(), instance, NOW).skip_message == "3 new high-reward examples, 10 needed"


def test_enough_new_examples_start_the_whole_loop(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    request = next_run(loop, connect(), instance, NOW)
    assert isinstance(request, dg.RunRequest)
    assert request.asset_selection is None
    assert request.run_key == "notes:0:10:attempt1"


def test_the_job_of_a_request_exists_before_its_run(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    made = definitions(loop)
    resources = {"finetune_home": FinetuneHome(path=str(home()))}
    for _ in range(2):  # the daemon was killed after the first evaluation, and evaluates it again
        with dg.build_sensor_context(instance, sensor_name="notes_new_examples", resources=resources) as context:
            request = made.get_sensor_def("notes_new_examples").evaluate_tick(context).run_requests[0]
        (job,) = list_jobs(connect())
        assert (job.status, job.origin, job.created_by) == ("pending", "sensor", "notes_new_examples")
        assert request.tags[JOB_TAG] == job.id and request.tags[WATERMARK_TAG] == "0"
    started = job_of_run(connect(), "notes", "run", request.tags)  # in its first step
    assert started.id == job.id and runs_of(connect(), job.id) == ["run"]


@pytest.mark.parametrize("tick", [None, "17"])
@pytest.mark.parametrize("kind", ["sensor", "schedule"])
def test_a_test_in_dagsters_ui_creates_no_job(loop, instance, kind, tick):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    repository = definitions(loop).get_repository_def()
    if kind == "sensor":
        log_key = tick and [repository.name, "notes_new_examples", tick]  # "Test sensor" gives none
        answer = get_external_sensor_execution(
            repository, None, instance.get_ref(), "notes_new_examples", None, None, None, log_key, None
        )
    else:
        log_key = tick and [repository.name, "notes_yearly", tick]
        answer = get_external_schedule_execution(
            repository, instance.get_ref(), "notes_yearly", NOW.timestamp(), "UTC", log_key
        )
    (request,) = answer.run_requests
    assert len(list_jobs(connect())) == (0 if tick is None else 1)
    assert (JOB_TAG in request.tags) == (tick is not None)


@pytest.mark.parametrize("name", ["nightly", "yearly"])
def test_a_request_of_a_schedule_has_a_job_of_its_own(loop, instance, name):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    schedule = definitions(loop).get_schedule_def(f"notes_{name}")
    for night in (1, 2):
        with dg.build_schedule_context(
            instance, datetime(2026, 1, night, tzinfo=UTC), resources={"finetune_home": FinetuneHome(path=str(home()))}
        ) as context:
            (request,) = schedule.evaluate_tick(context).run_requests
        assert list_jobs(connect())[0].origin == "schedule"
        assert request.tags[JOB_TAG] in {job.id for job in list_jobs(connect())}
        assert bool(request.run_config) == (name == "yearly")
    # The nightly evaluation asks for the same run again, and the yearly training is another one each time.
    assert len(list_jobs(connect())) == (1 if name == "nightly" else 2)


def test_a_run_that_only_reads_files_is_no_training_job(loop, instance):
    write_events(loop.drop_folder / "log.jsonl", *corrected(["ash"]))
    with dg.build_sensor_context(
        instance, sensor_name="notes_new_examples", resources={"finetune_home": FinetuneHome(path=str(home()))}
    ) as context:
        (request,) = definitions(loop).get_sensor_def("notes_new_examples").evaluate_tick(context).run_requests
    assert request.asset_selection and JOB_TAG not in request.tags and list_jobs(connect()) == []


def test_only_what_curation_would_accept_counts_once(loop, instance):
    ingest_events(
        loop,
        *corrected(["ash"]),
        interaction("no feedback"),
        interaction("unsure", confidence=0.2),
        feedback("f1", "unsure", "success", score=95),
        interaction("bad"),
        feedback("f2", "bad", "thumbs_down"),
        interaction("leaked", prompt="Golden question  AMBER"),
        feedback("f3", "leaked", "thumbs_up"),
        interaction("one", prompt="the same", output="the same"),
        feedback("f4", "one", "thumbs_up"),
        interaction("two", prompt="The  SAME", output="the same"),
        feedback("f5", "two", "thumbs_up"),
    )
    assert count_new(loop, connect(), watermark=0) == 2  # ash, and "the same" once


def test_different_corrections_of_one_prompt_are_one_example(loop):
    ingest_events(loop, *(x for n in range(5) for x in (
        interaction(f"i{n}", prompt="one prompt"), feedback(f"f{n}", f"i{n}", "correction", correction=f"answer {n}")
    )))  # fmt: skip
    assert count_new(loop, connect(), watermark=0) == 1


def test_a_growing_file_does_not_delay_the_loop(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    write_events(loop.drop_folder / "log.jsonl", *corrected(["still more"]))
    request = next_run(loop, connect(), instance, NOW)
    assert isinstance(request, dg.RunRequest) and request.asset_selection is None


def test_examples_of_a_judged_dataset_are_not_new(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    judge(loop, promote=False)
    assert next_run(loop, connect(), instance, NOW).skip_message == "0 new high-reward examples, 10 needed"


def test_judged_content_that_is_logged_again_is_not_new(loop):
    ingest_events(loop, *corrected(["ash"]))
    with connect().write() as connection:
        prompt = "please note what ash said about the ash matter"
        mark_judged(connection, loop.name, [content_hash(prompt, "ash spoke")])
    judge(loop)
    again = interaction("later", prompt=prompt)
    ingest_events(loop, again, feedback("f", "later", "correction", correction="ash spoke"))
    assert count_new(loop, connect(), watermark=0) == 0


def test_an_unread_file_starts_a_run_of_raw_logs(loop, instance):
    write_events(loop.drop_folder / "new.jsonl", *corrected(["ash"]))
    request = next_run(loop, connect(), instance, NOW)
    assert request.asset_selection == [dg.AssetKey(["notes", "raw_logs"])]
    ingest(loop, connect(), lambda text: None)
    assert next_run(loop, connect(), instance, NOW).skip_message == "1 new high-reward example, 10 needed"


def test_each_rewrite_of_a_file_starts_a_run(loop, instance):
    """Size and mtime stay the same, so a run key made only of those would repeat."""
    file = loop.drop_folder / "log.jsonl"
    write_events(file, interaction("a1"))
    stat, keys = file.stat(), []
    for name in ("a2", "a3", "a4"):
        ingest(loop, connect(), lambda text: None)
        file.write_text(interaction(name).model_dump_json() + "\n")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_size == stat.st_size
        keys.append(next_run(loop, connect(), instance, NOW).run_key)
    assert len(set(keys)) == 3


@pytest.mark.parametrize("name", ["new.csv", "new.json", "new.parquet"])
def test_every_file_format_starts_a_run_of_raw_logs(loop, instance, name):
    loop.drop_folder.mkdir(parents=True)
    write_as(loop.drop_folder / name, [{"prompt": "what did ash say?", "completion": "ash spoke"}])
    assert next_run(loop, connect(), instance, NOW).asset_selection == [dg.AssetKey(["notes", "raw_logs"])]
    ingest(loop, connect(), lambda text: None)
    assert next_run(loop, connect(), instance, NOW).skip_message == "1 new high-reward example, 10 needed"


def test_a_file_name_that_is_not_utf8_does_not_break_the_sensor(loop, instance):
    loop.drop_folder.mkdir(parents=True)
    write_as(loop.drop_folder / os.fsdecode(b"a\xfc.csv"), [{"prompt": "p", "completion": "c"}])
    assert next_run(loop, connect(), instance, NOW).asset_selection == [dg.AssetKey(["notes", "raw_logs"])]


def test_an_unreadable_file_starts_only_max_attempts_runs(loop, instance):
    write_events(loop.drop_folder / "new.jsonl", *corrected(["ash"]))
    keys = set()
    for _ in range(loop.trigger.max_attempts):
        request = next_run(loop, connect(), instance, NOW)
        keys.add(request.run_key)
        add_run(instance, loop, request, dg.DagsterRunStatus.FAILURE)
    assert len(keys) == loop.trigger.max_attempts
    message = next_run(loop, connect(), instance, NOW).skip_message
    assert message.startswith("0 new high-reward examples, 10 needed") and "look at the last run of raw_logs" in message


def test_a_failed_run_is_retried_up_to_max_attempts(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(12)))
    later = NOW
    for attempt in (1, 2, 3):
        later += timedelta(minutes=10)
        request = next_run(loop, connect(), instance, later)
        assert request.run_key == f"notes:0:12:attempt{attempt}"
        assert request.tags == {LOOP_TAG: "notes", WATERMARK_TAG: "0", FIRST_ATTEMPT_TAG: "12"}
        add_run(instance, loop, request, dg.DagsterRunStatus.FAILURE)
    gave_up = next_run(loop, connect(), instance, later + timedelta(minutes=10))
    assert (
        "12 new high-reward examples, 10 needed" in gave_up.skip_message and "by itself at 22" in gave_up.skip_message
    )
    ingest_events(loop, *corrected(f"more{n}" for n in range(10)))
    rearmed = next_run(loop, connect(), instance, later + timedelta(minutes=20))
    assert rearmed.run_key == "notes:0:22:attempt1"


def test_no_run_starts_during_another_run_of_the_loop(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    by_hand = dg.DagsterRun(
        job_name="__ASSET_JOB",
        run_id=str(uuid.uuid4()),
        asset_selection=frozenset({dg.AssetKey(["notes", "raw_logs"])}),
    )
    instance.add_run(by_hand.with_status(dg.DagsterRunStatus.STARTED))
    assert "is in progress" in next_run(loop, connect(), instance, NOW).skip_message


FOREIGN = [
    ("notes", {"job_name": "__ASSET_JOB", "asset_selection": frozenset({dg.AssetKey(["raw_logs"])})}),
    # Bare keys: another project of the same Dagster instance may have some as well.
    ("", {"job_name": "__ASSET_JOB", "asset_selection": frozenset({dg.AssetKey(["orders"])})}),
    ("", {"job_name": "other_job"}),
    ("notes", {"job_name": "notes2_loop", "tags": {LOOP_TAG: "notes2"}}),
]


@pytest.mark.parametrize(("prefix", "run"), FOREIGN, ids=["another loop", "another project", "a job", "by tag"])
def test_a_run_of_something_else_does_not_delay_this_loop(make_loop, instance, prefix, run):
    loop = make_loop(key_prefix=prefix)
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    other = dg.DagsterRun(run_id=str(uuid.uuid4()), **run)
    instance.add_run(other.with_status(dg.DagsterRunStatus.STARTED))
    assert isinstance(next_run(loop, connect(), instance, NOW), dg.RunRequest)


def test_a_stalled_run_does_not_delay_the_next_one(loop, instance):
    ingest_events(loop, *corrected(f"person{n}" for n in range(10)))
    request = next_run(loop, connect(), instance, NOW)
    run = add_run(instance, loop, request, dg.DagsterRunStatus.STARTED)
    instance.report_engine_event("the last word", run)
    assert "is in progress" in next_run(loop, connect(), instance, datetime.now(UTC)).skip_message
    next_day = datetime.now(UTC) + timedelta(days=1)
    assert isinstance(next_run(loop, connect(), instance, next_day), dg.RunRequest)
