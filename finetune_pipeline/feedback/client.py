"""The client for applications: it logs what was asked and answered, and what people thought of it.

    from finetune_pipeline.feedback import FeedbackClient

    client = FeedbackClient("aec_parser")                               # into the store of this machine
    client = FeedbackClient("aec_parser", url="http://127.0.0.1:8484")  # to a gateway

    id = client.log("200 mm concrete wall", answer, user="u1")
    client.correct(id, better_answer, user="u1")

One client serves all threads. Importing it loads neither SQLAlchemy nor httpx: each comes with the transport that
needs it.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar, Unpack
from uuid import UUID, uuid5

from uuid_utils.compat import uuid7

from finetune_pipeline.records import (
    Feedback,
    FeedbackKind,
    Interaction,
    Message,
    Rating,
    Turn,
    text_hash,
    validate_application_event,
)
from finetune_pipeline.settings import LoopSettings, load_loop

if TYPE_CHECKING:
    import httpx

    from finetune_pipeline.database import Database

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)
_NAMESPACE = UUID("6b1c36a9-9a0c-5d0e-8a51-5b0a3c2f7d11")
_BATCH_EVENTS = 1_000
_BATCH_CHARACTERS = 4_000_000
_TIMEOUT_SECONDS = 30.0
_TAKEN = frozenset({"recorded", "duplicate", "waiting", "accepted"})
"""What a gateway says of an event that it keeps; accepted is safe, but not in the store yet."""


class FeedbackError(RuntimeError):
    """An event could not be recorded, or a file of events not be read or written; the message says what to do."""


class IdTakenError(FeedbackError):
    """A gateway has an event with other content under this id."""


class InteractionFields(TypedDict, total=False):
    """What may be known of an exchange beside prompt and output; see `records.Interaction`."""

    created_at: datetime
    history: Sequence[Turn | Message]
    model: str | None
    confidence: float | None
    validation_score: float | None
    user: str | None
    domain: str | None
    kind: str | None
    retrieved_context: str | None
    variant: str | None
    flag: str | None
    latency_ms: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seed: int | None


@dataclass
class LoggedCall:
    """An exchange under way, see `FeedbackClient.call`.

    Attributes:
        id: the interaction's id, for feedback.
        output: what the model answered; to be set before the block ends.
        details: what is known only after the answer, such as `{"confidence": 0.93}`.
    """

    id: UUID
    output: str | None = None
    details: InteractionFields = field(default_factory=InteractionFields)


class Transport(Protocol):
    """Where events go."""

    def send(self, events: Sequence[Interaction | Feedback]) -> int:
        """Bring events there, all or none; returns how many were not known before."""

    def stats(self) -> dict[str, int]:
        """How much the store holds of the loop, by the names of `store.counters`."""

    def close(self) -> None:
        """Let go of what is held open."""


class FeedbackClient:
    """Logs exchanges with a loop's model and what was thought of them.

    An id or a `key` makes a call safe to repeat: what is recorded already is left as it was. If the repeated
    call has other content, this module logs a warning with the id. A key is any text of the application's own;
    the event's id follows from the loop's name and the key.

    Args:
        loop: name of the loop, or its settings.
        url: address of a gateway; without one, events go into the store of `FINETUNE_HOME` or `FINETUNE_DATABASE_URL`.
        api_key: what the gateway asks for, if it asks.
        database: another store than the configured one.

    Raises:
        SettingsError: there is no such loop here.
        DatabaseError: the store cannot be opened.
    """

    def __init__(
        self,
        loop: str | LoopSettings,
        *,
        url: str | None = None,
        api_key: str | None = None,
        database: "Database | None" = None,
    ) -> None:
        if url is not None and database is not None:
            raise ValueError("give a url or a database, not both: events go to one place")
        self.loop = loop if isinstance(loop, str) else loop.name
        self._transport: Transport
        if url is not None:
            self._transport = _Gateway(self.loop, url, api_key)
        else:
            self._transport = _Store(load_loop(loop) if isinstance(loop, str) else loop, database)
        self._last: ContextVar[UUID | None] = ContextVar("last_id", default=None)

    def __enter__(self) -> "FeedbackClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections to the gateway; a client of the local store holds none of its own."""
        self._transport.close()

    @property
    def last_id(self) -> UUID | None:
        """Id of the interaction that this thread, or this asyncio task, logged last through this client."""
        return self._last.get()

    def log(
        self,
        prompt: str,
        output: str,
        *,
        id: UUID | str | None = None,
        key: str | None = None,
        **details: Unpack[InteractionFields],
    ) -> UUID:
        """Log one exchange; returns the id by which feedback will speak of it.

        Raises:
            ValueError: a field is not what it should be; the message names it.
            DatabaseError: the store could not take it (locked, disk full); nothing of it was kept.
            FeedbackError: the gateway did not take it.
        """
        identity = self._identity(id, key)
        self._transport.send([self._event({"prompt": prompt, "output": output, "id": identity, **details})])
        self._last.set(identity)
        return identity

    def log_many(self, events: Iterable[Interaction | Feedback | Mapping[str, Any]]) -> int:
        """Log many events, in the store by a thousand a transaction; returns how many were not known before.

        Args:
            events: records, or mappings of their fields, feedback being known by its `interaction_id`. `id` and
                `created_at` may be missing; whoever wants to try again after an error, or to give feedback, gives ids.

        Raises:
            ValueError: an event is not what it should be; those of earlier batches are recorded.
        """
        return sum(self._transport.send(batch) for batch in in_batches(map(self._event, events)))

    @contextmanager
    def call(
        self, prompt: str, *, id: UUID | str | None = None, key: str | None = None, **details: Unpack[InteractionFields]
    ) -> Iterator[LoggedCall]:
        """Log the exchange that happens in the block, with its latency; a block that raises logs nothing.

            with client.call(prompt, user="u1") as call:
                call.output = answer(prompt)

        What the store or the gateway cannot take is an error of this module's log, not of the block: its answer is
        worth more than the log of it.

        Raises:
            FeedbackError: the block ended without `call.output`.
        """
        call = LoggedCall(self._identity(id, key))
        start = time.perf_counter()
        yield call
        latency_ms = (time.perf_counter() - start) * 1000
        known: InteractionFields = {"latency_ms": latency_ms, **details, **call.details}
        self._log_answered(prompt, _answered(call.output), call.id, known)

    def logged(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function prompt -> answer, sync or async, so that every call of it is logged.

        The prompt is the first argument, the output is the result as text; the result is returned as it is, and
        `client.last_id` is then the interaction's id. A call that raises logs nothing.

        Raises:
            TypeError: the function is a method, a generator or has no arguments; use `call` inside it instead.
        """
        import asyncio  # here, since importing it is a sixth of the time that importing the client takes

        prompt_of = _first_argument(function)

        @functools.wraps(function)
        def answer(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.call(prompt_of(*args, **kwargs)) as call:
                result = function(*args, **kwargs)
                call.output = None if result is None else str(result)
            return result

        @functools.wraps(function)
        async def answer_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            start = time.perf_counter()
            result: Any = await function(*args, **kwargs)  # type: ignore[misc]  # it is a coroutine function
            latency_ms = (time.perf_counter() - start) * 1000
            output = _answered(None if result is None else str(result))
            id, details = self._identity(None, None), InteractionFields(latency_ms=latency_ms)
            # In a thread, so that other tasks go on while the store writes.
            await asyncio.to_thread(self._log_answered, prompt_of(*args, **kwargs), output, id, details)
            self._last.set(id)
            return result

        return answer_async if inspect.iscoroutinefunction(function) else answer  # type: ignore[return-value]

    def _log_answered(self, prompt: str, output: str, id: UUID, details: InteractionFields) -> None:
        """Log an exchange whose answer somebody waits for: trouble with the log must not cost them the answer."""
        try:
            self.log(prompt, output, id=id, **details)
        except Exception as error:  # whatever it is, a database that went away or a field that cannot be kept
            _log.error("an exchange was not logged, its answer goes on: %s", error)

    def correct(
        self, interaction_id: UUID | str, correction: str, *, user: str | None = None, key: str | None = None
    ) -> UUID:
        """Give the answer as it should have been; this and the methods below return the feedback's id."""
        return self._give(interaction_id, "correction", key, correction=correction, user=user)

    def thumbs_up(
        self,
        interaction_id: UUID | str,
        *,
        user: str | None = None,
        strength: float | None = None,
        output: str | None = None,
        key: str | None = None,
    ) -> UUID:
        """Say that the answer is right.

        Args:
            strength: 0 to 100, how sure; default wholly.
            output: the text that it was said of, if that is another than the logged output (a correction).
        """
        return self._give(interaction_id, "thumbs_up", key, user=user, score=strength, output_hash=_hash(output))

    def thumbs_down(
        self,
        interaction_id: UUID | str,
        *,
        user: str | None = None,
        strength: float | None = None,
        output: str | None = None,
        key: str | None = None,
    ) -> UUID:
        """Say that the answer is wrong; arguments as of `thumbs_up`."""
        return self._give(interaction_id, "thumbs_down", key, user=user, score=strength, output_hash=_hash(output))

    def rate(
        self,
        interaction_id: UUID | str,
        rating: Rating,
        *,
        user: str | None = None,
        output: str | None = None,
        key: str | None = None,
    ) -> UUID:
        """Rate the answer: "1" to "5" stars, or "gold"; what each is worth, the loop's YAML says."""
        return self._give(interaction_id, "rating", key, user=user, rating=rating, output_hash=_hash(output))

    def validate(self, interaction_id: UUID | str, score: float, *, key: str | None = None) -> UUID:
        """Give the score of an automatic validation, 0 to 100.

        Below 60 it is a failure. Between 60 and 80 it is a success whose reward is low: the reward has no steps.
        """
        kind: FeedbackKind = "success" if score >= 60 else "validation_failure"
        return self._give(interaction_id, kind, key, score=score)

    def reward(self, interaction_id: UUID | str, value: float, *, key: str | None = None) -> UUID:
        """Give a reward of the application's own, -1 to 1."""
        return self._give(interaction_id, "reward", key, reward=value)

    def stats(self) -> dict[str, int]:
        """How much the store holds of the loop: interactions, feedback, feedback.<kind>, examples, corrected, ..."""
        return self._transport.stats()

    def _give(self, interaction_id: UUID | str, kind: FeedbackKind, key: str | None, **values: Any) -> UUID:
        identity = self._identity(None, key)
        event = self._event({"id": identity, "interaction_id": interaction_id, "kind": kind, **values})
        self._transport.send([event])
        return identity

    def _event(self, given: Interaction | Feedback | Mapping[str, Any]) -> Interaction | Feedback:
        event = given if isinstance(given, Interaction | Feedback) else self._validated(given)
        if event.loop != self.loop:
            raise ValueError(f"loop: found {event.loop!r}, expected {self.loop!r}, the loop of this client")
        return validate_application_event(event)

    def _validated(self, given: Mapping[str, Any]) -> Interaction | Feedback:
        kind = Feedback if given.get("event") == "feedback" or "interaction_id" in given else Interaction
        own = {"loop": self.loop, "created_at": datetime.now(UTC)}
        if "id" not in given:
            own["id"] = uuid7()
        return kind.model_validate({**own, **given})

    def _identity(self, id: UUID | str | None, key: str | None) -> UUID:
        if id is not None and key is not None:
            raise ValueError("give an id or a key, not both: the id follows from the key")
        if key is not None:
            return event_id(self.loop, key)
        if id is None:
            return uuid7()
        try:
            return id if isinstance(id, UUID) else UUID(id)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"id: found {id!r:.80}, expected a UUID") from None


def event_id(loop: str, key: str) -> UUID:
    """The id of the event that an application names by a key of its own.

    Raises:
        ValueError: the key is empty, or no text that can be written.
    """
    if not key:
        raise ValueError("key: found an empty text, expected a name of your own for this event")
    return uuid5(uuid5(_NAMESPACE, loop), key)


def in_batches(events: Iterable[Interaction | Feedback]) -> Iterator[list[Interaction | Feedback]]:
    """Batches for one transaction each: at most 1,000 events, and few where their texts are long."""
    batch: list[Interaction | Feedback] = []
    characters = 0
    for event in events:
        batch.append(event)
        characters += _characters(event)
        if len(batch) >= _BATCH_EVENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Store:
    """Into the tables, in this process: an event is there when `send` returns."""

    def __init__(self, loop: LoopSettings, database: "Database | None") -> None:
        from finetune_pipeline.database import connect
        from finetune_pipeline.feedback import store
        from finetune_pipeline.feedback.rewards import reward_function

        self._loop = loop.name
        self._reward = reward_function(loop.feedback)
        self._store = store
        self._database = database or connect()

    def send(self, events: Sequence[Interaction | Feedback]) -> int:
        with self._database.write() as connection:
            recorded = self._store.record(connection, self._loop, events, self._reward)
        for event in recorded.conflicts:
            _log.warning("%s", self._store.conflict_message(event))
        return recorded.interactions + recorded.feedback

    def stats(self) -> dict[str, int]:
        with self._database.read() as connection:
            return self._store.counters(connection, self._loop)

    def close(self) -> None:
        """The database is the process's, not this client's."""


class _Gateway:
    """Over HTTP to a gateway, one request an event."""

    def __init__(self, loop: str, url: str, api_key: str | None) -> None:
        import httpx

        self._loop = loop
        self._url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_TIMEOUT_SECONDS
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"url: found {url!r} ({error}), expected one such as http://127.0.0.1:8484") from None

    def send(self, events: Sequence[Interaction | Feedback]) -> int:
        return sum(self._post(event) != "duplicate" for event in events)

    def stats(self) -> dict[str, int]:
        answer = self._ask("GET", "/v1/feedback/stats", params={"loop": self._loop})
        kinds = answer.pop("by_kind", None) or {}
        counts = {**answer, **{f"feedback.{kind}": value for kind, value in kinds.items()}}
        # By the same names as in the store, which counts nothing else and does not name what it has none of.
        return {name: n for name, n in counts.items() if isinstance(n, int) and n and name != "pending_bytes"}

    def close(self) -> None:
        self._http.close()

    def _post(self, event: Interaction | Feedback) -> str:
        path = "/v1/interactions" if isinstance(event, Interaction) else "/v1/feedback"
        body = event.model_dump_json(exclude={"event"}, exclude_none=True)
        try:
            answer = self._ask("POST", path, content=body, headers={"Content-Type": "application/json"})
        except IdTakenError as error:
            _log.warning("%s", error)
            return "duplicate"
        status = answer.get("status")
        if answer.get("id") != str(event.id) or status not in _TAKEN:
            raise FeedbackError(
                f"the gateway {self._url} did not take the event {event.id} (status {status!r:.80}); its log says why"
            )
        return str(status)

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        import httpx

        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise FeedbackError(
                f"the gateway {self._url} cannot be reached ({error}); start it with `finetune serve`, or correct the "
                "url. Try again with the same id or key: nothing is recorded twice"
            ) from error
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict):
            return answer
        told = f"the gateway {self._url} answered {_problem(response, answer)}"
        taken = (
            isinstance(answer, dict)
            and isinstance(answer.get("error"), dict)
            and answer["error"].get("code") == "id_taken"
        )
        raise IdTakenError(told) if taken else FeedbackError(told)


def _problem(response: "httpx.Response", answer: Any) -> str:
    code = f"{response.status_code} {response.reason_phrase}".strip()
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        return f"{code}: {error.get('message')}"
    return f"{code} to {response.request.url.path}, and no JSON that a gateway sends; is its address right?"


def _answered(output: str | None) -> str:
    if output is None:
        raise FeedbackError("nothing was logged, since there is no output; set call.output, or return the answer")
    return output


def _first_argument(function: Callable[P, Any]) -> Callable[P, str]:
    signature = inspect.signature(function)
    first = next(iter(signature.parameters), None)
    streams = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if first in {None, "self", "cls"} or streams:
        raise TypeError(
            f"{function!r} cannot be decorated: expected a function prompt -> answer; inside a method or a generator, "
            "use `with client.call(prompt) as call`"
        )

    def prompt_of(*args: P.args, **kwargs: P.kwargs) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return str(bound.arguments[str(first)])

    return prompt_of


def _hash(output: str | None) -> str | None:
    return None if output is None else text_hash(output)


def _characters(event: Interaction | Feedback) -> int:
    if isinstance(event, Feedback):
        return len(event.correction or "")
    said = sum(len(turn.content) for turn in event.history)
    return len(event.prompt) + len(event.output) + len(event.retrieved_context or "") + said
