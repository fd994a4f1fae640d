import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.curation.acceptance import Policy, accept, answer_validator
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.records import Example, Turn
from finetune_pipeline.schemas import compile_schema, load_schema
from finetune_pipeline.settings import PROJECT_ROOT, CurationSettings
from finetune_pipeline_tests.conftest import uid

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
RULES = CurationSettings(max_prompt_chars=60, max_answer_chars=30)
POLICY = Policy(RULES, NearIndex({"q1": "150 mm concrete wall, two hours"}), answer_validator(SCHEMA))


def example(**fields):
    given = {"prompt": "a steel door", "target": '{"n": 1}', "reward": 0.9, "confidence": 0.9}
    flags = {"confirmed": False, "corrected": False}
    values = {**given, **flags, **fields}
    return Example(interaction_id=uid("a"), ingest_offset=1, **{"output": values["target"], **values})


def said(text):
    return (Turn(role="user", content=text),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "accepted"),
        ({"reward": 0.29}, "reward below 0.3"),
        ({"reward": 0.3}, "accepted"),  # the bound itself passes
        ({"reward": -1, "corrected": True}, "accepted"),  # a correction's reward is only its weight
        ({"confidence": 0.84}, "confidence below 0.85"),
        ({"confidence": 0.85}, "accepted"),
        ({"confidence": 0.0}, "confidence below 0.85"),
        ({"confidence": None}, "accepted"),  # missing confidence is not low confidence
        ({"confidence": None, "reward": 0.29}, "reward below 0.3"),
        ({"confidence": 0.1, "confirmed": True}, "accepted"),
        ({"confidence": 0.1, "corrected": True}, "accepted"),
        ({"prompt": "x" * 61}, "prompt longer than 60"),
        ({"target": '{"n": ' + "1" * 30 + "}"}, "answer longer than 30"),
        ({"target": "  "}, "answer is empty"),
        ({"target": '{"n": "one"}'}, "does not pass the output schema"),
        ({"target": "no json"}, "does not pass the output schema"),
        ({"prompt": "150 mm CONCRETE wall,  two hours"}, "near-duplicate of a benchmark question"),
        ({"history": said("x" * 50)}, "prompt longer than 60"),  # the whole conversation counts
        ({"history": said("hi"), "prompt": "150 mm concrete wall, two hours"}, "near-duplicate"),  # the prompt alone
        ({"history": said("150 mm concrete wall,"), "prompt": "two hours"}, "near-duplicate"),  # only together
    ],
)
def test_the_rule(fields, reason):
    decision = accept(example(**fields), POLICY)
    assert reason in decision.reason
    assert decision.accepted == (reason == "accepted")


def test_free_text_needs_no_schema():
    assert answer_validator(None)("anything") is None


NUMBERS = st.integers(-5, 10) | st.floats(-5, 10) | st.sampled_from([10**20, 1e300, 2.0, 150])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["wall", "steel", "concrete", "", "D", "Title 24"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["element", "material", "thickness_mm", "fire_rating_hr", "impact_rated", "x"]), VALUES
    )
    | VALUES,
    st.booleans(),
)
def test_the_fast_validator_passes_what_the_exact_one_passes(value, right):
    """The exact one is asked again about what the fast one refuses, so only what it lets through could differ."""
    schema = load_schema(PROJECT_ROOT / "data" / "benchmarks" / "aec_parser.schema.json")
    if right and isinstance(value, dict):
        value = {**value, "element": "wall", "material": "steel"}
    validator = answer_validator(schema)
    assert validator.fast is not None
    assert (validator(json.dumps(value)) is None) == compile_schema(schema).is_valid(value)


@pytest.mark.parametrize("part", [{"pattern": "^a"}, {"$ref": "http://127.0.0.1:9/x"}, {"items": {"format": "date"}}])
def test_a_schema_of_less_plain_words_is_left_to_the_exact_validator(part):
    assert answer_validator({"anyOf": [{"type": "integer"}, part]}).fast is None


def test_similarity_is_the_exact_jaccard_of_shingles():
    index = NearIndex({"a": "abcdefg", "b": "zzzzzzz"})
    # abcdefg has the pieces abcde bcdef cdefg, abcdefh has abcde bcdef cdefh: 2 of 4 are shared
    assert index.nearest("abcdefh") == ("a", 0.5)
    assert index.nearest("nothing alike") is None
