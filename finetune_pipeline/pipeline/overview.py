"""A loop in figures: what the first screen of the console shows beside `pipeline.status`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from finetune_pipeline.database import Database
from finetune_pipeline.feedback.statistics import (
    RewardStatistics,
    UseStatistics,
    gold_answers,
    reward_statistics,
    use_statistics,
    win_rates,
)
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.model_versions import ModelVersion, list_models
from finetune_pipeline.registry.training_jobs import IN_PROGRESS, TrainingJob, list_jobs
from finetune_pipeline.registry.trainings import list_trainings
from finetune_pipeline.settings import LoopSettings

LAST_JOBS = 8
"""How many of the newest training jobs are listed."""


@dataclass(frozen=True)
class VersionFigures:
    """One model version in a list or chart.

    Attributes:
        examples: examples that it was trained on; None if its training is not recorded.
        win_rate: of its answers that somebody judged; None if nobody did.
    """

    version: ModelVersion
    examples: int | None
    win_rate: float | None


@dataclass(frozen=True)
class LoopFigures:
    """A loop in figures.

    Attributes:
        champion: None is the base model.
        champion_since: when it became champion; None for a base model that always served.
        live: what was said about the champion's answers in use.
        gold: answers that a user gave a gold star.
        versions: oldest first, without archived ones.
        average_win_rate: mean over the versions whose answers somebody judged; None if there are none.
        rewards: of the loop's examples.
        active_jobs: training jobs in progress.
        jobs: the newest training jobs, newest first.
    """

    champion: ModelVersion | None
    champion_since: datetime | None
    live: UseStatistics
    gold: int
    versions: Sequence[VersionFigures]
    average_win_rate: float | None
    rewards: RewardStatistics
    active_jobs: int
    jobs: Sequence[TrainingJob]


def loop_figures(loop: LoopSettings, database: Database) -> LoopFigures:
    """Return a loop in figures, read from the database; nothing is written."""
    serving = champion(database, loop.name)
    models = [model for model in reversed(list_models(database, loop.name)) if model.archived_at is None]
    trained = {training.id: training.examples for training in list_trainings(database, loop.name)}
    with database.read() as connection:
        rates = win_rates(connection, loop.name)
        live = use_statistics(connection, loop.name, serving.name if serving else f"{loop.name}@base")
        rewards = reward_statistics(connection, loop.name)
        gold = gold_answers(connection, loop.name)
    versions = [
        VersionFigures(model, trained.get(model.lineage.get("lora_adapter", "")), rates.get(model.name))
        for model in models
    ]
    known = [one.win_rate for one in versions if one.win_rate is not None]
    return LoopFigures(
        champion=serving,
        champion_since=serving.deployed_at if serving else None,
        live=live,
        gold=gold,
        versions=versions,
        average_win_rate=fmean(known) if known else None,
        rewards=rewards,
        active_jobs=len(list_jobs(database, loop.name, IN_PROGRESS)),
        jobs=list_jobs(database, loop.name, limit=LAST_JOBS),
    )
