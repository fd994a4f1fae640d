"""The report of a comparison: a self-contained HTML page for people, and all metrics as JSON.

Prompts and answers are data: the template escapes everything, the plots are images, and the page has no scripts.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.comparison import (
    FLIPS,
    Comparison,
    Flip,
    GroupChange,
    ModelResult,
    QuestionComparison,
    Role,
)
from finetune_pipeline.evaluation.confidence import ConfidenceSeparation, separate_by_confidence
from finetune_pipeline.evaluation.gate import (
    HEADLINES,
    BudgetState,
    QualityFloor,
    Verdict,
    capacity,
    decide,
    slices_text,
)
from finetune_pipeline.evaluation.metric_table import MetricRow, format_metric, metric_table
from finetune_pipeline.evaluation.plots import (
    Plot,
    confidence_plot,
    draw,
    reliability_plot,
    training_plot,
    trend_plot,
)
from finetune_pipeline.evaluation.regression import RegressionTest, counts_of_json, regression_test
from finetune_pipeline.evaluation.report_facts import ReportFacts
from finetune_pipeline.evaluation.significance import PairedScores, Significance, SliceTest, compare_slices
from finetune_pipeline.schemas import Rule
from finetune_pipeline.settings import GateSettings

HTML = "report.html"
JSON = "report.json"
_MAX_ROWS = 200
"""Rows of a table on the page; the JSON has all of them."""


class ReportError(RuntimeError):
    """A report cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class SliceScore:
    """One model's score on a slice of the benchmark, and the prompts of the slice."""

    name: str
    correct: int
    total: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class ReportScore:
    """The challenger's score in a report, with the hash of what decides a score; "" in older reports."""

    scored_by: str
    score: float


@dataclass(frozen=True)
class ReportMetrics:
    """The table of metrics in a report, with the display names of the models, and the challenger's problems.

    `base` is None if the base model is one of the two.
    """

    base: str | None
    champion: str
    challenger: str
    rows: list[MetricRow]
    problems: tuple[str, ...]


def write_report(
    folder: Path,
    loop: str,
    comparison: Comparison,
    verdict: Verdict | None,
    gate: GateSettings,
    min_confidence: float,
    rules: Sequence[Rule] = (),
    facts: ReportFacts | None = None,
    created_at: datetime | None = None,
    budget: BudgetState | None = None,
    scored_by: str = "",
) -> None:
    """Write `report.html` and `report.json` into a folder.

    Args:
        verdict: the gate's verdict on this comparison; None if the gate was not asked.
        gate: the settings that gave it.
        min_confidence: curation's threshold, shown next to how well confidence separates correct from incorrect.
        rules: the compliance rules, for their titles.
        facts: what is known of the models beside their answers.
        created_at: default now.
        budget: the state of the error budget that gave the verdict; None unless it is required.
        scored_by: hash of what decides a score, without which scores of other reports cannot be compared with this one.
    """
    moment = created_at or datetime.now(UTC)
    confidence = {
        role: separate_by_confidence(
            [answer.confidence for answer in model.answers], [score.exact for score in model.scores], min_confidence
        )
        for role, model in comparison.models.items()
    }
    facts = facts or ReportFacts()
    data = _as_json(loop, comparison, verdict, gate, budget, confidence, facts, moment) | {"scored_by": scored_by}
    write_text(folder / JSON, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    failures = [
        Counter(rule for score in model.scores for rule in score.failed_rules) for model in comparison.models.values()
    ]
    flips = _flips(comparison)
    page = _template().render(
        loop=loop,
        created_at=moment.strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        # The title has the name of the loop, and a phone has no room for it in each column.
        names={role: model.name.removeprefix(f"{loop}@") for role, model in comparison.models.items()},
        verdict=verdict,
        gate=gate,
        headline=HEADLINES[verdict.decision] if verdict else comparison.summary,
        slices=slices_text(comparison.slice_tests(gate), gate),
        capacity=capacity(comparison.significance, gate.significance_level),
        regression=comparison.regression_test(gate),
        metrics=metric_table(comparison),
        facts=facts,
        plots=_plots(comparison, confidence, facts),
        confidence=confidence,
        flips=flips,
        same_answers=len(comparison.questions) - sum(map(len, flips.values())),
        invalid=_invalid_answers(comparison),
        violations=[one for one in comparison.questions if one.challenger_scores.failed_rules],
        rule_counts=[(rule.id, rule.title, [count[rule.id] for count in failures]) for rule in rules],
        limit=_MAX_ROWS,
    )
    write_text(folder / HTML, page)


def _invalid_answers(comparison: Comparison) -> list[tuple[str, list[tuple[BenchmarkQuestion, str, str]]]]:
    """Return the title of each list of the challenger's invalid answers, and question, answer and problem of each."""
    asked = {one.question.id: one.question for one in comparison.questions}
    sample = comparison.challenger.sample
    every = [(one.challenger, one.challenger_scores) for one in comparison.questions]
    lists = {"Invalid answers of the challenger": every}
    if comparison.constrained:
        lists["Invalid answers of the challenger without constrained decoding"] = list(
            zip(sample.answers, sample.scores, strict=True)
        )
    return [
        (title, [(asked[answer.id], answer.text, scores.problem) for answer, scores in answers if not scores.valid])
        for title, answers in lists.items()
    ]


@dataclass(frozen=True)
class ReportFindings:
    """What the gate and the checks need of a report.

    Attributes:
        verdict: of the gate, applied again to the counts.
        slices: the tests of the slices, with the gate's margin.
        regression: the test of the regression suite; None if there is no suite.
    """

    verdict: Verdict
    significance: Significance
    slices: tuple[SliceTest, ...]
    regression: RegressionTest | None = None


def findings_of_report(path: Path, gate: GateSettings) -> ReportFindings:
    """Return the gate's verdict on the counts in a report, with significance and slices.

    Args:
        path: the `report.json`.
        gate: the current settings, which may differ from those of the report.

    Raises:
        ReportError: the report is missing, another version of this project wrote it, or it has no error budget and
            these settings require one.
    """
    with _open_report(path) as data:
        significance = Significance(**data["significance"])
        budget = BudgetState(**data["budget"]) if data["budget"] else None
        if gate.significance == "required" and budget is None:
            raise ReportError(
                f"{path} was written with gate.significance: shown, and now it is required; materialize eval_report "
                "again"
            )
        slices = compare_slices(_slice_scores(data["questions"]), gate.slice_margin, gate.significance_level)
        counts = counts_of_json(data.get("regression"))  # older reports have none
        regression = regression_test(counts, gate.regression_tolerance, gate.significance_level) if counts else None
        verdict = decide(
            data["verdict"]["champion_correct"],
            data["verdict"]["challenger_correct"],
            data["verdict"]["total"],
            QualityFloor(**data["quality_floor"]),
            gate,
            significance,
            slices,
            budget,
            regression,
        )
        return ReportFindings(verdict, significance, slices, regression)


def _slice_scores(questions: list[dict[str, Any]]) -> dict[str, PairedScores]:
    by_slice: dict[str, list[dict[str, Any]]] = {}
    for one in questions:
        if one["champion"]["total"]:  # see paired_scores
            by_slice.setdefault(one["slice"], []).append(one)
    return {
        name: PairedScores(
            champion=[one["champion"]["correct"] for one in by_slice[name]],
            challenger=[one["challenger"]["correct"] for one in by_slice[name]],
            total=sum(one["champion"]["total"] for one in by_slice[name]),
            clusters=[one.get("cluster") for one in by_slice[name]],
        )
        for name in sorted(by_slice)
    }


def slices_of_report(path: Path, side: Literal["champion", "challenger"]) -> list[SliceScore]:
    """Return the scores of one of the two models on each slice of the benchmark.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        prompts: dict[str, list[str]] = {}
        for question in data["questions"]:
            prompts.setdefault(question["slice"], []).append(question["prompt"])
        return [
            SliceScore(one["name"], one[side]["correct"], one[side]["total"], tuple(prompts.get(one["name"], ())))
            for one in data["slices"]
        ]


def score_of_report(path: Path) -> ReportScore:
    """Return the challenger's score in a report.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        totals = data["challenger"]["totals"]
        return ReportScore(data.get("scored_by", ""), totals["correct"] / totals["total"])


def scores_by_question(path: Path) -> dict[str, tuple[int, int, str | None]]:
    """Return the challenger's score on each question in a report: correct, total and cluster by id.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        return {
            one["id"]: (one["challenger"]["correct"], one["challenger"]["total"], one.get("cluster"))
            for one in data["questions"]
        }


def metrics_of_report(path: Path) -> ReportMetrics:
    """Return the table of metrics in a report.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        rows = [MetricRow(**row) for row in data["metrics"]]
        problems = tuple(data.get("problems", ()))  # older reports have none
        base = data.get("base")  # older reports have none
        names = (base["name"] if base else None, data["champion"]["name"], data["challenger"]["name"])
        return ReportMetrics(*names, rows, problems)


@dataclass(frozen=True)
class ReportPlot:
    """A plot as data URLs, for a light and for a dark page."""

    title: str
    light: str
    dark: str


@contextmanager
def _open_report(path: Path) -> Iterator[Any]:
    """Yield the content of a report; a missing file, field or key is a ReportError."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is not a report of this version of the project ({error!r}); materialize eval_report again"
        ) from error


def _as_json(
    loop: str,
    comparison: Comparison,
    verdict: Verdict | None,
    gate: GateSettings,
    budget: BudgetState | None,
    confidence: dict[Role, ConfidenceSeparation],
    facts: ReportFacts,
    moment: datetime,
) -> dict[str, Any]:
    return {
        "loop": loop,
        "created_at": moment.isoformat(),
        "metric": comparison.metric.key,
        "constrained": comparison.constrained,
        "benchmark_sha256": comparison.benchmark_sha256,
        "base": None,
        **{role: _model_json(model) for role, model in comparison.models.items()},
        "wins": len(comparison.won),
        "losses": len(comparison.lost),
        "ties": comparison.ties,
        "flips": {kind: sum(one.flip == kind for one in comparison.questions) for kind in FLIPS},
        "verdict": asdict(verdict) if verdict else None,
        "quality_floor": asdict(comparison.quality_floor),
        "constant_answer": asdict(comparison.constant),
        "gate": gate.model_dump(mode="json"),
        "significance": asdict(comparison.significance),
        "budget": asdict(budget) if budget else None,
        "slice_tests": [asdict(one) for one in comparison.slice_tests(gate)],
        "problems": list(comparison.problems),
        "metrics": [asdict(row) for row in metric_table(comparison)],
        "slices": [_group_json(group) for group in comparison.slices],
        "wordings": [_group_json(group) for group in comparison.wordings],
        "confidence": {side: asdict(value) for side, value in confidence.items()},
        "facts": json.loads(json.dumps(asdict(facts), default=str)),
        "questions": [_question_json(one) for one in comparison.questions],
        "samples": comparison.samples,
        "judgements": [{**asdict(one), "text": str(one)} for one in comparison.judgements],
        "open_questions": _open_questions_json(comparison),
        "regression": comparison.regression.as_json() if comparison.regression else None,
    }


def _model_json(model: ModelResult) -> dict[str, Any]:
    return {
        "name": model.name,
        "gguf_sha256": model.gguf_sha256,
        "size_bytes": model.size_bytes,
        "totals": asdict(model.totals),
        "always_correct": model.always_correct,
        "unconstrained": {
            "totals": asdict(model.sample.totals),
            "answers": [
                {"id": answer.id, "answer": answer.text, **asdict(scores)}
                for answer, scores in zip(model.sample.answers, model.sample.scores, strict=True)
            ],
        },
        "speed": model.speed.model_dump() if model.speed else None,
        "performance": model.performance.model_dump() if model.performance else None,
    }


def _group_json(group: GroupChange) -> dict[str, Any]:
    return {**asdict(group), "change": group.change, "points": group.points}


def _question_json(one: QuestionComparison) -> dict[str, Any]:
    sides = {
        "base": (one.base, one.base_scores),
        "champion": (one.champion, one.champion_scores),
        "challenger": (one.challenger, one.challenger_scores),
    }
    answers = {
        side: {"answer": answer.text, "confidence": answer.confidence, **asdict(scores)}
        for side, (answer, scores) in sides.items()
        if answer and scores
    }
    return {**one.question.as_json(), "change": one.change, "flip": one.flip, **answers}


def _open_questions_json(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the questions without an expected answer, with what each model wrote, its time and its tokens."""
    return [
        {
            **question.as_json(),
            **{
                side: model.open_answers[index].model_dump(
                    include={"text", "seconds", "prompt_tokens", "completion_tokens", "refused"}
                )
                for side, model in comparison.models.items()
                if model.open_answers
            },
        }
        for index, question in enumerate(comparison.open_questions)
    ]


def _flips(comparison: Comparison) -> dict[Flip, list[QuestionComparison]]:
    """Return the questions whose answer changed by kind, losses first, without kinds that do not occur."""
    ordered = sorted(comparison.questions, key=lambda one: -abs(one.change))
    kinds = {kind: [one for one in ordered if one.flip == kind] for kind in FLIPS}
    return {kind: members for kind, members in kinds.items() if members}


def _plots(
    comparison: Comparison, confidence: dict[Role, ConfidenceSeparation], facts: ReportFacts
) -> dict[str, list[ReportPlot]]:
    """Return the plots of each section of the page."""
    sections: dict[str, list[tuple[str, Plot]]] = {"confidence": [], "trend": [], "training": []}
    if confidence["challenger"].bins:
        threshold = confidence["challenger"].threshold
        sections["confidence"] = [
            ("reliability", reliability_plot(comparison, confidence)),
            ("confidence", confidence_plot(comparison.challenger, threshold)),
        ]
    if facts.trend.points:
        sections["trend"] = [("trend over versions", trend_plot(facts.trend, comparison))]
    sections["training"] = [(f"training of {one.name}", training_plot(one)) for one in facts.curves]

    def image(plot: Plot, *, dark: bool) -> str:
        svg = draw([plot], (4.4, 3.0), "svg", dark=dark)
        return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

    return {
        section: [ReportPlot(title, image(plot, dark=False), image(plot, dark=True)) for title, plot in plots]
        for section, plots in sections.items()
    }


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric"] = format_metric
    environment.filters["expected"] = lambda expected: (
        expected if isinstance(expected, str) else json.dumps(expected, ensure_ascii=False)
    )
    return environment.get_template("report_page.html")
