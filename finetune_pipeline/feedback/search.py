"""Look up interactions and their feedback: by filters, by the prompt, and in the order of arrival."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import (
    StoredInteraction,
    feedback_from_row,
    find_interaction,
    interaction_from_row,
    newest_offset,
)
from finetune_pipeline.records import Feedback, Interaction, conversation_text, normalize

UNRATED = "unrated"
"""The label of interactions without feedback."""
_MAX_MATCHES = 1_000
_MAX_WORDS = 20  # that the database compares
_FETCHED_ROWS = 500


@dataclass(frozen=True)
class InteractionFilter:
    """Which interactions to return: those that fulfill all conditions that are given.

    Attributes:
        text: part of the prompt, the answer, or a correction; upper and lower case (of ASCII) are the same.
        user: who wrote the prompt or gave feedback on the answer.
        label: kind of a feedback on the answer, or UNRATED.
        since, until: when the feedback was given, or the answer logged; from `since` to before `until`.
        reward, confidence: least and most of the example's reward, and of the answer's confidence.
    """

    text: str | None = None
    user: str | None = None
    label: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reward: tuple[float, float] | None = None
    confidence: tuple[float, float] | None = None


def search(
    connection: sa.Connection, loop: str, wanted: InteractionFilter, limit: int, skip: int = 0
) -> list[StoredInteraction]:
    """Return interactions that match, newest first. User, label and time refer to the same feedback.

    Args:
        limit: at most so many.
        skip: leave out the newest ones, which an earlier page has.
    """
    i, f, e = t.interactions.c, t.feedback.c, t.examples.c
    about = sa.exists().where(f.interaction_id == i.id, f.loop == loop)
    given, logged = [], []
    if wanted.user is not None:
        given.append(f.user == wanted.user)
        logged.append(i.user == wanted.user)
    if wanted.since is not None:
        given.append(f.created_at >= wanted.since)
        logged.append(i.created_at >= wanted.since)
    if wanted.until is not None:
        given.append(f.created_at < wanted.until)
        logged.append(i.created_at < wanted.until)
    query = sa.select(i.id).where(i.loop == loop)
    if wanted.label == UNRATED:
        query = query.where(~about, *logged)
    elif wanted.label is not None:
        query = query.where(about.where(f.kind == wanted.label, *given))
    elif given:
        query = query.where(sa.or_(sa.and_(*logged), about.where(*given)))
    if wanted.text is not None:
        texts = (i.prompt, i.output)
        corrected = about.where(f.correction.icontains(wanted.text, autoescape=True))
        query = query.where(sa.or_(*(text.icontains(wanted.text, autoescape=True) for text in texts), corrected))
    if wanted.reward is not None:
        query = query.where(sa.exists().where(e.interaction_id == i.id, e.reward.between(*wanted.reward)))
    if wanted.confidence is not None:
        query = query.where(i.confidence.between(*wanted.confidence))
    newest_first = query.order_by(i.created_at.desc(), i.ingest_offset.desc())
    ids = connection.execute(newest_first.limit(limit).offset(skip)).scalars().all()
    found = (find_interaction(connection, UUID(id)) for id in ids)
    return [one for one in found if one is not None]


def interactions_with_prompt(connection: sa.Connection, loop: str, prompt: str) -> list[Interaction]:
    """Return the interactions that a person may mean by a prompt, the newest first; one if there is no doubt.

    These are the interactions with this prompt, or else those whose prompt contains it. White space and case do not
    matter. Of interactions with the same conversation and answer, only the newest is returned.
    """
    i = t.interactions.c
    words = prompt.split()[:_MAX_WORDS]
    query = sa.select(t.interactions).where(
        i.loop == loop, *(i.prompt.icontains(word, autoescape=True) for word in words)
    )
    rows = connection.execute(query.order_by(i.created_at.desc(), i.ingest_offset.desc()).limit(_MAX_MATCHES))
    wanted = normalize(prompt)
    matches = [one for one in map(interaction_from_row, rows) if wanted in normalize(one.prompt)]
    same = [one for one in matches if normalize(one.prompt) == wanted]
    distinct: dict[tuple[str, str], Interaction] = {}
    for one in same or matches:
        distinct.setdefault((normalize(conversation_text(one.prompt, one.history)), one.output), one)
    return list(distinct.values())


def events_after(
    connection: sa.Connection, loop: str, offset: int, reward: RewardFunction
) -> Iterator[tuple[int, Interaction | Feedback]]:
    """Yield a loop's events after an ingest offset with their offsets, in the order of arrival.

    A feedback has the reward that it counts for; it has none of ours while its interaction has not arrived.
    """
    until = newest_offset(connection)
    while offset < until:
        rows: list[tuple[int, Interaction | Feedback]] = []
        for table, convert in ((t.interactions, interaction_from_row), (t.feedback, feedback_from_row)):
            c = table.c
            query = sa.select(table).where(c.loop == loop, c.ingest_offset > offset, c.ingest_offset <= until)
            found = connection.execute(query.order_by(c.ingest_offset).limit(_FETCHED_ROWS))
            rows += [(row.ingest_offset, convert(row)) for row in found]
        # Each table gave its first rows, so only as many rows of both together are certain to be the next ones.
        for number, event in sorted(rows, key=lambda row: row[0])[:_FETCHED_ROWS]:
            offset = number
            yield number, _with_reward(connection, event, reward) if isinstance(event, Feedback) else event
        if len(rows) < _FETCHED_ROWS:
            return


def offset_of_last(connection: sa.Connection, loop: str, count: int) -> int:
    """Return the ingest offset before a loop's last `count` events."""
    offsets = sa.union_all(
        *(sa.select(table.c.ingest_offset).where(table.c.loop == loop) for table in (t.interactions, t.feedback))
    ).subquery()
    column = offsets.c.ingest_offset
    if not count:
        return newest_offset(connection)
    last = connection.execute(sa.select(column).order_by(column.desc()).limit(count)).scalars().all()
    return min(last, default=1) - 1


def _with_reward(connection: sa.Connection, event: Feedback, reward: RewardFunction) -> Feedback:
    row = connection.execute(
        sa.select(t.interactions).where(t.interactions.c.id == str(event.interaction_id))
    ).one_or_none()
    return event if row is None else event.model_copy(update={"reward": reward(event, interaction_from_row(row))})
