"""The decisions of reviewers, and the examples that result from them.

A decision is about a prompt and the answer that was shown. It holds for its interaction until it is undone, whatever
feedback arrives, and for the same prompt and answer elsewhere (a copy, a note that moved), which have the same content
hash. Of several decisions only the newest is effective.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks
from finetune_pipeline.feedback.content_hash import example_hash
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import Example, Feedback, Interaction, ReviewKind, same_answer

UNDO = "undo"


@dataclass(frozen=True)
class ReviewDecision:
    """A decision in effect.

    Attributes:
        target: the answer that was approved or written; for a rejection, the answer that was shown.
        content_hash: of the prompt and the answer that were shown.
        ingest_offset: the store's, to order decisions and feedback.
    """

    interaction_id: str
    kind: ReviewKind
    target: str
    reviewer: str
    created_at: datetime
    content_hash: str
    ingest_offset: int


@dataclass(frozen=True)
class EffectiveDecisions:
    """The decisions in effect for some interactions.

    Attributes:
        by_interaction: interaction id -> the decision on it.
        by_content: content hash -> the newest decision on this prompt and answer.
    """

    by_interaction: Mapping[str, ReviewDecision] = field(default_factory=dict)
    by_content: Mapping[str, ReviewDecision] = field(default_factory=dict)

    def apply(
        self, interaction: Interaction, by_feedback: Example | None, ingest_offset: int, reward: RewardFunction
    ) -> Example | None:
        """Return an interaction's example after review.

        An approval has the reward of a thumbs-up, an edit that of a correction.

        Args:
            by_feedback: the example by feedback alone; None without feedback.
            ingest_offset: the newest of the interaction and its feedback.
        """
        decision = self.by_interaction.get(str(interaction.id))
        if decision is None and by_feedback is not None:
            decision = self.by_content.get(example_hash(by_feedback))
        if decision is None:
            return by_feedback
        newest = max(ingest_offset, decision.ingest_offset)
        if decision.kind == "reject":
            return by_feedback and by_feedback.model_copy(update={"review": "reject", "ingest_offset": newest})
        approved = decision.kind == "approve"
        equivalent = Feedback(
            id=UUID(int=0),
            loop=interaction.loop,
            interaction_id=interaction.id,
            created_at=decision.created_at,
            kind="thumbs_up" if approved else "correction",
            correction=None if approved else decision.target,
            user=decision.reviewer,
        )
        return Example.from_interaction(
            interaction,
            ingest_offset=newest,
            target=decision.target,
            reward=reward(equivalent, interaction),
            confidence=interaction.confidence,
            confirmed=True,
            corrected=not same_answer(decision.target, interaction.output),
            review=decision.kind,
        )


def effective_decisions(
    connection: sa.Connection, loop: str, ids: Sequence[str], content_hashes: Iterable[str] = ()
) -> EffectiveDecisions:
    """Return the decisions in effect for these interactions and these contents."""
    d = t.review_decisions.c
    if connection.execute(sa.select(sa.func.max(d.ingest_offset))).scalar() is None:
        return EffectiveDecisions()  # most stores have no decisions, so millions of events need no further query
    by_interaction = _select(connection, d.interaction_id, ids)
    by_content = _select(connection, d.content_hash, sorted(set(content_hashes)), d.loop == loop)
    return EffectiveDecisions(
        {one.interaction_id: one for one in by_interaction}, {one.content_hash: one for one in by_content}
    )


def is_effective(decision: sa.FromClause = t.review_decisions) -> sa.ColumnElement[bool]:
    """Return the SQL condition that a decision is the newest of its interaction, and not an undo."""
    newer = t.review_decisions.alias()
    c = decision.c
    later = sa.exists().where(newer.c.interaction_id == c.interaction_id, newer.c.ingest_offset > c.ingest_offset)
    return sa.and_(c.decision != UNDO, ~later)


def decision_of(row: sa.Row[tuple[object, ...]]) -> ReviewDecision:
    """Return the decision of a row of the table."""
    return ReviewDecision(
        interaction_id=row.interaction_id,
        kind=row.decision,
        target=row.target or "",
        reviewer=row.reviewer,
        created_at=row.created_at if row.created_at.tzinfo else row.created_at.replace(tzinfo=UTC),
        content_hash=row.content_hash or "",
        ingest_offset=row.ingest_offset,
    )


def _select(
    connection: sa.Connection, column: sa.Column[str], values: Sequence[str], *where: sa.ColumnElement[bool]
) -> list[ReviewDecision]:
    """Return the decisions in effect, oldest first."""
    found = []
    for chunk in chunks(values):
        query = sa.select(t.review_decisions).where(column.in_(chunk), is_effective(), *where)
        found += [decision_of(row) for row in connection.execute(query)]
    return sorted(found, key=lambda one: one.ingest_offset)
