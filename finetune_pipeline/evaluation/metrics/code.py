"""Metrics of code: whether it parses, and whether it passes its tests in a sandbox."""

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, ClassVar

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric, MetricError
from finetune_pipeline.evaluation.metrics.sandbox import isolation_problem, run_in_sandbox
from finetune_pipeline.evaluation.metrics.text import missing_extra
from finetune_pipeline.evaluation.metrics.values import answer_text
from finetune_pipeline.settings import CodeTestsMetric, ParsesMetric

_FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_MAX_CHARACTERS = 100_000


def code_of(answer: str) -> str:
    r"""Return the first fenced block of an answer, or the whole answer if it has none.

    >>> code_of("Sure:\n```python\nx = 1\n```\nDone.")
    'x = 1\n'
    """
    found = _FENCED.search(answer)
    return found[2] if found else answer


class Parses(Metric):
    """Counts answers whose code parses; code without any statement does not."""

    def __init__(self, settings: ParsesMetric) -> None:
        self._parses = _python_parses if settings.language == "python" else _tree_sitter(settings.language)

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return 1 of 1 if the code parses."""
        code = code_of(answer.raw)
        return Count(int(bool(code.strip()) and len(code) <= _MAX_CHARACTERS and self._parses(code)), 1)


class CodeTests(Metric):
    """Counts answers whose Python code passes the tests of its question."""

    constant_scorings: ClassVar[int] = 0

    def __init__(self, settings: CodeTestsMetric) -> None:
        self._settings = settings
        if problem := isolation_problem():
            raise MetricError(
                f"evaluation: the metric {settings.key} runs code that a model wrote, and is off because the code "
                f"cannot be isolated here: {problem}; fix that, or remove the metric"
            )

    def problems(self, questions: Sequence[BenchmarkQuestion]) -> Iterator[str]:
        """Yield a problem for each question without tests, and for each whose expected answer does not pass them."""
        for question in questions:
            if not question.tests:
                yield (
                    f"evaluation: the metric {self._settings.key} needs the tests of every question, and "
                    f'{question.id!r} has none; add "tests", Python code that raises if the answer is wrong'
                )
                continue
            result = self._run(question, answer_text(question.expected))
            if not result.passed:
                yield (
                    f"evaluation: the expected answer of {question.id!r} does not pass its own tests "
                    f"({result.problem}); correct one of them"
                )

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return 1 of 1 if the code passes."""
        return Count(int(bool(answer.raw.strip()) and self._run(question, answer.raw).passed), 1)

    def _run(self, question: BenchmarkQuestion, answer: str) -> Any:
        settings = self._settings
        return run_in_sandbox(code_of(answer), question.tests or "", settings.timeout_seconds, settings.memory_mb)


def _python_parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in a model's code
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _tree_sitter(language: str) -> Callable[[str], bool]:
    name = f"tree_sitter_{language}"
    try:
        grammar = import_module(name)
        from tree_sitter import Language, Parser
    except ImportError as error:
        raise missing_extra("parses", "code") from error
    function = "language_typescript" if language == "typescript" else "language"
    parser = Parser(Language(getattr(grammar, function)()))

    def parses(code: str) -> bool:
        root = parser.parse(code.encode("utf-8", "replace")).root_node
        return bool(root.named_child_count) and not root.has_error

    return parses
