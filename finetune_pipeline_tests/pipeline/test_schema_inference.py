"""The JSON Schema that is inferred from answers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.inference.json_schema import rewrite_schema
from finetune_pipeline.pipeline.schema_inference import infer_schema, is_closed_set
from finetune_pipeline.schemas import answer_validator, compile_schema

# Control characters in a name can be validated, but not enforced while decoding.
TEXTS = st.sampled_from(["", "a", "b", "true", "1", "Ž", "李"]) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), max_size=4
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=8), st.integers(1, 8))
def test_every_answer_passes_the_schema_that_was_inferred_from_it(answers, times):
    schema = infer_schema(answers * times)
    validator = answer_validator(schema)
    assert [problem for answer in answers if (problem := validator(json.dumps(answer)))] == []


@settings(max_examples=40, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=6), st.integers(1, 8))
def test_constrained_decoding_can_enforce_the_schema(answers, times):
    rewrite_schema(infer_schema(answers * times))


LABELS = [{"kind": kind} for kind in ("billing", "hardware")] * 8


@pytest.mark.parametrize(
    ("answers", "properties"),
    [
        ([{"a": 1}, {"a": 2}], {"a": {"type": "integer"}}),
        ([{"a": 1}, {"a": 2.5}], {"a": {"type": "number"}}),  # an integer is a number
        ([{"a": True}, {"a": 1}], {"a": {"type": ["integer", "boolean"]}}),  # true is not 1
        ([{"a": None}, {"a": "x"}], {"a": {"type": ["string", "null"]}}),
        (LABELS, {"kind": {"type": "string", "enum": ["billing", "hardware"]}}),
        ([*LABELS, {"kind": None}], {"kind": {"type": ["string", "null"], "enum": ["billing", "hardware", None]}}),
        ([*LABELS, {"kind": 3}], {"kind": {"type": ["string", "integer"]}}),  # not only texts
        ([*LABELS, {"kind": "new"}], {"kind": {"type": "string"}}),  # a value that occurs once: there may be more
        ([{"kind": f"{n % 60}"} for n in range(600)], {"kind": {"type": "string"}}),  # too many values
        ([{"kind": "x" * 101}] * 20, {"kind": {"type": "string"}}),  # prose
        ([{"tags": ["a", "b"]}] * 8, {"tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}}),
        ([{"tags": []}], {"tags": {"type": "array"}}),
    ],
)
def test_types_and_enumerations(answers, properties):
    schema = infer_schema(answers)
    assert (schema["properties"], schema["additionalProperties"]) == (properties, False)


def test_a_property_is_required_where_every_answer_has_it():
    schema = infer_schema([{"at": {"city": "Rome", "zip": 1}, "n": 1}, {"at": {"city": "Oslo"}}])
    assert schema["required"] == ["at"] and schema["properties"]["at"]["required"] == ["city"]
    assert not compile_schema(schema).is_valid({"at": {"city": "Rome", "town": "x"}})


def test_an_object_whose_names_are_data_is_a_map():
    schema = infer_schema([{"words": {f"word{n}": n}} for n in range(201)])
    assert schema["properties"]["words"] == {"type": "object", "additionalProperties": {"type": "integer"}}


def test_deep_answers_end_in_any_value():
    answer: dict = {}
    for _ in range(60):
        answer = {"in": answer}
    rewrite_schema(infer_schema([answer]))
    assert answer_validator(infer_schema([answer]))(json.dumps(answer)) is None


@pytest.mark.parametrize(
    ("texts", "closed"),
    [
        ([], False),
        (["a"] * 3, False),
        (["a"] * 4, True),
        (["a", "b"] * 3, False),  # they repeat too rarely
        (["a", "b"] * 30 + ["c"], True),  # 1 of 61 occurs once
        (["a", "b"] * 20 + ["c"], False),  # 1 of 41
        (["Spotify", "spotify"] * 9, False),
    ],
)
def test_closed_sets(texts, closed):
    assert is_closed_set(texts) == closed
