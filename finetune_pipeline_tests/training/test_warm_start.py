"""The examples of an incremental training, and obstacles to a warm start."""

import pytest

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.warm_start import obstacle_to_warm_start, select_examples, with_both_labels

SETTINGS = TrainingSettings().model_dump(mode="json")


def test_all_new_examples_and_a_replay_sample_are_selected():
    hashes = [f"h{n}" for n in range(100)]
    known = set(hashes[:80])
    assert select_examples(hashes, known, 0, "seed") == list(range(80, 100))
    rows = select_examples(hashes, known, 1.5, "seed")
    assert len(rows) == 20 + 30 and rows == sorted(rows) and set(rows) >= set(range(80, 100))
    assert rows == select_examples(hashes, known, 1.5, "seed") != select_examples(hashes, known, 1.5, "another")
    assert select_examples(hashes, known, 99, "seed") == list(range(100))


def test_nothing_is_selected_if_nothing_is_new():
    assert select_examples(["a", "b"], {"a", "b", "c"}, 1, "seed") == []


def test_older_examples_of_the_missing_label_are_added():
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
        ({"learning_rate": 1e-5, "num_train_epochs": 9.0}, "b", None),  # these do not change the adapter's shape
        ({"lora_r": 8}, "b", "it was trained with other lora_r"),
        (
            {"lora_target_modules": ["q_proj"], "adapter": "qlora"},
            "b",
            "it was trained with other adapter, lora_target_modules",
        ),
        (
            {"use_rslora": True, "lora_config": {"bias": "all"}},
            "b",
            "it was trained with other use_rslora, lora_config",
        ),
        ({}, "c", "its base model differs"),
        # The champion of SFT has not seen undesirable completions.
        ({"method": "kto"}, "b", "it was trained by sft, which learns from other examples than kto"),
    ],
)
def test_a_warm_start_needs_the_same_base_and_shape(change, base, why):
    assert obstacle_to_warm_start({**SETTINGS, **change}, base, SETTINGS, "b") == why
