"""The choice of a training method by what the dataset holds. Pure; asked before anything heavy is loaded.

The rule follows from the measurements in `benchmarks/results/methods.json`.
"""

from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.training.job import TrainingError

Method = Literal["sft", "dpo", "kto"]

ENOUGH_CORRECTIONS = 6
"""From this many corrections on, SFT on them improves the model more than undesirable completions do."""
UNDESIRABLE_RATIO = 2
"""Undesirable completions for each desirable one, from which on KTO is chosen: fewer are normal in use."""


@dataclass(frozen=True)
class DatasetCounts:
    """Numbers of training examples, by kind.

    Attributes:
        desirable: desirable completions, corrections included; replay data is not counted.
        pairs: preference pairs: a correction and a completion of the model.
        undesirable: undesirable completions, corrected ones included.
    """

    desirable: int
    pairs: int
    undesirable: int

    def __str__(self) -> str:
        return (
            f"{self.desirable} desirable completions ({self.pairs} of them corrections) and {self.undesirable} "
            "undesirable"
        )


@dataclass(frozen=True)
class MethodChoice:
    """The method to train by, and the reason."""

    method: Method
    reason: str


def choose_method(method: Literal["auto", "sft", "dpo", "kto"], counts: DatasetCounts) -> MethodChoice:
    """Return the method that was set or, for auto, the one that suits the data.

    Completions that were good as they are teach little that is new. Corrections do and, without corrections,
    undesirable completions.

    Raises:
        TrainingError: the dataset has nothing that the method needs.
    """
    if method != "auto":
        choice = MethodChoice(method, f"method {method} (training.method); {counts}")
    elif counts.pairs >= ENOUGH_CORRECTIONS:
        reason = (
            f"method sft (chosen by auto); {counts}; from {ENOUGH_CORRECTIONS} corrections on, sft on them improved "
            "most when measured"
        )
        choice = MethodChoice("sft", reason)
    elif counts.desirable and counts.undesirable >= UNDESIRABLE_RATIO * counts.desirable:
        reason = (
            f"method kto (chosen by auto); {counts}; with fewer than {ENOUGH_CORRECTIONS} corrections, undesirable "
            "completions teach more"
        )
        choice = MethodChoice("kto", reason)
    else:
        choice = MethodChoice(
            "sft", f"method sft (chosen by auto); {counts}; too few undesirable completions to learn from"
        )
    missing = {
        "sft": "" if counts.desirable else "desirable completions",
        "dpo": "" if counts.pairs else "corrections of completions of the model",
        "kto": "" if counts.desirable and counts.undesirable else "desirable and undesirable completions",
    }[choice.method]
    if missing:
        raise TrainingError(
            f"{choice.method} needs {missing}, and the dataset has {counts}; log more feedback of that kind, or set "
            "training.method to another one (auto chooses)"
        )
    return choice
