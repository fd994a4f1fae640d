"""The event store: interactions and feedback are added once each, and what they teach is kept beside them.

Every function works on a connection of the caller's transaction, so that a batch of events and the place in the file
where it came from are kept together or not at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.verdict import resolve
from finetune_pipeline.records import Example, Feedback, Interaction, normalise

E = TypeVar("E", Interaction, Feedback)

_CHUNK = 500
_SEQUENCE = "events"


@dataclass(frozen=True)
class Recorded:
    """What became of a batch of events."""

    interactions: int = 0
    feedback: int = 0
    duplicates: int = 0

    def __add__(self, other: "Recorded") -> "Recorded":
        return Recorded(
            self.interactions + other.interactions,
            self.feedback + other.feedback,
            self.duplicates + other.duplicates,
        )


@dataclass(frozen=True)
class Totals:
    """How much the store holds of one loop."""

    interactions: int
    feedback: int
    examples: int
    unmatched_feedback: int


def record(
    connection: sa.Connection, task: str, events: Sequence[Interaction | Feedback], reward: RewardFunction
) -> Recorded:
    """Add the events that are not there yet and renew what their interactions teach.

    An id that is there already is left as it was: events are never changed.
    """
    # Taking the sequence first locks it until commit: no other writer can come between the look and the insert.
    first = _take(connection, len(events))
    fresh = _not_known(connection, events)
    rows = [(first + i, event) for i, event in enumerate(fresh)]
    interactions = [_row(sequence, event) for sequence, event in rows if isinstance(event, Interaction)]
    feedback = [_row(sequence, event) for sequence, event in rows if isinstance(event, Feedback)]
    if interactions:
        connection.execute(t.interactions.insert(), interactions)
    if feedback:
        connection.execute(t.feedback.insert(), feedback)
    touched = {str(event.id) if isinstance(event, Interaction) else str(event.interaction_id) for event in fresh}
    _renew_examples(connection, task, sorted(touched), reward)
    return Recorded(len(interactions), len(feedback), len(events) - len(fresh))


def newest_sequence(connection: sa.Connection) -> int:
    """The highest ingest sequence that was given out; every event up to it is committed."""
    value = connection.execute(sa.select(t.counters.c.value).where(t.counters.c.name == _SEQUENCE)).scalar()
    return int(value or 0)


def totals(connection: sa.Connection, task: str) -> Totals:
    """How many interactions, feedback and examples a loop has, and feedback whose interaction never came."""

    def count(table: sa.Table) -> int:
        return connection.execute(sa.select(sa.func.count()).where(table.c.task == task)).scalar_one()

    known = sa.exists().where(t.interactions.c.id == t.feedback.c.interaction_id)
    unmatched = sa.select(sa.func.count()).select_from(t.feedback).where(t.feedback.c.task == task, ~known)
    return Totals(
        count(t.interactions), count(t.feedback), count(t.examples), connection.execute(unmatched).scalar_one()
    )


def records(connection: sa.Connection, task: str, until: int) -> Iterator[Sequence[Any]]:
    """All interactions of a loop up to a sequence, with what they teach (null without feedback), in batches of rows."""
    i, e = t.interactions.c, t.examples.c
    query = (
        sa.select(
            i.id.label("interaction_id"), sa.func.coalesce(e.sequence, i.sequence).label("sequence"), i.created_at,
            i.prompt, i.output, i.model, i.user, i.confidence, e.target, e.reward, e.confirmed, e.corrected,
        )
        .select_from(t.interactions.outerjoin(t.examples, i.id == e.interaction_id))
        .where(i.task == task, i.sequence <= until)
        .order_by(i.sequence)
    )  # fmt: skip
    yield from connection.execution_options(yield_per=2_000).execute(query).partitions()


def new_examples(connection: sa.Connection, task: str, after: int, min_reward: float) -> Iterator[Example]:
    """Examples that changed after a sequence, were in no judged dataset, and may be good enough.

    The time grows with what is new, not with the history: both conditions have an index.
    """
    e, i = t.examples.c, t.interactions.c
    judged = sa.exists().where(t.judged_examples.c.loop == task, t.judged_examples.c.content_hash == e.content_hash)
    query = (
        sa.select(t.examples, i.prompt)
        .join(t.interactions, i.id == e.interaction_id)
        .where(e.task == task, e.sequence > after, sa.or_(e.corrected, e.reward >= min_reward), ~judged)
        .order_by(e.sequence)
    )
    for row in connection.execution_options(yield_per=500).execute(query):
        values = row._asdict()
        yield Example.model_validate({name: values[name] for name in Example.model_fields})


def mark_judged(connection: sa.Connection, loop: str, content_hashes: Sequence[str]) -> None:
    """Remember that a dataset with these contents was judged, so that they never count as new again."""
    j = t.judged_examples.c
    for chunk in _chunks(sorted(set(content_hashes))):
        query = sa.select(j.content_hash).where(j.loop == loop, j.content_hash.in_(chunk))
        there = set(connection.execute(query).scalars())
        rows = [{"loop": loop, "content_hash": value} for value in chunk if value not in there]
        if rows:
            connection.execute(t.judged_examples.insert(), rows)


def content_hash(prompt: str, target: str) -> str:
    """The identity of an example after exact deduplication: normalised prompt, and target without outer spaces."""
    return hash_of([normalise(prompt), target.strip()])


def _take(connection: sa.Connection, count: int) -> int:
    c = t.counters.c
    update = sa.update(t.counters).where(c.name == _SEQUENCE).values(value=c.value + count).returning(c.value)
    value = connection.execute(update).scalar_one()
    return int(value) - count + 1


def _not_known(connection: sa.Connection, events: Sequence[Interaction | Feedback]) -> list[Interaction | Feedback]:
    known: set[tuple[str, str]] = set()
    for table, kind in ((t.interactions, "interaction"), (t.feedback, "feedback")):
        ids = [str(event.id) for event in events if event.event == kind]
        for chunk in _chunks(ids):
            found = connection.execute(sa.select(table.c.id).where(table.c.id.in_(chunk))).scalars()
            known.update((kind, value) for value in found)
    fresh = []
    for event in events:
        key = (event.event, str(event.id))
        if key not in known:
            known.add(key)
            fresh.append(event)
    return fresh


def _renew_examples(connection: sa.Connection, task: str, ids: Sequence[str], reward: RewardFunction) -> None:
    for chunk in _chunks(ids):
        interactions = _load(connection, t.interactions, Interaction, t.interactions.c.id, task, chunk)
        feedback = _load(connection, t.feedback, Feedback, t.feedback.c.interaction_id, task, chunk)
        rows = []
        for interaction, sequence in interactions:
            own = [(item, number) for item, number in feedback if item.interaction_id == interaction.id]
            newest = max([sequence, *(number for _, number in own)])
            example = resolve(interaction, [item for item, _ in own], newest, reward)
            if example is not None:
                rows.append(_example_row(task, example))
        connection.execute(t.examples.delete().where(t.examples.c.task == task, t.examples.c.interaction_id.in_(chunk)))
        if rows:
            connection.execute(t.examples.insert(), rows)


def _load(
    connection: sa.Connection, table: sa.Table, kind: type[E], key: sa.Column[str], task: str, ids: Sequence[str]
) -> list[tuple[E, int]]:
    query = sa.select(table).where(table.c.task == task, key.in_(ids))
    return [
        (kind.model_validate({k: v for k, v in row._asdict().items() if k != "sequence"}), row.sequence)
        for row in connection.execute(query)
    ]


def _row(sequence: int, event: Interaction | Feedback) -> dict[str, Any]:
    values = event.model_dump(exclude={"event"})
    identifiers: dict[str, Any] = {name: str(values[name]) for name in ("id", "interaction_id") if name in values}
    return {**values, **identifiers, "sequence": sequence}


def _example_row(task: str, example: Example) -> dict[str, Any]:
    values = example.model_dump(exclude={"prompt"})
    identity = content_hash(example.prompt, example.target)
    return {**values, "interaction_id": str(example.interaction_id), "task": task, "content_hash": identity}


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]
