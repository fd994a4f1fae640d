"""`training: auto`: settings by amount of data and size of the base model."""

import itertools

import pytest

from finetune_pipeline.training.auto_settings import DATA, SIZES, choose_replay, choose_settings

TINY, SMALL, LARGE = 3_370_000, 135_000_000, 7_000_000_000
AMOUNTS = (1, 20, 50, 100, 265, 5_000, 1_000_000)


def test_every_amount_and_size_has_settings_and_a_reason_for_them():
    for examples, parameters in itertools.product(AMOUNTS, (1, TINY, SMALL, LARGE, 10**12)):
        chosen = choose_settings(examples, parameters)
        assert chosen.num_train_epochs >= 1 and 0 < chosen.learning_rate < 1e-2
        assert f"{examples:,} example" in chosen.reason and "million parameters: " in chosen.reason
        ratio, why = choose_replay(examples)
        assert ratio >= 0 and f"{ratio:g} for each of {examples:,} example" in why


@pytest.mark.parametrize("parameters", [TINY, SMALL, LARGE])
def test_more_data_never_means_more_epochs(parameters):
    epochs = [choose_settings(examples, parameters).num_train_epochs for examples in AMOUNTS]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1]


@pytest.mark.parametrize("examples", AMOUNTS)
def test_a_larger_model_never_gets_a_higher_rate_or_more_epochs(examples):
    chosen = [choose_settings(examples, parameters) for parameters in (TINY, SMALL, LARGE)]
    for smaller, larger in itertools.pairwise(chosen):
        assert larger.learning_rate < smaller.learning_rate
        assert larger.num_train_epochs <= smaller.num_train_epochs


def test_the_tables_cover_everything_in_order():
    for table in ([row.below for row in SIZES], [row.up_to for row in DATA]):
        assert table == sorted(set(table)) and table[-1] == float("inf")
