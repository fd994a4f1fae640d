"""The event store: interactions and feedback are added once each, and what they teach is kept beside them.

Every function works on a connection of the caller's transaction, so that a batch of events and the place in the file
where it came from are kept together or not at all.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID, uuid5

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import insert
from finetune_pipeline.feedback.content_hash import example_hash
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.review_decisions import is_standing, standing_decisions
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import Example, Feedback, Interaction

E = TypeVar("E", Interaction, Feedback)

_CHUNK = 500
_SEQUENCE = "events"


@dataclass(frozen=True)
class RecordResult:
    """What became of a batch of events.

    Attributes:
        interactions, feedback: how many were added.
        duplicates: how many were there already, or twice in the batch, or were deleted on a person's wish.
        duplicate_ids: ids of the duplicates.
        conflicts: duplicates with other content than the stored event of their id, which is kept.
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
    """One interaction with all that was said of it, and what it teaches now."""

    interaction: Interaction
    feedback: tuple[Feedback, ...]
    example: Example | None


@dataclass(frozen=True)
class InteractionState:
    """How an interaction of a declared source stands in the store: whether it is retracted, and where it stood last."""

    retracted: bool
    provenance: str | None


def record(
    connection: sa.Connection, loop: str, events: Sequence[Interaction | Feedback], reward: RewardFunction
) -> RecordResult:
    """Add the events that are not there yet and renew what their interactions teach.

    An id that is there already is left as it was: events are never changed. One that comes with other content is
    among the `conflicts`. What was erased stays away, and so does all feedback on it.
    """
    # Taking the ingest_offset first locks it until commit: no other writer can come between the look and the insert.
    first = take_offsets(connection, len(events))
    fresh, conflicts = _not_known(connection, events)
    rows = [(first + i, event) for i, event in enumerate(fresh)]
    interactions = [(event, ingest_offset) for ingest_offset, event in rows if isinstance(event, Interaction)]
    feedback = [(event, ingest_offset) for ingest_offset, event in rows if isinstance(event, Feedback)]
    if interactions:
        connection.execute(
            t.interactions.insert(), [_row(ingest_offset, event) for event, ingest_offset in interactions]
        )
    if feedback:
        connection.execute(t.feedback.insert(), [_row(ingest_offset, event) for event, ingest_offset in feedback])
    waiting = _renew(connection, loop, interactions, feedback, reward)
    added = {event.id for event in fresh}
    known = frozenset(event.id for event in events if event.id not in added)
    return RecordResult(len(interactions), len(feedback), len(events) - len(fresh), known, conflicts, waiting)


def conflict_message(event: Interaction | Feedback) -> str:
    """Return the message that an event's id is known with other content, and what to do."""
    return f"the {event.event} {event.id} is known with other content, which is kept; give the new event its own id"


def recompute_marked(connection: sa.Connection, loop: str, reward: RewardFunction) -> int:
    """Recompute the examples that a migration marked by an empty content hash; return how many.

    A migration that repairs events cannot do it, since it does not know the loop's rewards.
    """
    e = t.examples.c
    ids = connection.execute(sa.select(e.interaction_id).where(e.loop == loop, e.content_hash == "")).scalars().all()
    for chunk in _chunks(sorted(ids)):
        recompute_examples(connection, loop, chunk, reward, at=take_offsets(connection, 1))
    return len(ids)


def retract(connection: sa.Connection, loop: str, ids: Sequence[str]) -> int:
    """Have interactions teach nothing from now on, since their source no longer has them; returns how many did.

    They stay in the store, and teach again when their source has them again (`restore`).
    """
    i = t.interactions.c
    first, number = take_offsets(connection, len(ids)), 0
    counts: Counter[str] = Counter()
    for chunk in _chunks(ids):
        there = sa.select(i.id).where(i.id.in_(chunk), i.retracted_offset.is_(None))
        for id in sorted(connection.execute(there).scalars()):
            connection.execute(t.interactions.update().where(i.id == id).values(retracted_offset=first + number))
            number += 1
        _delete_examples(connection, loop, chunk, counts)
    add_to_counters(connection, loop, counts)
    return number


def restore(connection: sa.Connection, loop: str, provenances: Mapping[str, str], reward: RewardFunction) -> None:
    """Have interactions that were retracted, or stand elsewhere in their source now, teach what they taught.

    Args:
        provenances: id -> where it stands now.
    """
    update = t.interactions.update().where(t.interactions.c.id == sa.bindparam("moved"))
    for chunk in _chunks(sorted(provenances)):
        rows = [{"moved": id, "now": provenances[id]} for id in chunk]
        connection.execute(update.values(retracted_offset=None, provenance=sa.bindparam("now")), rows)
        recompute_examples(connection, loop, chunk, reward, at=take_offsets(connection, 1))


def source_feedback_id(interaction_id: UUID, reward: float | None = None) -> UUID:
    """The id of the feedback by which a source gives its item a reward; of a dropped file, each reward is another."""
    return uuid5(interaction_id, "feedback" if reward is None else f"reward {reward}")


def interaction_states(connection: sa.Connection, ids: Sequence[str]) -> dict[str, InteractionState]:
    """Which of these interactions the store has, and how each stands there."""
    i = t.interactions.c
    queries = (
        sa.select(i.id, i.retracted_offset.is_not(None), i.provenance).where(i.id.in_(chunk)) for chunk in _chunks(ids)
    )
    return {
        id: InteractionState(bool(retracted), provenance)
        for query in queries
        for id, retracted, provenance in connection.execute(query)
    }


def interactions_of_source(connection: sa.Connection, loop: str, source: str) -> Iterator[tuple[str, str, bool]]:
    """All interactions that were made from a declared source: id, provenance, whether it is retracted."""
    i = t.interactions.c
    query = sa.select(i.id, i.provenance, i.retracted_offset.is_not(None)).where(i.loop == loop, i.source == source)
    # Of the statement: a connection keeps its options, and PostgreSQL has no cursors for what writes.
    for row in connection.execute(query.execution_options(yield_per=5_000)):
        yield row[0], row[1] or "", bool(row[2])


def take_offsets(connection: sa.Connection, count: int) -> int:
    """Take the next `count` numbers of the ingest offset, and hold it until commit; returns the first of them."""
    c = t.counters.c
    update = sa.update(t.counters).where(c.name == _SEQUENCE).values(value=c.value + count).returning(c.value)
    value = connection.execute(update).scalar_one()
    return int(value) - count + 1


def newest_offset(connection: sa.Connection) -> int:
    """The highest ingest offset that was given out; every event up to it is committed."""
    value = connection.execute(sa.select(t.counters.c.value).where(t.counters.c.name == _SEQUENCE)).scalar()
    return int(value or 0)


def store_id(connection: sa.Connection) -> int:
    """A random number that the database was given when it was made: one's sequences mean nothing in another."""
    return int(connection.execute(sa.select(t.counters.c.value).where(t.counters.c.name == "store")).scalar_one())


def counters(connection: sa.Connection, loop: str) -> Counter[str]:
    """How much there is of what, in time that does not grow with it.

    Names: interactions, feedback, feedback.<kind>, examples, corrected (examples whose target a person wrote),
    rewarded (other examples with a reward above 0), unmatched (feedback whose interaction has not arrived), flagged
    (interactions that a person should look at). What is not named is 0.
    """
    rows = connection.execute(
        sa.select(t.loop_counters.c.name, t.loop_counters.c.value).where(t.loop_counters.c.loop == loop)
    )
    return Counter({name: int(value) for name, value in rows if value})


def unmatched_feedback(connection: sa.Connection, loop: str, limit: int) -> Sequence[Any]:
    """The oldest feedback whose interaction has not arrived: id, interaction_id, kind, created_at."""
    f = t.feedback.c
    known = sa.exists().where(t.interactions.c.id == f.interaction_id, t.interactions.c.loop == loop)
    query = sa.select(f.id, f.interaction_id, f.kind, f.created_at).where(f.loop == loop, ~known)
    return connection.execute(query.order_by(f.ingest_offset).limit(limit)).all()


def flagged_interactions(connection: sa.Connection, loop: str, limit: int) -> list[Interaction]:
    """The newest interactions that a person should look at, and that nobody has given feedback or decided on."""
    i = t.interactions.c
    decided = sa.exists().where(t.review_decisions.c.interaction_id == i.id, is_standing())
    looked_at = sa.exists().where(t.feedback.c.interaction_id == i.id, t.feedback.c.loop == loop)
    query = sa.select(t.interactions).where(i.loop == loop, i.flag.is_not(None), ~decided, ~looked_at)
    return [_interaction(row) for row in connection.execute(query.order_by(i.ingest_offset.desc()).limit(limit))]


def find_interaction(connection: sa.Connection, interaction_id: UUID) -> StoredInteraction | None:
    """The interaction of this id with its feedback in the order of arrival, and its example."""
    i, f, e = t.interactions.c, t.feedback.c, t.examples.c
    row = connection.execute(sa.select(t.interactions).where(i.id == str(interaction_id))).one_or_none()
    if row is None:
        return None
    interaction = _interaction(row)
    about = sa.select(t.feedback).where(f.interaction_id == row.id, f.loop == row.loop).order_by(f.ingest_offset)
    feedback = tuple(_feedback(one) for one in connection.execute(about))
    taught = connection.execute(sa.select(t.examples).where(e.interaction_id == row.id)).one_or_none()
    return StoredInteraction(interaction, feedback, _example(taught, interaction) if taught else None)


def interactions_with_examples(
    connection: sa.Connection, loop: str, until: int, after: int = 0
) -> Iterator[Sequence[Any]]:
    """Interactions of a loop with what they teach (null without feedback), in batches of rows, in the order of arrival.

    Args:
        until: the newest ingest offset to read.
        after: only interactions that came, whose example changed, that were retracted, or that a reviewer decided on,
            after this offset. The time grows with what is new, not with the history: each condition has an index.
    """
    i, e = t.interactions.c, t.examples.c
    source = t.interactions.outerjoin(t.examples, i.id == e.interaction_id)
    query = sa.select(
        i.id.label("interaction_id"), sa.func.coalesce(e.ingest_offset, i.ingest_offset).label("ingest_offset"),
        i.created_at, i.prompt, i.history, i.output, i.model, i.user, i.confidence, i.validation_score, i.domain,
        i.kind, i.retrieved_context, i.variant, i.flag, i.source, i.provenance, e.target, e.reward, e.confirmed,
        e.corrected, e.review,
    )  # fmt: skip
    if after:
        came = sa.select(i.id).where(i.loop == loop, i.ingest_offset > after, i.ingest_offset <= until)
        changed = sa.select(e.interaction_id).where(e.loop == loop, e.ingest_offset > after, e.ingest_offset <= until)
        gone = sa.select(i.id).where(i.loop == loop, i.retracted_offset > after, i.retracted_offset <= until)
        d = t.review_decisions.c  # an undone approval may leave no example at all
        decided = sa.select(d.interaction_id).where(d.loop == loop, d.ingest_offset > after, d.ingest_offset <= until)
        new = came.union(changed, gone, decided).subquery()
        query = query.select_from(new.join(source, new.c.id == i.id))
    else:
        query = query.select_from(source).where(i.loop == loop, i.ingest_offset <= until)
    query = query.order_by(i.ingest_offset)
    yield from connection.execute(query.execution_options(yield_per=2_000)).partitions()


def new_examples(connection: sa.Connection, loop: str, after: int, min_reward: float) -> Iterator[Example]:
    """Examples that changed after a ingest_offset, were in no judged dataset, and may be good enough.

    The time grows with what is new, not with the history: both conditions have an index.
    """
    e, i = t.examples.c, t.interactions.c
    judged = sa.exists().where(t.judged_examples.c.loop == loop, t.judged_examples.c.content_hash == e.content_hash)
    query = (
        sa.select(t.examples, i.prompt, i.history, i.output, i.source, i.provenance)
        .join(t.interactions, i.id == e.interaction_id)
        .where(e.loop == loop, e.ingest_offset > after, qualifies(min_reward), ~judged)
        .order_by(e.ingest_offset)
    )
    for row in connection.execute(query.execution_options(yield_per=500)):
        values = row._asdict()
        values["history"] = values["history"] or ()
        yield Example.model_validate({name: values[name] for name in Example.model_fields})


def qualifies(min_reward: float) -> sa.ColumnElement[bool]:
    """Whether an example of the table may train by its reward, a person's correction, or a reviewer's decision."""
    e = t.examples.c
    rejected = sa.and_(e.review.is_not(None), e.review == "reject")
    return sa.and_(sa.or_(e.corrected, e.reward >= min_reward, e.review.is_not(None)), ~rejected)


def mark_judged(connection: sa.Connection, loop: str, content_hashes: Sequence[str]) -> None:
    """Remember that a dataset with these contents was judged, so that they never count as new again."""
    j = t.judged_examples.c
    for chunk in _chunks(sorted(set(content_hashes))):
        query = sa.select(j.content_hash).where(j.loop == loop, j.content_hash.in_(chunk))
        there = set(connection.execute(query).scalars())
        rows = [{"loop": loop, "content_hash": value} for value in chunk if value not in there]
        if rows:
            connection.execute(t.judged_examples.insert(), rows)


def load_with_feedback(
    connection: sa.Connection, loop: str, ids: Sequence[str]
) -> Iterator[tuple[Interaction, int, Sequence[Feedback]]]:
    """These interactions with the newest ingest_offset of what is said in and of them, and all their feedback."""
    interactions = _load(connection, t.interactions, t.interactions.c.id, loop, ids)
    feedback = _load(connection, t.feedback, t.feedback.c.interaction_id, loop, ids)
    said = _by_interaction(
        [(_feedback(row), row.ingest_offset) for row in sorted(feedback, key=lambda row: row.ingest_offset)]
    )
    for row in interactions:
        own = said.get(UUID(row.id), [])
        newest = max([row.ingest_offset, *(number for _, number in own)])
        yield _interaction(row), newest, [item for item, _ in own]


def add_to_counters(connection: sa.Connection, loop: str, changes: Mapping[str, int]) -> None:
    """Add these changes to the loop's loop_counters."""
    rows = [{"loop": loop, "name": name, "value": value} for name, value in sorted(changes.items()) if value]
    if not rows:
        return
    added = insert(connection, t.loop_counters)
    total = t.loop_counters.c.value + added.excluded.value
    connection.execute(added.on_conflict_do_update(index_elements=["loop", "name"], set_={"value": total}), rows)


def recompute_examples(
    connection: sa.Connection, loop: str, ids: Sequence[str], reward: RewardFunction, at: int = 0
) -> None:
    """Work out anew what these interactions teach, from what the tables hold of them now.

    Args:
        at: a ingest_offset that was taken for it, so that who reads what changed since an earlier one sees them.
    """
    interactions = _load(connection, t.interactions, t.interactions.c.id, loop, ids)
    feedback = _load(connection, t.feedback, t.feedback.c.interaction_id, loop, ids)
    counts: Counter[str] = Counter()
    _delete_examples(connection, loop, ids, counts)
    by_interaction = _by_interaction([(_feedback(row), row.ingest_offset) for row in feedback])
    _teach(
        connection,
        loop,
        [(_interaction(row), max(at, row.ingest_offset)) for row in interactions if row.retracted_offset is None],
        by_interaction,
        reward,
        counts,
    )
    add_to_counters(connection, loop, counts)


_Numbered = tuple[E, int]


def _not_known(
    connection: sa.Connection, events: Sequence[Interaction | Feedback]
) -> tuple[list[Interaction | Feedback], tuple[Interaction | Feedback, ...]]:
    """Return the events to add (neither stored nor erased), and those that contradict a stored event."""

    def there(column: sa.Column[str], ids: Iterable[UUID]) -> set[str]:
        return {
            found
            for chunk in _chunks(sorted({str(id) for id in ids}))
            for found in connection.execute(sa.select(column).where(column.in_(chunk))).scalars()
        }

    feedback = [event for event in events if isinstance(event, Feedback)]
    known = {
        "interaction": there(t.interactions.c.id, (event.id for event in events if isinstance(event, Interaction))),
        "feedback": there(t.feedback.c.id, (event.id for event in feedback)),
    }
    erased = there(t.erased_events.c.id, [e.id for e in events] + [e.interaction_id for e in feedback])
    first = _stored(connection, known)
    fresh, conflicts = [], []
    for event in events:
        gone = {str(event.id), str(getattr(event, "interaction_id", event.id))} & erased
        if gone:
            continue
        if str(event.id) not in known[event.event]:
            known[event.event].add(str(event.id))
            first[event.event, event.id] = event
            fresh.append(event)
        elif _contradicts(event, first[event.event, event.id]):
            conflicts.append(event)
    return fresh, tuple(conflicts)


def _stored(connection: sa.Connection, known: Mapping[str, set[str]]) -> dict[tuple[str, UUID], Interaction | Feedback]:
    """Return the stored events with these ids."""
    found: dict[tuple[str, UUID], Interaction | Feedback] = {}
    readers = ((t.interactions, "interaction", _interaction), (t.feedback, "feedback", _feedback))
    for table, kind, read in readers:
        for chunk in _chunks(sorted(known[kind])):
            for row in connection.execute(sa.select(table).where(table.c.id.in_(chunk))):
                event: Interaction | Feedback = read(row)
                found[kind, event.id] = event
    return found


_NOT_SAID = frozenset(
    {"created_at", "source", "provenance", "seed", "latency_ms", "prompt_tokens", "completion_tokens"}
)
"""Fields in which a repeated event may differ: its provenance, time and costs."""


def _contradicts(event: Interaction | Feedback, stored: Interaction | Feedback) -> bool:
    """Return whether two events with one id differ in a field that both have."""
    if type(event) is not type(stored):
        return True
    pairs = ((getattr(event, name), getattr(stored, name)) for name in type(event).model_fields.keys() - _NOT_SAID)
    return any(new != old for new, old in pairs if new is not None and old is not None)


def _renew(
    connection: sa.Connection,
    loop: str,
    fresh: Sequence[_Numbered[Interaction]],
    feedback: Sequence[_Numbered[Feedback]],
    reward: RewardFunction,
) -> frozenset[UUID]:
    """Renew the examples that fresh events touch, and the loop_counters; returns the feedback that waits."""
    # What was just added is at hand; only what is older has to be read.
    arrived = {interaction.id: number for interaction, number in fresh}
    earlier_ids = sorted({str(item.interaction_id) for item, _ in feedback if item.interaction_id not in arrived})
    older = _load(connection, t.interactions, t.interactions.c.id, loop, earlier_ids)
    earlier = [(_interaction(row), row.ingest_offset) for row in older if row.retracted_offset is None]
    there = arrived.keys() | {UUID(row.id) for row in older}
    touched = [*map(str, arrived), *earlier_ids]
    rows = _load(connection, t.feedback, t.feedback.c.interaction_id, loop, touched)
    by_interaction = _by_interaction([(_feedback(row), row.ingest_offset) for row in rows])
    waiting = frozenset(item.id for item, _ in feedback if item.interaction_id not in there)
    new_ids = {item.id for item, _ in feedback}
    matched = sum(item.id not in new_ids for id in arrived for item, _ in by_interaction.get(id, ()))
    counts = Counter({"interactions": len(fresh), "feedback": len(feedback), "unmatched": len(waiting) - matched})
    counts.update(f"feedback.{item.kind}" for item, _ in feedback)
    counts["flagged"] = sum(interaction.flag is not None for interaction, _ in fresh)
    _delete_examples(connection, loop, earlier_ids, counts)
    _teach(connection, loop, [*fresh, *earlier], by_interaction, reward, counts)
    add_to_counters(connection, loop, counts)
    return waiting


def _teach(
    connection: sa.Connection,
    loop: str,
    interactions: Sequence[_Numbered[Interaction]],
    feedback: Mapping[UUID, Sequence[_Numbered[Feedback]]],
    reward: RewardFunction,
    counts: Counter[str],
) -> None:
    """Write the examples of these interactions; there are none of them yet."""
    taught = [_by_feedback(one, number, feedback.get(one.id), reward) for one, number in interactions]
    hashes = (example_hash(example) for _, example, _ in taught if example is not None)
    decisions = standing_decisions(connection, loop, [str(one.id) for one, _, _ in taught], hashes)
    rows = []
    for interaction, alone, newest in taught:
        example = decisions.apply(interaction, alone, newest, reward)
        if example is not None:
            rows.append(_example_row(loop, example))
            counts.update(_kinds(example.corrected, example.reward))
    if rows:
        connection.execute(t.examples.insert(), rows)


def _by_feedback(
    interaction: Interaction, ingest_offset: int, said: Sequence[_Numbered[Feedback]] | None, reward: RewardFunction
) -> tuple[Interaction, Example | None, int]:
    """What an interaction teaches by its feedback alone, and the newest ingest_offset of it all."""
    newest = max([ingest_offset, *(number for _, number in said or ())])
    return interaction, resolve(interaction, [item for item, _ in said], newest, reward) if said else None, newest


def _delete_examples(connection: sa.Connection, loop: str, ids: Sequence[str], counts: Counter[str]) -> None:
    e = t.examples.c
    for chunk in _chunks(ids):
        gone = connection.execute(
            t.examples.delete().where(e.loop == loop, e.interaction_id.in_(chunk)).returning(e.corrected, e.reward)
        )
        for corrected, reward in gone:
            counts.subtract(_kinds(corrected, reward))


def _kinds(corrected: bool, reward: float) -> list[str]:
    return ["examples", "corrected"] if corrected else ["examples", "rewarded"] if reward > 0 else ["examples"]


def _by_interaction(feedback: Sequence[_Numbered[Feedback]]) -> dict[UUID, list[_Numbered[Feedback]]]:
    found: dict[UUID, list[_Numbered[Feedback]]] = {}
    for item, number in feedback:
        found.setdefault(item.interaction_id, []).append((item, number))
    return found


def _load(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], loop: str, ids: Sequence[str]
) -> list[sa.Row[Any]]:
    # The loop is compared here: in the query, SQLite would take the index on it, and go through the whole history.
    queries = (sa.select(table).where(key.in_(chunk)) for chunk in _chunks(ids))
    return [row for query in queries for row in connection.execute(query) if row.loop == loop]


def _interaction(row: sa.Row[Any]) -> Interaction:
    values = {name: value for name, value in row._asdict().items() if name not in {"ingest_offset", "retracted_offset"}}
    return Interaction.model_validate({**values, "history": values["history"] or ()})


def _feedback(row: sa.Row[Any]) -> Feedback:
    return Feedback.model_validate({name: value for name, value in row._asdict().items() if name != "ingest_offset"})


def _example(row: sa.Row[Any], interaction: Interaction) -> Example:
    values = {name: value for name, value in row._asdict().items() if name in Example.model_fields}
    asked = interaction.model_dump(include={"prompt", "history", "output", "source", "provenance"})
    return Example.model_validate({**values, **asked})


def _row(ingest_offset: int, event: Interaction | Feedback) -> dict[str, Any]:
    values = event.model_dump(exclude={"event"})
    identifiers: dict[str, Any] = {name: str(values[name]) for name in ("id", "interaction_id") if name in values}
    if isinstance(event, Interaction):
        values["history"] = list(values["history"]) or None
    return {**values, **identifiers, "ingest_offset": ingest_offset}


def _example_row(loop: str, example: Example) -> dict[str, Any]:
    values = example.model_dump(exclude={"prompt", "history", "output", "source", "provenance"})
    return {
        **values,
        "interaction_id": str(example.interaction_id),
        "loop": loop,
        "content_hash": example_hash(example),
    }


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]
