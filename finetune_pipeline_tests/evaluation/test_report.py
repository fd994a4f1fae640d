"""Comparison, metrics and report of a small benchmark that contains hostile texts."""

import json
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
from finetune_pipeline.evaluation.confidence import separate_by_confidence
from finetune_pipeline.evaluation.metric_table import comparison_markdown, format_metric, metric_table
from finetune_pipeline.evaluation.plots import plot_png
from finetune_pipeline.evaluation.report import (
    ReportError,
    findings_of_report,
    metrics_of_report,
    slices_of_report,
    write_report,
)
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.pipeline.promote import scores_of
from finetune_pipeline.schemas import Rule
from finetune_pipeline.settings import GateSettings
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, line, write_benchmark

HOSTILE = "<script>alert('{{ 7*7 }}')</script>"
RULES = (Rule("rated", "Walls have a fire rating", {"required": ["fire_rating_hr"]}),)
CORRECT, HALF = json.dumps(WALL), '{"element": "wall", "material": "brick"}'
SCORER = Scorer("parameters", SCHEMA, RULES)
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


def side(name: str, texts: list[str], benchmark: Benchmark, speed: Speed | None) -> ModelResult:
    answers = [
        BenchmarkAnswer(
            id=question.id, text=text, confidence=0.9 if text == CORRECT else 0.4, prompt_tokens=9, completion_tokens=9
        )
        for question, text in zip(benchmark.questions, texts, strict=True)
    ]
    return score_model(name, name * 8, 4_000_000, answers, benchmark, SCORER, speed)


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
    assert comparison.regressed_slices == ("doors $x_",)
    assert [one.question.id for one in comparison.won] == ["w0", "w1"]
    assert [one.question.id for one in comparison.lost] == ["d0", "d1"]


def test_answers_to_other_questions_are_rejected(benchmark: Benchmark, comparison: Comparison) -> None:
    fewer = Benchmark(benchmark.questions[:2], "other")
    with pytest.raises(ComparisonError, match=r"champ answered other questions \(4\) than the benchmark has \(2\)"):
        compare(fewer, SCORER, comparison.champion, comparison.challenger)


def test_the_table_has_one_row_for_each_metric(comparison: Comparison) -> None:
    rows = {row.key: (row.champion, row.challenger, row.better) for row in metric_table(comparison)}
    assert rows == {
        "accuracy": (10 / 16, 10 / 16, None),
        "exact_match": (0.25, 0.5, True),
        "valid_rate": (1.0, 0.75, False),
        "compliance_rate": (0.25, 0.5, True),
        "hallucination_rate": (0.0, 0.0, None),
        "latency_p50_ms": (50, 40, True),
        "latency_p95_ms": (90, 60, True),
        "tokens_per_second": (700, 900, True),
        "size_mb": (4.0, 4.0, None),
    }
    assert "| exact match | 25.0% | 50.0% | +25.0 points |" in comparison_markdown(comparison)


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
    assert page.count("data:image/svg+xml;base64,") == 5
    data = json.loads((folder / "report.json").read_text())
    assert data["verdict"]["reason"] == (
        "challenger 10 of 16 correct, champion 10: gain 0.0%, 5% needed; more than 4 of 16 correct needed by "
        "gate.min_score 0.25; 3 of 4 answers valid, more than half required"
    )
    assert "Minimum score: more than 4 of 16 (gate.min_score)" in page
    assert "has 16 correct. Without constrained decoding, 3 of 4 answers are valid; more than half is required." in page
    assert [question["change"] for question in data["questions"]] == [2, 2, -2, -2]
    assert data["questions"][2]["challenger"]["problem"].startswith("not JSON")


def test_a_report_gives_the_same_verdict_again(tmp_path: Path, benchmark: Benchmark) -> None:
    champion = side("champ", [HALF] * 4, benchmark, None)
    challenger = side("chall", [CORRECT, CORRECT, CORRECT, HALF], benchmark, None)
    comparison = compare(benchmark, SCORER, champion, challenger)
    gate, strict = GateSettings(min_score=0), GateSettings(min_score=0, require_significance=True)
    write_report(tmp_path, "aec", comparison, judge(comparison, gate), gate, 0.85)
    assert findings_of_report(tmp_path / "report.json", gate).verdict == judge(comparison, gate)
    assert findings_of_report(tmp_path / "report.json", gate).verdict.promote
    assert findings_of_report(tmp_path / "report.json", strict).verdict == judge(comparison, strict)
    assert not findings_of_report(tmp_path / "report.json", strict).verdict.promote
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
