"""The acceptance policy: which examples may train, and why others may not."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.curation.acceptance import Policy, TokenCounter, accept, repeated_fraction
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.records import Example, Turn
from finetune_pipeline.refusals import is_refusal
from finetune_pipeline.schemas import answer_validator, compile_schema, load_schema
from finetune_pipeline.settings import PROJECT_ROOT, CurationSettings
from finetune_pipeline_tests.conftest import START, uid

from .datasets import example as numbered_example

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
SETTINGS = CurationSettings(max_prompt_chars=60, max_answer_chars=30)
BENCHMARK = NearIndex({"q1": "150 mm concrete wall, two hours"})
POLICY = Policy(SETTINGS, BENCHMARK, answer_validator(SCHEMA))


def example(**fields):
    given = {"prompt": "a steel door", "target": '{"n": 1}', "reward": 0.9, "confidence": 0.9}
    flags = {"confirmed": False, "corrected": False}
    values = {**given, **flags, **fields}
    return Example(interaction_id=uid("a"), ingest_offset=1, created_at=START, **{"output": values["target"], **values})


FREE_TEXT = Policy(CurationSettings(), BENCHMARK, answer_validator(None))
PROSE = (PROJECT_ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")


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
        ({"target": "\u200b\ufeff"}, "answer is empty"),
        ({"target": '{"n": "one"}'}, "does not pass the output schema"),
        ({"target": "no json"}, "does not pass the output schema"),
        ({"prompt": "150 mm CONCRETE wall,  two hours"}, "near-duplicate of a benchmark question"),
        ({"history": said("x" * 50)}, "prompt longer than 60"),  # the whole conversation counts
        ({"history": said("hi"), "prompt": "150 mm concrete wall, two hours"}, "near-duplicate"),  # the prompt alone
        ({"history": said("150 mm concrete wall,"), "prompt": "two hours"}, "near-duplicate"),  # only together
    ],
)
def test_the_filters(fields, reason):
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
def test_both_validators_accept_the_same_answers(value, add_required):
    """The exact one checks again what the fast one refuses, so only what the fast one accepts could differ."""
    schema = load_schema(PROJECT_ROOT / "data" / "benchmarks" / "aec_parser.schema.json")
    if add_required and isinstance(value, dict):
        value = {**value, "element": "wall", "material": "steel"}
    validator = answer_validator(schema)
    assert validator.fast is not None
    assert (validator(json.dumps(value)) is None) == compile_schema(schema).is_valid(value)


@pytest.mark.parametrize("part", [{"pattern": "^a"}, {"$ref": "http://127.0.0.1:9/x"}, {"items": {"format": "date"}}])
def test_a_schema_of_other_keywords_is_left_to_the_exact_validator(part):
    assert answer_validator({"anyOf": [{"type": "integer"}, part]}).fast is None


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I cannot help with that.",
        "I am sorry, I can't assist with this request.",
        "Sorry, I can’t do that for you.",
        "I cannot provide the drawing.",
        "Unfortunately, I am unable to open files.",
        "As an AI language model, I have no opinion.",
        "I'm not able to answer.",
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
    ],
)
def test_refusals_are_found(answer):
    assert is_refusal(answer)
    assert accept(numbered_example(1, target=answer), FREE_TEXT).reason == "answer is a refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry that you slept badly. What kept you awake?",
        "The wall cannot be thinner than 140 mm.",
        "I cannot recommend brick here: use concrete.",
        "Sorry for the delay: 150 mm.",
        '{"note": "I am sorry, I cannot help"}',
    ],
)
def test_what_only_looks_like_a_refusal_is_accepted(answer):
    assert not is_refusal(answer)


def test_a_refusal_that_a_person_wrote_or_confirmed_is_accepted():
    no = "I'm sorry, but I cannot help with that."
    assert accept(numbered_example(1, target=no, confirmed=True), FREE_TEXT).accepted
    assert accept(numbered_example(1, target=no, corrected=True), FREE_TEXT).accepted
    assert accept(numbered_example(1, target=no, review="approve"), FREE_TEXT).accepted


def test_repetitive_answers_are_left_out():
    sentence = "The duct runs along the corridor and turns left at the shaft before it rises to the roof. "
    assert repeated_fraction(sentence * 8) > 0.8
    assert repeated_fraction("no " * 60) > 0.8
    assert repeated_fraction("墙墙门" * 40) > 0.8
    assert repeated_fraction(PROSE) < 0.05
    assert repeated_fraction("ha ha ha") == 0.0
    assert accept(numbered_example(1, target=sentence * 8), FREE_TEXT).reason == "answer repeats itself"
    assert accept(numbered_example(1, target=sentence * 8, corrected=True), FREE_TEXT).accepted
    assert accept(numbered_example(1, target=sentence * 8, review="approve"), FREE_TEXT).accepted
    assert accept(numbered_example(1, target=PROSE[:3_000]), FREE_TEXT).accepted


# Parallel sentences, whose words differ in a few places.
PARALLEL = {
    "Japanese": "{}に行くことができますか。",
    "Chinese": "{}外墙的厚度为二百毫米,耐火极限为两小时。",
    "Thai": "{}ผนังมีความหนามิลลิเมตร ",
    "Burmese": "{}နံရံ၏အထူသည်မီလီမီတာဖြစ်သည်။",
}


@pytest.mark.parametrize("script", PARALLEL)
def test_parallel_sentences_without_spaces_are_no_repetition(script):
    sentences = [PARALLEL[script].format(name) for name in ("東京", "大阪", "京都", "札幌", "名古屋")]
    assert repeated_fraction("".join(sentences)) == 0.0
    assert repeated_fraction("".join(sentences) * 6) > 0.8


def test_tokens_are_the_base_models_and_the_counter_can_be_pickled():
    from transformers import AutoTokenizer

    base = PROJECT_ROOT / "data" / "starter_model"
    tokens = pickle.loads(pickle.dumps(TokenCounter(base)))
    text = "150 mm concrete wall, two hours — Kalifornien"
    expected = len(AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"])
    assert tokens.count(text) == expected
    assert not tokens.more_than(text, expected) and tokens.more_than(text, expected - 1)


def test_the_limits_in_tokens():
    limits = CurationSettings(max_prompt_tokens=8, max_answer_tokens=4)
    policy = Policy(
        limits, BENCHMARK, answer_validator(None), tokens=TokenCounter(PROJECT_ROOT / "data" / "starter_model")
    )
    assert accept(numbered_example(1, prompt="one", target="a"), policy).accepted
    assert (
        accept(numbered_example(1, prompt="one two " * 9, target="a"), policy).reason == "prompt longer than 8 tokens"
    )
    assert (
        accept(numbered_example(1, prompt="one", target="a b c " * 9), policy).reason == "answer longer than 4 tokens"
    )


def test_a_model_without_a_known_tokenizer_is_named(tmp_path):
    with pytest.raises(CurationError, match=r"tokenizer\.json, tokenizer\.model"):
        TokenCounter(tmp_path)
