"""Rows of training jobs: one for each, one in progress for each loop, one run at a time, events in order."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_pipeline.database import Database
from finetune_pipeline.registry.training_jobs import (
    IdempotencyError,
    JobBusyError,
    TrainingJob,
    UnknownJobError,
    add_event,
    add_run,
    claim_launch,
    create_job,
    events_of,
    find_job,
    find_job_of_run,
    list_jobs,
    new_job_id,
    runs_of,
    update_job,
)
from finetune_pipeline_tests.waiting import wait_until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job_of(**changes: Any) -> TrainingJob:
    fields = {
        "id": new_job_id(), "loop": "notes", "origin": "api", "created_by": "key", "created_at": NOW,
        "settings": {"training": {"seed": 1}}, "metadata": {"team": "blue"},
    }  # fmt: skip
    return TrainingJob(**{**fields, **changes})


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Return what calls return or raise that are made at the same moment in threads of their own."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number: int, call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = call()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_job_is_found_with_all_its_fields(db: Database) -> None:
    job = create_job(db, job_of())
    assert find_job(db, job.id) == job
    assert [event.message for event in events_of(db, job.id)] == ["created by key (api)"]
    with pytest.raises(UnknownJobError, match=r"there is no training job 'ftjob-1'; `finetune train list` shows them"):
        find_job(db, "ftjob-1")


def test_a_second_job_of_a_loop_names_the_one_in_progress(db: Database) -> None:
    job = create_job(db, job_of())
    for status in ("pending", "running"):
        update_job(db, job.id, {"status": status})
        with pytest.raises(JobBusyError, match=rf"{job.id} of loop notes is {status}.*finetune train cancel") as busy:
            create_job(db, job_of())
        assert busy.value.running_id == job.id
    create_job(db, job_of(loop="other"))
    create_job(db, job_of(origin="ui"), exclusive=False)  # a run that a person started waits for the other's training


@pytest.mark.parametrize("status", ["paused", "completed", "failed", "canceled"])
def test_a_job_without_a_run_does_not_hold_up_the_loop(db: Database, status: str) -> None:
    job = create_job(db, job_of())
    update_job(db, job.id, {"status": status})
    assert create_job(db, job_of()).status == "pending"


def test_a_paused_job_is_not_resumed_while_another_is_in_progress(db: Database) -> None:
    job = create_job(db, job_of())
    update_job(db, job.id, {"status": "paused"})
    other = create_job(db, job_of())
    with pytest.raises(JobBusyError) as busy:
        update_job(db, job.id, {"status": "pending"}, if_status=("paused",))
    assert (busy.value.running_id, find_job(db, job.id).status) == (other.id, "paused")


def test_one_idempotency_key_makes_one_job(db: Database) -> None:
    job = create_job(db, job_of(idempotency_key="k", request_sha256="a"))
    assert create_job(db, job_of(idempotency_key="k", request_sha256="a")) == job
    with pytest.raises(IdempotencyError, match=rf"'k' was used for another request, which created {job.id}"):
        create_job(db, job_of(idempotency_key="k", request_sha256="b"))
    other = create_job(db, job_of(loop="other", idempotency_key="k", request_sha256="b"))
    assert [one.id for one in list_jobs(db)] == sorted([job.id, other.id], reverse=True)


def test_requests_at_once_with_one_key_make_one_job(db: Database) -> None:
    calls = [lambda: create_job(db, job_of(idempotency_key="k", request_sha256="a")) for _ in range(6)]
    assert len({job.id for job in at_once(*calls)}) == len(list_jobs(db)) == 1


def test_of_jobs_that_are_created_at_once_one_is_in_progress(db: Database) -> None:
    results = at_once(*[lambda: create_job(db, job_of()) for _ in range(6)])
    (created,) = [one for one in results if isinstance(one, TrainingJob)]
    assert {one.running_id for one in results if isinstance(one, JobBusyError)} == {created.id}
    assert [job.id for job in list_jobs(db)] == [created.id]


def test_of_runs_at_once_one_works_on_the_job(db: Database) -> None:
    job = create_job(db, job_of(wanted="launch"))
    accepted = at_once(*[lambda run=run: add_run(db, job.id, run) for run in "abcdef"])
    assert (accepted.count(True), accepted.count(False)) == (1, 5), accepted
    (run,) = runs_of(db, job.id)
    assert run == "abcdef"[accepted.index(True)]
    found = find_job_of_run(db, run)
    assert found is not None and (found.id, found.wanted) == (job.id, None)


def test_each_resumption_has_one_more_run(db: Database) -> None:
    job = create_job(db, job_of(wanted="launch"))
    assert add_run(db, job.id, "first") and add_run(db, job.id, "first")
    assert not add_run(db, job.id, "second")
    update_job(db, job.id, {"status": "paused"})
    assert not add_run(db, job.id, "second")
    update_job(db, job.id, {"status": "pending", "wanted": "launch"})
    assert add_run(db, job.id, "second")
    assert runs_of(db, job.id) == ["first", "second"]
    assert not add_run(db, new_job_id(), "third")


@pytest.mark.parametrize("wanted", ["pause", "cancel"])
def test_a_job_that_is_to_end_takes_no_run(db: Database, wanted: str) -> None:
    job = create_job(db, job_of(wanted=wanted))
    assert not add_run(db, job.id, "late") and runs_of(db, job.id) == []


def test_of_servers_at_once_one_launches_the_run(db: Database) -> None:
    job = create_job(db, job_of(wanted="launch"))
    assert not claim_launch(db, job.id, timedelta(hours=1)), "its launch may be in progress"
    made = events_of(db, job.id)[0].created_at
    wait_until(lambda: datetime.now(UTC) - made > timedelta(seconds=0.5))
    claims = at_once(*[lambda: claim_launch(db, job.id, timedelta(seconds=0.5)) for _ in range(4)])
    assert claims.count(True) == 1, claims
    add_run(db, job.id, "run")
    assert not claim_launch(db, job.id, timedelta()), "it has a run"


def test_a_late_report_does_not_overwrite_the_end(db: Database) -> None:
    job = create_job(db, job_of())
    assert update_job(db, job.id, {"status": "canceled"}, if_status=("pending",), event="canceled")
    assert not update_job(db, job.id, {"status": "failed"}, if_status=("pending", "running"), event="failed")
    assert find_job(db, job.id).status == "canceled"
    assert [event.message for event in events_of(db, job.id)][1:] == ["canceled"]


def test_a_change_can_require_that_nothing_was_asked_for(db: Database) -> None:
    job = create_job(db, job_of(wanted="pause"))
    assert not update_job(db, job.id, {"status": "failed"}, unless_wanted=True)
    update_job(db, job.id, {"wanted": None})
    assert update_job(db, job.id, {"status": "failed"}, unless_wanted=True)


def test_events_that_are_written_at_once_have_consecutive_numbers(db: Database) -> None:
    job = create_job(db, job_of())
    at_once(*[lambda n=n: add_event(db, job.id, f"event {n}", kind="metrics", data={"step": n}) for n in range(8)])
    events = events_of(db, job.id)
    assert [event.number for event in events] == list(range(1, 10))
    assert {event.data.get("step") for event in events[1:]} == set(range(8))
    assert events_of(db, job.id, after=7) == events[7:] and events_of(db, job.id, limit=2) == events[:2]


def test_jobs_are_listed_newest_first_in_pages(db: Database) -> None:
    jobs = [create_job(db, job_of(created_at=NOW + timedelta(days=n)), exclusive=False) for n in range(4)]
    update_job(db, jobs[1].id, {"status": "completed"})
    ids = [job.id for job in reversed(jobs)]
    assert [job.id for job in list_jobs(db)] == ids
    assert [job.id for job in list_jobs(db, after=jobs[3], limit=2)] == ids[1:3]
    assert [job.id for job in list_jobs(db, statuses=("completed",))] == [jobs[1].id]
    assert list_jobs(db, "other") == []
