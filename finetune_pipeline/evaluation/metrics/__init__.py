"""Metrics of answers: how much of an answer is correct.

base.py        what every metric has
values.py      JSON values, and when two of them are the same
parameters.py  parameter accuracy
text.py        exact, contains, regex, ROUGE, chrF, edit similarity
embedding.py   similarity by sentence embeddings
code.py        whether code parses, and passes its tests in the sandbox of sandbox.py
function.py    the user's own function
judge.py       a model that compares two answers
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric, MetricError
from finetune_pipeline.evaluation.metrics.code import CodeTests, Parses
from finetune_pipeline.evaluation.metrics.embedding import EmbeddingSimilarity, Style
from finetune_pipeline.evaluation.metrics.function import Function
from finetune_pipeline.evaluation.metrics.judge import Judge
from finetune_pipeline.evaluation.metrics.parameters import Parameters
from finetune_pipeline.evaluation.metrics.text import (
    Chrf,
    Contains,
    EditSimilarity,
    Exact,
    Regex,
    Rouge1,
    RougeL,
)
from finetune_pipeline.settings import MetricSettings

__all__ = ["Answer", "Count", "Metric", "MetricError", "check_metric", "make_metrics", "metric_label"]

_MAX_PROBLEMS = 20  # of one metric

_METRICS: dict[str, tuple[str, Callable[[Any], Metric]]] = {
    "parameters": ("parameter accuracy", Parameters),
    "exact": ("accuracy", lambda _: Exact()),
    "contains": ("contains the expected text", lambda _: Contains()),
    "regex": ("regular expression", Regex),
    "rouge1": ("ROUGE-1 recall", lambda _: Rouge1()),
    "rougeL": ("ROUGE-L F1", lambda _: RougeL()),
    "chrf": ("chrF2", lambda _: Chrf()),
    "edit_similarity": ("edit similarity", lambda _: EditSimilarity()),
    "embedding_similarity": ("embedding similarity", lambda _: EmbeddingSimilarity()),
    "style": ("similarity to the person's texts", Style),
    "parses": ("code parses", Parses),
    "tests": ("code passes its tests", CodeTests),
    "function": ("own metric", Function),
    "judge": ("preferred by the judge", Judge),
}
"""Kind -> its name in tables, and what makes the metric from its settings."""


def make_metrics(
    settings: Sequence[MetricSettings], questions: Sequence[BenchmarkQuestion] | None = None
) -> list[Metric]:
    """Return the metrics of these settings.

    Args:
        settings: of each metric.
        questions: all metrics have to be usable for these; None checks nothing.

    Raises:
        MetricError: metrics cannot be made, because an extra is not installed or a function cannot be imported, or
            cannot be used for the questions; each problem is a line.
    """
    made, problems = [], []
    for one in settings:
        try:
            made.append(_METRICS[one.kind][1](one))
            if questions is not None:
                check_metric(made[-1], questions)
        except MetricError as error:
            problems.append(str(error))
    if problems:
        raise MetricError("\n".join(problems))
    return made


def check_metric(metric: Metric, questions: Sequence[BenchmarkQuestion]) -> None:
    """Check that a metric can be used for these questions.

    Raises:
        MetricError: it cannot; each problem is a line.
    """
    if problems := list(islice(metric.problems(questions), _MAX_PROBLEMS)):
        raise MetricError("\n".join(problems))


def metric_label(settings: MetricSettings) -> str:
    """Return the name of a metric in tables: its own, or that of its kind."""
    return settings.name or _METRICS[settings.kind][0]
