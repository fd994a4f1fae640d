"""The choice of a training method."""

import pytest

from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.method_choice import DatasetCounts, choose_method


@pytest.mark.parametrize(
    ("desirable", "pairs", "undesirable", "method", "message"),
    [
        (
            232,
            179,
            198,
            "sft",
            "method sft (chosen by auto); 232 desirable completions (179 of them corrections) and 198 undesirable",
        ),
        (6, 6, 198, "sft", "from 6 corrections on"),
        (
            41,
            0,
            160,
            "kto",
            "method kto (chosen by auto); 41 desirable completions (0 of them corrections) and 160 undesirable; "
            "with fewer than 6",
        ),
        (41, 5, 82, "kto", "undesirable completions teach more"),
        (41, 5, 81, "sft", "too few undesirable completions"),
        (12, 0, 0, "sft", "too few undesirable completions"),
    ],
)
def test_auto_chooses_by_the_numbers_of_examples(desirable, pairs, undesirable, method, message):
    chosen, reason = choose_method("auto", DatasetCounts(desirable, pairs, undesirable))
    assert chosen == method
    assert message in reason


def test_a_method_that_was_set_is_kept():
    reason = "method dpo (training.method); 60 desirable completions (3 of them corrections) and 5 undesirable"
    assert choose_method("dpo", DatasetCounts(desirable=60, pairs=3, undesirable=5)) == ("dpo", reason)


@pytest.mark.parametrize(
    ("method", "counts", "message"),
    [
        (
            "dpo",
            DatasetCounts(60, 0, 5),
            "dpo needs corrections of completions of the model, and the dataset has 60 desirable",
        ),
        ("kto", DatasetCounts(60, 0, 0), "kto needs desirable and undesirable completions"),
        ("kto", DatasetCounts(0, 0, 60), "kto needs desirable and undesirable completions"),
        ("auto", DatasetCounts(0, 0, 60), "sft needs desirable completions"),
    ],
)
def test_a_method_without_examples_is_refused_with_the_numbers(method, counts, message):
    with pytest.raises(TrainingError, match=message) as error:
        choose_method(method, counts)
    assert "log more feedback of that kind, or set training.method to another one" in str(error.value)
