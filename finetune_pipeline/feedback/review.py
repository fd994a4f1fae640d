"""Review: what could deserve a person's eye, a decision recorded, a decision undone.

Every function works on a connection of the caller's transaction: a decision and what it changes are kept together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from pydantic import Field, ValidationError

from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.content_hash import content_hash
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.review_decisions import (
    UNDO,
    ReviewDecision,
    decision_of,
    is_standing,
    standing_decisions,
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

POOL = 2_000
"""So many of each kind are looked at, the newest first, so that a long history does not make the queue slow."""

_CHUNK = 500


class ReviewError(RuntimeError):
    """A decision cannot be kept; the message says why, and what to do."""


class _Words(Record):
    """What a person typed: text that every store can keep."""

    target: Text
    reviewer: Annotated[ShortText, Field(min_length=1)]


@dataclass(frozen=True)
class ReviewCandidate:
    """An interaction that may deserve a person's eye.

    Attributes:
        feedback: all of it, in the order of arrival.
        rewards: what each feedback is worth.
        example: what it teaches by its feedback alone; None without any.
        decided: what a reviewer decided before a person corrected it anew.
    """

    interaction: Interaction
    feedback: tuple[Feedback, ...]
    rewards: tuple[float, ...]
    example: Example | None
    ingest_offset: int
    decided: ReviewDecision | None = None

    @property
    def answer(self) -> str:
        """The answer that a reviewer decides on."""
        return self.interaction.output if self.example is None else self.example.target

    @property
    def question(self) -> str:
        """The prompt with what was said before it."""
        return conversation_text(self.interaction.prompt, self.interaction.history)

    @property
    def content_hash(self) -> str:
        """Of the question and the answer."""
        return content_hash(self.question, self.answer)


def review_candidates(
    connection: sa.Connection, loop: str, reward: RewardFunction, below: float, min_reward: float, *, taught: bool
) -> list[ReviewCandidate]:
    """Interactions that may deserve a person's eye and that nobody decided on, the newest of each kind.

    Args:
        below: answers less confident than this, on which no person said anything, are among them.
        min_reward: examples from here on may train.
        taught: whether what may train is among them too.
    """
    queries = [_unsure(loop, below), _disputed(loop), _revised(loop), *([_taught(loop, min_reward)] if taught else [])]
    ids = sorted({id for query in queries for id in connection.execute(query.limit(POOL)).scalars()})
    found = list(load_candidates(connection, loop, ids, reward))
    decisions = standing_decisions(connection, loop, ids, [one.content_hash for one in found])
    return [
        ReviewCandidate(one.interaction, one.feedback, one.rewards, one.example, one.ingest_offset, own)
        for one in found
        for own in [decisions.own.get(str(one.interaction.id))]
        if one.content_hash not in decisions.alike
    ]


def load_candidates(
    connection: sa.Connection, loop: str, ids: Sequence[str], reward: RewardFunction
) -> Iterator[ReviewCandidate]:
    """These interactions as a reviewer sees them; what is not there any more is left out."""
    for chunk in _chunks(ids):
        for interaction, ingest_offset, feedback in load_with_feedback(connection, loop, chunk):
            example = resolve(interaction, feedback, ingest_offset, reward) if feedback else None
            rewards = tuple(reward(item, interaction) for item in feedback)
            yield ReviewCandidate(interaction, tuple(feedback), rewards, example, ingest_offset)


def record_decision(
    connection: sa.Connection,
    loop: str,
    shown: ReviewCandidate,
    kind: ReviewKind,
    target: str,
    reviewer: str,
    reward: RewardFunction,
) -> None:
    """Keep a reviewer's decision, and renew what it changes: this interaction, and the same words elsewhere.

    Args:
        shown: what the reviewer saw.
        target: of an edit the answer as it should be; else as shown.

    Raises:
        ReviewError: the interaction is gone, its answer is another one since, or the text cannot be kept.
    """
    ingest_offset = take_offsets(connection, 1)  # locked until commit: nothing comes between the look and the insert
    id = str(shown.interaction.id)
    now = next(load_candidates(connection, loop, [id], reward), None)
    if now is None:
        raise ReviewError(f"interaction {id} was deleted meanwhile; nothing was kept")
    if now.content_hash != shown.content_hash:
        raise ReviewError(f"the answer of interaction {id} was corrected meanwhile; look at it again")
    try:
        words = _Words(target=target, reviewer=reviewer)
    except ValidationError as error:
        first = error.errors()[0]
        raise ReviewError(f"{first['loc'][0]}: {first['msg']}; nothing was kept") from error
    row = {"decision": kind, "target": words.target, "content_hash": shown.content_hash}
    _add(connection, loop, ingest_offset, id, words.reviewer, row)
    _renew(connection, loop, ingest_offset, id, {shown.content_hash}, reward)


def undo_decision(
    connection: sa.Connection, loop: str, reviewer: str, reward: RewardFunction, interaction_id: UUID | None = None
) -> str | None:
    """Take back the reviewer's newest decision that stands; returns the interaction's id, None if there is none.

    The decision stays in the table, and the undo stands behind it.

    Args:
        interaction_id: only a decision on this one.
    """
    ingest_offset = take_offsets(connection, 1)
    d = t.review_decisions.c
    newest = sa.select(t.review_decisions).where(d.loop == loop, d.reviewer == reviewer, is_standing())
    if interaction_id is not None:
        newest = newest.where(d.interaction_id == str(interaction_id))
    row = connection.execute(newest.order_by(d.ingest_offset.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    decision = decision_of(row)
    _add(connection, loop, ingest_offset, decision.interaction_id, reviewer, {"decision": UNDO})
    taught = _contents(connection, [decision.interaction_id])
    _renew(connection, loop, ingest_offset, decision.interaction_id, {decision.content_hash, *taught}, reward)
    return decision.interaction_id


def standing_decision(connection: sa.Connection, loop: str, interaction_id: UUID) -> ReviewDecision | None:
    """The decision that stands for an interaction."""
    return standing_decisions(connection, loop, [str(interaction_id)]).own.get(str(interaction_id))


def interactions_with_content(connection: sa.Connection, loop: str, content_hashes: Sequence[str]) -> list[str]:
    """The interactions whose examples have these contents."""
    e = t.examples.c
    queries = (
        sa.select(e.interaction_id).where(e.loop == loop, e.content_hash.in_(chunk))
        for chunk in _chunks(content_hashes)
    )
    return [id for query in queries for id in connection.execute(query).scalars()]


def interactions_shaped_by(connection: sa.Connection, loop: str, decision_ids: Sequence[str]) -> set[str]:
    """The interactions whose examples these decisions may have shaped: their own, and those of the same words."""
    d, ids, hashes = t.review_decisions.c, set[str](), set[str]()
    for chunk in _chunks(decision_ids):
        for row in connection.execute(sa.select(d.interaction_id, d.content_hash).where(d.id.in_(chunk))):
            ids.add(row.interaction_id)
            hashes.update({row.content_hash} - {None})
    hashes.update(_contents(connection, sorted(ids)))
    return ids.union(interactions_with_content(connection, loop, sorted(hashes)))


def _contents(connection: sa.Connection, interaction_ids: Sequence[str]) -> Iterator[str]:
    e = t.examples.c
    for chunk in _chunks(interaction_ids):
        yield from connection.execute(sa.select(e.content_hash).where(e.interaction_id.in_(chunk))).scalars()


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


def _renew(
    connection: sa.Connection, loop: str, ingest_offset: int, id: str, hashes: set[str], reward: RewardFunction
) -> None:
    ids = sorted({id, *interactions_with_content(connection, loop, sorted(hashes))})
    for chunk in _chunks(ids):
        recompute_examples(connection, loop, chunk, reward, offset=ingest_offset)


def _add(
    connection: sa.Connection, loop: str, ingest_offset: int, interaction_id: str, reviewer: str, row: dict[str, str]
) -> None:
    who = {"reviewer": reviewer, "created_at": datetime.now(UTC)}
    where = {"id": str(uuid4()), "loop": loop, "ingest_offset": ingest_offset, "interaction_id": interaction_id}
    connection.execute(t.review_decisions.insert().values(**where, **who, **row))


def _undecided() -> sa.ColumnElement[bool]:
    """No decision stands for the interaction, or a person corrected it since."""
    i, d = t.interactions.c, t.review_decisions.c
    return ~sa.exists().where(d.interaction_id == i.id, is_standing(), ~_corrected_since())


def _corrected_since() -> sa.ColumnElement[bool]:
    d, f = t.review_decisions.c, t.feedback.alias().c
    return sa.exists().where(
        f.interaction_id == d.interaction_id, f.kind == "correction", f.ingest_offset > d.ingest_offset
    )


def _revised(loop: str) -> sa.Select[Any]:
    """Decided on, and a person corrected it since."""
    i, d = t.interactions.c, t.review_decisions.c
    query = sa.select(i.id).join(t.review_decisions, i.id == d.interaction_id).where(d.loop == loop, i.loop == loop)
    return query.where(i.retracted_offset.is_(None), is_standing(), _corrected_since()).order_by(d.ingest_offset.desc())


def _unsure(loop: str, below: float) -> sa.Select[Any]:
    """Flagged, or less confident than `below`, and no person said anything of it."""
    i, f = t.interactions.c, t.feedback.c
    looked_at = sa.exists().where(f.interaction_id == i.id, f.loop == loop, f.kind.in_(sorted(PERSON_KINDS)))
    unsure = sa.or_(i.flag.is_not(None), i.confidence < below)
    query = sa.select(i.id).where(i.loop == loop, i.retracted_offset.is_(None), unsure, ~looked_at, _undecided())
    return query.order_by(i.ingest_offset.desc())


def _disputed(loop: str) -> sa.Select[Any]:
    """One said yes and another no, two wrote other answers, or a person said no and nobody wrote what is right."""
    i, f = t.interactions.c, t.feedback.c
    no = sa.or_(f.kind == "thumbs_down", sa.and_(f.kind == "rating", f.rating.in_(["1", "2"])))
    yes = sa.or_(f.kind.in_(["thumbs_up", "success"]), sa.and_(f.kind == "rating", f.rating.in_(["4", "5", "gold"])))
    bad = sa.or_(no, f.kind.in_(["correction", "validation_failure"]), f.reward < 0)
    any_yes = sa.func.max(sa.case((sa.or_(yes, f.reward > 0), 1), else_=0)) == 1
    any_bad = sa.func.max(sa.case((bad, 1), else_=0)) == 1
    any_no = sa.func.max(sa.case((no, 1), else_=0)) == 1
    unanswered = sa.and_(any_no, sa.func.count(f.correction) == 0)
    several = sa.func.count(f.correction.distinct()) > 1
    query = sa.select(i.id).join(t.feedback, f.interaction_id == i.id).where(f.loop == loop, i.loop == loop)
    grouped = query.where(i.retracted_offset.is_(None), _undecided()).group_by(i.id, i.ingest_offset)
    return grouped.having(sa.or_(sa.and_(any_yes, any_bad), unanswered, several)).order_by(i.ingest_offset.desc())


def _taught(loop: str, min_reward: float) -> sa.Select[Any]:
    """What may train, and no reviewer saw."""
    i, e = t.interactions.c, t.examples.c
    query = sa.select(e.interaction_id).join(t.interactions, i.id == e.interaction_id)
    unseen = query.where(e.loop == loop, e.review.is_(None), qualifies(min_reward))
    return unseen.order_by(e.ingest_offset.desc())
