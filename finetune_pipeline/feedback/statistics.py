"""Statistics of a loop's feedback: rewards, how much the users agree, and what they said about one model version."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks
from finetune_pipeline.feedback.resolution import JUDGMENT_KINDS, answers_meant, latest_of_each_user
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import load_with_feedback
from finetune_pipeline.records import Feedback

BINS = tuple((step / 5, (step + 1) / 5) for step in range(-5, 5))
"""The bins of the histogram: from (inclusive) and to (exclusive; 1.0 belongs to the last one)."""


@dataclass(frozen=True)
class RewardStatistics:
    """The rewards of a loop's examples.

    Attributes:
        average: mean reward, -1 to 1; None without examples.
        histogram: the number of examples in each of BINS.
    """

    average: float | None
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class UserAgreement:
    """How much the users agree on whether answers are correct.

    Attributes:
        alpha: Krippendorff's alpha for nominal data (for, or against): 1 is full agreement, 0 what chance would give,
            and below 0 less than that. None if there is nothing to compare, or all ratings are the same.
        answers: the answers that several users rated.
        ratings: the ratings of these answers, one of each user.
    """

    alpha: float | None
    answers: int
    ratings: int


@dataclass(frozen=True)
class UseStatistics:
    """What was said about one model's answers in use.

    Attributes:
        answers: interactions that the model answered.
        won: answers that were confirmed, or rated above neutral.
        lost: answers that were corrected, or rated below neutral.
        tied: answers whose feedback is neutral.
        ratings: the latest rating of each user on each answer.
        gold: ratings that are gold stars.
        average_rating: 1 to 5, a gold star counts as 5; None without ratings.
        rating_deviation: standard deviation of the ratings; None without two ratings.
        average_reward: -1 to 1, over the answers with feedback; None without feedback.
    """

    answers: int
    won: int
    lost: int
    tied: int
    ratings: int
    gold: int
    average_rating: float | None
    rating_deviation: float | None
    average_reward: float | None

    @property
    def win_rate(self) -> float | None:
        """Won answers of those that are not tied; None without any."""
        return self.won / (self.won + self.lost) if self.won + self.lost else None

    @property
    def gold_rate(self) -> float | None:
        """Gold stars of all ratings; None without ratings."""
        return self.gold / self.ratings if self.ratings else None


def use_statistics(connection: sa.Connection, loop: str, model: str) -> UseStatistics:
    """Return what was said about the answers of one model (`loop@v1.2.0`, `loop@base`).

    An answer counts by its example, in which all its feedback is resolved. Answers that count as accepted only because
    nobody objected are left out, since nothing was said about them.
    """
    i, e, f = t.interactions.c, t.examples.c, t.feedback.c
    of_model = (i.loop == loop, i.model == model)
    answers = connection.execute(sa.select(sa.func.count()).where(*of_model)).scalar_one()
    counted = [
        sa.func.count().filter(condition)
        for condition in (
            sa.and_(~e.corrected, e.reward > 0),
            sa.or_(e.corrected, e.reward < 0),
            sa.and_(~e.corrected, e.reward == 0),
        )
    ]
    judged = sa.join(t.examples, t.interactions, e.interaction_id == i.id)
    totals = connection.execute(
        sa.select(*counted, sa.func.avg(e.reward))
        .select_from(judged)
        .where(*of_model, ~e.implicit, e.content_hash != "")
    ).one()
    won, lost, tied, reward = tuple(totals)
    newest_first = (f.created_at.desc(), f.ingest_offset.desc())
    author = sa.func.coalesce(f.user, "")
    turn = sa.func.row_number().over(partition_by=(f.interaction_id, author), order_by=newest_first).label("turn")
    rated = sa.join(t.feedback, t.interactions, f.interaction_id == i.id)
    latest = (
        sa.select(f.rating, turn)
        .select_from(rated)
        .where(*of_model, f.kind == "rating", f.rating.is_not(None))
        .subquery()
    )
    given = connection.execute(
        sa.select(latest.c.rating, sa.func.count()).where(latest.c.turn == 1).group_by(latest.c.rating)
    )
    counts: dict[str, int] = {row[0]: row[1] for row in given}
    stars = [5 if rating == "gold" else int(rating) for rating, count in counts.items() for _ in range(count)]
    return UseStatistics(
        answers=answers,
        won=won,
        lost=lost,
        tied=tied,
        ratings=len(stars),
        gold=counts.get("gold", 0),
        average_rating=fmean(stars) if stars else None,
        rating_deviation=stdev(stars) if len(stars) > 1 else None,
        average_reward=reward,
    )


def win_rates(connection: sa.Connection, loop: str) -> dict[str, float]:
    """Return the win rate of each model whose answers somebody judged, by its name, as in `UseStatistics`."""
    i, e = t.interactions.c, t.examples.c
    won = sa.func.count().filter(~e.corrected, e.reward > 0)
    lost = sa.func.count().filter(sa.or_(e.corrected, e.reward < 0))
    query = (
        sa.select(i.model, won, lost)
        .select_from(sa.join(t.examples, t.interactions, e.interaction_id == i.id))
        .where(e.loop == loop, i.model.is_not(None), ~e.implicit, e.content_hash != "")
        .group_by(i.model)
    )
    counted = [tuple(row) for row in connection.execute(query)]
    return {model: wins / (wins + losses) for model, wins, losses in counted if wins + losses}


def gold_answers(connection: sa.Connection, loop: str) -> int:
    """Return how many answers somebody gave a gold star."""
    f = t.feedback.c
    query = sa.select(sa.func.count(f.interaction_id.distinct())).where(f.loop == loop, f.rating == "gold")
    return int(connection.execute(query).scalar_one())


def reward_statistics(connection: sa.Connection, loop: str) -> RewardStatistics:
    """Return the mean and the distribution of the rewards of a loop's examples."""
    reward = t.examples.c.reward
    counted = [
        sa.func.count().filter(reward >= low, reward < (high if high < 1 else 2)).label(f"bin{number}")
        for number, (low, high) in enumerate(BINS)
    ]
    average, *histogram = connection.execute(
        sa.select(sa.func.avg(reward), *counted).where(t.examples.c.loop == loop)
    ).one()
    return RewardStatistics(average, tuple(histogram))


def agreement(connection: sa.Connection, loop: str, reward: RewardFunction) -> UserAgreement:
    """Return how much users agree, by the latest thumb or rating of each user on each answer; neutral ones count not.

    Feedback without a user counts as that of one more user, as in `resolution`.
    """
    f = t.feedback.c
    users = sa.func.count(sa.func.coalesce(f.user, "").distinct())
    several = sa.select(f.interaction_id).where(f.loop == loop, f.kind.in_(sorted(JUDGMENT_KINDS)))
    ids = connection.execute(several.group_by(f.interaction_id).having(users > 1)).scalars().all()
    units = [unit for chunk in chunks(ids) for unit in _units(connection, loop, chunk, reward) if sum(unit) > 1]
    return UserAgreement(krippendorff_alpha(units), len(units), sum(map(sum, units)))


def krippendorff_alpha(units: Iterable[tuple[int, int]]) -> float | None:
    """Return Krippendorff's alpha of nominal data with two values, or None if it is undefined.

    1 - observed / expected disagreement, after Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability",
    section C (nominal data, any number of observers, missing data).

    Args:
        units: for each unit, how many observers gave the one value, and how many the other.
    """
    pairable = [unit for unit in units if sum(unit) > 1]
    first, second = sum(unit[0] for unit in pairable), sum(unit[1] for unit in pairable)
    if not (first and second):
        return None
    # Each of both disagreements is a sum over the ordered pairs of different values.
    observed = sum(2 * one * other / (one + other - 1) for one, other in pairable) / (first + second)
    expected = 2 * first * second / ((first + second) * (first + second - 1))
    return 1 - observed / expected


def _units(
    connection: sa.Connection, loop: str, ids: Sequence[str], reward: RewardFunction
) -> Iterator[tuple[int, int]]:
    for interaction, _, feedback in load_with_feedback(connection, loop, ids):
        about: defaultdict[str, list[Feedback]] = defaultdict(list)
        for answers, one in zip(answers_meant(interaction, feedback), feedback, strict=True):
            for answer in answers if one.kind in JUDGMENT_KINDS else ():
                about[answer].append(one)
        for judgments in about.values():
            latest = latest_of_each_user(judgments)
            # Of several ratings of a user at the same time, none is the latest.
            rewards = [reward(given[0], interaction) for given in latest.values() if len(given) == 1]
            signs = Counter(value > 0 for value in rewards if value)
            yield signs[True], signs[False]
