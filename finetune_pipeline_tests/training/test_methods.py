"""Which method suits a dataset, and what each needs."""

import pytest

from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.methods import Counts, choose


@pytest.mark.parametrize(
    ("good", "pairs", "bad", "method", "said"),
    [
        (232, 179, 198, "sft", "sft: 232 answers found good (179 of them corrections) and 198 found bad"),
        (6, 6, 198, "sft", "from 6 corrections on"),
        (41, 0, 160, "kto", "kto: 41 answers found good (0 of them corrections) and 160 found bad; fewer than 6"),
        (41, 5, 82, "kto", "so bad ones tell more"),
        (41, 5, 81, "sft", "too few bad ones"),
        (12, 0, 0, "sft", "too few bad ones"),
    ],
)
def test_auto_goes_by_what_the_dataset_holds_and_says_the_numbers(good, pairs, bad, method, said):
    choice = choose("auto", Counts(good, pairs, bad))
    assert choice.method == method
    assert said in choice.reason


def test_what_was_set_by_hand_is_kept_and_the_numbers_are_told():
    choice = choose("dpo", Counts(good=60, pairs=3, bad=5))
    assert choice.method == "dpo"
    assert (
        choice.reason
        == "dpo, as training.method says; there are 60 answers found good (3 of them corrections) and 5 found bad"
    )


@pytest.mark.parametrize(
    ("method", "counts", "said"),
    [
        (
            "dpo",
            Counts(60, 0, 5),
            "dpo needs corrections of answers that the model gave, and the dataset has 60 answers",
        ),
        ("kto", Counts(60, 0, 0), "kto needs answers found good and answers found bad"),
        ("kto", Counts(0, 0, 60), "kto needs answers found good and answers found bad"),
        ("auto", Counts(0, 0, 60), "sft needs answers found good"),
    ],
)
def test_a_method_without_anything_to_learn_from_says_what_was_found_and_what_to_do(method, counts, said):
    with pytest.raises(TrainingError, match=said) as error:
        choose(method, counts)
    assert "log more feedback of that kind, or set training.method to another one" in str(error.value)
