"""Review: which interactions may need one, and how decisions are recorded and undone.

Every function works on a connection of the caller's transaction, so that a decision and its effects are stored
together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from pydantic import Field, ValidationError

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.review_decisions import (
    UNDO,
    ReviewDecision,
    decision_of,
    effective_decisions,
    is_effective,
)
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import load_with_feedback, qualifies, recompute_examples, take_offsets
from finetune_pipeline.records import (
    PERSON_KINDS,
    Example,
    Feedback,
    Interaction,
    Record,
    ReviewKind,
    ShortText,
    Text,
    conversation_text,
)
from finetune_pipeline.validation_messages import error_message

MAX_CANDIDATES = 2_000
"""Candidates per reason, newest first, so that the queue opens fast whatever the length of the history."""


class ReviewError(RuntimeError):
    """A decision cannot be recorded; the message says why, and what to do."""


class _DecisionInput(Record):
    """What a reviewer typed."""

    target: Text
    reviewer: Annotated[ShortText, Field(min_length=1)]


@dataclass(frozen=True)
class ReviewCandidate:
    """An interaction that may need a review.

    Attributes:
        feedback: all of it, in the order of arrival.
        rewards: the reward of each feedback.
        example: the example by feedback alone; None without feedback.
        previous_decision: a decision in effect, although a person has corrected the answer since.
    """

    interaction: Interaction
    feedback: tuple[Feedback, ...]
    rewards: tuple[float, ...]
    example: Example | None
    previous_decision: ReviewDecision | None = None

    @property
    def answer(self) -> str:
        """The answer that a reviewer decides on."""
        return self.interaction.output if self.example is None else self.example.target

    @property
    def content_hash(self) -> str:
        """The content hash of the prompt and the answer."""
        return content_hash(conversation_text(self.interaction.prompt, self.interaction.history), self.answer)


def review_candidates(
    connection: sa.Connection,
    loop: str,
    reward: RewardFunction,
    below: float,
    min_reward: float,
    *,
    include_qualifying: bool,
) -> list[ReviewCandidate]:
    """Return interactions that may need a review and have no decision, the newest for each reason.

    Args:
        below: answers with a lower confidence, and without feedback of a person, are candidates.
        min_reward: examples with at least this reward may train.
        include_qualifying: whether examples that may train are candidates, too.
    """
    queries = [_low_confidence(loop, below), _disputed(loop), _tied(loop), _corrected_after_decision(loop)]
    if include_qualifying:
        queries.append(_qualifying(loop, min_reward))
    ids = sorted({id for query in queries for id in connection.execute(query.limit(MAX_CANDIDATES)).scalars()})
    found = list(load_candidates(connection, loop, ids, reward))
    decisions = effective_decisions(connection, loop, ids, [one.content_hash for one in found])
    return [
        replace(one, previous_decision=decisions.by_interaction.get(str(one.interaction.id)))
        for one in found
        if one.content_hash not in decisions.by_content
    ]


def load_candidates(
    connection: sa.Connection, loop: str, ids: Sequence[str], reward: RewardFunction
) -> Iterator[ReviewCandidate]:
    """Yield interactions as a reviewer sees them; ids that are not stored are left out."""
    for chunk in chunks(ids):
        for interaction, ingest_offset, feedback in load_with_feedback(connection, loop, chunk):
            example = resolve(interaction, feedback, ingest_offset, reward) if feedback else None
            rewards = tuple(reward(one, interaction) for one in feedback)
            yield ReviewCandidate(interaction, tuple(feedback), rewards, example)


def record_decision(
    connection: sa.Connection,
    loop: str,
    shown: ReviewCandidate,
    kind: ReviewKind,
    target: str,
    reviewer: str,
    reward: RewardFunction,
) -> None:
    """Record a reviewer's decision, and recompute the examples of this interaction and of the same content elsewhere.

    Args:
        shown: what the reviewer saw.
        target: the corrected answer of an edit; else the answer that was shown.

    Raises:
        ReviewError: the interaction was deleted, its answer has changed, or the text cannot be stored.
    """
    ingest_offset = take_offsets(connection, 1)  # locks until commit, so nothing comes between the check and the insert
    id = str(shown.interaction.id)
    now = next(load_candidates(connection, loop, [id], reward), None)
    if now is None:
        raise ReviewError(f"interaction {id} was deleted in the meantime; nothing was recorded")
    if now.content_hash != shown.content_hash:
        raise ReviewError(f"the answer of interaction {id} was corrected in the meantime; review it again")
    try:
        given = _DecisionInput(target=target, reviewer=reviewer)
    except ValidationError as error:
        raise ReviewError(f"{error_message(error)}; nothing was recorded") from error
    row = {"decision": kind, "target": given.target, "content_hash": shown.content_hash}
    _insert_decision(connection, loop, ingest_offset, id, given.reviewer, row)
    _recompute(connection, loop, ingest_offset, id, {shown.content_hash}, reward)


def undo_decision(
    connection: sa.Connection, loop: str, reviewer: str, reward: RewardFunction, interaction_id: UUID | None = None
) -> str | None:
    """Undo the reviewer's newest decision in effect; return the interaction's id, or None if there is no decision.

    The decision stays in the table, followed by the undo.

    Args:
        interaction_id: undo only a decision on this interaction.
    """
    ingest_offset = take_offsets(connection, 1)
    d = t.review_decisions.c
    newest = sa.select(t.review_decisions).where(d.loop == loop, d.reviewer == reviewer, is_effective())
    if interaction_id is not None:
        newest = newest.where(d.interaction_id == str(interaction_id))
    row = connection.execute(newest.order_by(d.ingest_offset.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    decision = decision_of(row)
    _insert_decision(connection, loop, ingest_offset, decision.interaction_id, reviewer, {"decision": UNDO})
    hashes = {decision.content_hash, *_content_hashes(connection, [decision.interaction_id])}
    _recompute(connection, loop, ingest_offset, decision.interaction_id, hashes, reward)
    return decision.interaction_id


def effective_decision(connection: sa.Connection, loop: str, interaction_id: UUID) -> ReviewDecision | None:
    """Return the decision in effect for an interaction."""
    return effective_decisions(connection, loop, [str(interaction_id)]).by_interaction.get(str(interaction_id))


def interactions_with_content(connection: sa.Connection, loop: str, content_hashes: Sequence[str]) -> list[str]:
    """Return the ids of the interactions whose examples have these content hashes."""
    e = t.examples.c
    queries = (
        sa.select(e.interaction_id).where(e.loop == loop, e.content_hash.in_(chunk)) for chunk in chunks(content_hashes)
    )
    return [id for query in queries for id in connection.execute(query).scalars()]


def interactions_shaped_by(connection: sa.Connection, loop: str, decision_ids: Sequence[str]) -> set[str]:
    """Return the ids of the interactions whose examples these decisions may affect: by interaction or by content."""
    d, ids, hashes = t.review_decisions.c, set[str](), set[str]()
    for chunk in chunks(decision_ids):
        for row in connection.execute(sa.select(d.interaction_id, d.content_hash).where(d.id.in_(chunk))):
            ids.add(row.interaction_id)
            hashes.update({row.content_hash} - {None})
    hashes.update(_content_hashes(connection, sorted(ids)))
    return ids.union(interactions_with_content(connection, loop, sorted(hashes)))


def _content_hashes(connection: sa.Connection, interaction_ids: Sequence[str]) -> Iterator[str]:
    e = t.examples.c
    for chunk in chunks(interaction_ids):
        yield from connection.execute(sa.select(e.content_hash).where(e.interaction_id.in_(chunk))).scalars()


def _recompute(
    connection: sa.Connection, loop: str, ingest_offset: int, id: str, hashes: set[str], reward: RewardFunction
) -> None:
    for chunk in chunks(sorted({id, *interactions_with_content(connection, loop, sorted(hashes))})):
        recompute_examples(connection, loop, chunk, reward, offset=ingest_offset)


def _insert_decision(
    connection: sa.Connection, loop: str, ingest_offset: int, interaction_id: str, reviewer: str, row: dict[str, str]
) -> None:
    where = {"id": str(uuid4()), "loop": loop, "ingest_offset": ingest_offset, "interaction_id": interaction_id}
    who = {"reviewer": reviewer, "created_at": datetime.now(UTC)}
    connection.execute(t.review_decisions.insert().values(**where, **who, **row))


# The conditions and queries of the candidates, in SQL.

_NEWEST_FIRST = (t.interactions.c.created_at.desc(), t.interactions.c.id)
"""By the time of the interaction: a log that is imported late is not newer than what was logged since."""


def _undecided() -> sa.ColumnElement[bool]:
    """Return the condition that no decision is in effect, or a person has corrected the answer since."""
    i, d = t.interactions.c, t.review_decisions.c
    return ~sa.exists().where(d.interaction_id == i.id, is_effective(), ~_corrected_since())


def _corrected_since() -> sa.ColumnElement[bool]:
    d, f = t.review_decisions.c, t.feedback.alias().c
    return sa.exists().where(
        f.interaction_id == d.interaction_id, f.kind == "correction", f.ingest_offset > d.ingest_offset
    )


def _corrected_after_decision(loop: str) -> sa.Select[Any]:
    """Select interactions whose decision is in effect, but whose answer a person has corrected since."""
    i, d = t.interactions.c, t.review_decisions.c
    query = sa.select(i.id).join(t.review_decisions, i.id == d.interaction_id).where(d.loop == loop, i.loop == loop)
    return query.where(i.retracted_offset.is_(None), is_effective(), _corrected_since()).order_by(*_NEWEST_FIRST)


def _low_confidence(loop: str, below: float) -> sa.Select[Any]:
    """Select interactions that are flagged or less confident than `below`, and on which no person gave feedback."""
    i, f = t.interactions.c, t.feedback.c
    judged = sa.exists().where(f.interaction_id == i.id, f.loop == loop, f.kind.in_(sorted(PERSON_KINDS)))
    unsure = sa.or_(i.flag.is_not(None), i.confidence < below)
    query = sa.select(i.id).where(i.loop == loop, i.retracted_offset.is_(None), unsure, ~judged, _undecided())
    return query.order_by(*_NEWEST_FIRST)


def _disputed(loop: str) -> sa.Select[Any]:
    """Select interactions with contradicting feedback or corrections, or that were rejected but not corrected."""
    i, f = t.interactions.c, t.feedback.c
    rejection = sa.or_(f.kind == "thumbs_down", sa.and_(f.kind == "rating", f.rating.in_(["1", "2"])))
    positive = sa.or_(
        f.kind.in_(["thumbs_up", "success"]),
        sa.and_(f.kind == "rating", f.rating.in_(["4", "5", "gold"])),
        f.reward > 0,
    )
    negative = sa.or_(rejection, f.kind.in_(["correction", "validation_failure"]), f.reward < 0)

    def any_row(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.func.max(sa.case((condition, 1), else_=0)) == 1

    uncorrected = sa.and_(any_row(rejection), sa.func.count(f.correction) == 0)
    several_corrections = sa.func.count(f.correction.distinct()) > 1
    query = sa.select(i.id).join(t.feedback, f.interaction_id == i.id).where(f.loop == loop, i.loop == loop)
    grouped = query.where(i.retracted_offset.is_(None), _undecided()).group_by(i.id, i.created_at)
    disagree = sa.and_(any_row(positive), any_row(negative))
    return grouped.having(sa.or_(disagree, uncorrected, several_corrections)).order_by(*_NEWEST_FIRST)


def _tied(loop: str) -> sa.Select[Any]:
    """Select interactions that have feedback but no example, since as much of it is for the answer as against it."""
    i, f, e = t.interactions.c, t.feedback.c, t.examples.c
    given = sa.exists().where(f.interaction_id == i.id, f.loop == loop)
    example = sa.exists().where(e.interaction_id == i.id)
    query = sa.select(i.id).where(i.loop == loop, i.retracted_offset.is_(None), given, ~example, _undecided())
    return query.order_by(*_NEWEST_FIRST)


def _qualifying(loop: str, min_reward: float) -> sa.Select[Any]:
    """Select interactions whose examples may train and have not been reviewed."""
    i, e = t.interactions.c, t.examples.c
    query = sa.select(e.interaction_id).join(t.interactions, i.id == e.interaction_id)
    unreviewed = query.where(e.loop == loop, i.loop == loop, e.review.is_(None), qualifies(min_reward))
    return unreviewed.order_by(*_NEWEST_FIRST)
