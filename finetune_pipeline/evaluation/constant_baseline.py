"""The best constant answer: the expected answer that scores highest when it is given to every question. Pure.

A model that does not score above it has learned nothing about the questions. Scores are sums over parts of an answer
(a value at a path, the nth occurrence of a word), so each answer is scored in one pass over its parts instead of once
for each question.
"""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from finetune_pipeline.evaluation.scoring import Metric, answer_text, leaves, words
from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import InvalidJsonError, parse_json

Expected = dict[str, Any] | str
ScoreFunction = Callable[[Any], int]


@dataclass(frozen=True)
class ConstantAnswer:
    """An answer, and its score when it is given to every question."""

    text: str
    correct: int


def best_constant(expected: Sequence[Expected], metric: Metric, *, structured: bool) -> ConstantAnswer:
    """Return the expected answer that scores highest when given to every question; on ties, the first.

    Args:
        expected: the answer of each question; at least one.
        metric: what counts as correct.
        structured: the loop has an output schema, so that answers are JSON.
    """
    texts = [answer for answer in expected if isinstance(answer, str) and not structured]
    values = [answer for answer in expected if structured or not isinstance(answer, str)]
    score_on_texts = _score_function(texts, metric, lambda text: [normalize(text)])
    score_on_values = _score_function(values, metric, lambda value: [_key(value)])
    # Each expected answer as a model would write it, without repetitions.
    answers = dict.fromkeys(
        one if isinstance(one, str) and not structured else json.dumps(one, ensure_ascii=False) for one in expected
    )
    best = ConstantAnswer("", -1)
    for answer in answers:
        correct = score_on_texts(answer) if texts else 0
        if values:
            with suppress(InvalidJsonError):  # a text given to a question that expects JSON
                correct += score_on_values(parse_json(answer))
        if correct > best.correct:
            best = ConstantAnswer(answer, correct)
    return best


def _score_function(expected: Sequence[Any], metric: Metric, whole: Callable[[Any], list[Hashable]]) -> ScoreFunction:
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
    return [(path, _key(normalize(leaf) if isinstance(leaf, str) else leaf)) for path, leaf in leaves(value)]


def _key(value: Any) -> Hashable:
    """Return a key that is equal for values that `json_equal` considers equal: 150 is 150.0, true is not 1."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(child)) for name, child in value.items())
    if isinstance(value, list):
        return "list", tuple(map(_key, value))
    return ("bool", value) if isinstance(value, bool) else ("value", value)
