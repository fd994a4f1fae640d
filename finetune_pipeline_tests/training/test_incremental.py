"""Which examples an incremental training takes, and when there can be none."""

import pytest

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.incremental import chosen, obstacle

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


@pytest.mark.parametrize(
    ("change", "base", "why"),
    [
        ({}, "b", None),
        ({"learning_rate": 1e-5, "epochs": 9.0}, "b", None),  # how it learns may change
        ({"lora_r": 8}, "b", "it was trained with other lora_r"),
        ({"target_modules": ["q_proj"], "adapter": "qlora"}, "b", "it was trained with other adapter, target_modules"),
        ({}, "c", "its base model is another one"),
        # What KTO learns from, the champion of SFT has not seen: the answers found bad.
        ({"method": "kto"}, "b", "it was trained by sft, which learns from other answers than kto"),
    ],
)
def test_only_an_adapter_of_the_same_shape_and_base_is_gone_on_with(change, base, why):
    assert obstacle({**SETTINGS, **change}, base, SETTINGS, "b") == why
