"""Give examples to the answers that nobody objected to, as the loop's `feedback.implicit_acceptance` says.

Ingestion and the sensor do so. A command that only reads counts what they would give.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks
from finetune_pipeline.feedback.implicit import (
    NOTHING_ACCEPTED,
    ImplicitRule,
    delete_rule,
    rule_in_effect,
    write_rule,
)
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import (
    ResolvedExample,
    counters,
    delete_implicit_examples,
    interaction_from_row,
    recompute_examples,
    resolved_examples,
    take_offsets,
)
from finetune_pipeline.settings import LoopSettings

PAGE = 1_000


def accept_unrated(loop: LoopSettings, database: Database, now: datetime) -> int:
    """Give an example to each answer that became old enough since the last call; return how many were accepted.

    If the settings changed, all implicit examples are deleted first and made again by the new ones; if they were
    removed, only deleted. The time grows with the answers that became old enough, which an index finds, and not with
    the history. Each page of them is a transaction of its own, so that a first call does not block other writers.

    Interactions that arrive later with an earlier time are the concern of `feedback.store`, which applies the rule to
    whatever it records or recomputes.
    """
    settings = loop.feedback.implicit_acceptance
    with database.read() as connection:
        changed = not is_in_effect(loop, connection)
    if changed:
        with database.write() as connection:
            take_offsets(connection, 0)  # locks until commit, so nobody records an event by the old rule meanwhile
            delete_implicit_examples(connection, loop.name)
            if settings is None:
                delete_rule(connection, loop.name)
            else:
                write_rule(connection, loop.name, ImplicitRule(settings, NOTHING_ACCEPTED))
    if settings is None:
        return 0
    until, accepted = now - timedelta(hours=settings.after_hours), 0
    while (found := _accept_page(loop, database, until)) is not None:
        accepted += found
    return accepted


def is_in_effect(loop: LoopSettings, connection: sa.Connection) -> bool:
    """Return whether the store's implicit examples were made by the loop's settings."""
    rule = rule_in_effect(connection, loop.name)
    return (rule and rule.settings) == loop.feedback.implicit_acceptance


def unaccepted(loop: LoopSettings, connection: sa.Connection, now: datetime) -> Iterator[list[ResolvedExample]]:
    """Yield the examples that `accept_unrated` would make, in pages, without making them.

    If the settings are not in effect yet, these replace all implicit examples that the store has.
    """
    settings = loop.feedback.implicit_acceptance
    if settings is None:
        return
    stored = rule_in_effect(connection, loop.name)
    since = stored.accepted_until if stored and is_in_effect(loop, connection) else NOTHING_ACCEPTED
    rule = ImplicitRule(settings, now - timedelta(hours=settings.after_hours))
    i, f, e = t.interactions.c, t.feedback.c, t.examples.c
    explicit = sa.exists().where(e.interaction_id == i.id, ~e.implicit)
    judged = sa.exists().where(f.interaction_id == i.id, f.loop == loop.name)
    old_enough = sa.select(t.interactions).where(
        i.loop == loop.name,
        i.created_at > since,
        i.created_at <= rule.accepted_until,
        i.confidence >= settings.min_confidence,
        i.retracted_offset.is_(None),
        ~explicit,
        ~judged,
    )
    reward = reward_function(loop.feedback)
    for rows in connection.execute(old_enough.execution_options(yield_per=PAGE)).partitions():
        silent = [(interaction_from_row(row), row.ingest_offset) for row in rows]
        yield list(resolved_examples(connection, loop.name, silent, {}, reward, rule))


def _accept_page(loop: LoopSettings, database: Database, until: datetime) -> int | None:
    """Apply the rule to the next answers up to a time; return how many are accepted, or None if all were done."""
    with database.write() as connection:
        offset = take_offsets(connection, 1)  # locks until commit, and gives the new examples an offset of their own
        rule = rule_in_effect(connection, loop.name)
        if rule is None or rule.settings != loop.feedback.implicit_acceptance or rule.accepted_until >= until:
            return None
        i = t.interactions.c
        has_example = sa.exists().where(t.examples.c.interaction_id == i.id)
        old_enough = sa.select(i.id, i.created_at).where(
            i.loop == loop.name,
            i.created_at > rule.accepted_until,
            i.created_at <= until,
            i.confidence >= rule.settings.min_confidence,
            ~has_example,
        )
        found = connection.execute(old_enough.order_by(i.created_at).limit(PAGE)).all()
        if len(found) == PAGE:  # up to the last of them, with all others of its time
            last = found[-1].created_at
            until = last if last.tzinfo else last.replace(tzinfo=UTC)
            found = connection.execute(old_enough.where(i.created_at <= until)).all()
        write_rule(connection, loop.name, ImplicitRule(rule.settings, until))
        before = counters(connection, loop.name)["implicit"]
        reward = reward_function(loop.feedback)
        for chunk in chunks([row.id for row in found]):
            recompute_examples(connection, loop.name, chunk, reward, offset=offset)
        return counters(connection, loop.name)["implicit"] - before
