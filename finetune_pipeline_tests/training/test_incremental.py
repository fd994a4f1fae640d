"""Which examples an incremental training takes, and when there can be none."""

import pytest

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.incremental import chosen, obstacle, with_both_labels

SETTINGS = TrainingSettings().model_dump(mode="json")


def test_all_new_examples_are_taken_and_as_many_older_ones_as_wished():
    hashes = [f"h{n}" for n in range(100)]
    known = set(hashes[:80])
    assert chosen(hashes, known, 0, "seed") == list(range(80, 100))
    rows = chosen(hashes, known, 1.5, "seed")
    assert len(rows) == 20 + 30 and rows == sorted(rows) and set(rows) >= set(range(80, 100))
    assert rows == chosen(hashes, known, 1.5, "seed") != chosen(hashes, known, 1.5, "another")
    assert chosen(hashes, known, 99, "seed") == list(range(100))


def test_where_nothing_is_new_nothing_is_taken():
    assert chosen(["a", "b"], {"a", "b", "c"}, 1, "seed") == []


def test_where_what_is_new_is_all_bad_as_many_older_good_ones_are_taken():
    hashes = [f"h{n}" for n in range(10)]
    labels = [True] * 4 + [False] * 6
    known = set(hashes[:7])
    rows = with_both_labels([5, 7, 8, 9], hashes, labels, known, "seed")
    assert len(rows) == 7 and rows == sorted(rows) and set(rows) > {5, 7, 8, 9}
    assert [labels[row] for row in rows] == [True] * 3 + [False] * 4
    assert rows == with_both_labels([5, 7, 8, 9], hashes, labels, known, "seed")
    assert with_both_labels([1, 7], hashes, labels, known, "seed") == [1, 7]
    assert with_both_labels([7, 8], hashes, [False] * 10, known, "seed") == [7, 8]


@pytest.mark.parametrize(
    ("change", "base", "why"),
    [
        ({}, "b", None),
        ({"learning_rate": 1e-5, "num_train_epochs": 9.0}, "b", None),  # how it learns may change
        ({"lora_r": 8}, "b", "it was trained with other lora_r"),
        (
            {"lora_target_modules": ["q_proj"], "adapter": "qlora"},
            "b",
            "it was trained with other adapter, lora_target_modules",
        ),
        ({}, "c", "its base model is another one"),
        # What KTO learns from, the champion of SFT has not seen: the answers found bad.
        ({"method": "kto"}, "b", "it was trained by sft, which learns from other answers than kto"),
    ],
)
def test_only_an_adapter_of_the_same_shape_and_base_is_gone_on_with(change, base, why):
    assert obstacle({**SETTINGS, **change}, base, SETTINGS, "b") == why
