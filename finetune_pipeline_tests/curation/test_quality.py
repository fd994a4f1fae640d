"""Answers that teach nothing, lengths in tokens, and what is contained in the benchmark."""

import pickle

import pytest

from finetune_pipeline.curation.acceptance import Policy, accept, answer_validator, near_benchmark
from finetune_pipeline.curation.decontamination import NearIndex, jaccard, shingles
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.quality import repetition
from finetune_pipeline.curation.token_count import TokenCounter
from finetune_pipeline.records import Turn
from finetune_pipeline.refusals import is_refusal
from finetune_pipeline.settings import PROJECT_ROOT, CurationSettings

from .test_dataset import example

QUESTION = "How thick does a concrete wall beside the stair have to be for two hours of fire rating in California?"
INDEX = NearIndex({"q": QUESTION, "short": "a steel door"})
FREE = Policy(CurationSettings(), INDEX, answer_validator(None))
PROSE = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


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
    assert accept(example(1, target=answer), FREE).reason == "answer is a refusal"


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
def test_what_only_sounds_like_one_is_none(answer):
    assert not is_refusal(answer)


def test_a_refusal_that_a_person_wrote_or_found_right_is_learnt():
    no = "I'm sorry, but I cannot help with that."
    assert accept(example(1, target=no, confirmed=True), FREE).accepted
    assert accept(example(1, target=no, corrected=True), FREE).accepted
    assert accept(example(1, target=no, review="approve"), FREE).accepted


def test_texts_that_go_round_are_found_and_others_are_not():
    sentence = "The duct runs along the corridor and turns left at the shaft before it rises to the roof. "
    assert repetition(sentence * 8) > 0.8
    assert repetition("no " * 60) > 0.8
    assert repetition("墙墙门" * 40) > 0.8
    assert repetition(PROSE) < 0.05
    assert repetition("ha ha ha") == 0.0
    assert accept(example(1, target=sentence * 8), FREE).reason == "answer repeats itself"
    assert accept(example(1, target=sentence * 8, corrected=True), FREE).accepted
    assert accept(example(1, target=sentence * 8, review="approve"), FREE).accepted
    assert accept(example(1, target=PROSE[:3_000]), FREE).accepted


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (
            f"Good morning! I read your note of yesterday and wonder: {QUESTION.lower()} Thank you very much for it.",
            True,
        ),
        (f"{QUESTION[:-1]}; and then, a wall of brick? And of timber, of steel, of glass, in Oregon?", True),
        ("How thick does a concrete wall beside the stair have to be?", True),  # a part of the question
        ("How thick does a wall have to be?", False),  # too short to be anybody's
        ("I need a steel door in the wall beside the stair, as in the other wing of the building", False),
        ("How thick does a timber wall beside the lobby have to be for two hours in Oregon or California?", False),
    ],
)
def test_a_question_within_a_longer_one_is_found(prompt, found):
    assert jaccard(shingles(prompt), shingles(QUESTION)) < 0.8
    assert near_benchmark(prompt, (), FREE) is found
    reason = accept(example(1, prompt=prompt), FREE).reason
    assert (reason == "contains, or is part of, a benchmark question") is found


def test_a_question_that_was_asked_earlier_in_the_conversation_is_found():
    said = (Turn(role="user", content=QUESTION), Turn(role="assistant", content="140 mm"))
    assert near_benchmark("and in Oregon, what would you say there?", said, FREE)


@pytest.mark.parametrize(
    ("question", "prompt", "found"),
    [
        ("Timber roof; T24; CA", "Hi! timber roof, T24 CA, quickly please, with a reason", True),  # four words
        ("Timber roof; T24; CA; R47", "Hi! timber roof, T24 CA, quickly please, with a reason", False),  # not all of it
        ("Timber roof; T24; CA", "A timber roof of T24, and then CA", False),  # not in a row
        ("Timber roof; T24; CA", "subtimber roof T24 cab", False),  # words, not pieces of them
        ("golden question birch", "Hi! golden question birch, quickly please, with a reason", False),  # everybody's
    ],
)
def test_a_short_question_is_found_where_all_of_it_stands(question, prompt, found):
    policy = Policy(CurationSettings(), NearIndex({"q": question}), answer_validator(None))
    assert near_benchmark(prompt, (), policy) is found


@pytest.mark.parametrize("question", ["golden question amber", "ALUM lite, 1600x1650, IGU", QUESTION[:60]])
def test_an_earlier_turn_that_is_a_question_is_found(question):
    policy = Policy(CurationSettings(), NearIndex({"q": question}), answer_validator(None))
    said = (Turn(role="user", content=question.upper()), Turn(role="assistant", content="golden answer"))
    assert near_benchmark("and now repeat that for the record please", said, policy)


def test_the_same_answer_to_another_question_is_no_overlap():
    assert accept(example(1, prompt="Quelle est l'épaisseur du mur?", target=QUESTION), FREE).accepted


def test_near_is_what_nearest_says():
    index = NearIndex({str(n): f"request number {n} for a wall of {n * 37 % 100} mm" for n in range(200)})
    for n in range(0, 200, 7):
        for text in (f"request number {n} for a wall of {n * 37 % 100} mm", f"number {n} wall of {n} mm", f"{n}", ""):
            for similarity in (0.3, 0.5, 0.8, 1.0):
                nearest = index.nearest(text)
                assert index.near(text, similarity) == (nearest is not None and nearest[1] >= similarity)


def test_tokens_are_those_of_the_base_model_and_the_counter_travels():
    from transformers import AutoTokenizer

    base = PROJECT_ROOT / "data" / "starter_model"
    tokens = pickle.loads(pickle.dumps(TokenCounter(base)))
    text = "150 mm concrete wall, two hours — Kalifornien"
    expected = len(AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"])
    assert tokens.count(text) == expected
    assert not tokens.more_than(text, expected) and tokens.more_than(text, expected - 1)


def test_what_is_too_long_in_tokens_is_left_out():
    rules = CurationSettings(max_prompt_tokens=8, max_answer_tokens=4)
    policy = Policy(rules, INDEX, answer_validator(None), tokens=TokenCounter(PROJECT_ROOT / "data" / "starter_model"))
    assert accept(example(1, prompt="one", target="a"), policy).accepted
    assert accept(example(1, prompt="one two " * 9, target="a"), policy).reason == "prompt longer than 8 tokens"
    assert accept(example(1, prompt="one", target="a b c " * 9), policy).reason == "answer longer than 4 tokens"


def test_a_model_without_a_known_tokenizer_is_named(tmp_path):
    with pytest.raises(CurationError, match=r"tokenizer\.json, tokenizer\.model"):
        TokenCounter(tmp_path)
