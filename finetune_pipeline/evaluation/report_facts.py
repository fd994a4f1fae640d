"""What a report says about the compared models beside their answers: use, training, data, earlier versions, hashes.

Only the records; `pipeline.report_facts` fills them from the registry, the store and the artifacts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_pipeline.evaluation.metric_table import MetricRow

CONVERGED = 0.95
"""Fraction of the loss reduction at which a training counts as converged."""


@dataclass(frozen=True)
class TrendPoint:
    """The score of a promoted version on the benchmark of the report, by the metric of the report.

    Attributes:
        after_gap: the version promoted before it was left out, so the two neighbors in the trend are not neighbors.
    """

    version: str
    score: float
    promoted_at: datetime
    after_gap: bool = False


@dataclass(frozen=True)
class Trend:
    """The scores of the promoted versions, oldest first.

    Attributes:
        left_out: promoted versions that were evaluated on another benchmark, by another metric or with other options of
            it, so that their scores cannot be compared with these.
    """

    points: tuple[TrendPoint, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingCurve:
    """The losses of one training by step.

    Attributes:
        name: of the model that it made.
        validation: with the loss before the first step; of training examples if there was no validation set.
        kept_step: the step whose weights were kept.
    """

    name: str
    training: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    kept_step: int


@dataclass(frozen=True)
class ReportedData:
    """The dataset that a model was trained on: counts of examples.

    Attributes:
        name: of the model.
        sources: source -> examples of train and validation.
        corrections: examples whose target a person wrote and whose rejected answer is known.
        left_out: reason -> examples.
    """

    name: str
    train: int
    validation: int
    replayed: int
    corrections: int
    sources: Mapping[str, int]
    left_out: Mapping[str, int]
    redacted: int
    watermark: int


@dataclass(frozen=True)
class ReportFacts:
    """Everything in a report that is not a comparison of answers; what is unknown is empty.

    Attributes:
        use: metrics of each model from use; a value that was not measured is None.
        training: metrics of each model's training.
        sealed: what the newest look at the sealed benchmark found, and when it is asked next; empty without one.
        hashes: name -> SHA-256 or version of everything that the report is about.
    """

    use: Sequence[MetricRow] = ()
    training: Sequence[MetricRow] = ()
    curves: Sequence[TrainingCurve] = ()
    data: Sequence[ReportedData] = ()
    trend: Trend = field(default_factory=Trend)
    sealed: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)


def convergence_step(losses: Sequence[tuple[int, float]]) -> int | None:
    """Return the first step at which 95 % of the loss reduction was reached; None if the loss never fell.

    The reduction is that from the first to the lowest loss.

    >>> convergence_step([(0, 2.0), (10, 1.2), (20, 1.04), (30, 1.0), (40, 1.1)])
    20
    """
    if not losses:
        return None
    first, lowest = losses[0][1], min(loss for _, loss in losses)
    if lowest >= first:
        return None
    return next(step for step, loss in losses if first - loss >= CONVERGED * (first - lowest))


def gain_per_100_examples(score: float, score_before: float, examples: int) -> float | None:
    """Return the sample efficiency: the gain in score per 100 training examples; None without examples."""
    return (score - score_before) / examples * 100 if examples else None
