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
    """Numbers of training examples, by kind."""

    desirable: int  # completions, corrections included; replay data is not counted
    pairs: int  # preference pairs: a correction and a completion of the model
    undesirable: int  # completions, corrected ones included

    def __str__(self) -> str:
        return (
            f"{self.desirable} desirable completions ({self.pairs} of them corrections) and {self.undesirable} "
            "undesirable"
        )


def choose_method(method: Literal["auto", "sft", "dpo", "kto"], counts: DatasetCounts) -> tuple[Method, str]:
    """Return the method that was set or, for auto, the one that suits the data; and the reason.

    Completions that were good as they are teach little that is new. Corrections do and, without corrections,
    undesirable completions.

    Raises:
        TrainingError: the dataset has nothing that the method needs.
    """
    chosen: Method = "sft" if method == "auto" else method
    why = "too few undesirable completions to learn from"
    if counts.pairs >= ENOUGH_CORRECTIONS:
        why = f"from {ENOUGH_CORRECTIONS} corrections on, sft on them improved most when measured"
    elif counts.desirable and counts.undesirable >= UNDESIRABLE_RATIO * counts.desirable:
        chosen = "kto" if method == "auto" else method
        why = f"with fewer than {ENOUGH_CORRECTIONS} corrections, undesirable completions teach more"
    missing = {
        "sft": "" if counts.desirable else "desirable completions",
        "dpo": "" if counts.pairs else "corrections of completions of the model",
        "kto": "" if counts.desirable and counts.undesirable else "desirable and undesirable completions",
    }[chosen]
    if missing:
        raise TrainingError(
            f"{chosen} needs {missing}, and the dataset has {counts}; log more feedback of that kind, or set "
            "training.method to another one (auto chooses)"
        )
    if method != "auto":
        return method, f"method {method} (training.method); {counts}"
    return chosen, f"method {chosen} (chosen by auto); {counts}; {why}"
