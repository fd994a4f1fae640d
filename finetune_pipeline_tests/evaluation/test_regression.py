"""The regression suite: its exact test against scipy, what small suites can decide, the gate and the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binom, binomtest

from finetune_pipeline.evaluation.benchmark import load_benchmark
from finetune_pipeline.evaluation.comparison import Comparison, compare, judge
from finetune_pipeline.evaluation.regression import (
    RegressionCounts,
    RegressionSuite,
    SuiteAnswer,
    binomial_tail,
    fewest_broken,
    regression_test,
)
from finetune_pipeline.evaluation.report import findings_of_report, write_report
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.settings import GateSettings
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, line, question, write_benchmark
from finetune_pipeline_tests.evaluation.test_report import CORRECT, HALF, HOSTILE, SCORER, side


@pytest.mark.parametrize("broken", [0, 1, 3, 7, 40, 200])
@pytest.mark.parametrize("count", [1, 2, 48, 200])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, 0.5])
def test_the_p_value_is_scipys(broken: int, count: int, tolerance: float) -> None:
    if broken > count:
        return
    expected = binomtest(broken, count, tolerance, alternative="greater").pvalue
    assert binomial_tail(broken, count, tolerance) == pytest.approx(expected, abs=1e-12)
    fewest = fewest_broken(count, tolerance, 0.05)
    critical = int(binom.isf(0.05, count, tolerance)) + 1
    assert fewest == (max(critical, 1) if critical <= count else None)


def counts(held: int, broken: int, asked: int | None = None, standing: int | None = None) -> RegressionCounts:
    asked = held if asked is None else asked
    return RegressionCounts(standing or asked, asked, held, broken, regained=0)


@pytest.mark.parametrize(
    ("given", "exceeded", "text"),
    [
        (
            counts(2, 1),
            False,
            "1 of 2 fixed corrections broken, 10% tolerated: p = 0.19; 2 broken would be significant",
        ),
        (counts(2, 2), True, "2 of 2 fixed corrections broken, 10% tolerated: p = 0.01; at most 0.05 is significant"),
        (
            counts(1, 1),
            False,
            "1 of 1 fixed correction broken, 10% tolerated: p = 0.1; 1 question can decide nothing: even 1 broken "
            "would give p = 0.1, at most 0.05 is significant",
        ),
        (
            counts(0, 0, asked=3),
            False,
            "the champion answers none of 3 fixed corrections correctly, so none can be broken",
        ),
        (
            counts(150, 4, asked=200, standing=900),
            False,
            "4 of 150 fixed corrections broken (a sample of 900), 10% tolerated: p = 1; 22 broken would be "
            "significant; of 50 that the champion answers incorrectly, 0 are correct again",
        ),
    ],
)
def test_a_suite_says_what_it_can_decide(given: RegressionCounts, exceeded: bool, text: str) -> None:
    found = regression_test(given, 0.1, 0.05)
    assert (found.exceeded, found.text) == (exceeded, text)


def test_correct_is_the_expected_answer_or_the_full_score_by_the_gates_metric() -> None:
    tolerant = Scorer({"kind": "parameters", "relative_tolerance": 0.01}, SCHEMA)  # type: ignore[arg-type]
    assert tolerant.is_correct(question(WALL), json.dumps({**WALL, "thickness_mm": 231}))  # within 1 %
    assert not tolerant.is_correct(question(WALL), HALF)
    assert not tolerant.is_correct(question(WALL), "a wall")
    assert Scorer("rouge1").is_correct(question("It is raining."), "it is  raining.")
    judged = Scorer({"kind": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "criteria": "short"})  # type: ignore[arg-type]
    assert judged.is_correct(question("yes"), "Yes") and not judged.is_correct(question("yes"), "no")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Return a comparison that promotes, of a challenger that breaks three of three fixed corrections."""
    benchmark = load_benchmark(write_benchmark(tmp_path / "b.jsonl", [line("w0"), line("w1")]), SCHEMA)
    made = compare(
        benchmark, SCORER, side("champ", [HALF] * 2, benchmark, None), side("chall", [CORRECT] * 2, benchmark, None)
    )
    answers = tuple(
        SuiteAnswer(question("right", id=f"c{n}", prompt=f"{n} {HOSTILE}"), "right", True, HOSTILE, False)
        for n in range(3)
    )
    kept = SuiteAnswer(question("kept", id="c3", prompt="kept"), "wrong", False, "kept", True)
    return replace(made, regression=RegressionSuite(4, (*answers, kept)))


def test_broken_corrections_are_shown_and_block_only_if_required(comparison: Comparison, tmp_path: Path) -> None:
    shown = GateSettings(min_score=0)
    verdict = judge(comparison, shown)
    assert verdict.promote
    assert verdict.reason.split("\n")[-1] == (
        "regression suite: 3 of 3 fixed corrections broken, 10% tolerated: p = 0.001; at most 0.05 is significant; "
        "of 1 that the champion answers incorrectly, 1 are correct again"
    )
    assert (verdict.champion_correct, verdict.total) == (4, 8)  # the suite is no part of the score
    required = GateSettings(min_score=0, regression="required")
    verdict = judge(comparison, required)
    assert verdict.decision == "reject"
    assert verdict.reason.split("\n")[1].startswith("it breaks too many fixed corrections: 3 of 3 fixed corrections")
    assert judge(comparison, GateSettings(min_score=0, regression="required", regression_tolerance=0.9)).promote

    write_report(tmp_path, "aec", comparison, verdict, required, 0.85)
    found = findings_of_report(tmp_path / "report.json", required)
    assert found.verdict == verdict and found.regression == comparison.regression_test(required)
    assert findings_of_report(tmp_path / "report.json", shown).verdict.promote
    page = (tmp_path / "report.html").read_text()
    assert "Regression suite (3 broken of 4)" in page
    assert "<script" not in page and page.count(">broken<") == 3 and "3 of 3 fixed corrections broken" in page
    questions = json.loads((tmp_path / "report.json").read_text())["regression"]["questions"]
    assert [one["broken"] for one in questions] == [True, True, True, False]
    assert questions[3]["challenger"] == {"answer": "kept", "correct": True}


def test_without_a_suite_nothing_is_said(comparison: Comparison, tmp_path: Path) -> None:
    gate = GateSettings(min_score=0, regression="required")
    without = replace(comparison, regression=None)
    verdict = judge(without, gate)
    assert verdict.promote and "regression" not in verdict.reason
    write_report(tmp_path, "aec", without, verdict, gate, 0.85)
    assert findings_of_report(tmp_path / "report.json", gate).regression is None
    assert "Regression suite" not in (tmp_path / "report.html").read_text()
