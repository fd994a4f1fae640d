"""Recorded comparisons and the watermark of judged data."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from finetune_pipeline.database import Database
from finetune_pipeline.registry.comparisons import (
    ComparisonRecord,
    find_comparison,
    judged_watermark,
    list_comparisons,
)
from finetune_pipeline_tests.registry.conftest import record_comparison

START = datetime(2026, 1, 1, tzinfo=UTC)


def comparison(home: Path, id: str, watermark: int, loop: str = "aec", promote: bool = False) -> ComparisonRecord:
    return ComparisonRecord(
        id=id,
        loop=loop,
        challenger_sha256="a" * 64,
        champion_id=None,
        champion_sha256="b" * 64,
        benchmark_sha256="c" * 64,
        promote=promote,
        reason="gain 3.0%, 5% needed",
        watermark=watermark,
        report_path=home / "artifacts" / loop / "eval_report" / id / "report.html",
        created_at=START + timedelta(minutes=watermark),
    )


def test_the_watermark_does_not_depend_on_the_verdict(db: Database, own_home: Path) -> None:
    assert judged_watermark(db, "aec") == 0
    record_comparison(db, comparison(own_home, "r1", 120, promote=True))
    record_comparison(db, comparison(own_home, "r2", 180))
    record_comparison(db, comparison(own_home, "r3", 60))
    record_comparison(db, comparison(own_home, "r1", 900, loop="notes"))
    assert (judged_watermark(db, "aec"), judged_watermark(db, "notes")) == (180, 900)
    assert [one.id for one in list_comparisons(db, "aec")] == ["r2", "r1", "r3"]


def test_the_same_report_is_recorded_once(db: Database, own_home: Path) -> None:
    first = comparison(own_home, "r1", 120)
    record_comparison(db, first)
    record_comparison(db, comparison(own_home, "r1", 121))
    assert list_comparisons(db, "aec") == [first]
    assert find_comparison(db, "aec", "r1") == first
    assert find_comparison(db, "aec", "r9") is None
