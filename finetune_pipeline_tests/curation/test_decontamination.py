"""Overlap with the benchmark: near-duplicates, questions within longer texts, and parts of questions."""

import pytest

from finetune_pipeline.curation.acceptance import Policy, accept, benchmark_overlap
from finetune_pipeline.curation.decontamination import NearIndex, jaccard, shingles
from finetune_pipeline.records import Turn
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings

from .datasets import example

QUESTION = "How thick does a concrete wall beside the stair have to be for two hours of fire rating in California?"
INDEX = NearIndex({"q": QUESTION, "short": "a steel door"})
FREE_TEXT = Policy(CurationSettings(), INDEX, answer_validator(None))


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (
            f"Good morning! I read your note of yesterday and wonder: {QUESTION.lower()} Thank you very much for it.",
            True,
        ),
        (f"{QUESTION[:-1]}; and then, a wall of brick? And of timber, of steel, of glass, in Oregon?", True),
        ("How thick does a concrete wall beside the stair have to be?", True),  # a part of the question
        ("How thick does a wall have to be?", False),  # too short
        ("I need a steel door in the wall beside the stair, as in the other wing of the building", False),
        ("How thick does a timber wall beside the lobby have to be for two hours in Oregon or California?", False),
    ],
)
def test_a_question_within_a_longer_text_is_found(prompt, found):
    assert jaccard(shingles(prompt), shingles(QUESTION)) < 0.8
    assert bool(benchmark_overlap(prompt, (), FREE_TEXT)) is found
    reason = accept(example(1, prompt=prompt), FREE_TEXT).reason
    assert (reason == "contains, or is part of, a benchmark question") is found


def test_a_question_in_an_earlier_turn_is_found():
    said = (Turn(role="user", content=QUESTION), Turn(role="assistant", content="140 mm"))
    assert benchmark_overlap("and in Oregon, what would you say there?", said, FREE_TEXT)


@pytest.mark.parametrize(
    ("question", "prompt", "found"),
    [
        ("Timber roof; T24; CA", "Hi! timber roof, T24 CA, quickly please, with a reason", True),  # four words
        ("Timber roof; T24; CA", "Hi! tim\u00adber roof, \u200bT24 CA, quickly please, with a reason", True),
        ("Timber roof; T24; CA; R47", "Hi! timber roof, T24 CA, quickly please, with a reason", False),  # not all of it
        ("Timber roof; T24; CA", "A timber roof of T24, and then CA", False),  # not in a row
        ("Timber roof; T24; CA", "subtimber roof T24 cab", False),  # whole words, not parts of words
        ("벽 두께는 얼마입니까", "안녕하세요! 벽 두께는 얼마입니까? 이유도 함께 알려 주세요", True),  # three long words
        ("Duvar kalınlığı nedir", "Merhaba! Duvar kalınlığı nedir? Gerekçesiyle birlikte, hemen", True),
        ("a steel door", "Hi! a steel door, quickly please, with a reason", False),  # three short words
        ("golden question", "Hi! golden question, quickly please, with a reason", False),  # two words
        ("golden question", "Hi! And now, with a reason:\ngolden question\nThank you very much", True),  # as a line
        ("벽 두께는?", "안녕하세요! 벽 두께는? 이유도 함께 알려 주세요", True),
        ("벽 두께는?", "안녕하세요! 벽 두께는 얼마나 되고 이유는 무엇인지 알려 주세요", False),  # part of a sentence
        ("외벽 두께는 얼마?", "이유도 함께 알려 주세요: 외벽 두께는 얼마?", True),
        ("מה עובי הקיר?", "נא לענות בקצרה. מה עובי הקיר? תודה רבה לך", True),
        ("ما السمك؟", "أجب من فضلك بإيجاز؛ ما السمك؟ شكرا جزيلا لك", True),
        ("墙厚？", "请回答下面的问题。墙厚？谢谢您的帮助和回复", False),  # two characters
        ("wall thickness?", "Dear all,\r\n- wall thickness?\r\n- door height?\r\nRegards", True),
        ("wall 3.5 m?", "It stands there. Wall 3.5 m? Please price it for me", True),
        ("3.5 m high", "It is a wall. It is 3.5 m high. Please price it", False),  # part of a sentence
        ("brick", "Name the material of the wall in this drawing.\nbrick\nThanks", False),  # one word
    ],
)
def test_a_short_question_is_found_where_its_words_stand_in_a_row(question, prompt, found):
    policy = Policy(CurationSettings(), NearIndex({"q": question}), answer_validator(None))
    assert bool(benchmark_overlap(prompt, (), policy)) is found


@pytest.mark.parametrize("question", ["golden question amber", "ALUM lite, 1600x1650, IGU", QUESTION[:60]])
def test_an_earlier_turn_that_is_part_of_a_question_is_found(question):
    policy = Policy(CurationSettings(), NearIndex({"q": question}), answer_validator(None))
    said = (Turn(role="user", content=question.upper()), Turn(role="assistant", content="golden answer"))
    assert benchmark_overlap("and now repeat that for the record please", said, policy)


def test_the_same_answer_to_another_question_is_no_overlap():
    assert accept(example(1, prompt="Quelle est l'épaisseur du mur?", target=QUESTION), FREE_TEXT).accepted


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 1.0])
def test_near_agrees_with_nearest(similarity):
    index = NearIndex({str(n): f"request number {n} for a wall of {n * 37 % 100} mm" for n in range(200)})
    for n in range(0, 200, 7):
        for text in (f"request number {n} for a wall of {n * 37 % 100} mm", f"number {n} wall of {n} mm", f"{n}", ""):
            nearest = index.nearest(text)
            assert index.near(text, similarity) == (nearest is not None and nearest[1] >= similarity)


def test_similarity_is_the_exact_jaccard_of_shingles():
    index = NearIndex({"a": "abcdefg", "b": "zzzzzzz"})
    # abcdefg has the shingles abcde bcdef cdefg, abcdefh has abcde bcdef cdefh: 2 of 4 are shared
    assert index.nearest("abcdefh") == ("a", 0.5)
    assert index.nearest("nothing alike") is None
