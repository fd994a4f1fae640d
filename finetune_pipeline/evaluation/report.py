"""The report of a comparison: a self-contained HTML page for people, and all metrics as JSON.

Prompts and answers are data: the template escapes everything, and the plots are images.
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
from finetune_pipeline.evaluation.comparison import Comparison, GroupChange, ModelResult, QuestionComparison
from finetune_pipeline.evaluation.confidence import ConfidenceSeparation, separate_by_confidence
from finetune_pipeline.evaluation.gate import QualityFloor, Verdict, decide
from finetune_pipeline.evaluation.metric_table import MetricRow, format_metric, metric_table
from finetune_pipeline.evaluation.plots import (
    Plot,
    confidence_plot,
    draw,
    metrics_plot,
    slices_plot,
    speed_plot,
    wordings_plot,
)
from finetune_pipeline.evaluation.significance import Significance
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
class ReportMetrics:
    """The table of metrics in a report, with the display names of both models."""

    champion: str
    challenger: str
    rows: list[MetricRow]


def write_report(
    folder: Path,
    loop: str,
    comparison: Comparison,
    verdict: Verdict,
    gate: GateSettings,
    min_confidence: float,
    rules: Sequence[Rule] = (),
    created_at: datetime | None = None,
) -> None:
    """Write `report.html` and `report.json` into a folder.

    Args:
        verdict: the gate's verdict on this comparison.
        gate: the settings that gave it.
        min_confidence: curation's threshold, shown next to how well confidence separates correct from incorrect.
        rules: the compliance rules, for their titles.
        created_at: default now.
    """
    moment = created_at or datetime.now(UTC)
    models = {"champion": comparison.champion, "challenger": comparison.challenger}
    confidence = {
        side: separate_by_confidence(
            [answer.confidence for answer in model.answers], [score.exact for score in model.scores], min_confidence
        )
        for side, model in models.items()
    }
    data = _as_json(loop, comparison, verdict, gate, confidence, moment)
    write_text(folder / JSON, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    champion_failures, challenger_failures = (
        Counter(rule for score in model.scores for rule in score.failed_rules) for model in models.values()
    )
    page = _template().render(
        loop=loop,
        created_at=moment.strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        verdict=verdict,
        gate=gate,
        metrics=metric_table(comparison),
        plots=_plots(comparison, min_confidence),
        confidence=confidence,
        questions=[("won", comparison.won), ("lost", comparison.lost)],
        invalid=[one for one in comparison.questions if not one.challenger_scores.valid],
        violations=[one for one in comparison.questions if one.challenger_scores.failed_rules],
        rule_counts=[(rule.id, rule.title, champion_failures[rule.id], challenger_failures[rule.id]) for rule in rules],
        limit=_MAX_ROWS,
    )
    write_text(folder / HTML, page)


@dataclass(frozen=True)
class ReportFindings:
    """What the gate and the checks need of a report.

    Attributes:
        verdict: of the gate, applied again to the counts.
        changes: slice -> change of its score in points, -1 to 1.
        regressed: names of the slices in which the challenger's score is lower.
    """

    verdict: Verdict
    significance: Significance
    changes: dict[str, float]
    regressed: tuple[str, ...]


def findings_of_report(path: Path, gate: GateSettings) -> ReportFindings:
    """Return the gate's verdict on the counts in a report, with significance and slices.

    Args:
        path: the `report.json`.
        gate: the current settings, which may differ from those of the report.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        significance, regressed = Significance(**data["significance"]), tuple(data["regressed_slices"])
        verdict = decide(
            data["verdict"]["champion_correct"],
            data["verdict"]["challenger_correct"],
            data["verdict"]["total"],
            QualityFloor(**data["quality_floor"]),
            gate,
            significance,
            regressed,
        )
        changes = {one["name"]: one["points"] for one in data["slices"]}
        return ReportFindings(verdict, significance, changes, regressed)


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


def metrics_of_report(path: Path) -> ReportMetrics:
    """Return the table of metrics in a report.

    Raises:
        ReportError: the report is missing, or another version of this project wrote it.
    """
    with _open_report(path) as data:
        rows = [MetricRow(**row) for row in data["metrics"]]
        return ReportMetrics(data["champion"]["name"], data["challenger"]["name"], rows)


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
    verdict: Verdict,
    gate: GateSettings,
    confidence: dict[str, ConfidenceSeparation],
    moment: datetime,
) -> dict[str, Any]:
    return {
        "loop": loop,
        "created_at": moment.isoformat(),
        "metric": comparison.metric,
        "benchmark_sha256": comparison.benchmark_sha256,
        "champion": _model_json(comparison.champion),
        "challenger": _model_json(comparison.challenger),
        "verdict": asdict(verdict),
        "quality_floor": asdict(comparison.quality_floor),
        "constant_answer": asdict(comparison.constant),
        "gate": gate.model_dump(mode="json"),
        "significance": asdict(comparison.significance),
        "regressed_slices": list(comparison.regressed_slices),
        "metrics": [asdict(row) for row in metric_table(comparison)],
        "slices": [_group_json(group) for group in comparison.slices],
        "wordings": [_group_json(group) for group in comparison.wordings],
        "confidence": {side: asdict(value) for side, value in confidence.items()},
        "questions": [_question_json(one) for one in comparison.questions],
    }


def _model_json(model: ModelResult) -> dict[str, Any]:
    return {
        "name": model.name,
        "gguf_sha256": model.gguf_sha256,
        "size_bytes": model.size_bytes,
        "totals": asdict(model.totals),
        "speed": model.speed.model_dump() if model.speed else None,
    }


def _group_json(group: GroupChange) -> dict[str, Any]:
    return {**asdict(group), "change": group.change, "points": group.points}


def _question_json(one: QuestionComparison) -> dict[str, Any]:
    question = {key: value for key, value in asdict(one.question).items() if value is not None}
    sides = {"champion": (one.champion, one.champion_scores), "challenger": (one.challenger, one.challenger_scores)}
    answers = {
        side: {"answer": answer.text, "confidence": answer.confidence, **asdict(scores)}
        for side, (answer, scores) in sides.items()
    }
    return {**question, "change": one.change, **answers}


def _plots(comparison: Comparison, min_confidence: float) -> list[tuple[str, str]]:
    """Return the title and the data URL of each plot."""
    plots: list[tuple[str, Plot, float]] = [
        ("metrics of both models", metrics_plot(comparison), 3.3),
        ("change in each slice", slices_plot(comparison), max(2.6, 1.1 + 0.3 * len(comparison.slices))),
    ]
    if comparison.wordings:
        plots.append(("accuracy by wording", wordings_plot(comparison), 1.6 + 0.5 * len(comparison.wordings)))
    if comparison.challenger.speed and comparison.champion.speed:
        plots.append(("latency", speed_plot(comparison), 2.6))
    if any(answer.confidence is not None for answer in comparison.challenger.answers):
        plots.append(("confidence", confidence_plot(comparison.challenger, min_confidence), 2.6))
    return [
        (title, "data:image/svg+xml;base64," + base64.b64encode(draw([plot], (6.4, height), "svg")).decode())
        for title, plot, height in plots
    ]


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
