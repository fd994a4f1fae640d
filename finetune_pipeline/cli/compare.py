"""`finetune compare`: two models on the loop's benchmark, with the tables of the report in the terminal."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_pipeline.cli.options import json_option, loop_option, one_line, print_json
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.evaluation.comparison import Comparison, GroupChange, Role
    from finetune_pipeline.evaluation.metric_table import MetricRow
    from finetune_pipeline.pipeline.compare import FinishedComparison


@click.command()
@click.argument("first", metavar="A", is_eager=True)
@click.argument("second", metavar="B", is_eager=True)
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the API key of the endpoint.")
@click.option(
    "--questions",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Changed answers to print, losses first, and questions without an expected answer.",
)
@json_option
@loop_option
def compare(
    first: str, second: str, api_key_env: str | None, questions: int, loop: LoopSettings, as_json: bool
) -> None:
    """Compare model B with model A on the loop's benchmark.

    A and B are versions (aec_parser@v1.2.0, champion, previous, base), challengers (the first digits of their SHA-256),
    paths of GGUF files, or models behind OpenAI-compatible servers (http://localhost:8000/v1#model-name).

    Answers of files are reused by their hash; a server is asked each time. The comparison is recorded with wins,
    losses and ties, has an HTML report, and promotes nothing.
    """
    from finetune_pipeline.evaluation.report import HTML, JSON
    from finetune_pipeline.pipeline.compare import compare_two

    done = compare_two(loop, first, second, lambda line: click.echo(line, err=True), api_key_env)
    folder = done.report.path
    if as_json:
        data = json.loads((folder / JSON).read_text(encoding="utf-8"))
        left_out = {"questions", "verdict", "gate"}
        kept = {name: value for name, value in data.items() if name not in left_out}
        print_json({"id": done.record.id, **kept, "html": folder / HTML, "json": folder / JSON})
        return
    console = Console(markup=False, highlight=False)
    for part in _parts(done, questions):
        console.print(part)
    # Not by rich, which would break what people copy.
    click.echo(f"\nbenchmark  {done.comparison.benchmark_sha256}")
    for role, model in done.comparison.models.items():
        click.echo(f"{_LETTERS[role]:<9}  {model.gguf_sha256}")
    click.echo(f"report     {folder / HTML}")


_LETTERS: dict["Role", str] = {"base": "base", "champion": "A", "challenger": "B"}


def _parts(done: "FinishedComparison", questions: int) -> Iterator[str | Text | Table]:
    """Yield the lines and tables of the comparison, as the report has them."""
    from finetune_pipeline.evaluation.gate import capacity, slices_text
    from finetune_pipeline.evaluation.metric_table import metric_table

    comparison, facts = done.comparison, done.facts
    yield comparison.summary
    yield from (f"- {problem}" for problem in comparison.problems)
    s = comparison.significance
    p_value = f"p = {s.p_value:.4f}" if s.p_value >= 0.0001 else "p < 0.0001"
    yield f"B against A: {done.record.wins:,} won, {done.record.losses:,} lost, {done.record.ties:,} tied"
    yield f"{p_value} ({s.method}, one-sided, {s.questions:,} questions)"
    yield f"{capacity(s, done.gate.significance_level)}\n"
    for role, model in comparison.models.items():
        yield f"{_LETTERS[role]:<4}  {model.origin or model.name}"
    yield ""
    yield _metric_table(comparison, "metric", metric_table(comparison), "—")
    if comparison.saturation:
        yield comparison.saturation
    if comparison.contention:
        yield f"The machine was busy: {comparison.contention}. Latency and speed are not reliable."
    yield from (str(judgement) for judgement in comparison.judgements)
    for title, groups in (("slice", comparison.slices), ("wording", comparison.wordings)):
        if groups:
            yield ""
            yield _group_table(comparison, title, groups)
    yield f"slices: {slices_text(comparison.slice_tests(done.gate), done.gate)}"
    if suite := comparison.regression_test(done.gate):
        yield f"regression suite, A as the champion and B as the challenger: {suite.text}"
    yield ""
    yield _confidence_table(comparison, done.threshold)
    for title, rows in (("from use", facts.use), ("training", facts.training)):
        yield ""
        yield _metric_table(comparison, title, rows, "—") if rows else f"{title}: not measured"
    for data in facts.data:
        sources = ", ".join(f"{name} {count:,}" for name, count in data.sources.items()) or "unknown"
        yield (
            f"\ndata of {data.name}: {data.train - data.replayed:,} training + {data.replayed:,} replay, "
            f"{data.validation:,} validation, {data.corrections:,} corrections; sources: {sources}"
        )
    if facts.trend.points:
        scores = ", ".join(f"{point.version} {point.score:.1%}" for point in facts.trend.points)
        yield f"\npromoted versions on this benchmark: {scores}"
    if facts.sealed:
        yield f"\nsealed benchmark: {facts.sealed}"
    yield ""
    yield from _changed_answers(comparison, questions)
    yield from _open_questions(comparison, questions)


def _metric_table(comparison: "Comparison", title: str, rows: "Sequence[MetricRow]", missing: str) -> Table:
    table = _table(comparison, title)
    for row in rows:
        *values, change = row.cells if comparison.base else row.cells[1:]
        table.add_row(row.name, *(missing if value == "—" else value for value in values), change)
    return table


def _group_table(comparison: "Comparison", title: str, groups: "Sequence[GroupChange]") -> Table:
    from finetune_pipeline.evaluation.metric_table import format_metric

    table = _table(comparison, title)
    for group in groups:
        totals = [getattr(group, role) for role in comparison.models]
        scores = [format_metric(one.correct / one.total if one.total else None, "%") for one in totals]
        name = f"{group.name} ({group.champion.questions:,})"
        table.add_row(name, *scores, format_metric(group.points, "%", signed=True))
    return table


def _confidence_table(comparison: "Comparison", threshold: float) -> Table:
    from finetune_pipeline.evaluation.confidence import separate_by_confidence

    table = _table(comparison, "confidence", change=False)
    measured = [
        separate_by_confidence([a.confidence for a in model.answers], [s.exact for s in model.scores], threshold)
        for model in comparison.models.values()
    ]
    for name, values in (
        ("AUROC", [one.auroc for one in measured]),
        ("calibration error", [one.calibration_error for one in measured]),
    ):
        table.add_row(name, *("—" if value is None else f"{value:.3f}" for value in values))
    return table


def _table(comparison: "Comparison", title: str, *, change: bool = True) -> Table:
    """Return a table with a column for each model; numbers are never broken, names are."""
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for heading in [*(_LETTERS[role] for role in comparison.models), *(["change"] if change else [])]:
        table.add_column(heading, justify="right")
    return table


def _changed_answers(comparison: "Comparison", limit: int) -> Iterator[str | Text]:
    from finetune_pipeline.evaluation.comparison import FLIPS

    ordered = sorted(comparison.questions, key=lambda one: -abs(one.change))
    changed = [(kind, one) for kind in FLIPS for one in ordered if one.flip == kind]
    counts = Counter(kind for kind, _ in changed)
    yield "changed answers: " + (", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none")
    for kind, one in changed[:limit]:
        expected = one.question.expected
        yield f"\n{one.question.id}, {kind}: {one_line(one.question.prompt)}"
        text = expected if isinstance(expected, str) else json.dumps(expected, ensure_ascii=False)
        answers = {_LETTERS[role]: getattr(one, role).text for role in comparison.models}
        for name, answer in {"expected": text, **answers}.items():
            yield Text(f"  {name:<8}  {one_line(answer)}", no_wrap=True, overflow="ellipsis")  # the report has all
    if len(changed) > limit:
        yield f"\nand {len(changed) - limit:,} more in the report"


def _open_questions(comparison: "Comparison", limit: int) -> Iterator[str | Text]:
    asked = comparison.open_questions
    if asked:
        yield f"\nquestions without an expected answer, for people to compare: {len(asked):,}"
    for index, question in enumerate(asked[:limit]):
        yield f"\n{question.id}: {one_line(question.prompt)}"
        for role, model in comparison.models.items():
            text = one_line(model.open_answers[index].text)
            yield Text(f"  {_LETTERS[role]:<8}  {text}", no_wrap=True, overflow="ellipsis")
    if len(asked) > limit:
        yield f"\nand {len(asked) - limit:,} more in the report"
