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

from finetune_pipeline.evaluation.metrics import Metric, answer_text, leaves, words
from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import InvalidJsonError, parse_json

Expected = dict[str, Any] | str
Score = Callable[[Any], int]


@dataclass(frozen=True)
class ConstantAnswer:
    """An answer, and its score when it is given to every question."""

    text: str
    right: int


def best_constant(expected: Sequence[Expected], metric: Metric, *, structured: bool) -> ConstantAnswer:
    """Return the expected answer that scores highest when given to every question; on ties, the first.

    Args:
        expected: the answer of each question; at least one.
        metric: what counts as correct.
        structured: the loop has an output schema, so that answers are JSON.
    """
    texts = [answer for answer in expected if isinstance(answer, str) and not structured]
    values = [answer for answer in expected if structured or not isinstance(answer, str)]
    of_text = _scorer(texts, metric, lambda text: [normalize(text)])
    of_value = _scorer(values, metric, lambda value: [_key(value)])
    best = ConstantAnswer("", -1)
    for answer in {_form(one, structured): None for one in expected}:
        right = of_text(answer) if texts else 0
        if values:
            with suppress(InvalidJsonError):  # a text for a question that expects JSON
                right += of_value(parse_json(answer))
        if right > best.right:
            best = ConstantAnswer(answer, right)
    return best


def _form(expected: Expected, structured: bool) -> str:
    """Return an expected answer as a model would write it."""
    return expected if isinstance(expected, str) and not structured else json.dumps(expected, ensure_ascii=False)


def _scorer(expected: Sequence[Any], metric: Metric, whole: Callable[[Any], list[Hashable]]) -> Score:
    """Return a function that scores an answer, summed over all these expected answers.

    Args:
        expected: the expected answers.
        metric: what counts as correct.
        whole: the part that `exact` compares.
    """
    if metric == "words":
        return _words_scorer(answer_text(one) for one in expected)
    parts = _leaf_parts if metric == "parameters" else whole
    held = Counter(part for one in expected for part in parts(one))
    return lambda answer: sum(held[part] for part in parts(answer))


def _words_scorer(expected: Iterable[str]) -> Score:
    # The nth occurrence of a word is correct for each expected answer that has it n times and is longer than its index.
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for text in expected:
        wanted = words(text)
        for word, count in Counter(wanted).items():
            for nth in range(1, count + 1):
                lengths[word, nth].append(len(wanted))
    for known in lengths.values():
        known.sort()

    def score(answer: Any) -> int:
        right, seen = 0, Counter[str]()
        for place, word in enumerate(words(answer_text(answer))):
            seen[word] += 1
            known = lengths.get((word, seen[word]), [])
            right += len(known) - bisect_right(known, place)
        return right

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
