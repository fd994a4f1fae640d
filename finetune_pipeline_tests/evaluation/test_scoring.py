"""Scores of one answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.evaluation.constant_baseline import best_constant
from finetune_pipeline.evaluation.metrics.text import count_words
from finetune_pipeline.evaluation.metrics.values import json_equal, leaves, same_value
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.schemas import Rule
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, question, score

RATED = Rule("rated", "Walls have a fire rating", {"required": ["fire_rating_hr"]})
THICK = Rule("thick", "Walls are at least 100 mm", {"properties": {"thickness_mm": {"minimum": 100}}})


@pytest.mark.parametrize(
    ("answer", "correct", "exact", "valid", "stated", "hallucinated"),
    [
        (json.dumps(WALL), 4, True, True, 4, 0),
        ('{"element": "wall", "material": "brick", "thickness_mm": 230.0, "fire_rating_hr": 2}', 4, True, True, 4, 0),
        ('{"element": "wall", "material": " BRICK "}', 2, False, True, 2, 0),
        ('{"element": "wall", "width_mm": 900}', 1, False, True, 2, 1),
        ('{"element": "wall", "width_mm": null}', 1, False, False, 1, 0),
        ('{"element": "roof"}', 0, False, False, 1, 0),
        ('{"element": "wall", "material": {"name": "brick"}}', 1, False, False, 2, 1),
        ('{"element": "wall", "fire_rating_hr": "2"}', 1, False, False, 2, 0),
        ('{"element": "wall", "fire_rating_hr": true}', 1, False, False, 2, 0),
        ("```json\n{}\n```", 0, False, False, 0, 0),
        ("", 0, False, False, 0, 0),
        ('{"element": "wall", "thickness_mm": NaN}', 0, False, False, 0, 0),
        ('{"element": "wall", "thickness_mm": 1e999}', 0, False, False, 0, 0),
        ('{"element": "wall", "thickness_mm": 1' + "0" * 400 + "}", 0, False, False, 0, 0),
        ("[" * 5000, 0, False, False, 0, 0),
        ("[" * 500 + "]" * 500, 0, False, False, 0, 0),
        (r'{"element": "wall", "\ud800": 1}', 0, False, False, 0, 0),
        ('"wall"', 0, False, False, 0, 0),  # states nothing at any path
        ("{}", 0, False, False, 0, 0),
    ],
)
def test_parameters(answer: str, correct: int, exact: bool, valid: bool, stated: int, hallucinated: int) -> None:
    scores = score(Scorer("parameters", SCHEMA), WALL, answer)
    found = (scores.correct, scores.total, scores.exact, scores.valid, scores.stated, scores.hallucinated)
    assert found == (correct, 4, exact, valid, stated, hallucinated)
    assert bool(scores.problem) != valid
    assert scores.compliant is None


def test_true_is_not_one() -> None:
    assert not same_value(True, 1)
    assert not same_value(0, False)
    assert same_value(True, True)
    assert same_value(150, 150.0)


def constant(expected: list[object], scorer: Scorer) -> int:
    return best_constant([question(one) for one in expected], scorer).correct


SAME = [
    ("Mauerwerk", "Mauer\u00adwerk"), ("brick", "\ufeffbri\u200bck\u2060"), ("שלום", "\u202bשלום\u202c\u200f"),
    ("مرحبا", "\u061cمرحبا"),
    ("café", "cafe\u0301"), ("벽", "\u1107\u1167\u11a8"), ("❤", "❤\ufe0f"), ("葛", "葛\U000e0100"),
]  # fmt: skip
"""Texts that look the same."""


@pytest.mark.parametrize(("expected", "answer"), SAME)
def test_answers_that_look_the_same_are_the_same(expected: str, answer: str) -> None:
    assert expected != answer
    assert score(Scorer("exact"), expected, answer).exact and score(Scorer("rouge1"), expected, answer).correct == 1
    assert constant([expected, answer], Scorer("exact")) == 2


@pytest.mark.parametrize(("expected", "answer"), SAME)
@pytest.mark.parametrize("metric", ["exact", "parameters"])
def test_values_of_json_that_look_the_same_are_the_same(expected: str, answer: str, metric: str) -> None:
    scores = score(Scorer(metric), {"wall": [expected]}, json.dumps({"wall": [answer]}))
    assert scores.exact and scores.correct == scores.total == 1
    assert constant([{"wall": [expected]}, {"wall": [answer]}], Scorer(metric, {})) == 2


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("10²", "102"), ("10 m²", "10² m"), ("2½", "21/2"), ("2 ¼", "2 ½"), ("H₂O 2", "H2 O2"), ("٣", "3"),
        ("می\u200cخواهم", "میخواهم"), ("👨\u200d👧", "👨👧"), ("resume", "résumé"), ("-5", "5"),
    ],
)  # fmt: skip
def test_answers_that_look_different_are_different(expected: str, answer: str) -> None:
    assert not score(Scorer("exact"), expected, answer).exact
    assert not score(Scorer("parameters"), {"a": expected}, json.dumps({"a": answer})).correct


@pytest.mark.parametrize("answer", ["", " \n", "\u200b", "\ufeff \u2060"])
def test_an_answer_of_which_nothing_is_seen_is_empty(answer: str) -> None:
    assert score(Scorer("exact"), "wall", answer).problem == "the answer is empty"


@pytest.mark.parametrize(("right", "wrong"), [("10² m", "102 m"), ("2½ m", "21/2 m")])
def test_a_number_with_a_superscript_or_fraction_is_not_another_number(right: str, wrong: str) -> None:
    assert count_words(right, wrong)[0] < count_words(right, right)[0]


def test_lists_are_compared_by_index() -> None:
    scores = score(Scorer("parameters"), {"layers": ["brick", "wool"]}, '{"layers": ["brick", "air", "wool"]}')
    assert (scores.correct, scores.total, scores.stated, scores.hallucinated) == (1, 2, 3, 1)


def test_leaves_keep_their_path() -> None:
    assert dict(leaves({"a": {"b": [1, {"c": 2}]}, "d": []})) == {("a", "b", 0): 1, ("a", "b", 1, "c"): 2, ("d",): []}


def test_violated_rules_are_named() -> None:
    scorer = Scorer("parameters", SCHEMA, [RATED, THICK])
    assert score(scorer, WALL, json.dumps(WALL)).compliant is True
    thin = score(scorer, WALL, '{"element": "wall", "thickness_mm": 90}')
    assert (thin.compliant, thin.failed_rules) == (False, ("rated", "thick"))
    assert score(scorer, WALL, "sorry").compliant is False


@pytest.mark.parametrize(
    ("expected", "answer", "correct", "total"),
    [
        ("use a fire door", "Use a fire door.", 4, 4),
        ("use a fire door", "You could perhaps use a fire door", 1, 4),
        ("the door the wall", "the the the the", 2, 4),
        ("use a fire door", "", 0, 4),
        ("!!", "!!", 1, 1),
    ],
)
def test_rouge1_is_recall_within_the_expected_length(expected: str, answer: str, correct: int, total: int) -> None:
    assert count_words(expected, answer) == (correct, total)
    scores = score(Scorer("rouge1"), expected, answer)
    assert (scores.correct, scores.total, scores.valid) == (correct, total, bool(answer))


def test_exact_counts_answers() -> None:
    scorer = Scorer("exact")
    assert (score(scorer, "Yes, it is.", " yes,  it IS.").correct, score(scorer, "yes", "no").correct) == (1, 0)
    assert score(scorer, {"a": 1}, '{"a": 1.0}').correct == 1
    assert score(scorer, {"a": 1}, '{"a": 1, "b": 2}').total == 1
    assert score(scorer, {"a": 1}, '{"a": 1, "b": 2}').correct == 0


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_the_expected_answer_has_the_highest_score(expected: dict[str, object]) -> None:
    scores = score(Scorer("parameters"), expected, json.dumps(expected))
    assert (scores.correct, scores.exact, scores.valid, scores.hallucinated) == (scores.total, True, True, 0)


@given(json_values, st.text())
def test_no_answer_breaks_the_scorer(value: object, text: str) -> None:
    scorer = Scorer("parameters", SCHEMA, [RATED])
    for answer in (json.dumps(value), text):
        scores = score(scorer, WALL, answer)
        assert 0 <= scores.correct <= scores.total == 4
        assert 0 <= scores.hallucinated <= scores.stated


@given(json_values, json_values)
def test_equality_is_symmetric(left: object, right: object) -> None:
    assert json_equal(left, right) == json_equal(right, left)
    assert json_equal(left, left)


@given(st.text(), st.text())
def test_rouge1_never_exceeds_the_total(expected: str, answer: str) -> None:
    correct, total = count_words(expected, answer)
    assert 0 <= correct <= total
