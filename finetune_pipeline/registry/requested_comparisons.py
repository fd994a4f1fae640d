"""Comparisons that a program or the console asked for: one row for each, its pairs of answers, and the votes on them.

One process at a time works on a comparison. It holds a lease in the row and renews it while it works; the lease of a
killed process ends by itself, and the comparison waits again. `pipeline.comparisons` does the work.
"""

import os
import secrets
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import comparison_pairs, comparison_votes, requested_comparisons
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.registry.champion import lock_loop_in

LEASE_SECONDS = 30.0
"""How long a lease holds without being renewed, and so how long a comparison waits after a `kill -9`."""

MAX_TRIES = 3
"""Processes that may end without a result before a comparison has failed."""

ERASED = "[erased]"
"""Takes the place of a text that was erased."""

ComparisonStatus = Literal["pending", "running", "completed", "failed", "canceled"]
Choice = Literal["base", "tuned", "tie"]
UNFINISHED: tuple[ComparisonStatus, ...] = ("pending", "running")


class RequestedComparisonError(RuntimeError):
    """A comparison cannot be created, changed or voted on as asked; the message says why and what to do."""


class UnknownComparisonError(RequestedComparisonError):
    """There is no such comparison or pair."""


class ComparisonLeaseLostError(RuntimeError):
    """Another process works on the comparison, or it was canceled."""


class RequestedComparison(Record):
    """A comparison of two models that somebody asked for. It judges no data and promotes nothing."""

    id: str = Field(pattern="^cmp-[0-9a-f]{24}$")
    loop: str
    base: str = Field(description="Name of the model to compare with.")
    base_id: str | None = Field(description="Its id in the registry; None is the base model.")
    tuned: str = Field(description="Name of the model to compare.")
    tuned_id: str | None
    prompts: list[str] | None = Field(default=None, description="Given prompts; None: the loop's benchmark.")
    created_by: str = Field(description="Name of the API key, or of the OS user.")
    idempotency_key: str | None = None
    request_sha256: str | None = Field(default=None, description="Of the request with that key.")
    status: ComparisonStatus = "pending"
    tries: int = Field(default=0, description="Processes that began to work on it.")
    progress: dict[str, Any] = Field(default={}, description="model, answered and questions; or empty.")
    error: str = ""
    base_wins: int | None = Field(default=None, description="Questions in which its score is higher.")
    tuned_wins: int | None = None
    ties: int | None = None
    p_value: float | None = Field(default=None, description="One-sided, that the tuned model is not better.")
    report: str | None = Field(default=None, description="Version of the report.")
    created_at: UtcDatetime
    started_at: UtcDatetime | None = None
    finished_at: UtcDatetime | None = None
    locked_by: str | None = None
    locked_until: UtcDatetime | None = None


class ComparedPair(Record):
    """Two answers to one prompt."""

    comparison_id: str
    number: int = Field(ge=1)
    prompt: str
    base_answer: str
    tuned_answer: str
    swapped: bool = Field(description="The tuned model's answer is shown first.")


class ComparisonVote(Record):
    """What one voter said about one pair."""

    comparison_id: str
    number: int
    voter: str
    choice: Choice
    created_at: UtcDatetime


@dataclass(frozen=True)
class VoteCounts:
    """Votes by their choice.

    Attributes:
        voters: names of those who voted, sorted.
    """

    base_wins: int = 0
    tuned_wins: int = 0
    ties: int = 0
    voters: tuple[str, ...] = ()


@dataclass(frozen=True)
class ErasedFromComparisons:
    """What was erased of a person.

    Attributes:
        prompts: given prompts that were overwritten.
        pairs: pairs whose prompt and answers were overwritten.
        votes: votes that were deleted.
    """

    prompts: int = 0
    pairs: int = 0
    votes: int = 0


@dataclass(frozen=True)
class ModelVotes:
    """What blind votes said about one model, in all comparisons with others."""

    won: int = 0
    lost: int = 0
    tied: int = 0

    @property
    def win_rate(self) -> float | None:
        """Won votes of those that are not tied; None without any."""
        return self.won / (self.won + self.lost) if self.won + self.lost else None


def new_comparison_id() -> str:
    """Return the id of a new comparison."""
    return f"cmp-{secrets.token_hex(12)}"


def create_comparison(db: Database, comparison: RequestedComparison) -> RequestedComparison:
    """Record a comparison, or return the one that the same request created before.

    Raises:
        RequestedComparisonError: another request used the idempotency key.
    """
    c = requested_comparisons.c
    with db.write() as connection:
        if comparison.idempotency_key is not None:
            lock_loop_in(connection, comparison.loop)  # so that two requests at once do not both find nothing
            here = (c.loop == comparison.loop, c.idempotency_key == comparison.idempotency_key)
            row = connection.execute(sa.select(requested_comparisons).where(*here)).first()
            if row is not None:
                known = RequestedComparison(**row._mapping)
                if known.request_sha256 != comparison.request_sha256:
                    raise RequestedComparisonError(
                        f"the idempotency key {comparison.idempotency_key!r} was used for another request, which "
                        f"created {known.id}; send that request again, or choose another key"
                    )
                return known
        connection.execute(sa.insert(requested_comparisons).values(**comparison.model_dump()))
    return comparison


def find_requested_comparison(db: Database, id: str) -> RequestedComparison:
    """Return a comparison; one whose process was killed is pending again.

    Raises:
        UnknownComparisonError: there is none with this id.
    """
    query = sa.select(requested_comparisons).where(requested_comparisons.c.id == id)
    with db.read() as connection:
        row = connection.execute(query).first()
    if row is None:
        raise UnknownComparisonError(f"there is no comparison {id[:100]!r}; list them to see what there is")
    return _comparison(row)


def list_requested_comparisons(
    db: Database, loops: Collection[str], statuses: Collection[ComparisonStatus] = ()
) -> list[RequestedComparison]:
    """Return the comparisons of some loops, newest first; with no status given, all of them."""
    c = requested_comparisons.c
    query = sa.select(requested_comparisons).where(c.loop.in_(loops)).order_by(c.created_at.desc(), c.id.desc())
    with db.read() as connection:
        found = [_comparison(row) for row in connection.execute(query)]
    return [one for one in found if not statuses or one.status in statuses]


def next_pending(db: Database, loops: Collection[str]) -> RequestedComparison | None:
    """Return the oldest comparison of some loops that waits for a process; None if there is none."""
    c = requested_comparisons.c
    killed = sa.and_(c.status == "running", c.locked_until < datetime.now(UTC))
    query = sa.select(requested_comparisons).where(c.loop.in_(loops), sa.or_(c.status == "pending", killed))
    with db.read() as connection:
        row = connection.execute(query.order_by(c.created_at, c.id).limit(1)).first()
    return _comparison(row) if row else None


def compared_in(connection: sa.Connection, loop: str) -> set[str]:
    """Return the ids of the models that unfinished comparisons of a loop need, within a transaction."""
    c = requested_comparisons.c
    rows = connection.execute(sa.select(c.base_id, c.tuned_id).where(c.loop == loop, c.status.in_(UNFINISHED)))
    return {id for row in rows for id in row if id is not None}


class ComparisonLease:
    """The right of this process to work on a comparison, and its only way to change the row.

    Attributes:
        comparison: the row when the lease was taken.
    """

    def __init__(self, db: Database, comparison: RequestedComparison, owner: str) -> None:
        self.comparison = comparison
        self._db = db
        self._owner = owner

    def renew(self, progress: Mapping[str, Any]) -> None:
        """Keep the lease, and record how far the work is.

        Raises:
            ComparisonLeaseLostError: another process has taken it, or the comparison was canceled.
        """
        self._update(progress=dict(progress), locked_until=_until())

    def finish(self, pairs: Sequence[ComparedPair], **results: Any) -> None:
        """Record the pairs and results; the comparison is completed.

        Raises:
            ComparisonLeaseLostError: as in `renew`; nothing was written.
        """
        self._update(pairs, status="completed", error="", **_ENDED, finished_at=datetime.now(UTC), **results)

    def fail(self, error: str) -> None:
        """Record that the comparison has failed.

        Raises:
            ComparisonLeaseLostError: as in `renew`; nothing was written.
        """
        self._update(status="failed", error=error, **_ENDED, finished_at=datetime.now(UTC))

    def give_back(self) -> None:
        """Let another process do the work, because this one was told to end; that is no try.

        Raises:
            ComparisonLeaseLostError: as in `renew`; nothing was written.
        """
        self._update(status="pending", tries=self.comparison.tries - 1, **_ENDED)

    def _update(self, pairs: Sequence[ComparedPair] = (), **values: Any) -> None:
        c = requested_comparisons.c
        own = (c.id == self.comparison.id, c.locked_by == self._owner, c.status == "running")
        with self._db.write() as connection:
            if not connection.execute(sa.update(requested_comparisons).where(*own).values(**values)).rowcount:
                raise ComparisonLeaseLostError(
                    f"the comparison {self.comparison.id} was canceled, or another process does it"
                )
            if pairs:
                connection.execute(sa.insert(comparison_pairs), [pair.model_dump() for pair in pairs])


_ENDED: Mapping[str, Any] = {"locked_by": None, "locked_until": None}


def claim_comparison(db: Database, id: str) -> ComparisonLease | None:
    """Take the lease of a comparison that waits; None if it does not wait.

    One whose processes ended too often without a result has failed then.
    """
    c, now = requested_comparisons.c, datetime.now(UTC)
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    with db.write() as connection:
        row = connection.execute(sa.select(requested_comparisons).where(c.id == id).with_for_update()).first()
        if row is None or _comparison(row).status != "pending":
            return None
        if row.tries >= MAX_TRIES:
            error = f"{row.tries} processes that worked on it ended without a result; the server's log may say why"
            values: dict[str, Any] = {"status": "failed", "error": error, "finished_at": now, **_ENDED}
        else:
            values = {"status": "running", "tries": row.tries + 1, "locked_by": owner, "locked_until": _until()}
            values["started_at"] = row.started_at or now
        connection.execute(sa.update(requested_comparisons).where(c.id == id).values(**values))
        if values["status"] == "failed":
            return None
        row = connection.execute(sa.select(requested_comparisons).where(c.id == id)).one()
    return ComparisonLease(db, RequestedComparison(**row._mapping), owner)


def cancel_comparison(db: Database, id: str) -> RequestedComparison:
    """Cancel a comparison that has not ended; the process that works on it notices within seconds.

    Raises:
        UnknownComparisonError: there is none with this id.
        RequestedComparisonError: it has ended.
    """
    c = requested_comparisons.c
    here = (c.id == id, c.status.in_(UNFINISHED))
    values = {"status": "canceled", "finished_at": datetime.now(UTC), **_ENDED}
    with db.write() as connection:
        changed = connection.execute(sa.update(requested_comparisons).where(*here).values(**values)).rowcount
    found = find_requested_comparison(db, id)
    if not changed and found.status != "canceled":
        raise RequestedComparisonError(f"the comparison {id} is {found.status}; it cannot be canceled now")
    return found


def pairs_of(db: Database, id: str, after: int = 0, limit: int | None = None) -> list[ComparedPair]:
    """Return the pairs of a comparison with numbers above `after`, in their order."""
    p = comparison_pairs.c
    query = sa.select(comparison_pairs).where(p.comparison_id == id, p.number > after).order_by(p.number).limit(limit)
    with db.read() as connection:
        return [ComparedPair(**row._mapping) for row in connection.execute(query)]


def votes_of(db: Database, id: str, voter: str | None = None) -> list[ComparisonVote]:
    """Return the votes on a comparison's pairs, of one voter or of all, by number and voter."""
    v = comparison_votes.c
    query = sa.select(comparison_votes).where(v.comparison_id == id).order_by(v.number, v.voter)
    if voter is not None:
        query = query.where(v.voter == voter)
    with db.read() as connection:
        return [ComparisonVote(**row._mapping) for row in connection.execute(query)]


def record_vote(db: Database, vote: ComparisonVote) -> ComparisonVote:
    """Record a vote and return the voter's vote on this pair, which is the first one that was recorded.

    Raises:
        UnknownComparisonError: there is no such pair.
    """
    p, v = comparison_pairs.c, comparison_votes.c
    pair = (p.comparison_id == vote.comparison_id, p.number == vote.number)
    here = (v.comparison_id == vote.comparison_id, v.number == vote.number, v.voter == vote.voter)
    with db.write() as connection:
        # Locked, so that of two votes of one voter at once the second finds the first.
        if connection.execute(sa.select(p.number).where(*pair).with_for_update()).first() is None:
            raise UnknownComparisonError(f"the comparison {vote.comparison_id} has no pair {vote.number}")
        known = connection.execute(sa.select(comparison_votes).where(*here)).first()
        if known is not None:
            return ComparisonVote(**known._mapping)
        connection.execute(sa.insert(comparison_votes).values(**vote.model_dump()))
    return vote


def count_votes(votes: Iterable[ComparisonVote]) -> VoteCounts:
    """Return how many votes each of the two models got."""
    votes = list(votes)
    choices = [vote.choice for vote in votes]
    voters = tuple(sorted({vote.voter for vote in votes}))
    return VoteCounts(choices.count("base"), choices.count("tuned"), choices.count("tie"), voters)


def erase_in(connection: sa.Connection, loop: str, texts: Collection[str], voter: str) -> ErasedFromComparisons:
    """Overwrite the prompts and answers of a loop's comparisons that contain one of some texts; delete a voter's votes.

    The pairs stay, with the votes of others on them. A comparison that would still ask such a prompt is canceled.
    """
    c, p, v = requested_comparisons.c, comparison_pairs.c, comparison_votes.c
    here = sa.select(c.id).where(c.loop == loop)
    votes = connection.execute(sa.delete(comparison_votes).where(v.voter == voter, v.comparison_id.in_(here))).rowcount

    def named(*said: str) -> bool:
        return any(text in one for one in said for text in texts)

    erased_pairs = erased_prompts = 0
    query = sa.select(comparison_pairs).where(p.comparison_id.in_(here))
    for pair in connection.execute(query).all() if texts else ():
        if named(pair.prompt, pair.base_answer, pair.tuned_answer):  # an answer may repeat what its prompt says
            erased_pairs += 1
            own = (p.comparison_id == pair.comparison_id, p.number == pair.number)
            values = dict.fromkeys(("prompt", "base_answer", "tuned_answer"), ERASED)
            connection.execute(sa.update(comparison_pairs).where(*own).values(values))
    for id, prompts in connection.execute(sa.select(c.id, c.prompts).where(c.loop == loop)).all() if texts else ():
        kept = [ERASED if named(prompt) else prompt for prompt in prompts or ()]
        if ERASED not in kept:
            continue
        erased_prompts += sum(map(named, prompts))
        connection.execute(sa.update(requested_comparisons).where(c.id == id).values(prompts=kept))
        ended = {"status": "canceled", "finished_at": datetime.now(UTC), **_ENDED}
        ended["error"] = "a prompt was erased with a person's data"
        unfinished = (c.id == id, c.status.in_(UNFINISHED))
        connection.execute(sa.update(requested_comparisons).where(*unfinished).values(ended))
    return ErasedFromComparisons(erased_prompts, erased_pairs, votes)


def votes_by_model(db: Database, loop: str) -> dict[str | None, ModelVotes]:
    """Return what blind votes said about each model of a loop that has any, by its id; None is the base model."""
    c, v = requested_comparisons.c, comparison_votes.c
    query = (
        sa.select(c.base_id, c.tuned_id, v.choice, sa.func.count())
        .join(comparison_votes, v.comparison_id == c.id)
        .where(c.loop == loop)
        .group_by(c.base_id, c.tuned_id, v.choice)
    )
    found: dict[str | None, ModelVotes] = {}
    with db.read() as connection:
        for base_id, tuned_id, choice, count in connection.execute(query):
            for model_id, mine in ((base_id, "base"), (tuned_id, "tuned")):
                before = found.get(model_id, ModelVotes())
                found[model_id] = ModelVotes(
                    before.won + count * (choice == mine),
                    before.lost + count * (choice not in (mine, "tie")),
                    before.tied + count * (choice == "tie"),
                )
    return found


def _comparison(row: sa.Row[Any]) -> RequestedComparison:
    found = RequestedComparison(**row._mapping)
    killed = found.locked_until is not None and found.locked_until < datetime.now(UTC)
    return found.model_copy(update={"status": "pending"}) if found.status == "running" and killed else found


def _until() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=LEASE_SECONDS)
