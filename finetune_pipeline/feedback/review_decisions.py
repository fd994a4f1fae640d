"""What reviewers decided, and what that makes of an example.

A decision is about an answer to a question, as it was shown. It stands for the interaction until it is undone, whatever
feedback comes, and for the same question and answer wherever else they are (a copy, a note that moved): what counts is
their content hash. The newest decision stands.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.content_hash import example_hash
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import Example, Feedback, Interaction, ReviewKind

UNDO = "undo"
_CHUNK = 500


@dataclass(frozen=True)
class ReviewDecision:
    """A reviewer's decision that stands.

    Attributes:
        target: the answer that was approved or written; of a rejection the one that was shown.
        content_hash: of the question and answer that were shown.
        ingest_offset: the store's, so that later and earlier are told apart.
    """

    interaction_id: str
    kind: ReviewKind
    target: str
    reviewer: str
    created_at: datetime
    content_hash: str
    ingest_offset: int


@dataclass(frozen=True)
class StandingDecisions:
    """The decisions that stand for some interactions: their own, and those on the same question and answer."""

    own: Mapping[str, ReviewDecision] = field(default_factory=dict)
    alike: Mapping[str, ReviewDecision] = field(default_factory=dict)

    def apply(
        self, interaction: Interaction, taught: Example | None, ingest_offset: int, reward: RewardFunction
    ) -> Example | None:
        """What an interaction teaches after review.

        Args:
            taught: what it teaches by its feedback alone; None without feedback.
            ingest_offset: the newest of what shaped it.
        """
        decision = self.own.get(str(interaction.id))
        if decision is None and taught is not None:
            decision = self.alike.get(example_hash(taught))
        if decision is None:
            return taught
        newest = max(ingest_offset, decision.ingest_offset)
        if decision.kind == "reject":
            return taught and taught.model_copy(update={"review": "reject", "ingest_offset": newest})
        return _approved(interaction, decision, newest, reward)


def _approved(
    interaction: Interaction, decision: ReviewDecision, ingest_offset: int, reward: RewardFunction
) -> Example:
    """The answer that a reviewer approved or wrote; it is worth what the same from a user would be."""
    said = (
        {"kind": "thumbs_up"} if decision.kind == "approve" else {"kind": "correction", "correction": decision.target}
    )
    feedback = Feedback.model_validate(
        {
            **said,
            "id": UUID(int=0),
            "loop": interaction.loop,
            "interaction_id": interaction.id,
            "created_at": decision.created_at,
            "user": decision.reviewer,
        }
    )
    return Example.from_interaction(
        interaction,
        ingest_offset=ingest_offset,
        target=decision.target,
        reward=reward(feedback, interaction),
        confidence=interaction.confidence,
        confirmed=True,
        corrected=decision.target.strip() != interaction.output.strip(),
        review=decision.kind,
    )


def standing_decisions(
    connection: sa.Connection, loop: str, ids: Sequence[str], content_hashes: Iterable[str] = ()
) -> StandingDecisions:
    """The decisions that stand for these interactions, and for these contents."""
    d = t.review_decisions.c
    if connection.execute(sa.select(sa.func.max(d.ingest_offset))).scalar() is None:
        return StandingDecisions()  # most stores have none, and their millions of events need not ask for each
    own = _select(connection, d.interaction_id, ids)
    alike = _select(connection, d.content_hash, sorted(set(content_hashes)), d.loop == loop)
    return StandingDecisions({one.interaction_id: one for one in own}, {one.content_hash: one for one in alike})


def is_standing(decision: sa.FromClause = t.review_decisions) -> sa.ColumnElement[bool]:
    """Whether a row of the decisions is the newest of its interaction, and no undo."""
    newer = t.review_decisions.alias()
    c = decision.c
    later = sa.exists().where(newer.c.interaction_id == c.interaction_id, newer.c.ingest_offset > c.ingest_offset)
    return sa.and_(c.decision != UNDO, ~later)


def _select(
    connection: sa.Connection, column: sa.Column[str], values: Sequence[str], *where: sa.ColumnElement[bool]
) -> list[ReviewDecision]:
    """The decisions that stand, the newest last."""
    found = []
    for start in range(0, len(values), _CHUNK):
        query = sa.select(t.review_decisions).where(column.in_(values[start : start + _CHUNK]), is_standing(), *where)
        found += [decision_of(row) for row in connection.execute(query)]
    return sorted(found, key=lambda one: one.ingest_offset)


def decision_of(row: sa.Row[tuple[object, ...]]) -> ReviewDecision:
    """A row of the table."""
    moment = row.created_at if row.created_at.tzinfo else row.created_at.replace(tzinfo=UTC)
    shown = row.content_hash or ""
    return ReviewDecision(
        row.interaction_id, row.decision, row.target or "", row.reviewer, moment, shown, row.ingest_offset
    )
