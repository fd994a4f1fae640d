"""Declared sources into the store, as the raw_logs asset does it; and the events of dropped files. No Dagster here."""

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from finetune_pipeline.artifacts import hash_of, wait_for_lock
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.database import Database
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.erasure import erased_users
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import (
    State,
    of_source,
    record,
    restore,
    retract,
    sources_feedback_id,
    states,
    take_offsets,
)
from finetune_pipeline.records import Feedback, Interaction, is_in_future, without_system_prompt
from finetune_pipeline.settings import (
    INGESTED,
    CodeSource,
    DocumentsSource,
    IngestedSource,
    LogsSource,
    LoopSettings,
    Source,
    home,
)
from finetune_pipeline.sources.source_record import Cursor, Item, Reading, Skipped, SourceError

_log = logging.getLogger(__name__)
_BATCH = 1_000
_CHUNK = 500
_PROVENANCE, _REASON = 1_000, 300
_NAMED = 10_000  # of a table of millions in which no row can be used, the first are named, and all counted
_SAID = 3  # of what could not be looked into
_BETWEEN_CURSORS = 100_000  # a source that gives cursors gives one more often
_SPACE = uuid.UUID("6a4b1f0e-7c52-4f0b-9d3e-52c8a1f7b9d4")  # of this project's name-based ids; any random one would do

ERASED = "its author was erased"
"""Why an item is not taken, without the name."""

Reader = Callable[[Any, Any], Reading]
"""Reads a source: of its settings and the cursor of the last reading (None at first)."""


@dataclass
class Fed:
    """What reading one source did.

    Attributes:
        items: conversations that it gave.
        new: of them not in the store before.
        retracted: earlier ones that it no longer has.
        skipped: things in it that could not be used.
        failed: why it could not be read to its end; empty if it was.
    """

    name: str
    items: int = 0
    new: int = 0
    retracted: int = 0
    skipped: int = 0
    failed: str = ""

    def __str__(self) -> str:
        """As the run's log says it."""
        done = f"{self.name}: {self.items} items, {self.new} of them new, {self.retracted} retracted, {self.skipped} "
        return done + ("skipped" if not self.failed else f"skipped; {self.failed}")


def read_feeds(loop: LoopSettings, database: Database, tell: Callable[[str], None]) -> list[Fed]:
    """Read every declared source of a loop; one that fails is named, and the others go on."""
    done = []
    for feed in loop.sources:
        if isinstance(feed, LogsSource | IngestedSource):
            continue  # events and dropped files have their own way
        try:
            fed = read_feed(loop, feed, database, reader(feed), tell)
        except SourceError as error:
            fed = Fed(feed.name, failed=redact(str(error)).text)
        except (OSError, RuntimeError, ValueError) as error:  # a path, a right or a host's name that nobody foresaw
            found = redact(f"{type(error).__name__}: {error}").text
            fed = Fed(
                feed.name,
                failed=f"cannot be read ({found}); correct its settings in the loop's YAML, or mend what it says",
            )
        tell(str(fed))
        done.append(fed)
    return done


def reader(feed: Source) -> Reader:
    """What reads a source: `read` of the module of `finetune_pipeline.sources` that is named as its kind."""
    module: Any = import_module(f"finetune_pipeline.sources.{feed.kind}")
    read: Reader = module.read
    if isinstance(feed, CodeSource | DocumentsSource):  # what goes to a teacher is redacted first
        read = partial(module.read, redact=lambda text: redact(text).text)
    return read


def read_feed(
    loop: LoopSettings, feed: Source, database: Database, read: Reader, tell: Callable[[str], None] = _log.info
) -> Fed:
    """Take what a source gives into the store. A batch of items is one transaction, with the cursor behind it.

    An item's id is made of its source and content, and of its key where it has one: reading it again changes nothing,
    wherever it stands by then, and when it changed it is a new one, and the old is retracted.

    Raises:
        SourceError: it cannot be read; what it gave until then was taken.
    """
    sync = _Sync(loop, feed, database, reward_function(loop.feedback))
    # One that began before another would retract what only the other saw.
    with wait_for_lock(home() / "cache" / "feeds" / loop.name / feed.name, f"reading of {feed.name}", tell):
        for batch in _batches(read(feed, sync.cursor())):
            sync.take(batch)
        sync.finish()
    return sync.fed


@dataclass
class _Sync:
    loop: LoopSettings
    feed: Source
    database: Database
    reward: RewardFunction
    seen: set[bytes] = field(default_factory=set)
    """Ids that it gave, as 16 bytes since it may have a million; of a source with cursors nobody needs them."""
    again: Counter[bytes] = field(default_factory=Counter)
    """Id of what it gave more than once -> how often more."""
    skipped: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    """Origin of what could not be looked into, or not to its end -> why."""
    later: set[str] = field(default_factory=set)
    """Origins of what nothing was made of this time."""
    marked: bool = False
    anew: Cursor | None = None
    """The last cursor of a reading that began again; it is kept at the end."""
    since_mark: dict[str, str] = field(default_factory=dict)
    """Origin -> id of what it is now, or nothing where it cannot be used any more."""

    def __post_init__(self) -> None:
        self.fed = Fed(self.feed.name)

    def cursor(self) -> Any:
        """Where the last reading ended."""
        m = t.source_cursors.c
        query = sa.select(m.cursor).where(m.loop == self.loop.name, m.source == self.feed.name)
        with self.database.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def take(self, batch: list[Item | Skipped | Cursor]) -> None:
        """Take a batch: new items are recorded, retracted ones that are back teach again."""
        cursors = [one for one in batch if isinstance(one, Cursor)]
        with self.database.write() as connection:
            take_offsets(connection, 0)  # until commit nobody else adds an event, or erases anyone
            made = self._usable(connection, batch)
            known = states(connection, list(made))
            events = [event for id, pair in made.items() if id not in known for event in pair]
            recorded = record(connection, self.loop.name, events, self.reward)
            now = {id: str(made[id][0].provenance) for id in known}
            changed = {
                id: provenance
                for id, provenance in now.items()
                if known[id] != State(retracted=False, provenance=provenance)
            }
            restore(connection, self.loop.name, changed, self.reward)
            if cursors and cursors[-1].anew:
                self.anew = cursors[-1]
            elif cursors:
                self.marked = True
                self.seen.clear()
                self.fed.retracted += retract(connection, self.loop.name, self._superseded(connection))
                self._put_mark(connection, cursors[-1].value)
                self.since_mark.clear()
        self.fed.new += recorded.interactions

    def finish(self) -> None:
        """After a whole reading: retract what the source no longer gave, and keep what it skipped."""
        with self.database.write() as connection:
            if not self.marked and not self._of_no_use():
                self.fed.retracted += retract(connection, self.loop.name, self._gone(connection))
                if self.anew is not None:
                    self._put_mark(connection, self.anew.value)
            self._put_skipped(connection)
        if self.unseen:
            self.fed.failed = self._not_to_its_end()
        elif self._of_no_use():
            self.fed.failed = self._all_unusable()

    def _of_no_use(self) -> bool:
        """Whether it gave nothing but what cannot be used: rather a mistake in its settings than what was meant."""
        told = self.unseen.keys() | self.later
        return not self.fed.items and any(
            reason != ERASED and provenance not in told for provenance, reason in self.skipped.items()
        )

    def _all_unusable(self) -> str:
        provenance, reason = min(self.skipped.items())
        return (
            f"nothing in it can be used, so nothing was retracted ({redact(provenance).text}: {reason}); correct the "
            f"source's settings or what it says, or take its items out with `finetune feedback retract --source "
            f"{self.feed.name}`"
        )

    def _not_to_its_end(self) -> str:
        first = [
            redact(f"{provenance}: {reason}").text for provenance, reason in islice(sorted(self.unseen.items()), _SAID)
        ]
        more = f"; and {len(self.unseen) - _SAID} more" if len(self.unseen) > _SAID else ""
        return f"not read to its end, and nothing retracted there: {'; '.join(first)}{more}"

    def _gone(self, connection: sa.Connection) -> list[str]:
        return [
            id
            for id, provenance, retracted in of_source(connection, self.loop.name, self.feed.name)
            if not retracted and uuid.UUID(id).bytes not in self.seen and not self._may_be_there(provenance)
        ]

    def _may_be_there(self, provenance: str) -> bool:
        """Whether it stood in, or beneath, something that could not be looked into, or that nothing was made of."""
        if provenance in self.later or provenance.rpartition(" [")[0] in self.later:
            return True
        beneath = ("/", ":", "#", " [")
        return any(
            not here or provenance == here or provenance.startswith(tuple(here + cursor for cursor in beneath))
            for here in self.unseen
        )

    def _usable(
        self, connection: sa.Connection, batch: list[Item | Skipped | Cursor]
    ) -> dict[str, tuple[Interaction, Feedback]]:
        """The events of a batch's items, by the interaction's id; what cannot be used is written down."""
        users = {one.user for one in batch if isinstance(one, Item) and one.user is not None}
        erased = erased_users(connection, self.loop.name, users)
        made = {}
        for one in batch:
            if isinstance(one, Skipped):
                self._skip(one)
            elif isinstance(one, Item) and one.user in erased:
                self._skip(Skipped(one.provenance, ERASED))
            elif isinstance(one, Item) and (events := self._add(one)) is not None:
                made[str(events[0].id)] = events
        return made

    def _add(self, item: Item) -> tuple[Interaction, Feedback] | None:
        try:
            made = self._events(item)
        except ValidationError as error:
            first = error.errors()[0]
            self._skip(Skipped(item.provenance, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
            return None
        self.fed.items += 1
        if not self.marked:
            self.seen.add(made[0].id.bytes)
        self._is_now(item.provenance, str(made[0].id))
        return made

    def _events(self, item: Item) -> tuple[Interaction, Feedback]:
        """The events of an item: what has another text, reward, author or key is another item.

        What says the same as an earlier one is told from it by its number among those, not by its place: that changes
        with every line before it.
        """
        feed: Any = self.feed
        reward = feed.reward if item.reward is None else item.reward
        item = _without_system_prompt(item, self.loop)
        key = item.provenance if item.keyed else ""
        id = uuid.uuid5(_SPACE, "\n".join([self.loop.name, self.feed.name, key, _content(item, reward, item.user)]))
        if id.bytes in self.seen and not item.keyed:
            self.again[id.bytes] += 1
            id = uuid.uuid5(id, str(self.again[id.bytes]))
        return _made(self.loop.name, self.feed.name, item, id, reward, sources_feedback_id(id))

    def _skip(self, one: Skipped) -> None:
        """Note what cannot be used. Reasons say what was found, and that may be a secret as well."""
        provenance = one.provenance[:_PROVENANCE]
        self.fed.skipped += provenance not in self.skipped
        reason = redact(one.reason).text[:_REASON]
        if len(self.skipped) < _NAMED:
            self.skipped[provenance] = reason
        if one.unseen:
            self.unseen[one.provenance] = reason
        elif one.later:
            self.later.add(one.provenance)
        else:
            self._is_now(one.provenance, "")

    def _is_now(self, provenance: str, id: str) -> None:
        if len(self.since_mark) < _BETWEEN_CURSORS:  # beyond, it is a source without cursors, which retracts at its end
            self.since_mark[provenance] = id

    def _superseded(self, connection: sa.Connection) -> list[str]:
        """Earlier states of what was given since the last cursor."""
        i, old, provenances = t.interactions.c, [], self.since_mark
        names = sorted(provenances)
        for start in range(0, len(names), _CHUNK):
            here = i.provenance.in_(names[start : start + _CHUNK])
            own = sa.and_(i.loop == self.loop.name, i.source == self.feed.name, here, i.retracted_offset.is_(None))
            old += [
                id
                for id, provenance in connection.execute(sa.select(i.id, i.provenance).where(own))
                if id != provenances[provenance]
            ]
        return old

    def _put_mark(self, connection: sa.Connection, value: Any) -> None:
        own = {"loop": self.loop.name, "source": self.feed.name}
        m = t.source_cursors.c
        connection.execute(t.source_cursors.delete().where(m.loop == own["loop"], m.source == own["source"]))
        connection.execute(t.source_cursors.insert().values(**own, cursor=value, read_at=datetime.now(UTC)))

    def _put_skipped(self, connection: sa.Connection) -> None:
        own = {"loop": self.loop.name, "source": self.feed.name}
        s = t.skipped_records.c
        connection.execute(t.skipped_records.delete().where(s.loop == own["loop"], s.source == own["source"]))
        # Of those whose provenances are the same but for an address, one is named; all are counted.
        named = {redact(provenance).text[:_PROVENANCE]: reason for provenance, reason in sorted(self.skipped.items())}
        rows = [{**own, "provenance": provenance, "reason": reason} for provenance, reason in named.items()]
        if rows:
            connection.execute(t.skipped_records.insert(), rows)


def ingested_events(loop: LoopSettings, item: Item) -> tuple[Interaction, Feedback]:
    """The events of a conversation in a file that was handed over once: the same in another file is the same one.

    Another reward of it is another feedback on it.
    """
    reward = loop.ingest.default_reward if item.reward is None else item.reward
    item = _without_system_prompt(item, loop)
    id = uuid.uuid5(_SPACE, "\n".join([loop.name, INGESTED, _content(item)]))
    return _made(loop.name, INGESTED, item, id, reward, sources_feedback_id(id, reward))


def _without_system_prompt(item: Item, loop: LoopSettings) -> Item:
    prompt, history = without_system_prompt(item.prompt, item.history, loop.system_prompt)
    return replace(item, prompt=prompt, history=history)


def _content(item: Item, *more: object) -> str:
    said = [turn.model_dump() for turn in item.history]
    return hash_of([item.prompt, said, item.answer, item.model_output, *more])


def _made(
    loop: str, source: str, item: Item, id: uuid.UUID, reward: float, feedback_id: uuid.UUID
) -> tuple[Interaction, Feedback]:
    """The interaction of an item, and the feedback that gives it its reward, or its correction."""
    moment = item.created_at
    if moment is None or is_in_future(moment):  # a note may be about a future day
        moment = datetime.now(UTC)
    interaction = Interaction(
        id=id, loop=loop, created_at=moment, prompt=item.prompt, history=item.history,
        output=item.answer if item.model_output is None else item.model_output,
        user=item.user, domain=item.domain, kind=item.kind, source=source, provenance=item.provenance,
    )  # fmt: skip
    kind: dict[str, Any] = {"kind": "reward"}
    if item.model_output is not None:
        kind = {"kind": "correction", "correction": item.answer}
    own = {"id": feedback_id, "loop": loop, "interaction_id": id, "created_at": moment}
    return interaction, Feedback(**own, **kind, reward=reward)


def _batches(reading: Iterable[Item | Skipped | Cursor]) -> Iterator[list[Item | Skipped | Cursor]]:
    """Batches that end with a cursor, when they are large, or where the reading fails."""
    batch: list[Item | Skipped | Cursor] = []
    try:
        for one in reading:
            batch.append(one)
            if isinstance(one, Cursor) or len(batch) >= _BATCH:
                yield batch
                batch = []
    except Exception:
        if batch:  # what a teacher answered until then was paid for
            yield batch
        raise
    if batch:
        yield batch


def retract_source(loop: str, source: str, database: Database) -> int:
    """Have nothing teach any more of what came from a source, and erase how far it was read; returns how many did.

    Where it is declared still, or again, the next reading brings back what it has.
    """
    with database.write() as connection:
        take_offsets(connection, 0)  # until commit nobody else adds an event
        there = [id for id, _, retracted in of_source(connection, loop, source) if not retracted]
        m = t.source_cursors.c
        connection.execute(t.source_cursors.delete().where(m.loop == loop, m.source == source))
        return retract(connection, loop, there)


def teaching_sources(connection: sa.Connection, loop: str) -> dict[str, int]:
    """Each source of which something teaches, and how many items of it do."""
    i = t.interactions.c
    there = sa.and_(i.loop == loop, i.source.is_not(None), i.retracted_offset.is_(None))
    query = sa.select(i.source, sa.func.count().label("items")).where(there).group_by(i.source).order_by(i.source)
    return {row.source: row.items for row in connection.execute(query)}


def no_longer_declared(connection: sa.Connection, loop: LoopSettings) -> dict[str, int]:
    """Sources that the loop's YAML does not name any more though what they gave still teaches, and how much that is."""
    declared = {INGESTED, *(feed.name for feed in loop.sources)}
    return {source: n for source, n in teaching_sources(connection, loop.name).items() if source not in declared}


def skipped_records(connection: sa.Connection, loop: LoopSettings, limit: int) -> Sequence[Any]:
    """The first things that the declared sources held and nobody could use: source, provenance, reason."""
    s = t.skipped_records.c
    own = sa.and_(s.loop == loop.name, s.source.in_([feed.name for feed in loop.sources]))
    query = sa.select(s.source, s.provenance, s.reason).where(own).order_by(s.source, s.provenance)
    return connection.execute(query.limit(limit)).all()
