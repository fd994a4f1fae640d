"""Deleting what the store holds of a person. What was deleted stays away: its ids are remembered.

An item of a declared source has no id of its own: it has another when its text or its rating changed. So the
person's name is remembered too, as a hash that is this store's own (`erased_users`), and neither a declared source nor
a dropped file of conversations brings in anything by that author again. It cannot reach what an application logs later.
"""

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.review import interactions_shaped_by
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import add_to_counters, recompute_examples, store_id, take_offsets

_CHUNK = 500
_WIPE_MS = 3_000
_SPACE = uuid.UUID("b6a5f9f2-0f0e-4a53-8a2c-3f4f0c1d7e65")  # of this module's name-based ids; any random one would do


@dataclass(frozen=True)
class PersonData:
    """What the store holds of a person, by ids.

    Attributes:
        interactions: the person's own.
        feedback: all feedback on those, and the person's on those of others.
        on_others: interactions of others that the person gave feedback on, or whose example one of `decisions` shaped.
        decisions: review decisions on the person's interactions, and the person's on those of others.
        sources: the declared sources, and dropped files, that interactions of the person came from.
    """

    interactions: tuple[str, ...]
    feedback: tuple[str, ...]
    on_others: tuple[str, ...]
    decisions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def taught(self) -> tuple[str, ...]:
        """The interactions whose examples the person had a part in."""
        return self.interactions + self.on_others

    @property
    def count(self) -> int:
        """How much it is."""
        return len(self.interactions) + len(self.feedback) + len(self.decisions)


@dataclass(frozen=True)
class Erased:
    """What was deleted: how many of each, and the ids of all deleted events."""

    interactions: int
    feedback: int
    decisions: int
    rejected_lines: int
    ids: frozenset[str]


def loops_with_data(connection: sa.Connection) -> list[str]:
    """Names of all loops that the store has anything of, those no longer declared too."""
    tables = (t.interactions, t.feedback, t.review_decisions, t.rejected_lines)
    names = sa.union(*(sa.select(table.c.loop) for table in tables))
    return sorted(connection.execute(names).scalars())


def person_data(connection: sa.Connection, loop: str, user: str) -> PersonData:
    """What `erase_user` would delete, and where it would change what is taught."""
    i, f, d = t.interactions.c, t.feedback.c, t.review_decisions.c
    query = sa.select(i.id, i.source).where(i.loop == loop, i.user == user).order_by(i.ingest_offset)
    rows = connection.execute(query).all()
    interactions = [row.id for row in rows]
    sources = sorted({row.source for row in rows if row.source is not None})
    feedback: dict[str, None] = {}
    decided = sa.select(d.id).where(d.loop == loop, d.reviewer == user)
    decisions = dict.fromkeys(connection.execute(decided).scalars())
    for chunk in _chunks(interactions):
        about = sa.select(f.id).where(f.loop == loop, f.interaction_id.in_(chunk))
        feedback.update(dict.fromkeys(connection.execute(about).scalars()))
        decided = sa.select(d.id).where(d.loop == loop, d.interaction_id.in_(chunk))
        decisions.update(dict.fromkeys(connection.execute(decided).scalars()))
    own = connection.execute(sa.select(f.id, f.interaction_id).where(f.loop == loop, f.user == user)).all()
    feedback.update(dict.fromkeys(row.id for row in own))
    others = {row.interaction_id for row in own} | interactions_shaped_by(connection, loop, list(decisions))
    on_others = others - set(interactions)
    return PersonData(tuple(interactions), tuple(feedback), tuple(sorted(on_others)), tuple(decisions), tuple(sources))


def erased_users(connection: sa.Connection, loop: str, users: Iterable[str]) -> frozenset[str]:
    """Those of these people who were erased in a loop."""
    names = {_author_id(connection, loop, user): user for user in users}
    f = t.erased_events.c
    queries = (sa.select(f.id).where(f.id.in_(chunk)) for chunk in _chunks(sorted(names)))
    return frozenset(names[id] for query in queries for id in connection.execute(query).scalars())


def erased_after(connection: sa.Connection, loop: str, offset: int) -> bool:
    """Return whether an event of the loop was erased after this ingest offset."""
    e = t.erased_events.c
    query = sa.select(e.id).where(e.loop == loop, e.ingest_offset > offset).limit(1)
    return connection.execute(query).first() is not None


def erase_user(connection: sa.Connection, loop: str, user: str, reward: RewardFunction) -> Erased:
    """Delete a person's interactions with all that was said of them, and what the person said of those of others.

    A review decision goes as a whole, as feedback does: what it holds beside the reviewer's name are the reviewer's
    words. What the interactions of others teach is worked out anew from what is left. Call `wipe` after
    the commit.

    Args:
        reward: the loop's reward function.
    """
    # The ingest_offset is locked until commit: no event can come between the look and the deletion.
    take_offsets(connection, 0)
    held = person_data(connection, loop, user)
    ids = [*held.interactions, *held.feedback]
    name = [] if erased_users(connection, loop, [user]) else [_author_id(connection, loop, user)]
    gone = [*ids, *held.decisions, *name]
    first = take_offsets(connection, len(gone))
    _overwrite_deleted(connection)
    add_to_counters(connection, loop, _delete_events(connection, loop, held))
    _remember(connection, loop, gone, first)
    for chunk in _chunks(held.taught):  # a deleted interaction teaches nothing any more, so its example goes too
        recompute_examples(connection, loop, chunk, reward)
    rejected = _delete_rejected(connection, loop, user)
    _delete_skipped(connection, loop, user)
    return Erased(len(held.interactions), len(held.feedback), len(held.decisions), rejected, frozenset(ids))


def overwrite_deleted(database: Database) -> bool:
    """Take what was deleted out of SQLite's files too: its write-ahead log still holds earlier pages.

    Returns:
        Whether it is out of them. It is not while another transaction still reads the state before, or writes.
    """
    if database.engine.dialect.name != "sqlite":
        return True  # PostgreSQL's vacuum does that in its own time
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        usual = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
        cursor.execute(f"PRAGMA busy_timeout={_WIPE_MS}")
        try:
            busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            cursor.execute(f"PRAGMA busy_timeout={usual}")
        return not busy
    finally:
        connection.close()


def _delete_events(connection: sa.Connection, loop: str, held: PersonData) -> Counter[str]:
    """Delete the rows; returns what that does to the loop's loop_counters of events."""
    i, f, d = t.interactions.c, t.feedback.c, t.review_decisions.c
    counts: Counter[str] = Counter()
    for chunk in _chunks(held.feedback):
        matched = sa.exists().where(i.id == f.interaction_id, i.loop == loop)
        for kind, has_interaction in connection.execute(sa.select(f.kind, matched).where(f.id.in_(chunk))):
            counts.subtract(["feedback", f"feedback.{kind}", *([] if has_interaction else ["unmatched"])])
        connection.execute(t.feedback.delete().where(f.id.in_(chunk)))
    for chunk in _chunks(held.decisions):
        connection.execute(t.review_decisions.delete().where(d.id.in_(chunk)))
    for chunk in _chunks(held.interactions):
        for (flag,) in connection.execute(sa.select(i.flag).where(i.id.in_(chunk))):
            counts.subtract(["interactions", *([] if flag is None else ["flagged"])])
        connection.execute(t.interactions.delete().where(i.id.in_(chunk)))
    return counts


def _remember(connection: sa.Connection, loop: str, ids: Sequence[str], first: int) -> None:
    rows = [{"id": id, "loop": loop, "ingest_offset": first + number} for number, id in enumerate(ids)]
    for start in range(0, len(rows), _CHUNK):
        connection.execute(t.erased_events.insert(), rows[start : start + _CHUNK])


def _delete_rejected(connection: sa.Connection, loop: str, user: str) -> int:
    r = t.rejected_lines.c
    written = {json.dumps(user), json.dumps(user, ensure_ascii=False)}
    # A name behind which a colon stands is the key of a field, and not a person.
    named = re.compile("|".join(rf"{re.escape(name)}(?!\s*:)" for name in sorted(written)))
    like = sa.or_(*(r.excerpt.contains(name, autoescape=True) for name in written))
    rows = connection.execute(sa.select(r.path, r.line, r.excerpt).where(r.loop == loop, like)).all()
    found = [(row.path, row.line) for row in rows if named.search(row.excerpt)]
    for path, line in found:
        connection.execute(t.rejected_lines.delete().where(r.loop == loop, r.path == path, r.line == line))
    return len(found)


def _delete_skipped(connection: sa.Connection, loop: str, user: str) -> None:
    """One line too many does no harm: the next reading writes them all anew."""
    s = t.skipped_records.c
    named = sa.or_(s.provenance.contains(user, autoescape=True), s.reason.contains(user, autoescape=True))
    connection.execute(t.skipped_records.delete().where(s.loop == loop, named))


def _author_id(connection: sa.Connection, loop: str, user: str) -> str:
    return str(uuid.uuid5(_SPACE, "\n".join([str(store_id(connection)), loop, user])))


def _overwrite_deleted(connection: sa.Connection) -> None:
    """Have SQLite write zeros over what it deletes; otherwise the texts would stay readable in the file."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA secure_delete=ON")


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]
