"""The event store: interactions and feedback are appended once each, and their examples are kept up to date.

Every function works on a connection of the caller's transaction, so that a batch of events and the position in the file
that they came from are stored together or not at all.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid5

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks, insert
from finetune_pipeline.feedback.content_hash import example_hash
from finetune_pipeline.feedback.implicit import (
    ImplicitRule,
    contradicted_examples,
    implicit_examples,
    rule_in_effect,
)
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.review_decisions import effective_decisions, is_effective
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import Example, Feedback, Interaction

E = TypeVar("E", Interaction, Feedback)

_OFFSET_COUNTER = "events"
_STORE_ID_COUNTER = "store"
_INTERNAL_COLUMNS = frozenset({"ingest_offset", "retracted_offset"})

_INCIDENTAL_FIELDS = frozenset(
    {"created_at", "source", "provenance", "seed", "latency_ms", "prompt_tokens", "completion_tokens"}
)
"""Fields in which a repeated event may differ from the stored one: where and when it was logged, and its costs."""

_COUNTED_COLUMNS = tuple(t.examples.c[name] for name in ("corrected", "reward", "implicit", "review"))
"""The columns of an example that decide by which counters it counts."""

_WithOffset = tuple[E, int]
"""An event and its ingest offset."""


@dataclass(frozen=True)
class RecordResult:
    """What happened to a batch of events.

    Attributes:
        interactions, feedback: how many were added.
        duplicates: how many were stored already, came twice in the batch, or were erased.
        duplicate_ids: ids of the duplicates.
        conflicts: duplicates whose content differs from the stored event, which is kept.
        unmatched_ids: ids of the added feedback whose interaction has not arrived yet.
    """

    interactions: int = 0
    feedback: int = 0
    duplicates: int = 0
    duplicate_ids: frozenset[UUID] = field(default=frozenset(), compare=False)
    conflicts: tuple[Interaction | Feedback, ...] = field(default=(), compare=False)
    unmatched_ids: frozenset[UUID] = field(default=frozenset(), compare=False)

    def __add__(self, other: "RecordResult") -> "RecordResult":
        return RecordResult(
            self.interactions + other.interactions,
            self.feedback + other.feedback,
            self.duplicates + other.duplicates,
            self.duplicate_ids | other.duplicate_ids,
            self.conflicts + other.conflicts,
            self.unmatched_ids | other.unmatched_ids,
        )


@dataclass(frozen=True)
class StoredInteraction:
    """An interaction with all its feedback, in the order of arrival, and its current example."""

    interaction: Interaction
    feedback: tuple[Feedback, ...]
    example: Example | None


@dataclass(frozen=True)
class InteractionState:
    """The state of an interaction of a declared source: whether it is retracted, and its last provenance."""

    retracted: bool
    provenance: str | None


# ---- recording


def record(
    connection: sa.Connection, loop: str, events: Sequence[Interaction | Feedback], reward: RewardFunction
) -> RecordResult:
    """Add the events that are not stored yet, and recompute the examples of their interactions.

    Stored events never change: an event with a known id is not added, and if its content differs it is among the
    `conflicts`. Erased events, and all feedback on erased interactions, are not added.
    """
    # Taking the offsets first locks the counter until commit, so no other writer adds an event between look and insert.
    first = take_offsets(connection, len(events))
    new_events, conflicts = _new_events(connection, events)
    numbered = [(event, first + number) for number, event in enumerate(new_events)]
    interactions = [(event, offset) for event, offset in numbered if isinstance(event, Interaction)]
    feedback = [(event, offset) for event, offset in numbered if isinstance(event, Feedback)]
    if interactions:
        connection.execute(t.interactions.insert(), [_event_row(event, offset) for event, offset in interactions])
    if feedback:
        connection.execute(t.feedback.insert(), [_event_row(event, offset) for event, offset in feedback])
    unmatched = _recompute_after_recording(connection, loop, interactions, feedback, reward)
    added = {event.id for event in new_events}
    duplicates = frozenset(event.id for event in events if event.id not in added)
    return RecordResult(
        len(interactions), len(feedback), len(events) - len(new_events), duplicates, conflicts, unmatched
    )


def conflict_message(event: Interaction | Feedback) -> str:
    """Return the message that an event's id already exists with different content, and what to do."""
    return f"the {event.event} {event.id} already exists with different content, which is kept; use a new id"


def _new_events(
    connection: sa.Connection, events: Sequence[Interaction | Feedback]
) -> tuple[list[Interaction | Feedback], tuple[Interaction | Feedback, ...]]:
    """Return the events to add (neither stored nor erased), and those that contradict a stored event."""

    def existing(column: sa.Column[str], ids: Iterable[UUID]) -> set[str]:
        return {
            found
            for chunk in chunks(sorted({str(id) for id in ids}))
            for found in connection.execute(sa.select(column).where(column.in_(chunk))).scalars()
        }

    feedback = [event for event in events if isinstance(event, Feedback)]
    known = {
        "interaction": existing(t.interactions.c.id, (event.id for event in events if isinstance(event, Interaction))),
        "feedback": existing(t.feedback.c.id, (event.id for event in feedback)),
    }
    erased = existing(t.erased_events.c.id, [e.id for e in events] + [e.interaction_id for e in feedback])
    stored: dict[tuple[str, UUID], Interaction | Feedback] = {}
    for chunk in chunks(sorted(known["interaction"])):
        for row in connection.execute(sa.select(t.interactions).where(t.interactions.c.id.in_(chunk))):
            stored["interaction", UUID(row.id)] = interaction_from_row(row)
    for chunk in chunks(sorted(known["feedback"])):
        for row in connection.execute(sa.select(t.feedback).where(t.feedback.c.id.in_(chunk))):
            stored["feedback", UUID(row.id)] = feedback_from_row(row)
    new_events, conflicts = [], []
    for event in events:
        if {str(event.id), str(getattr(event, "interaction_id", event.id))} & erased:
            continue
        if str(event.id) not in known[event.event]:
            known[event.event].add(str(event.id))
            stored[event.event, event.id] = event
            new_events.append(event)
        elif _contradicts(event, stored[event.event, event.id]):
            conflicts.append(event)
    return new_events, tuple(conflicts)


def _contradicts(event: Interaction | Feedback, stored: Interaction | Feedback) -> bool:
    """Return whether two events with one id differ in a field that both have."""
    if type(event) is not type(stored):
        return True
    names = type(event).model_fields.keys() - _INCIDENTAL_FIELDS
    pairs = ((getattr(event, name), getattr(stored, name)) for name in names)
    return any(new != old for new, old in pairs if new is not None and old is not None)


# ---- retraction


def retract(connection: sa.Connection, loop: str, ids: Sequence[str]) -> int:
    """Delete the examples of interactions that their source no longer has; return how many interactions that were.

    The interactions stay in the store, and `restore` gives them their examples again.
    """
    i = t.interactions.c
    first, number = take_offsets(connection, len(ids)), 0
    counts: Counter[str] = Counter()
    for chunk in chunks(ids):
        active = sa.select(i.id).where(i.id.in_(chunk), i.retracted_offset.is_(None))
        for id in sorted(connection.execute(active).scalars()):
            connection.execute(t.interactions.update().where(i.id == id).values(retracted_offset=first + number))
            number += 1
        _delete_examples(connection, loop, chunk, counts)
    add_to_counters(connection, loop, counts)
    return number


def restore(connection: sa.Connection, loop: str, provenances: Mapping[str, str], reward: RewardFunction) -> None:
    """Undo the retraction of interactions, or give them a new provenance, and recompute their examples.

    Args:
        provenances: interaction id -> current provenance.
    """
    update = t.interactions.update().where(t.interactions.c.id == sa.bindparam("restored_id"))
    for chunk in chunks(sorted(provenances)):
        rows = [{"restored_id": id, "current": provenances[id]} for id in chunk]
        connection.execute(update.values(retracted_offset=None, provenance=sa.bindparam("current")), rows)
        recompute_examples(connection, loop, chunk, reward, offset=take_offsets(connection, 1))


def source_feedback_id(interaction_id: UUID, reward: float | None = None) -> UUID:
    """Return the id of the feedback that gives a source record its reward.

    Args:
        reward: only of a dropped file, where each reward is a separate feedback.
    """
    return uuid5(interaction_id, "feedback" if reward is None else f"reward {reward}")


def interaction_states(connection: sa.Connection, ids: Sequence[str]) -> dict[str, InteractionState]:
    """Return the state of those of these interactions that are stored."""
    i = t.interactions.c
    columns = sa.select(i.id, i.retracted_offset.is_not(None), i.provenance)
    return {
        id: InteractionState(bool(retracted), provenance)
        for chunk in chunks(ids)
        for id, retracted, provenance in connection.execute(columns.where(i.id.in_(chunk)))
    }


def interactions_of_source(connection: sa.Connection, loop: str, source: str) -> Iterator[tuple[str, str, bool]]:
    """Yield id, provenance and whether it is retracted, of every interaction of a declared source."""
    i = t.interactions.c
    query = sa.select(i.id, i.provenance, i.retracted_offset.is_not(None)).where(i.loop == loop, i.source == source)
    # The option is the statement's: on the connection it would stay, and PostgreSQL has no cursors for writes.
    for row in connection.execute(query.execution_options(yield_per=5_000)):
        yield row[0], row[1] or "", bool(row[2])


# ---- offsets and counters


def take_offsets(connection: sa.Connection, count: int) -> int:
    """Reserve the next `count` ingest offsets and lock the counter until commit; return the first of them."""
    c = t.counters.c
    update = sa.update(t.counters).where(c.name == _OFFSET_COUNTER).values(value=c.value + count).returning(c.value)
    value = connection.execute(update).scalar_one()
    return int(value) - count + 1


def newest_offset(connection: sa.Connection) -> int:
    """Return the highest ingest offset that was given out; every event up to it is committed."""
    value = connection.execute(sa.select(t.counters.c.value).where(t.counters.c.name == _OFFSET_COUNTER)).scalar()
    return int(value or 0)


def store_id(connection: sa.Connection) -> int:
    """Return the random number of this database; offsets of one database mean nothing in another."""
    c = t.counters.c
    return int(connection.execute(sa.select(c.value).where(c.name == _STORE_ID_COUNTER)).scalar_one())


def counters(connection: sa.Connection, loop: str) -> Counter[str]:
    """Return the loop's counters, in a time that does not grow with what they count.

    Names: interactions, feedback, feedback.<kind>, examples, corrected (examples whose target a person wrote),
    implicit (examples of answers that nobody objected to), rewarded (other examples with a reward above 0), unmatched
    (feedback whose interaction has not arrived), flagged (interactions flagged for review). A counter that is 0 is left
    out.
    """
    c = t.loop_counters.c
    rows = connection.execute(sa.select(c.name, c.value).where(c.loop == loop))
    return Counter({name: int(value) for name, value in rows if value})


def add_to_counters(connection: sa.Connection, loop: str, changes: Mapping[str, int]) -> None:
    """Add changes, by counter name, to the loop's counters."""
    rows = [{"loop": loop, "name": name, "value": value} for name, value in sorted(changes.items()) if value]
    if rows:
        statement = insert(connection, t.loop_counters)
        total = t.loop_counters.c.value + statement.excluded.value
        connection.execute(
            statement.on_conflict_do_update(index_elements=["loop", "name"], set_={"value": total}), rows
        )


# ---- reading


def unmatched_feedback(connection: sa.Connection, loop: str, limit: int) -> Sequence[Any]:
    """Return the oldest feedback whose interaction has not arrived: id, interaction_id, kind, created_at."""
    f = t.feedback.c
    matched = sa.exists().where(t.interactions.c.id == f.interaction_id, t.interactions.c.loop == loop)
    query = sa.select(f.id, f.interaction_id, f.kind, f.created_at).where(f.loop == loop, ~matched)
    return connection.execute(query.order_by(f.created_at, f.ingest_offset).limit(limit)).all()


def flagged_interactions(connection: sa.Connection, loop: str, limit: int) -> list[Interaction]:
    """Return the newest interactions that are flagged for review and have neither feedback nor a decision."""
    i = t.interactions.c
    decided = sa.exists().where(t.review_decisions.c.interaction_id == i.id, is_effective())
    has_feedback = sa.exists().where(t.feedback.c.interaction_id == i.id, t.feedback.c.loop == loop)
    query = sa.select(t.interactions).where(i.loop == loop, i.flag.is_not(None), ~decided, ~has_feedback)
    rows = connection.execute(query.order_by(i.created_at.desc(), i.ingest_offset.desc()).limit(limit))
    return [interaction_from_row(row) for row in rows]


def find_interaction(connection: sa.Connection, interaction_id: UUID) -> StoredInteraction | None:
    """Return an interaction with its feedback and example, or None if it is not stored."""
    i, f, e = t.interactions.c, t.feedback.c, t.examples.c
    row = connection.execute(sa.select(t.interactions).where(i.id == str(interaction_id))).one_or_none()
    if row is None:
        return None
    interaction = interaction_from_row(row)
    query = sa.select(t.feedback).where(f.interaction_id == row.id, f.loop == row.loop).order_by(f.ingest_offset)
    feedback = tuple(feedback_from_row(one) for one in connection.execute(query))
    example_row = connection.execute(sa.select(t.examples).where(e.interaction_id == row.id)).one_or_none()
    example = None
    if example_row is not None:
        own = Example.model_fields.keys() - Example.INTERACTION_FIELDS - {"interaction_id"}
        values = {name: value for name, value in example_row._asdict().items() if name in own}
        example = Example.from_interaction(interaction, **values)
    return StoredInteraction(interaction, feedback, example)


def load_with_feedback(
    connection: sa.Connection, loop: str, ids: Sequence[str]
) -> Iterator[tuple[Interaction, int, Sequence[Feedback]]]:
    """Yield interactions, the newest ingest offset of each and its feedback, and the feedback in order of arrival."""
    interactions = _rows(connection, t.interactions, t.interactions.c.id, loop, ids)
    feedback = _feedback_by_interaction(connection, loop, ids)
    for row in interactions:
        own = sorted(feedback.get(UUID(row.id), []), key=lambda one: one[1])
        newest = max([row.ingest_offset, *(offset for _, offset in own)])
        yield interaction_from_row(row), newest, [one for one, _ in own]


def interactions_with_examples(
    connection: sa.Connection, loop: str, until: int, after: int = 0
) -> Iterator[Sequence[Any]]:
    """Yield a loop's interactions with the columns of their examples, in batches of rows, in the order of arrival.

    The example's columns are null for an interaction without an example.

    Args:
        until: the newest ingest offset to read.
        after: only interactions that arrived, got feedback, whose example changed, that were retracted, or that a
            reviewer decided on, after this offset. The time grows with what is new and not with the history, because
            each of these conditions has an index.
    """
    i, e = t.interactions.c, t.examples.c
    source = t.interactions.outerjoin(t.examples, i.id == e.interaction_id)
    query = sa.select(
        i.id.label("interaction_id"), sa.func.coalesce(e.ingest_offset, i.ingest_offset).label("ingest_offset"),
        i.created_at, i.prompt, i.history, i.output, i.model, i.user, i.confidence, i.validation_score, i.domain,
        i.kind, i.retrieved_context, i.variant, i.flag, i.source, i.provenance, e.target, e.reward, e.confirmed,
        e.corrected, e.implicit, e.review,
    )  # fmt: skip
    if after:
        arrived = sa.select(i.id).where(i.loop == loop, i.ingest_offset > after, i.ingest_offset <= until)
        changed = sa.select(e.interaction_id).where(e.loop == loop, e.ingest_offset > after, e.ingest_offset <= until)
        retracted = sa.select(i.id).where(i.loop == loop, i.retracted_offset > after, i.retracted_offset <= until)
        # Feedback, and undoing an approval, may delete the example, so `changed` does not find it.
        f, d = t.feedback.c, t.review_decisions.c
        judged = sa.select(f.interaction_id).where(f.loop == loop, f.ingest_offset > after, f.ingest_offset <= until)
        decided = sa.select(d.interaction_id).where(d.loop == loop, d.ingest_offset > after, d.ingest_offset <= until)
        new = arrived.union(changed, retracted, judged, decided).subquery()
        query = query.select_from(new.join(source, new.c.id == i.id))
    else:
        query = query.select_from(source).where(i.loop == loop, i.ingest_offset <= until)
    query = query.order_by(i.ingest_offset)
    yield from connection.execute(query.execution_options(yield_per=2_000)).partitions()


def new_examples(
    connection: sa.Connection, loop: str, after: int, min_reward: float, *, implicit: bool = True
) -> Iterator[Example]:
    """Yield qualifying examples that changed after an ingest offset and were in no judged dataset.

    The time grows with what is new and not with the history, because both conditions have an index.

    Args:
        implicit: whether to include those by the rule of implicit acceptance.
    """
    e, i = t.examples.c, t.interactions.c
    judged = sa.exists().where(t.judged_examples.c.loop == loop, t.judged_examples.c.content_hash == e.content_hash)
    query = (
        sa.select(t.examples, *(i[name] for name in sorted(Example.INTERACTION_FIELDS)))
        .join(t.interactions, i.id == e.interaction_id)
        .where(e.loop == loop, e.ingest_offset > after, qualifies(min_reward), ~judged, _with_implicit(implicit))
        .order_by(e.ingest_offset)
    )
    for row in connection.execute(query.execution_options(yield_per=500)):
        values = row._asdict()
        values["history"] = values["history"] or ()
        yield Example.model_validate({name: values[name] for name in Example.model_fields})


def count_low_reward(
    connection: sa.Connection, loop: str, after: int, min_reward: float, *, implicit: bool = True
) -> int:
    """Return how many examples changed after an ingest offset and may not train because of their reward.

    Args:
        implicit: whether to include those by the rule of implicit acceptance.
    """
    e = t.examples.c
    low = sa.and_(e.review.is_(None), ~qualifies(min_reward))
    query = sa.select(sa.func.count()).where(e.loop == loop, e.ingest_offset > after, low, _with_implicit(implicit))
    return int(connection.execute(query).scalar_one())


def qualifies(min_reward: float) -> sa.ColumnElement[bool]:
    """Return the SQL condition that an example may train, the same as `Example.qualifies`."""
    e = t.examples.c
    rejected = sa.and_(e.review.is_not(None), e.review == "reject")
    return sa.and_(sa.or_(e.corrected, e.reward >= min_reward, e.review.is_not(None)), ~rejected)


def _with_implicit(implicit: bool) -> sa.ColumnElement[bool]:
    return sa.true() if implicit else ~t.examples.c.implicit


def judged_among(connection: sa.Connection, loop: str, content_hashes: Iterable[str]) -> set[str]:
    """Return those of these contents that a judged dataset had."""
    j = t.judged_examples.c
    queries = (
        sa.select(j.content_hash).where(j.loop == loop, j.content_hash.in_(chunk))
        for chunk in chunks(sorted(set(content_hashes)))
    )
    return {found for query in queries for found in connection.execute(query).scalars()}


def mark_judged(connection: sa.Connection, loop: str, content_hashes: Iterable[str]) -> None:
    """Remember the contents of a judged dataset, so that they never count as new again."""
    remaining = iter(content_hashes)
    while chunk := list(islice(remaining, 500)):
        rows = [{"loop": loop, "content_hash": value} for value in sorted(set(chunk))]
        connection.execute(insert(connection, t.judged_examples).on_conflict_do_nothing(), rows)


# ---- examples


def recompute_marked(connection: sa.Connection, loop: str, reward: RewardFunction) -> int:
    """Recompute the examples that a migration marked by an empty content hash; return how many.

    A migration that repairs events, or changes how feedback is resolved, does not know the loop's rewards.
    """
    e = t.examples.c
    ids = connection.execute(sa.select(e.interaction_id).where(e.loop == loop, e.content_hash == "")).scalars().all()
    for chunk in chunks(sorted(ids)):
        recompute_examples(connection, loop, chunk, reward, offset=take_offsets(connection, 1))
    return len(ids)


def delete_implicit_examples(connection: sa.Connection, loop: str) -> int:
    """Delete the examples that exist only by the rule of implicit acceptance; return how many."""
    e = t.examples.c
    deleted = t.examples.delete().where(e.loop == loop, e.implicit).returning(*_COUNTED_COLUMNS)
    counts: Counter[str] = Counter()
    for row in connection.execute(deleted):
        counts.subtract(_counters_of_example(*row))
    add_to_counters(connection, loop, counts)
    return -counts["examples"]


def recompute_examples(
    connection: sa.Connection, loop: str, ids: Sequence[str], reward: RewardFunction, offset: int = 0
) -> None:
    """Recompute the examples of interactions from what the tables hold now.

    Args:
        offset: an ingest offset taken for this change, so that readers of changes after an earlier offset see it.
    """
    interactions = _rows(connection, t.interactions, t.interactions.c.id, loop, ids)
    counts: Counter[str] = Counter()
    _delete_examples(connection, loop, ids, counts)
    active = [
        (interaction_from_row(row), max(offset, row.ingest_offset))
        for row in interactions
        if row.retracted_offset is None
    ]
    _insert_examples(connection, loop, active, _feedback_by_interaction(connection, loop, ids), reward, counts)
    add_to_counters(connection, loop, counts)


def _recompute_after_recording(
    connection: sa.Connection,
    loop: str,
    new_interactions: Sequence[_WithOffset[Interaction]],
    new_feedback: Sequence[_WithOffset[Feedback]],
    reward: RewardFunction,
) -> frozenset[UUID]:
    """Recompute the examples and counters that new events affect; return the ids of the unmatched new feedback."""
    # Only older interactions have to be read: the new ones are here.
    arrived = {interaction.id for interaction, _ in new_interactions}
    older_ids = sorted({str(one.interaction_id) for one, _ in new_feedback if one.interaction_id not in arrived})
    older = _rows(connection, t.interactions, t.interactions.c.id, loop, older_ids)
    feedback = _feedback_by_interaction(connection, loop, [*map(str, arrived), *older_ids])

    present = arrived | {UUID(row.id) for row in older}
    unmatched = frozenset(one.id for one, _ in new_feedback if one.interaction_id not in present)
    new_ids = {one.id for one, _ in new_feedback}
    matched_now = sum(one.id not in new_ids for id in arrived for one, _ in feedback.get(id, ()))
    counts = Counter(
        interactions=len(new_interactions), feedback=len(new_feedback), unmatched=len(unmatched) - matched_now
    )
    counts.update(f"feedback.{one.kind}" for one, _ in new_feedback)
    counts["flagged"] = sum(interaction.flag is not None for interaction, _ in new_interactions)

    _delete_examples(connection, loop, older_ids, counts)
    active = [(interaction_from_row(row), row.ingest_offset) for row in older if row.retracted_offset is None]
    _insert_examples(connection, loop, [*new_interactions, *active], feedback, reward, counts)
    add_to_counters(connection, loop, counts)
    judged = [interaction for interaction, _ in [*new_interactions, *active] if interaction.id in feedback]
    if contradicted := contradicted_examples(connection, loop, judged):
        recompute_examples(connection, loop, contradicted, reward, offset=take_offsets(connection, 1))
    return unmatched


def _insert_examples(
    connection: sa.Connection,
    loop: str,
    interactions: Sequence[_WithOffset[Interaction]],
    feedback: Mapping[UUID, Sequence[_WithOffset[Feedback]]],
    reward: RewardFunction,
    counts: Counter[str],
) -> None:
    """Insert the examples of interactions that have none in the table, and count them."""
    rule = rule_in_effect(connection, loop)
    rows = [
        {
            **one.example.model_dump(exclude=set(Example.INTERACTION_FIELDS)),
            "interaction_id": str(one.example.interaction_id),
            "loop": loop,
            "content_hash": one.content_hash,
            "implicit": one.implicit,
        }
        for one in resolved_examples(connection, loop, interactions, feedback, reward, rule)
    ]
    for row in rows:
        counts.update(_counters_of_example(*(row[column.name] for column in _COUNTED_COLUMNS)))
    if rows:
        connection.execute(t.examples.insert(), rows)


class ResolvedExample(NamedTuple):
    """The example of an interaction after feedback and review.

    Attributes:
        implicit: it exists only by the rule of implicit acceptance.
    """

    example: Example
    content_hash: str
    implicit: bool

    @property
    def counts_as_implicit(self) -> bool:
        """Return whether it is among the loop's counter `implicit`."""
        one = self.example
        return "implicit" in _counters_of_example(one.corrected, one.reward, self.implicit, one.review)


def resolved_examples(
    connection: sa.Connection,
    loop: str,
    interactions: Sequence[_WithOffset[Interaction]],
    feedback: Mapping[UUID, Sequence[_WithOffset[Feedback]]],
    reward: RewardFunction,
    rule: ImplicitRule | None,
) -> Iterator[ResolvedExample]:
    """Yield the examples that interactions have by their feedback, the decisions on them, and a rule for the others."""
    silent = [(interaction, offset) for interaction, offset in interactions if not feedback.get(interaction.id)]
    newest = {
        interaction.id: max([offset, *(number for _, number in feedback.get(interaction.id, ()))])
        for interaction, offset in interactions
    }
    by_feedback = {
        interaction.id: resolve(interaction, [one for one, _ in own], newest[interaction.id], reward)
        for interaction, _ in interactions
        if (own := feedback.get(interaction.id))
    }
    implicit = implicit_examples(connection, loop, rule, silent, filter(None, by_feedback.values()))
    resolved = {**by_feedback, **implicit}
    hashes = (example_hash(example) for example in resolved.values() if example is not None)
    decisions = effective_decisions(connection, loop, [str(one.id) for one, _ in interactions], hashes)
    for interaction, _ in interactions:
        example = decisions.apply(interaction, resolved.get(interaction.id), newest[interaction.id], reward)
        if example is not None:
            # Without the implicit example, only an approval or edit of this very interaction would give it one.
            decided = str(interaction.id) in decisions.by_interaction and example.review != "reject"
            yield ResolvedExample(example, example_hash(example), interaction.id in implicit and not decided)


def _delete_examples(connection: sa.Connection, loop: str, ids: Sequence[str], counts: Counter[str]) -> None:
    e = t.examples.c
    for chunk in chunks(ids):
        deleted = connection.execute(
            t.examples.delete().where(e.loop == loop, e.interaction_id.in_(chunk)).returning(*_COUNTED_COLUMNS)
        )
        for row in deleted:
            counts.subtract(_counters_of_example(*row))


def _counters_of_example(corrected: bool, reward: float, implicit: bool, review: str | None) -> list[str]:
    if corrected:
        return ["examples", "corrected"]
    if implicit and review is None and reward > 0:
        return ["examples", "implicit"]
    return ["examples", "rewarded"] if reward > 0 else ["examples"]


# ---- rows


def interaction_from_row(row: sa.Row[Any]) -> Interaction:
    """Return the interaction of a row of the table."""
    values = {name: value for name, value in row._asdict().items() if name not in _INTERNAL_COLUMNS}
    return Interaction.model_validate({**values, "history": values["history"] or ()})


def feedback_from_row(row: sa.Row[Any]) -> Feedback:
    """Return the feedback of a row of the table."""
    return Feedback.model_validate({k: v for k, v in row._asdict().items() if k not in _INTERNAL_COLUMNS})


def _event_row(event: Interaction | Feedback, ingest_offset: int) -> dict[str, Any]:
    values = event.model_dump(exclude={"event"})
    values |= {name: str(values[name]) for name in ("id", "interaction_id") if name in values}
    if isinstance(event, Interaction):
        values["history"] = list(values["history"]) or None
    return {**values, "ingest_offset": ingest_offset}


def _rows(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], loop: str, ids: Sequence[str]
) -> list[sa.Row[Any]]:
    # The loop is compared here: in the query, SQLite would choose the loop's index and read the whole history.
    queries = (sa.select(table).where(key.in_(chunk)) for chunk in chunks(ids))
    return [row for query in queries for row in connection.execute(query) if row.loop == loop]


def _feedback_by_interaction(
    connection: sa.Connection, loop: str, ids: Sequence[str]
) -> dict[UUID, list[_WithOffset[Feedback]]]:
    found: dict[UUID, list[_WithOffset[Feedback]]] = {}
    for row in _rows(connection, t.feedback, t.feedback.c.interaction_id, loop, ids):
        found.setdefault(UUID(row.interaction_id), []).append((feedback_from_row(row), row.ingest_offset))
    return found
