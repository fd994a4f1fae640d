"""Scores of one answer. Pure; the counts are integers, so that a comparison of two models is exact.

What is correct is counted by the metrics of the loop (see `metrics`). `exact` compares texts in any case and with any
white space, and the values of JSON. Characters that nobody sees never count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics import Answer, Count, make_metrics, metric_label
from finetune_pipeline.evaluation.metrics.code import CodeTests
from finetune_pipeline.evaluation.metrics.judge import Judge
from finetune_pipeline.evaluation.metrics.values import count_hallucinated, json_equal
from finetune_pipeline.schemas import InvalidJsonError, Rule, Schema, compile_schema, parse_json
from finetune_pipeline.settings import Metric
from finetune_pipeline.words import visible_form

_METRIC: TypeAdapter[Metric] = TypeAdapter(Metric)


@dataclass(frozen=True)
class Scores:
    """Scores of one answer against the expected one."""

    correct: int  # of `total`, by the gate's metric
    total: int
    exact: bool
    valid: bool  # JSON that passes the output schema, or a non-empty text
    compliant: bool | None  # passes every rule; None if the loop has no rules
    stated: int  # values that the answer states; 0 for texts
    hallucinated: int  # stated values at paths that the expected answer does not have
    failed_rules: tuple[str, ...] = ()  # ids of the failed rules
    problem: str = ""  # why it is not valid
    metrics: tuple[Count, ...] = ()  # by each further metric


@dataclass(frozen=True)
class MetricLabel:
    """Names of a metric: in JSON, and in tables."""

    key: str
    name: str


class Scorer:
    """Scores the answers of one loop; schema and rules are compiled once.

    Args:
        metric: what `Scores.correct` counts; its settings, or its kind.
        schema: the output schema; with one, answers are JSON.
        rules: compliance rules on the answer's JSON, or on its text.
        metrics: what `Scores.metrics` count.
        questions: all metrics have to be usable for these; None checks nothing.

    Raises:
        MetricError: metrics cannot be used here; each problem is a line.
    """

    def __init__(
        self,
        metric: Metric | str,
        schema: Schema | None = None,
        rules: Sequence[Rule] = (),
        metrics: Sequence[Metric | str] = (),
        questions: Sequence[BenchmarkQuestion] | None = None,
    ) -> None:
        settings = [_METRIC.validate_python(one) for one in (metric, *metrics)]
        self.metric, *self.metrics = make_metrics(settings, questions)
        self.label, *self.labels = [MetricLabel(one.key, metric_label(one)) for one in settings]
        self.structured = schema is not None
        self._schema = compile_schema(schema) if schema is not None else None
        self._rules = {rule.id: compile_schema(rule.schema) for rule in rules}

    def count(self, question: BenchmarkQuestion, answer: str) -> Count:
        """Return how much of an answer is correct by the gate's metric."""
        return self.metric.count(question, self._read(question, answer))

    def is_correct(self, question: BenchmarkQuestion, answer: str) -> bool:
        """Return whether an answer is the expected one, or has the full score by the gate's metric.

        A judge and the tests of code need more than the two texts, so with these only the expected answer is correct.
        """
        read = self._read(question, answer)
        if read.exact or isinstance(self.metric, Judge | CodeTests):
            return read.exact
        count = self.metric.count(question, read)
        return count.correct == count.total > 0

    def score(self, question: BenchmarkQuestion, answer: str) -> Scores:
        """Return the scores of an answer. An answer that should be JSON and is not scores 0.

        Raises:
            MetricError: a metric failed; the message names it and the question.
        """
        read = self._read(question, answer)
        problem, stated, hallucinated = read.problem, 0, 0
        if self._is_text(question):
            problem = "" if visible_form(answer) else "the answer is empty"
        elif not problem:
            invalid = next(self._schema.iter_errors(read.value), None) if self._schema else None
            problem = f"at {invalid.json_path} {invalid.message}" if invalid else ""
            stated, hallucinated = count_hallucinated(question.expected, read.value)
        failed = () if read.problem else tuple(id for id, rule in self._rules.items() if not rule.is_valid(read.value))
        correct = self.metric.count(question, read)
        return Scores(
            correct=correct.correct,
            total=correct.total,
            exact=read.exact,
            valid=not problem,
            compliant=not (failed or read.problem) if self._rules else None,
            stated=stated,
            hallucinated=hallucinated,
            failed_rules=failed,
            problem=problem,
            metrics=tuple(metric.count(question, read) for metric in self.metrics),
        )

    def _is_text(self, question: BenchmarkQuestion) -> bool:
        return self._schema is None and isinstance(question.expected, str)

    def _read(self, question: BenchmarkQuestion, answer: str) -> Answer:
        if self._is_text(question):
            return Answer(answer, answer, visible_form(str(question.expected)) == visible_form(answer))
        try:
            value = parse_json(answer)
        except InvalidJsonError as error:
            return Answer(answer, None, exact=False, problem=str(error))
        return Answer(answer, value, json_equal(question.expected, value))
