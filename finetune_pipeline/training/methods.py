"""By which method to train, decided by what the dataset holds. Pure, and asked before anything heavy is loaded.

The figures behind the rule are those of `benchmarks/results/methods.json`.
"""

from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.training.job import TrainingError

Method = Literal["sft", "dpo", "kto"]

ENOUGH_CORRECTIONS = 6
"""From so many corrections on, learning them gives more than all that was said of bad answers."""
MANY_BAD = 2
"""So many bad answers for each good one are a verdict on what the model does, and not what use brings along."""


@dataclass(frozen=True)
class Counts:
    """What there is to train on.

    Attributes:
        good: answers found good, corrections among them; replayed ones are not counted.
        pairs: corrections with another answer of the model's own.
        bad: answers found bad, the corrected ones among them.
    """

    good: int
    pairs: int
    bad: int

    def __str__(self) -> str:
        return f"{self.good} answers found good ({self.pairs} of them corrections) and {self.bad} found bad"


@dataclass(frozen=True)
class Choice:
    """The method to train by, and why."""

    method: Method
    reason: str


def choose(method: Literal["auto", "sft", "dpo", "kto"], counts: Counts) -> Choice:
    """The method that was set, or for auto the one that suits the data.

    Raises:
        TrainingError: there is nothing that the method could learn from.
    """
    choice = (
        _suiting(counts)
        if method == "auto"
        else Choice(method, f"{method}, as training.method says; there are {counts}")
    )
    missing = _missing(choice.method, counts)
    if missing:
        raise TrainingError(
            f"{choice.method} needs {missing}, and the dataset has {counts}; log more feedback of that kind, or set "
            "training.method to another one (auto chooses)"
        )
    return choice


def _suiting(counts: Counts) -> Choice:
    """What was good as it came teaches little that is new: corrections do, and where there are none, bad answers."""
    if counts.pairs >= ENOUGH_CORRECTIONS:
        return Choice(
            "sft",
            f"sft: {counts}; from {ENOUGH_CORRECTIONS} corrections on, learning them gave most when it was measured",
        )
    if counts.good and counts.bad >= MANY_BAD * counts.good:
        return Choice("kto", f"kto: {counts}; fewer than {ENOUGH_CORRECTIONS} corrections, so bad ones tell more")
    return Choice("sft", f"sft: {counts}; too few bad ones to learn from them")


def _missing(method: Method, counts: Counts) -> str:
    """What the method cannot do without and the data does not have."""
    if method == "dpo":
        return "" if counts.pairs else "corrections of answers that the model gave"
    if method == "kto":
        return "" if counts.good and counts.bad else "answers found good and answers found bad"
    return "" if counts.good else "answers found good"
