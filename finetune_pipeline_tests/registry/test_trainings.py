"""Recorded training jobs."""

from datetime import UTC, datetime
from typing import Any

from finetune_pipeline.database import Database
from finetune_pipeline.registry.trainings import (
    Training,
    find_training,
    list_trainings,
    record_training,
)


def training_of(**changes: Any) -> Training:
    fields = {
        "id": "a1", "loop": "aec", "run_id": "run-1", "dataset": "d1", "method": "lora", "mode": "full",
        "device": "cpu", "examples": 120, "steps": 40, "loss_before": 1.5, "loss_after": 0.25,
        "tokens_per_second": 4240.5, "wall_seconds": 12.5, "peak_memory_bytes": 3_000_000_000, "watermark": 480,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }  # fmt: skip
    return Training(**{**fields, **changes})


def test_a_recorded_job_is_found(db: Database) -> None:
    record_training(db, training_of())
    assert find_training(db, "aec", "a1") == training_of()
    assert find_training(db, "notes", "a1") is None
    assert find_training(db, "aec", "a2") is None


def test_recording_a_job_again_keeps_the_first_row(db: Database) -> None:
    record_training(db, training_of())
    record_training(db, training_of(run_id="run-2", created_at=datetime(2026, 2, 1, tzinfo=UTC)))
    record_training(db, training_of(loop="notes", run_id="run-3"))
    first, other = find_training(db, "aec", "a1"), find_training(db, "notes", "a1")
    assert first is not None and first.run_id == "run-1"
    assert other is not None and other.run_id == "run-3"


def test_jobs_are_listed_newest_first(db: Database) -> None:
    record_training(db, training_of())
    record_training(db, training_of(id="a2", created_at=datetime(2026, 2, 1, tzinfo=UTC)))
    record_training(db, training_of(id="a3", loop="notes"))
    assert [job.id for job in list_trainings(db, "aec")] == ["a2", "a1"]
