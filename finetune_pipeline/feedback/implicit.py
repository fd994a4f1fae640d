"""Implicit acceptance: the rule by which an answer that nobody objected to has an example."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks, upsert
from finetune_pipeline.feedback.content_hash import content_hash, example_hash
from finetune_pipeline.feedback.rewards import SUCCESS_SCORE
from finetune_pipeline.records import ASK, Example, Interaction, conversation_text
from finetune_pipeline.settings import ImplicitAcceptance

NOTHING_ACCEPTED = datetime(1970, 1, 1, tzinfo=UTC)
"""`accepted_until` of a rule by which no answer was accepted yet."""


@dataclass(frozen=True)
class ImplicitRule:
    """The rule of a loop, as the store has it. Every writer applies it, whatever settings its process has read.

    Attributes:
        settings: those by which the loop's implicit examples were made.
        accepted_until: the rule holds for interactions up to this time.
    """

    settings: ImplicitAcceptance
    accepted_until: datetime

    def example(self, interaction: Interaction, ingest_offset: int) -> Example | None:
        """Return the example of an interaction without feedback, or None if its answer is not accepted.

        The confidence has to be known and high enough. Excluded are answers that are flagged for review, those that a
        validator did not call a success, those of `finetune ask`, where somebody tries a model, and those of declared
        sources and dropped files, which have a reward of their own.
        """
        one = interaction
        excluded = one.flag is not None or one.source is not None or one.variant == ASK or not one.output.strip()
        failed = one.validation_score is not None and one.validation_score < SUCCESS_SCORE
        unsure = one.confidence is None or one.confidence < self.settings.min_confidence
        if excluded or failed or unsure or one.created_at > self.accepted_until:
            return None
        return Example.from_interaction(
            one,
            ingest_offset=ingest_offset,
            target=one.output,
            reward=self.settings.reward,
            confidence=one.confidence,
            confirmed=False,
            corrected=False,
            implicit=True,
        )


def rule_in_effect(connection: sa.Connection, loop: str) -> ImplicitRule | None:
    """Return the rule of a loop, or None where implicit acceptance is off."""
    row = connection.execute(sa.select(t.implicit_acceptance).where(t.implicit_acceptance.c.loop == loop)).one_or_none()
    if row is None:
        return None
    until = row.accepted_until
    settings = ImplicitAcceptance(after_hours=row.after_hours, min_confidence=row.min_confidence, reward=row.reward)
    return ImplicitRule(settings, until if until.tzinfo else until.replace(tzinfo=UTC))


def write_rule(connection: sa.Connection, loop: str, rule: ImplicitRule) -> None:
    """Store the rule of a loop, in place of an earlier one."""
    row = {"loop": loop, **rule.settings.model_dump(), "accepted_until": rule.accepted_until}
    upsert(connection, t.implicit_acceptance, row)


def delete_rule(connection: sa.Connection, loop: str) -> None:
    """Switch implicit acceptance of a loop off; its examples are the caller's concern."""
    connection.execute(t.implicit_acceptance.delete().where(t.implicit_acceptance.c.loop == loop))


def implicit_examples(
    connection: sa.Connection,
    loop: str,
    rule: ImplicitRule | None,
    silent: Iterable[tuple[Interaction, int]],
    by_feedback: Iterable[Example],
) -> dict[UUID, Example]:
    """Return the examples of accepted answers, by interaction.

    If somebody objected to the same answer to the same prompt elsewhere, as with a model that always answers the same,
    the example has the reward of that objection, so that silence never outvotes it.

    Args:
        rule: None where implicit acceptance is off.
        silent: interactions without feedback, and their ingest offsets.
        by_feedback: examples that are not in the store yet.
    """
    accepted = [example for one, offset in silent if rule and (example := rule.example(one, offset))]
    if not accepted:
        return {}
    lowest = _objections(connection, loop, {example_hash(one) for one in accepted})
    for one in by_feedback:
        if one.reward < 0:
            lowest[example_hash(one)] = min(one.reward, lowest.get(example_hash(one), 0.0))
    return {
        one.interaction_id: one.model_copy(update={"reward": lowest.get(example_hash(one), one.reward)})
        for one in accepted
    }


def contradicted_examples(connection: sa.Connection, loop: str, judged: Iterable[Interaction]) -> Sequence[str]:
    """Return the interactions whose implicit examples have another reward than follows from the feedback now.

    Args:
        judged: interactions that have feedback; others may have the same prompt and answer.
    """
    rule = rule_in_effect(connection, loop)
    if rule is None:
        return []
    hashes = {content_hash(conversation_text(one.prompt, one.history), one.output) for one in judged}
    lowest = _objections(connection, loop, hashes)
    e = t.examples.c
    query = sa.select(e.interaction_id, e.content_hash, e.reward).where(e.loop == loop, e.implicit, e.review.is_(None))
    return [
        row.interaction_id
        for chunk in chunks(sorted(hashes))
        for row in connection.execute(query.where(e.content_hash.in_(chunk)))
        if row.reward != lowest.get(row.content_hash, rule.settings.reward)
    ]


def _objections(connection: sa.Connection, loop: str, content_hashes: Iterable[str]) -> dict[str, float]:
    """Return content hash -> the lowest reward by feedback on it, where that is below 0."""
    e = t.examples.c
    query = sa.select(e.content_hash, sa.func.min(e.reward)).where(e.loop == loop, ~e.implicit, e.reward < 0)
    return {
        hash: reward
        for chunk in chunks(sorted(content_hashes))
        for hash, reward in connection.execute(query.where(e.content_hash.in_(chunk)).group_by(e.content_hash))
    }
