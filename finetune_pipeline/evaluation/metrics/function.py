"""A metric that is the user's own Python function."""

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import ClassVar

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric, MetricError, rounded
from finetune_pipeline.evaluation.metrics.values import answer_text
from finetune_pipeline.settings import FunctionMetric
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline.wording import error_line


class Function(Metric):
    """Calls a function (BenchmarkQuestion, answer) -> score from 0 to 1."""

    constant_scorings: ClassVar[int] = 2_000

    def __init__(self, settings: FunctionMetric) -> None:
        self._key, self._path = settings.key, settings.function
        module, _, name = self._path.rpartition(".")
        try:
            self._function = getattr(import_module(module), name)
        except Exception as error:  # the module is the user's: importing it may raise anything
            raise MetricError(
                f"evaluation: the function {self._path} of the metric {self._key} cannot be imported "
                f"({type(error).__name__}: {error_line(error)}); expected package.module.function, importable where "
                "the loop runs"
            ) from error
        if not callable(self._function):
            raise MetricError(
                f"evaluation: {self._path} of the metric {self._key} is {short_repr(self._function)}; expected a "
                "function (BenchmarkQuestion, answer) -> score from 0 to 1"
            )

    def problems(self, questions: Sequence[BenchmarkQuestion]) -> Iterator[str]:
        """Yield the first problem of the function with an expected or an empty answer.

        A model may write anything, so a function that fails on an empty answer would stop an evaluation after hours.
        """
        for question in questions:
            for text in (answer_text(question.expected), ""):
                try:
                    self.count(question, Answer(text, None, exact=False))
                except MetricError as error:
                    yield str(error)
                    return

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return the function's score in thousandths."""
        where = f"evaluation: the metric {self._key} ({self._path})"
        asked = f"question {question.id!r}" if answer.raw.strip() else f"an empty answer to question {question.id!r}"
        try:
            score = self._function(question, answer.raw)
            number = float(score)
        except Exception as error:  # the function is the user's: it may raise anything
            raise MetricError(
                f"{where} raised {type(error).__name__} on {asked}: {error_line(error).rstrip('.')}; fix the function, "
                "or remove the metric"
            ) from error
        if not (math.isfinite(number) and 0 <= number <= 1):
            raise MetricError(f"{where} returned {short_repr(score)} for {asked}; expected a number from 0 to 1")
        return rounded(number)
