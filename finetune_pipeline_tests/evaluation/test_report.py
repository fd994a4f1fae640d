"""Comparison, metrics and report of a small benchmark that contains hostile texts."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_pipeline.evaluation.benchmark import Benchmark, load_benchmark
from finetune_pipeline.evaluation.comparison import (
    BenchmarkAnswer,
    Comparison,
    ComparisonError,
    ModelResult,
    Speed,
    compare,
    judge,
    score_model,
)
from finetune_pipeline.evaluation.confidence import separate_by_confidence, wilson_interval
from finetune_pipeline.evaluation.gate import BudgetState
from finetune_pipeline.evaluation.metric_table import MetricRow, comparison_markdown, format_metric, metric_table
from finetune_pipeline.evaluation.performance import Performance
from finetune_pipeline.evaluation.plots import plot_png, trend_plot
from finetune_pipeline.evaluation.report import (
    ReportError,
    findings_of_report,
    metrics_of_report,
    slices_of_report,
    write_report,
)
from finetune_pipeline.evaluation.report_facts import (
    ReportedData,
    ReportFacts,
    TrainingCurve,
    Trend,
    TrendPoint,
    convergence_step,
)
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.pipeline.challengers import scores_of
from finetune_pipeline.schemas import Rule
from finetune_pipeline.settings import GateSettings
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, line, write_benchmark

HOSTILE = "<script>alert('{{ 7*7 }}')</script>"
RULES = (Rule("rated", "Walls have a fire rating", {"required": ["fire_rating_hr"]}),)
CORRECT, HALF = json.dumps(WALL), '{"element": "wall", "material": "brick"}'
SCORER = Scorer("parameters", SCHEMA, RULES)
UNCONSTRAINED = "none of 4 answers without constrained decoding passes the output schema"
FAST = Speed(latency_p50_ms=40, latency_p95_ms=60, tokens_per_second=900, prompts=24)
SLOW = Speed(latency_p50_ms=50, latency_p95_ms=90, tokens_per_second=700, prompts=24)


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    lines = [
        line("w0"),
        line("w1", wording="firm"),
        line("d0", slice="doors $x_", prompt=HOSTILE),
        line("d1", slice="doors $x_", wording="firm"),
    ]
    return load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), SCHEMA)


def side(
    name: str, texts: list[str], benchmark: Benchmark, speed: Speed | None, scorer: Scorer = SCORER
) -> ModelResult:
    answers = [
        BenchmarkAnswer(
            id=question.id, text=text, confidence=0.9 if text == CORRECT else 0.4, prompt_tokens=9, completion_tokens=9
        )
        for question, text in zip(benchmark.questions, texts, strict=True)
    ]
    return score_model(name, name * 8, 4_000_000, answers, benchmark, scorer, speed)


@pytest.fixture
def comparison(benchmark: Benchmark) -> Comparison:
    champion = side("champ", [HALF, HALF, HALF, CORRECT], benchmark, SLOW)
    challenger = side("chall", [CORRECT, CORRECT, HOSTILE, HALF], benchmark, FAST)
    return compare(benchmark, SCORER, champion, challenger)


def test_slices_wordings_and_questions_are_compared(comparison: Comparison) -> None:
    assert [(group.name, group.change, group.points) for group in comparison.slices] == [
        ("doors $x_", -4, -0.5),
        ("walls", 4, 0.5),
    ]
    assert [(group.name, group.change) for group in comparison.wordings] == [("firm", 0), ("plain", 0)]
    assert [(one.name, one.status) for one in comparison.slice_tests(GateSettings())] == [
        ("doors $x_", "too small"),
        ("walls", "too small"),
    ]
    assert [one.question.id for one in comparison.won] == ["w0", "w1"]
    assert [one.question.id for one in comparison.lost] == ["d0", "d1"]


def test_the_base_model_is_beside_both(tmp_path: Path, benchmark: Benchmark, comparison: Comparison) -> None:
    base = side("base", [HALF, HOSTILE, HALF, HALF], benchmark, None)
    compared = compare(benchmark, SCORER, comparison.champion, comparison.challenger, base)
    assert list(compared.models) == ["base", "champion", "challenger"]
    assert [row.base for row in metric_table(compared)[:3]] == [6 / 16, 0.0, 0.75]
    assert "| metric | base | champ | chall | change |" in comparison_markdown(compared)
    assert [group.base.correct for group in compared.slices if group.base] == [4, 2]
    assert judge(compared, GateSettings()) == judge(comparison, GateSettings())  # it decides nothing
    write_report(tmp_path, "aec", compared, judge(compared, GateSettings()), GateSettings(), 0.85)
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["base"]["name"], data["questions"][0]["base"]["answer"]) == ("base", HALF)
    assert metrics_of_report(tmp_path / "report.json").base == "base"
    page = (tmp_path / "report.html").read_text()
    assert page.count('<span class="label base">') == len(compared.questions)  # every answer changed
    assert "The base model is one of the two" not in page
    assert compare(benchmark, SCORER, comparison.champion, comparison.challenger).base is None


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (CORRECT, HALF, "correct to wrong"),
        (HALF, CORRECT, "wrong to correct"),
        (HALF, HOSTILE, "score fell"),
        (HOSTILE, HALF, "score rose"),
        ("no", HOSTILE, "changed at equal score"),
        (HALF, HALF.replace(" ", ""), None),  # the same JSON in another notation
        (CORRECT, CORRECT, None),
    ],
)
def test_a_changed_answer_has_a_kind(benchmark: Benchmark, before: str, after: str, kind: str | None) -> None:
    sides = [side(name, [text] * 4, benchmark, None) for name, text in (("champ", before), ("chall", after))]
    compared = compare(benchmark, SCORER, *sides)
    assert {one.flip for one in compared.questions} == {kind}
    assert len(compared.won) + len(compared.lost) + compared.ties == 4


def test_the_page_filters_changed_answers_losses_first(tmp_path: Path, comparison: Comparison) -> None:
    write_report(tmp_path, "aec", comparison, judge(comparison, GateSettings()), GateSettings(), 0.85)
    page = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["flips"] == {
        "correct to wrong": 1, "score fell": 1, "wrong to correct": 2, "score rose": 0, "changed at equal score": 0,
    }  # fmt: skip
    labels = re.findall(r"<label for=\"flip-\w+\">(.*?)</label>", page)
    assert labels == ["all (4)", "correct to wrong (1)", "score fell (1)", "wrong to correct (2)"]
    assert page.index("d1 ·") < page.index("d0 ·") < page.index("w0 ·")


@pytest.mark.parametrize(
    ("answers", "tokens", "expected"),
    [
        (["no", "nope", "never", "not"], 9, [f"{UNCONSTRAINED}: none is JSON"]),
        (["{}", "[]", "1", "null"], 9, [f"{UNCONSTRAINED}: 4 are JSON"]),
        ([HALF, HALF, HALF, HALF], 9, []),  # all expected answers are equal
        (["", " ", CORRECT, HALF], 9, ["2 of 4 answers are empty"]),
        ([CORRECT, CORRECT, HALF, HALF], 32, ["4 of 4 answers were cut off at evaluation.max_tokens: 32"]),
    ],
)
def test_what_explains_a_low_score_is_said(
    benchmark: Benchmark, comparison: Comparison, answers: list[str], tokens: int, expected: list[str]
) -> None:
    champion = side("champ", [HALF] * 4, benchmark, SLOW)
    challenger = side("chall", answers, benchmark, FAST)
    longer = tuple(one.model_copy(update={"completion_tokens": tokens}) for one in challenger.answers)
    compared = replace(compare(benchmark, SCORER, champion, replace(challenger, answers=longer)), max_tokens=32)
    assert [one for one in compared.problems if not one.startswith("slices")] == expected


def test_one_answer_to_everything_and_fallen_slices_are_named(tmp_path: Path, comparison: Comparison) -> None:
    lines = [line(f"q{n}", slice=f"s{n % 2}", expected={"element": "wall", "thickness_mm": n}) for n in range(4)]
    benchmark = load_benchmark(write_benchmark(tmp_path / "c.jsonl", lines), SCHEMA)
    right = [json.dumps({"element": "wall", "thickness_mm": n}) for n in range(4)]
    compared = compare(
        benchmark, SCORER, side("champ", right, benchmark, None), side("chall", [right[0]] * 4, benchmark, None)
    )
    assert compared.problems == (
        "4 of 4 answers are the same text",
        "slices that lost most: s1 (-50.0 points), s0 (-25.0 points)",
    )


def test_answers_to_other_questions_are_rejected(benchmark: Benchmark, comparison: Comparison) -> None:
    fewer = Benchmark(benchmark.questions[:2], "other")
    with pytest.raises(ComparisonError, match=r"champ answered other questions \(4\) than the benchmark has \(2\)"):
        compare(fewer, SCORER, comparison.champion, comparison.challenger)


def test_further_metrics_have_rows_and_never_decide(benchmark: Benchmark, comparison: Comparison) -> None:
    weighted = {"kind": "parameters", "name": "weighted", "weights": {"element": 0}}
    scorer = Scorer("parameters", SCHEMA, RULES, ["contains", weighted])
    texts = {"champ": [HALF, HALF, HALF, CORRECT], "chall": [CORRECT, CORRECT, HOSTILE, HALF]}
    compared = compare(benchmark, scorer, *(side(name, texts[name], benchmark, None, scorer) for name in texts))
    rows = [(row.key, row.name, row.champion, row.challenger) for row in metric_table(compared)]
    assert rows[:3] == [
        ("accuracy", "parameter accuracy", 10 / 16, 10 / 16),
        ("metric_contains", "contains the expected text", 0.25, 0.5),
        ("metric_weighted", "weighted", 6 / 12, 7 / 12),
    ]
    assert judge(compared, GateSettings()).reason == judge(comparison, GateSettings()).reason


def test_the_table_has_one_row_for_each_metric(comparison: Comparison) -> None:
    rows = {row.key: (row.champion, row.challenger, row.better) for row in metric_table(comparison)}
    assert rows == {
        "accuracy": (10 / 16, 10 / 16, None),
        "exact_match": (0.25, 0.5, True),
        "valid_rate": (1.0, 0.75, False),
        "unconstrained_valid_rate": (1.0, 0.75, False),
        "compliance_rate": (0.25, 0.5, True),
        "hallucination_rate": (0.0, 0.0, None),
        "latency_p50_ms": (50, 40, True),
        "latency_p95_ms": (90, 60, True),
        "tokens_per_second": (700, 900, True),
        "response_tokens": (9.0, 9.0, None),
        "size_mb": (4.0, 4.0, None),
    }
    assert "| exact match | 25.0% | 50.0% | +25.0 points |" in comparison_markdown(comparison)


def test_what_a_model_costs_is_shown_with_how_it_was_measured(comparison: Comparison) -> None:
    measured = Performance(
        requests_per_second=10, tokens_per_second=500, concurrency=8, requests=32, prompt_tokens=20,
        response_tokens=9, seconds=3.2, peak_memory_bytes=50_000_000, price_per_hour=0.9,
    )  # fmt: skip
    faster = measured.model_copy(update={"requests_per_second": 20.0, "tokens_per_second": 1000.0})
    shown = replace(
        comparison,
        champion=replace(comparison.champion, performance=measured),
        challenger=replace(comparison.challenger, performance=faster),
    )
    rows = {row.key: row for row in metric_table(shown)}
    assert rows["requests_per_second"].cells[1:] == ("10.0", "20.0", "+10.0")
    assert "\n\nAt saturation: 8 at a time, 32 requests with 20 prompt tokens" in comparison_markdown(shown)
    assert rows["cost_per_million_tokens"].cells[1:3] == ("0.5", "0.2")
    assert rows["cost_per_million_tokens"].better
    assert rows["peak_memory_mb"].champion == 50.0


@pytest.mark.parametrize(
    ("value", "unit", "signed", "text"),
    [
        (0.8125, "%", False, "81.2%"),
        (-0.00001, "%", True, "0.0 points"),
        (1240.4, "tokens/s", False, "1,240 tokens/s"),
        (-3.25, "ms", True, "-3.2 ms"),
        (None, "MB", False, "—"),
    ],
)
def test_metrics_are_formatted_for_people(value: float | None, unit: str, signed: bool, text: str) -> None:
    assert format_metric(value, unit, signed=signed) == text  # type: ignore[arg-type]


def test_confidence_is_compared_with_correctness() -> None:
    found = separate_by_confidence([0.9, 0.9, 0.5, 0.95, None], [True, True, False, False, True], 0.85)
    assert (found.auroc, found.correct, found.correct_above, found.incorrect, found.incorrect_above) == (
        0.5,
        2,
        2,
        2,
        1,
    )
    assert separate_by_confidence([0.5, 0.5], [True, False], 0.85).auroc == 0.5
    assert separate_by_confidence([0.9, 0.1], [True, True], 0.85).auroc is None
    assert separate_by_confidence([], [], 0.85).auroc is None


def test_calibration_is_measured_in_bins_of_confidence() -> None:
    found = separate_by_confidence([1.0, 0.95, 0.9, 0.25, 0.2, None], [True, True, False, False, True, True], 0.85)
    low, high = found.bins
    assert (low.confidence, low.answers, low.correct) == (pytest.approx(0.225), 2, 1)
    assert (high.confidence, high.answers, high.correct) == (pytest.approx(0.95), 3, 2)
    assert found.calibration_error == pytest.approx((2 * abs(0.5 - 0.225) + 3 * abs(2 / 3 - 0.95)) / 5)
    assert separate_by_confidence([], [], 0.85).calibration_error is None


@pytest.mark.parametrize(("correct", "count"), [(0, 3), (1, 3), (3, 3), (40, 240)])
def test_intervals_of_a_fraction_agree_with_scipy(correct: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(correct, count).proportion_ci(method="wilson")
    assert wilson_interval(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([(0, 2.0), (10, 1.2), (20, 1.04), (30, 1.0), (40, 1.1)], 20),
        ([(0, 1.0), (10, 0.5)], 10),
        ([(0, 1.0), (10, 1.5)], None),
        ([], None),
    ],
)
def test_the_step_of_convergence(losses: list[tuple[int, float]], step: int | None) -> None:
    assert convergence_step(losses) == step


def test_facts_beside_the_answers_are_on_the_page(tmp_path: Path, comparison: Comparison) -> None:
    facts = ReportFacts(
        use=[MetricRow("win_rate", "win rate", 0.75, None, True, "%")],
        training=[MetricRow("convergence", "convergence", None, 40, False, "steps")],
        curves=[TrainingCurve("chall", ((5, 1.0), (10, 0.5)), ((0, 1.5), (10, 0.6)), 10)],
        data=[ReportedData("chall", 300, 30, 60, 12, {"logs": 200, HOSTILE: 70}, {"too long": 3}, 4, 480)],
        trend=Trend((TrendPoint("v1.0.0", 0.5, datetime(2026, 1, 1, tzinfo=UTC)),), ("v0.9.0",)),
        hashes={"adapter": "a" * 64},
    )
    write_report(tmp_path, "aec", comparison, None, GateSettings(), 0.85, facts=facts)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == 2 * 4
    expected = [
        "not measured", "240 examples to train on, 60 replayed, 30 for validation; 12 corrections",
        "left out: too long",
        "another benchmark, by another metric or with other options of it: v0.9.0",
        "a" * 64, "No clear difference between chall and champ",
    ]  # fmt: skip
    assert [text for text in expected if text not in page] == []
    # The four answers all changed, and a comparison without a verdict says what so few questions can decide.
    assert "Correct is the full score of a question.</p>" in page
    assert "4 questions can decide nothing: even 4 won and none lost would give p = 0.062; at least 5" in page
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] is None


def test_unchanged_answers_are_counted(tmp_path: Path, benchmark: Benchmark) -> None:
    champion = side("champ", [HALF, HALF, HALF, CORRECT], benchmark, None)
    challenger = side("chall", [CORRECT, HALF, HALF, CORRECT], benchmark, None)
    compared = compare(benchmark, SCORER, champion, challenger)
    write_report(tmp_path, "aec", compared, None, GateSettings(), 0.85)
    assert "The other 3 questions have the same answer from both models." in (tmp_path / "report.html").read_text()


def test_a_change_that_is_shown_as_0_is_neither_better_nor_worse() -> None:
    def better(champion: float, challenger: float) -> bool | None:
        return MetricRow("size_mb", "model size", champion, challenger, False, "MB").better

    assert (better(2.14, 2.11), better(2.14, 2.0), better(2.0, 2.14)) == (None, True, False)


def test_the_trend_has_no_line_over_versions_that_were_left_out(comparison: Comparison) -> None:
    from matplotlib.figure import Figure

    moment = datetime(2026, 1, 1, tzinfo=UTC)
    points = [TrendPoint(f"v1.{n}.0", 0.5, moment, after_gap=n == 2) for n in range(4)]
    axes = Figure().subplots()
    trend_plot(Trend(tuple(points), ("v1.1.5",)), comparison)(axes)
    lines = [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert lines == [[0, 1], [2, 3]]
    assert max(map(len, axes.get_title(loc="left").split("\n"))) <= 40


def test_the_report_is_an_escaped_page_and_json(tmp_path: Path, comparison: Comparison) -> None:
    gate = GateSettings(min_score=0.25)
    folder = tmp_path / "report"
    write_report(folder, "aec", comparison, judge(comparison, gate), gate, 0.85, RULES)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "http://" not in page and "https://" not in page
    assert "Reject: the champion stays" in page
    assert page.count("data:image/svg+xml;base64,") == 2 * 2  # each plot for a light and for a dark page
    data = json.loads((folder / "report.json").read_text())
    statement, *reasons, evidence = data["verdict"]["reason"].split("\n")
    assert statement == (
        "challenger 10 of 16 correct, champion 10: gain 0.0%, 5% needed; more than 4 of 16 correct needed by "
        "gate.min_score 0.25; 3 of 4 unconstrained answers valid, more than half required"
    )
    assert evidence.startswith("2 questions won, 2 lost, 0 equal: p = ")
    assert "4 questions can decide nothing" in evidence and f"<li>{evidence.split('; ')[0]}" in page
    assert "too small to tell: doors $x_, walls" in page
    assert reasons == ["it does not gain enough over the champion: at least 11 correct needed"]
    assert "<li>it does not gain enough over the champion: at least 11 correct needed</li>" in page
    assert "Minimum score: more than 4 of 16 (gate.min_score)" in page
    assert "has 16 correct. Without constrained decoding, 3 of 4 answers are valid; more than half is required." in page
    assert [question["change"] for question in data["questions"]] == [2, 2, -2, -2]
    assert data["questions"][2]["challenger"]["problem"].startswith("not JSON")


def test_a_report_gives_the_same_verdict_again(tmp_path: Path, benchmark: Benchmark) -> None:
    champion = side("champ", [HALF] * 4, benchmark, None)
    challenger = side("chall", [CORRECT, CORRECT, CORRECT, HALF], benchmark, None)
    comparison = compare(benchmark, SCORER, champion, challenger)
    gate, strict = GateSettings(min_score=0), GateSettings(min_score=0, significance="required")
    write_report(tmp_path, "aec", comparison, judge(comparison, gate), gate, 0.85)
    assert findings_of_report(tmp_path / "report.json", gate).verdict == judge(comparison, gate)
    assert findings_of_report(tmp_path / "report.json", gate).verdict.promote
    with pytest.raises(ReportError, match="now it is required; materialize eval_report again"):
        findings_of_report(tmp_path / "report.json", strict)
    budget = BudgetState(tested=True, left=11)
    write_report(tmp_path, "aec", comparison, judge(comparison, strict, budget), strict, 0.85, budget=budget)
    found = findings_of_report(tmp_path / "report.json", strict)
    assert found.verdict == judge(comparison, strict, budget)
    assert (found.verdict.decision, found.verdict.tests_left) == ("inconclusive", 11)
    assert found.slices == comparison.slice_tests(strict)
    page = (tmp_path / "report.html").read_text()
    assert "Inconclusive: the champion stays" in page and "11 further comparisons" in page
    document = json.loads((tmp_path / "report.json").read_text())
    document["worth"] = document.pop("quality_floor")  # as an earlier version named it
    for content in ("{}", json.dumps(document)):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ReportError, match=r"not a report of this version .* materialize eval_report again"):
            findings_of_report(tmp_path / "report.json", gate)


def test_the_plot_is_a_small_png(comparison: Comparison) -> None:
    image = plot_png(comparison)
    assert image.startswith(b"\x89PNG")
    assert len(image) < 150_000


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from finetune_pipeline.evaluation import report, run; "
        "print([name for name in ('matplotlib', 'numpy', 'torch', 'llama_cpp', 'jinja2', 'jsonschema', 'dagster') "
        "if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_report_gives_the_score_in_each_slice(tmp_path: Path, comparison: Comparison) -> None:
    gate = GateSettings()
    write_report(tmp_path, "aec", comparison, judge(comparison, gate), gate, 0.85)
    found = slices_of_report(tmp_path / "report.json", "challenger")
    assert [(one.name, one.correct, one.total) for one in found] == [
        (group.name, group.challenger.correct, group.challenger.total) for group in comparison.slices
    ]
    assert {one.name: len(one.prompts) for one in found} == {"doors $x_": 2, "walls": 2}
    with pytest.raises(ReportError, match="materialize eval_report again"):
        slices_of_report(tmp_path / "none.json", "champion")


def test_speed_of_a_busy_machine_is_flagged_everywhere(benchmark: Benchmark, tmp_path: Path) -> None:
    busy = FAST.model_copy(update={"contention": "other processes used 1.9 of 2 cores"})
    sides = [side(name, [CORRECT] * 4, benchmark, busy) for name in ("champ", "chall")]
    compared = compare(benchmark, SCORER, *sides)
    flagged = {row.key for row in metric_table(compared) if row.flag}
    assert flagged == {"latency_p50_ms", "latency_p95_ms", "tokens_per_second"}
    assert "| latency, median (machine busy) | 40.0 ms |" in comparison_markdown(compared)
    write_report(tmp_path, "aec", compared, judge(compared, GateSettings()), GateSettings(), 0.5)
    assert "other processes used 1.9 of 2 cores" in (tmp_path / "report.html").read_text()
    kept = scores_of(metrics_of_report(tmp_path / "report.json").rows)
    assert not flagged & set(kept) and kept["accuracy"] == 1.0
    assert kept["speed_flag"] == "other processes used 1.9 of 2 cores"


def test_speed_of_a_quiet_machine_is_stored(benchmark: Benchmark) -> None:
    compared = compare(benchmark, SCORER, *(side(n, [CORRECT] * 4, benchmark, FAST) for n in ("champ", "chall")))
    kept = scores_of(metric_table(compared))
    assert kept["latency_p50_ms"] == 40 and "speed_flag" not in kept
