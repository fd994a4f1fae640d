"""The report of a comparison: a page for people (self-contained HTML) and all its figures as JSON.

Prompts and answers are data: the template escapes everything, and the plots are images.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.evaluation.comparison import Comparison, GroupChange, Pair, Side
from finetune_pipeline.evaluation.confidence import Separation, separation
from finetune_pipeline.evaluation.figures import metric_table, show
from finetune_pipeline.evaluation.gate import Verdict, Worth, decide
from finetune_pipeline.evaluation.plots import (
    confidence_plot,
    draw,
    metrics_plot,
    plot_png,
    slices_plot,
    speed_plot,
    wordings_plot,
)
from finetune_pipeline.evaluation.significance import Significance
from finetune_pipeline.schemas import Rule
from finetune_pipeline.settings import GateSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "HTML",
    "JSON",
    "ReportError",
    "SliceScore",
    "plot_png",
    "slices_of_report",
    "verdict_of_report",
    "write_report",
]

HTML = "report.html"
JSON = "report.json"
_ROWS = 200
"""Rows of a table on the page; the JSON has all."""


class ReportError(RuntimeError):
    """A report cannot be read; the message says which, and what to do."""


@dataclass(frozen=True)
class SliceScore:
    """How a model did in a part of the benchmark, and what it was asked there."""

    name: str
    right: int
    total: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class _Plot:
    title: str
    source: str


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
        verdict: of the gate about this comparison.
        gate: the settings that gave it.
        min_confidence: curation's threshold, shown beside how well confidence separates right from wrong.
        rules: the compliance rules, for their titles.
        created_at: default now.
    """
    moment = created_at or datetime.now(UTC)
    separations = {
        "champion": _separation(comparison.champion, min_confidence),
        "challenger": _separation(comparison.challenger, min_confidence),
    }
    data = _as_json(loop, comparison, verdict, gate, separations, moment)
    write_text(folder / JSON, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    page = _template().render(
        loop=loop,
        created_at=moment.strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        verdict=verdict,
        gate=gate,
        figures=metric_table(comparison),
        plots=_plots(comparison, min_confidence),
        separations=separations,
        questions=[("won", comparison.won), ("lost", comparison.lost)],
        invalid=_of_side(comparison, lambda pair: not pair.challenger_scores.valid),
        broken=_of_side(comparison, lambda pair: bool(pair.challenger_scores.failed_rules)),
        rule_counts=_rule_counts(comparison, rules),
        limit=_ROWS,
    )
    write_text(folder / HTML, page)


def verdict_of_report(path: Path, gate: GateSettings) -> Verdict:
    """Ask the gate again, on the counts that a report holds.

    Args:
        path: the `report.json`.
        gate: the settings as they are now, which need not be those of the report.

    Raises:
        ReportError: the report is missing or not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return decide(
            data["verdict"]["champion_right"],
            data["verdict"]["challenger_right"],
            data["verdict"]["total"],
            Worth(**data["worth"]),
            gate,
            Significance(**data["significance"]),
            data["falling_slices"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not a report ({error!r}); materialize eval_report again") from error


def slices_of_report(path: Path, side: Literal["champion", "challenger"]) -> list[SliceScore]:
    """The benchmark's slices as one of the two models answered them.

    Args:
        path: the `report.json`.

    Raises:
        ReportError: the report is missing or not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        asked: dict[str, list[str]] = {}
        for question in data["questions"]:
            asked.setdefault(question["slice"], []).append(question["prompt"])
        return [
            SliceScore(one["name"], one[side]["right"], one[side]["total"], tuple(asked.get(one["name"], ())))
            for one in data["slices"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not a report ({error!r}); materialize eval_report again") from error


def _as_json(
    loop: str,
    comparison: Comparison,
    verdict: Verdict,
    gate: GateSettings,
    separations: dict[str, Separation],
    moment: datetime,
) -> dict[str, Any]:
    return {
        "loop": loop,
        "created_at": moment.isoformat(),
        "metric": comparison.metric,
        "benchmark_sha256": comparison.benchmark_sha256,
        "champion": _side_json(comparison.champion),
        "challenger": _side_json(comparison.challenger),
        "verdict": asdict(verdict),
        "worth": asdict(comparison.worth),
        "constant_answer": asdict(comparison.constant),
        "gate": gate.model_dump(mode="json"),
        "significance": asdict(comparison.significance),
        "falling_slices": list(comparison.falling_slices),
        "figures": [asdict(figure) for figure in metric_table(comparison)],
        "slices": [_group_json(group) for group in comparison.slices],
        "wordings": [_group_json(group) for group in comparison.wordings],
        "confidence": {side: asdict(value) for side, value in separations.items()},
        "questions": [_pair_json(pair) for pair in comparison.pairs],
    }


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "gguf_sha256": side.gguf_sha256,
        "size_bytes": side.size_bytes,
        "totals": asdict(side.totals),
        "speed": side.speed.model_dump() if side.speed else None,
    }


def _group_json(group: GroupChange) -> dict[str, Any]:
    return {**asdict(group), "change": group.change, "points": group.points}


def _pair_json(pair: Pair) -> dict[str, Any]:
    question = {key: value for key, value in asdict(pair.question).items() if value is not None}
    sides = {
        "champion": (pair.champion, pair.champion_scores),
        "challenger": (pair.challenger, pair.challenger_scores),
    }
    return {
        **question,
        "change": pair.change,
        **{
            name: {"answer": answer.text, "confidence": answer.confidence, **asdict(scores)}
            for name, (answer, scores) in sides.items()
        },
    }


def _separation(side: Side, threshold: float) -> Separation:
    return separation([answer.confidence for answer in side.answers], [score.exact for score in side.scores], threshold)


def _of_side(comparison: Comparison, wanted: Callable[[Pair], bool]) -> list[Pair]:
    return [pair for pair in comparison.pairs if wanted(pair)]


def _rule_counts(comparison: Comparison, rules: Sequence[Rule]) -> list[tuple[str, str, int, int]]:
    """Id and title of each rule, and how often it failed for the champion and for the challenger."""
    champion, challenger = (
        Counter(rule for score in side.scores for rule in score.failed_rules)
        for side in (comparison.champion, comparison.challenger)
    )
    return [(rule.id, rule.title, champion[rule.id], challenger[rule.id]) for rule in rules]


def _plots(comparison: Comparison, min_confidence: float) -> list[_Plot]:
    wide = max(2.6, 1.1 + 0.3 * len(comparison.slices))
    plots: list[tuple[str, Callable[[Axes], None], float]] = [
        ("metrics of both models", metrics_plot(comparison), 3.3),
        ("change in each slice", slices_plot(comparison), wide),
    ]
    if comparison.wordings:
        plots.append(("accuracy by wording", wordings_plot(comparison), 1.6 + 0.5 * len(comparison.wordings)))
    if comparison.challenger.speed and comparison.champion.speed:
        plots.append(("latency", speed_plot(comparison), 2.6))
    if any(answer.confidence is not None for answer in comparison.challenger.answers):
        plots.append(("confidence", confidence_plot(comparison.challenger, min_confidence), 2.6))
    return [_Plot(title, _image(draw([plot], (6.4, height), "svg"))) for title, plot, height in plots]


def _image(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    environment.filters["expected"] = _expected_text
    return environment.get_template("report_page.html")


def _expected_text(expected: Any) -> str:
    return expected if isinstance(expected, str) else json.dumps(expected, ensure_ascii=False)
