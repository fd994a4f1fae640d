"""Recorded comparisons and the watermark of judged data."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from finetune_pipeline.database import Database
from finetune_pipeline.registry.comparisons import (
    ComparisonRecord,
    ManualComparison,
    find_comparison,
    judged_watermark,
    list_comparisons,
    list_manual_comparisons,
    record_manual_comparison,
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
        decision="promote" if promote else "reject",
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


def test_wins_losses_and_ties_are_kept(db: Database, own_home: Path) -> None:
    counted = comparison(own_home, "r1", 120).model_copy(update={"wins": 12, "losses": 3, "ties": 225})
    record_comparison(db, counted)
    record_comparison(db, comparison(own_home, "old", 100))
    found = {one.id: (one.wins, one.losses, one.ties) for one in list_comparisons(db, "aec")}
    assert found == {"r1": (12, 3, 225), "old": (None, None, None)}


def test_a_comparison_by_hand_judges_nothing(db: Database, own_home: Path) -> None:
    made = ManualComparison(
        id="m1", loop="aec", first="aec@base", first_sha256="a" * 64, second="https://localhost/v1#m",
        second_sha256="b" * 64, benchmark_sha256="c" * 64, wins=2, losses=1, ties=237, p_value=0.5,
        report_path=own_home / "artifacts" / "aec" / "manual_comparison" / "m1" / "report.html", created_at=START,
    )  # fmt: skip
    record_manual_comparison(db, made)
    assert list_manual_comparisons(db, "aec") == [made]
    assert (list_manual_comparisons(db, "notes"), list_comparisons(db, "aec")) == ([], [])
    assert (judged_watermark(db, "aec"), find_comparison(db, "aec", "m1")) == (0, None)
