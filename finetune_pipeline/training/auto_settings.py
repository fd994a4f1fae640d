"""The choice of `training: auto`: learning rate, epochs and replay by amount of data and size of the base model. Pure.

Two rows decide, one of each table. `python -m benchmarks few_examples` measured the row of up to 80
examples, with a model below 50 million parameters; the other rows are estimates.
"""

from dataclasses import dataclass

from finetune_pipeline.wording import counted

CHOSEN = ("learning_rate", "num_train_epochs", "load_best_model_at_end")
"""Settings of training that auto chooses where they are not set. It chooses curation.replay_ratio too."""


@dataclass(frozen=True)
class SizeRow:
    """What suits base models of a size.

    Attributes:
        below: the row holds for fewer parameters than this.
        learning_rate: peak learning rate for SFT with LoRA.
        passes: fraction of the epochs of the table below, at least one epoch.
        reason: why, for people.
    """

    below: float
    learning_rate: float
    passes: float
    reason: str


@dataclass(frozen=True)
class DataRow:
    """What suits an amount of data.

    Attributes:
        up_to: the row holds for at most so many training examples, without replay.
        epochs: passes over the data.
        keep_best: keep the weights with the lowest validation loss. Its set has a tenth of the examples: on five of
            them the loss is lowest by chance, early in the training.
        replay_ratio: replay examples for each training example.
        reason: why so many epochs, for people.
        replay_reason: why so much replay.
    """

    up_to: float
    epochs: float
    keep_best: bool
    replay_ratio: float
    reason: str
    replay_reason: str


SIZES = (
    SizeRow(50e6, 2e-3, 1, "a model below 50 million parameters learns a task only with a high learning rate"),
    SizeRow(500e6, 5e-4, 0.5, "a model below 500 million parameters learns from fewer passes at a lower rate"),
    SizeRow(float("inf"), 2e-4, 0.5, "the usual rate for LoRA on larger models, which learn from few passes"),
)
_AS_MUCH = "as much as there is new, against forgetting"
DATA = (
    DataRow(
        30,
        16,
        False,
        2,
        "so few examples make few updates, and validate too little to choose weights",
        "many passes over so little data forget more",
    ),
    DataRow(80, 12, False, 1, "few examples make few updates, and validate too little to choose weights", _AS_MUCH),
    DataRow(
        200, 8, False, 1, "as many updates as with more data, and too little validation to choose weights", _AS_MUCH
    ),
    DataRow(1_000, 4, True, 1, "enough examples for a few epochs", _AS_MUCH),
    DataRow(10_000, 3, True, 1, "TRL's default number of epochs", _AS_MUCH),
    DataRow(float("inf"), 1, True, 0.2, "more passes take long and gain little", "one pass forgets little"),
)


@dataclass(frozen=True)
class AutoSettings:
    """Settings of training for an amount of data and a size of model, and why.

    Attributes:
        learning_rate, num_train_epochs, load_best_model_at_end: of TrainingSettings.
        reason: one line, for people.
    """

    learning_rate: float
    num_train_epochs: float
    load_best_model_at_end: bool
    reason: str


def choose_settings(examples: int, parameters: int) -> AutoSettings:
    """Return the settings for SFT with LoRA.

    Args:
        examples: to train on, without replay.
        parameters: of the base model.
    """
    size, data = next(row for row in SIZES if parameters < row.below), _data_row(examples)
    return AutoSettings(
        size.learning_rate,
        max(1.0, data.epochs * size.passes),
        data.keep_best,
        f"for {counted(examples, 'example')} and {parameters / 1e6:,.0f} million parameters: {size.reason}; "
        f"{data.reason}",
    )


def choose_replay(examples: int) -> tuple[float, str]:
    """Return the replay examples for each of so many training examples, and why."""
    row = _data_row(examples)
    return row.replay_ratio, f"{row.replay_ratio:g} for each of {counted(examples, 'example')}: {row.replay_reason}"


def _data_row(examples: int) -> DataRow:
    return next(row for row in DATA if examples <= row.up_to)
