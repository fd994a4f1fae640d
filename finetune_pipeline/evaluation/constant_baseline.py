"""The best constant answer: the expected answer that scores highest when it is given to every question. Pure.

A model that does not score above it has learned nothing about the questions. Scores are sums over parts of an answer
(a value at a path, the nth occurrence of a word), so each answer is scored in one pass over its parts instead of once
for each question. For a metric that is no such sum, the most frequent expected answers are scored on each question.
"""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Metric
from finetune_pipeline.evaluation.metrics.parameters import Parameters
from finetune_pipeline.evaluation.metrics.text import Exact, Rouge1
from finetune_pipeline.evaluation.metrics.values import answer_text, leaves
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.words import as_displayed, visible_form, words

Expected = dict[str, Any] | str
ScoreFunction = Callable[[Any], int]
Sums = Literal["parameters", "rouge1", "exact"]
"""A metric whose score is a sum over parts of an answer."""


@dataclass(frozen=True)
class ConstantAnswer:
    """An answer, and its score when it is given to every question."""

    text: str
    correct: int


def best_constant(questions: Sequence[BenchmarkQuestion], scorer: Scorer) -> ConstantAnswer:
    """Return the expected answer that scores highest when given to every question; on ties, the first.

    A metric may limit how many answers are scored (`Metric.constant_scorings`). Then only the most frequent ones are
    tried, or none, and the score is 0.

    Args:
        questions: at least one.
        scorer: the loop's.
    """
    expected = [question.expected for question in questions]
    if (sums := _sums(scorer.metric)) is not None:
        return _best_by_parts(expected, sums, structured=scorer.structured)
    counts = Counter(_as_written(one, structured=scorer.structured) for one in expected)
    best = ConstantAnswer("", 0)
    for answer, _ in counts.most_common(scorer.metric.constant_scorings // len(questions)):
        correct = sum(scorer.count(question, answer).correct for question in questions)
        if correct > best.correct:
            best = ConstantAnswer(answer, correct)
    return best


def _sums(metric: Metric) -> Sums | None:
    if isinstance(metric, Parameters):
        return "parameters" if metric.is_plain else None
    return "exact" if isinstance(metric, Exact) else "rouge1" if isinstance(metric, Rouge1) else None


def _as_written(expected: Expected, *, structured: bool) -> str:
    """Return an expected answer as a model would write it."""
    return expected if isinstance(expected, str) and not structured else json.dumps(expected, ensure_ascii=False)


def _best_by_parts(expected: Sequence[Expected], metric: Sums, *, structured: bool) -> ConstantAnswer:
    texts = [answer for answer in expected if isinstance(answer, str) and not structured]
    values = [answer for answer in expected if structured or not isinstance(answer, str)]
    score_on_texts = _score_function(texts, metric, lambda text: [visible_form(text)])
    score_on_values = _score_function(values, metric, lambda value: [_key(value)])
    answers = dict.fromkeys(_as_written(one, structured=structured) for one in expected)  # without repetitions
    best = ConstantAnswer("", -1)
    for answer in answers:
        correct = score_on_texts(answer) if texts else 0
        if values:
            with suppress(InvalidJsonError):  # a text given to a question that expects JSON
                correct += score_on_values(parse_json(answer))
        if correct > best.correct:
            best = ConstantAnswer(answer, correct)
    return best


def _score_function(expected: Sequence[Any], metric: Sums, whole: Callable[[Any], list[Hashable]]) -> ScoreFunction:
    """Return a function that scores an answer, summed over all these expected answers.

    Args:
        expected: the expected answers.
        metric: what counts as correct.
        whole: the one part of an answer that `exact` compares.
    """
    if metric == "rouge1":
        return _rouge1_function(answer_text(one) for one in expected)
    parts = _leaf_parts if metric == "parameters" else whole
    counts = Counter(part for one in expected for part in parts(one))
    return lambda answer: sum(counts[part] for part in parts(answer))


def _rouge1_function(expected: Iterable[str]) -> ScoreFunction:
    # The nth occurrence of a word counts for an expected answer that has the word at least n times and is longer than
    # the index of the occurrence.
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for text in expected:
        wanted = words(text)
        for word, count in Counter(wanted).items():
            for nth in range(1, count + 1):
                lengths[word, nth].append(len(wanted))
    for known in lengths.values():
        known.sort()

    def score(answer: Any) -> int:
        correct, seen = 0, Counter[str]()
        for index, word in enumerate(words(answer_text(answer))):
            seen[word] += 1
            known = lengths.get((word, seen[word]), [])
            correct += len(known) - bisect_right(known, index)
        return correct

    return score


def _leaf_parts(value: Any) -> list[Hashable]:
    """Return the parts that `count_parameters` compares; equal for values that `same_value` considers the same."""
    return [(path, _key(visible_form(leaf) if isinstance(leaf, str) else leaf)) for path, leaf in leaves(value)]


def _key(value: Any) -> Hashable:
    """Return a key that is equal for values that `json_equal` considers equal: 150 is 150.0, true is not 1."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(child)) for name, child in value.items())
    if isinstance(value, list):
        return "list", tuple(map(_key, value))
    if isinstance(value, bool):
        return "bool", value
    return "value", as_displayed(value) if isinstance(value, str) else value
