"""The best constant answer, compared with scoring every expected answer on every question."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.evaluation.constant_baseline import ConstantAnswer, best_constant
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline_tests.evaluation.fakes import question, score

ANY_SCHEMA: dict[str, Any] = {}


def by_force(expected: list[Any], scorer: Scorer) -> int:
    """Return the highest score of an expected answer that is given to every question."""
    texts = [one if isinstance(one, str) and not scorer.structured else json.dumps(one) for one in expected]
    return max(sum(score(scorer, one, text).correct for one in expected) for text in texts)


def scorer_of(metric: str | dict[str, Any], *, structured: bool) -> Scorer:
    return Scorer(metric, ANY_SCHEMA if structured else None)


def constant(expected: list[Any], scorer: Scorer) -> ConstantAnswer:
    return best_constant([question(one) for one in expected], scorer)


@pytest.mark.parametrize(
    ("expected", "metric", "structured", "text", "correct"),
    [
        (["yes", "Yes ", "no"], "exact", False, "yes", 2),
        (["the wall is red", "the door is red", "no"], "rouge1", False, "the wall is red", 7),
        (["a a b", "a b b", "a"], "rouge1", False, "a a b", 6),
        ([{"a": 1, "b": 2}, {"a": 1.0, "b": 3}, {"a": True, "b": 3}], "parameters", True, '{"a": 1.0, "b": 3}', 4),
        ([{"a": "Oregon "}, {"a": "oregon"}, {"a": "x"}], "parameters", True, '{"a": "Oregon "}', 2),
        ([{"a": "Oregon "}, {"a": "oregon"}], "exact", True, '{"a": "Oregon "}', 1),
        ([{"a": [1]}, {"a": []}, {"a": {}}, {"a": []}], "parameters", True, '{"a": []}', 2),
        ([{"a": 1}, "x", "x"], "exact", False, "x", 2),
        (["one", "two"], "exact", True, '"one"', 1),
        (["a red wall", "red", "a wall"], "contains", False, "a red wall", 2),
        ([{"a": 1}, {"a": 2}, {"a": 3}], {"kind": "parameters", "tolerances": {"a": 1}}, True, '{"a": 2}', 3),
    ],
)
def test_the_answer_with_the_highest_score_is_found(
    expected: list[Any], metric: Any, structured: bool, text: str, correct: int
) -> None:
    scorer = scorer_of(metric, structured=structured)
    found = constant(expected, scorer)
    assert (found.text, found.correct) == (text, correct)
    assert found.correct == by_force(expected, scorer)


words = st.lists(st.sampled_from(["a", "A", "b", "c,", "!"]), min_size=1, max_size=6).map(" ".join)
leaf = st.sampled_from([1, 1.0, 0, True, False, None, "x", "X ", "", [], {}])
value = st.recursive(leaf, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from("ab"), v, max_size=2))
objects = st.dictionaries(st.sampled_from("abc"), value, max_size=3)
metrics = st.sampled_from(["parameters", "rouge1", "exact"])


@given(st.lists(words | objects, min_size=1, max_size=6), metrics, st.booleans())
def test_the_score_equals_the_scorer_s(expected: list[Any], metric: Any, structured: bool) -> None:
    scorer = scorer_of(metric, structured=structured)
    found = constant(expected, scorer)
    assert found.correct == by_force(expected, scorer)


def test_thousands_of_different_answers_take_one_pass() -> None:
    expected = [f"note {n} says that the wall number {n % 7} is {n} mm thick and painted" for n in range(5_000)]
    # Scoring all 25 million pairs would exceed the time limit of a test.
    assert constant(expected, Scorer("rouge1")).correct >= 8 * 5_000
