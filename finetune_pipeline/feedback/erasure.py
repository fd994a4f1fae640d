"""Erasing a person's data from the store. What was erased stays away, because its ids are remembered.

The records of declared sources have no stable ids: the id changes with the text or the rating. So the person's name is
remembered, too, as a hash that only this store can compute (`erased_users`), and neither declared sources nor dropped
files of conversations bring in anything by this author again. Interactions that an application logs later are stored.
"""

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.database.statements import chunks
from finetune_pipeline.feedback.review import interactions_shaped_by
from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.feedback.store import add_to_counters, recompute_examples, store_id, take_offsets

_CHECKPOINT_MS = 3_000
_CUT_EXCERPT = 190  # earlier versions stored 200 bytes, without white space at the ends
_ID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NAMESPACE = uuid.UUID("b6a5f9f2-0f0e-4a53-8a2c-3f4f0c1d7e65")  # random; of this module's name-based ids


@dataclass(frozen=True)
class PersonData:
    """The ids of what the store holds of a person.

    Attributes:
        interactions: the person's own.
        feedback: all feedback on those, and the person's feedback on interactions of others.
        on_others: interactions of others that the person gave feedback on, or whose examples depend on `decisions`.
        decisions: review decisions on the person's interactions, and the person's decisions on those of others.
        sources: the declared sources, and dropped files, that the person's interactions came from.
    """

    interactions: tuple[str, ...]
    feedback: tuple[str, ...]
    on_others: tuple[str, ...]
    decisions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def affected_interactions(self) -> tuple[str, ...]:
        """The interactions whose examples depend on the person's data."""
        return self.interactions + self.on_others

    @property
    def count(self) -> int:
        """The number of interactions, feedback and decisions."""
        return len(self.interactions) + len(self.feedback) + len(self.decisions)


@dataclass(frozen=True)
class Erased:
    """How much was erased, and the ids of all erased events."""

    interactions: int
    feedback: int
    decisions: int
    rejected_lines: int
    ids: frozenset[str]


def loops_with_data(connection: sa.Connection) -> list[str]:
    """Return the names of all loops in the store, including those that are not declared any more."""
    tables = (t.interactions, t.feedback, t.review_decisions, t.rejected_lines)
    names = sa.union(*(sa.select(table.c.loop) for table in tables))
    return sorted(connection.execute(names).scalars())


def person_data(connection: sa.Connection, loop: str, user: str) -> PersonData:
    """Return what `erase_user` would delete, and the interactions whose examples would change."""
    i, f, d = t.interactions.c, t.feedback.c, t.review_decisions.c
    query = sa.select(i.id, i.source).where(i.loop == loop, i.user == user).order_by(i.ingest_offset)
    rows = connection.execute(query).all()
    interactions = [row.id for row in rows]
    sources = sorted({row.source for row in rows if row.source is not None})
    feedback: dict[str, None] = {}  # dictionaries as ordered sets
    own_decisions = sa.select(d.id).where(d.loop == loop, d.reviewer == user)
    decisions = dict.fromkeys(connection.execute(own_decisions).scalars())
    for chunk in chunks(interactions):
        about = sa.select(f.id).where(f.loop == loop, f.interaction_id.in_(chunk))
        feedback.update(dict.fromkeys(connection.execute(about).scalars()))
        about = sa.select(d.id).where(d.loop == loop, d.interaction_id.in_(chunk))
        decisions.update(dict.fromkeys(connection.execute(about).scalars()))
    own = connection.execute(sa.select(f.id, f.interaction_id).where(f.loop == loop, f.user == user)).all()
    feedback.update(dict.fromkeys(row.id for row in own))
    others = {row.interaction_id for row in own} | interactions_shaped_by(connection, loop, list(decisions))
    on_others = others - set(interactions)
    return PersonData(tuple(interactions), tuple(feedback), tuple(sorted(on_others)), tuple(decisions), tuple(sources))


def person_texts(connection: sa.Connection, data: PersonData) -> set[str]:
    """Return the texts of a person's data: prompts, answers, conversations, corrections, and where they came from."""
    i, f, d = t.interactions.c, t.feedback.c, t.review_decisions.c
    texts: set[str | None] = set()
    for chunk in chunks(data.interactions):
        columns = (i.prompt, i.output, i.retrieved_context, i.provenance, i.history)
        for *found, history in connection.execute(sa.select(*columns).where(i.id.in_(chunk))):
            texts.update(found, (turn["content"] for turn in history or ()))
    for column, key, ids in ((f.correction, f.id, data.feedback), (d.target, d.id, data.decisions)):
        for chunk in chunks(ids):
            texts.update(connection.execute(sa.select(column).where(key.in_(chunk))).scalars())
    return {text for text in texts if text}


def erased_users(connection: sa.Connection, loop: str, users: Iterable[str]) -> frozenset[str]:
    """Return those of the given users who were erased in a loop."""
    names = {_user_id(connection, loop, user): user for user in users}
    e = t.erased_events.c
    queries = (sa.select(e.id).where(e.id.in_(chunk)) for chunk in chunks(sorted(names)))
    return frozenset(names[id] for query in queries for id in connection.execute(query).scalars())


def erased_after(connection: sa.Connection, loop: str, offset: int) -> bool:
    """Return whether an event of the loop was erased after this ingest offset."""
    e = t.erased_events.c
    query = sa.select(e.id).where(e.loop == loop, e.ingest_offset > offset).limit(1)
    return connection.execute(query).first() is not None


def erase_user(connection: sa.Connection, loop: str, user: str, reward: RewardFunction) -> Erased:
    """Delete a person's interactions with all feedback on them, and the person's feedback on those of others.

    Review decisions are deleted likewise, and so are the questions of the regression suite that depend on any of it.
    The examples of others' interactions are recomputed from what is left. Call `overwrite_deleted` after the commit.

    Args:
        reward: the loop's reward function.
    """
    take_offsets(connection, 0)  # locks until commit, so no event is added between the query and the deletion
    data = person_data(connection, loop, user)
    event_ids = [*data.interactions, *data.feedback]
    name = [] if erased_users(connection, loop, [user]) else [_user_id(connection, loop, user)]
    ids = [*event_ids, *data.decisions, *name]
    first = take_offsets(connection, len(ids))
    if connection.dialect.name == "sqlite":  # otherwise the deleted texts stay readable in the file
        connection.exec_driver_sql("PRAGMA secure_delete=ON")
    _delete_events(connection, loop, data)
    q = t.regression_questions.c
    for chunk_of_ids in chunks(data.affected_interactions):
        connection.execute(t.regression_questions.delete().where(q.loop == loop, q.interaction_id.in_(chunk_of_ids)))
    for chunk in chunks([{"id": id, "loop": loop, "ingest_offset": first + number} for number, id in enumerate(ids)]):
        connection.execute(t.erased_events.insert(), chunk)
    for chunk_of_ids in chunks(data.affected_interactions):  # also deletes the examples of deleted interactions
        recompute_examples(connection, loop, chunk_of_ids, reward)
    rejected = _delete_rejected_lines(connection, loop, user, event_ids)
    s = t.skipped_records.c
    # Deleting too many of these does no harm: the next sync writes them again.
    named = sa.or_(s.provenance.contains(user, autoescape=True), s.reason.contains(user, autoescape=True))
    connection.execute(t.skipped_records.delete().where(s.loop == loop, named))
    return Erased(len(data.interactions), len(data.feedback), len(data.decisions), rejected, frozenset(event_ids))


def overwrite_deleted(database: Database) -> bool:
    """Truncate SQLite's own write-ahead log, which still contains the deleted rows; return whether that worked.

    It does not work while another transaction writes, or reads the state before the deletion.
    """
    if database.engine.dialect.name != "sqlite":
        return True  # PostgreSQL removes deleted rows by its own vacuum
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        timeout = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
        cursor.execute(f"PRAGMA busy_timeout={_CHECKPOINT_MS}")
        try:
            busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            cursor.execute(f"PRAGMA busy_timeout={timeout}")
        return not busy
    finally:
        connection.close()


def _delete_events(connection: sa.Connection, loop: str, data: PersonData) -> None:
    i, f, d = t.interactions.c, t.feedback.c, t.review_decisions.c
    counts: Counter[str] = Counter()
    for chunk in chunks(data.feedback):
        matched = sa.exists().where(i.id == f.interaction_id, i.loop == loop)
        for kind, has_interaction in connection.execute(sa.select(f.kind, matched).where(f.id.in_(chunk))):
            counts.subtract(["feedback", f"feedback.{kind}", *([] if has_interaction else ["unmatched"])])
        connection.execute(t.feedback.delete().where(f.id.in_(chunk)))
    for chunk in chunks(data.decisions):
        connection.execute(t.review_decisions.delete().where(d.id.in_(chunk)))
    for chunk in chunks(data.interactions):
        for (flag,) in connection.execute(sa.select(i.flag).where(i.id.in_(chunk))):
            counts.subtract(["interactions", *([] if flag is None else ["flagged"])])
        connection.execute(t.interactions.delete().where(i.id.in_(chunk)))
    add_to_counters(connection, loop, counts)


def _delete_rejected_lines(connection: sa.Connection, loop: str, user: str, ids: Iterable[str]) -> int:
    """Delete rejected lines that name the person or one of the person's events, or of which that is not known.

    Lines that earlier versions rejected have only their first _CUT_EXCERPT characters here.
    """
    r = t.rejected_lines.c
    written = {json.dumps(user), json.dumps(user, ensure_ascii=False)}
    # A string followed by a colon is the name of a field, not of a person.
    named = re.compile("|".join(rf"{re.escape(name)}(?!\s*:)" for name in sorted(written)))
    quoted = re.compile(rf"[\"']{re.escape(user)}[\"']")
    erased = set(ids)
    found = [
        (row.path, row.line)
        for row in connection.execute(sa.select(t.rejected_lines).where(r.loop == loop))
        if named.search(row.excerpt)
        or quoted.search(row.reason)
        or erased & {id.lower() for id in _ID.findall(row.excerpt)}
        or len(row.excerpt) >= _CUT_EXCERPT
    ]
    for path, line in found:
        connection.execute(t.rejected_lines.delete().where(r.loop == loop, r.path == path, r.line == line))
    return len(found)


def _user_id(connection: sa.Connection, loop: str, user: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "\n".join([str(store_id(connection)), loop, user])))
