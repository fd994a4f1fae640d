"""The client with which applications log interactions and feedback.

    from finetune_pipeline.feedback import FeedbackClient

    client = FeedbackClient("aec_parser")                               # into the store of this machine
    client = FeedbackClient("aec_parser", url="http://127.0.0.1:8484")  # to a gateway

    id = client.log("200 mm concrete wall", answer, user="u1")
    client.correct(id, better_answer, user="u1")

One client serves all threads. Importing it loads neither SQLAlchemy nor httpx: the transport that needs one loads it.
"""

import functools
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar, Unpack
from uuid import UUID, uuid5

from pydantic import ValidationError
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
from finetune_pipeline.validation_messages import error_message

if TYPE_CHECKING:
    from finetune_pipeline.database import Database

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)
_NAMESPACE = UUID("6b1c36a9-9a0c-5d0e-8a51-5b0a3c2f7d11")
_BATCH_EVENTS = 1_000
_BATCH_CHARACTERS = 4_000_000
_TIMEOUT_SECONDS = 30.0
_KEPT = frozenset({"recorded", "duplicate", "unmatched", "accepted"})
"""The statuses of an event that the gateway keeps; `accepted` is safe, but not in the store yet."""


class FeedbackError(RuntimeError):
    """An event could not be recorded, or a feedback file not be read or written; the message says what to do."""


class IdTakenError(FeedbackError):
    """The gateway has an event with this id and different content."""


class InteractionFields(TypedDict, total=False):
    """The optional fields of an interaction; see `records.Interaction`."""

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
    metadata: dict[str, Any] | None


@dataclass
class LoggedCall:
    """An interaction in progress, see `FeedbackClient.call`.

    Attributes:
        id: the interaction's id, for feedback.
        output: the model's answer; set it before the block ends.
        details: fields that are known only after the answer, such as `{"confidence": 0.93}`.
    """

    id: UUID
    output: str | None = None
    details: InteractionFields = field(default_factory=InteractionFields)


class Transport(Protocol):
    """The way of events to the store."""

    def send(self, events: Sequence[Interaction | Feedback]) -> int:
        """Record all events, or none; return how many are new."""

    def stats(self) -> dict[str, int]:
        """Return the loop's counters, see `store.counters`."""

    def close(self) -> None:
        """Close connections."""


class FeedbackClient:
    """Logs interactions with a loop's model, and feedback on them.

    An id or a `key` makes a call safe to repeat: an event that is recorded already does not change. If the repeated
    call has different content, this module logs a warning with the id. A key is any text that the application chooses;
    the event's id is derived from the loop's name and the key.

    Args:
        loop: name of the loop, or its settings.
        url: address of a gateway; by default events go to the store of `FINETUNE_HOME` or `FINETUNE_DATABASE_URL`.
        api_key: the gateway's API key, if it requires one.
        database: a store other than the configured one.

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
            raise ValueError("give a url or a database, not both")
        self.loop = loop if isinstance(loop, str) else loop.name
        self._settings = None if isinstance(loop, str) else loop  # None: only the gateway knows them
        self._transport: Transport
        if url is not None:
            self._transport = _GatewayTransport(self.loop, url, api_key)
        else:
            self._settings = self._settings or load_loop(self.loop)
            self._transport = _StoreTransport(self._settings, database)
        self._last: ContextVar[UUID | None] = ContextVar("last_id", default=None)

    def __enter__(self) -> "FeedbackClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the gateway; a client of the local store has none."""
        self._transport.close()

    @property
    def last_id(self) -> UUID | None:
        """The id of the interaction that this thread, or asyncio task, logged last through this client."""
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
        """Log one interaction; return its id, which feedback refers to.

        Raises:
            ValueError: a field is invalid; the message names it.
            DatabaseError: the store could not be written (locked, disk full); nothing was recorded.
            FeedbackError: the gateway did not record it.
        """
        identity = self._identity(id, key)
        self._transport.send([self._event({"prompt": prompt, "output": output, "id": identity, **details})])
        self._last.set(identity)
        return identity

    def log_many(self, events: Iterable[Interaction | Feedback | Mapping[str, Any]]) -> int:
        """Log many events, a thousand per transaction; return how many are new.

        Args:
            events: records, or mappings of their fields; a mapping with an `interaction_id` is feedback. `id` and
                `created_at` are optional. Give ids to repeat the call after an error, or to give feedback later.

        Raises:
            ValueError: an event is invalid; those of earlier batches are recorded.
        """
        return sum(self._transport.send(batch) for batch in in_batches(map(self._event, events)))

    @contextmanager
    def call(
        self, prompt: str, *, id: UUID | str | None = None, key: str | None = None, **details: Unpack[InteractionFields]
    ) -> Iterator[LoggedCall]:
        """Log the interaction that the block produces, with its latency; a block that raises logs nothing.

            with client.call(prompt, user="u1") as call:
                call.output = answer(prompt)

        If the interaction cannot be recorded, this module logs an error and the block succeeds, since its answer is
        worth more than the record of it.

        Raises:
            FeedbackError: the block ended without `call.output`.
        """
        call = LoggedCall(self._identity(id, key))
        start = time.perf_counter()
        yield call
        latency_ms = (time.perf_counter() - start) * 1000
        known: InteractionFields = {"latency_ms": latency_ms, **details, **call.details}
        self._log_or_report(prompt, _require_output(call.output), call.id, known)

    def logged(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function prompt -> answer, sync or async, so that every call is logged.

        The first argument is the prompt, and the result is the output: a text, or a value that is written as JSON. The
        result is returned unchanged, and `client.last_id` is the interaction's id. A call that raises logs nothing. Nor
        does one whose prompt is no text, or whose result is another object, such as a client library's message.

        Raises:
            TypeError: the function is a method, a generator or has no arguments; use `call` inside it instead.
        """
        import asyncio  # imported here, because it takes a sixth of the client's import time

        prompt_of = _first_argument(function)

        @functools.wraps(function)
        def answer(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            details = InteractionFields(latency_ms=(time.perf_counter() - start) * 1000)
            output = _require_output(result)
            self._log_or_report(prompt_of(*args, **kwargs), output, self._identity(None, None), details)
            return result

        @functools.wraps(function)
        async def answer_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            start = time.perf_counter()
            result: Any = await function(*args, **kwargs)  # type: ignore[misc]  # it is a coroutine function
            latency_ms = (time.perf_counter() - start) * 1000
            output = _require_output(result)
            id, details = self._identity(None, None), InteractionFields(latency_ms=latency_ms)
            # In a thread, so that other tasks continue while the store writes.
            await asyncio.to_thread(self._log_or_report, prompt_of(*args, **kwargs), output, id, details)
            self._last.set(id)
            return result

        return answer_async if inspect.iscoroutinefunction(function) else answer  # type: ignore[return-value]

    def _log_or_report(self, prompt: object, output: object, id: UUID, details: InteractionFields) -> None:
        """Log an interaction; report a failure only in this module's log, since somebody waits for the answer."""
        try:
            if not isinstance(prompt, str):
                raise TypeError(
                    f"the prompt is an object ({type(prompt).__name__}), expected a text; log it with `call`"
                )
            self.log(prompt, _output_text(output), id=id, **details)
        except Exception as error:  # any error: a database that went away, a field that cannot be stored
            _log.error("an interaction was not logged, but its answer is returned: %s", error)

    def correct(
        self, interaction_id: UUID | str, correction: str, *, user: str | None = None, key: str | None = None
    ) -> UUID:
        """Correct the answer; like the methods below, return the feedback's id.

        Raises:
            ValueError: a field is invalid, or the loop's output schema does not accept the correction.
            FeedbackError: the gateway did not record it, for example because of its loop's output schema.
        """
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
        """Say that the answer is correct.

        Args:
            strength: 0 to 100, default 100.
            output: the text that the thumb is about, if it is not the logged output but a correction.
        """
        return self._give(
            interaction_id,
            "thumbs_up",
            key,
            user=user,
            score=strength,
            output_hash=_hash(output),
        )

    def thumbs_down(
        self,
        interaction_id: UUID | str,
        *,
        user: str | None = None,
        strength: float | None = None,
        output: str | None = None,
        key: str | None = None,
    ) -> UUID:
        """Say that the answer is wrong; arguments as for `thumbs_up`."""
        return self._give(
            interaction_id,
            "thumbs_down",
            key,
            user=user,
            score=strength,
            output_hash=_hash(output),
        )

    def rate(
        self,
        interaction_id: UUID | str,
        rating: Rating | int,
        *,
        user: str | None = None,
        output: str | None = None,
        key: str | None = None,
    ) -> UUID:
        """Rate the answer with 1 to 5 stars or "gold"; the loop's YAML sets the reward of each."""
        return self._give(
            interaction_id,
            "rating",
            key,
            user=user,
            rating=rating,
            output_hash=_hash(output),
        )

    def validate(self, interaction_id: UUID | str, score: float, *, key: str | None = None) -> UUID:
        """Give the score of an automatic validation, 0 to 100.

        Below 60 it is a failure. Between 60 and 80 it is a success with a low reward, since the reward is continuous.
        """
        kind: FeedbackKind = "success" if score >= 60 else "validation_failure"
        return self._give(interaction_id, kind, key, score=score)

    def reward(self, interaction_id: UUID | str, value: float, *, key: str | None = None) -> UUID:
        """Give a reward of the application's own, -1 to 1."""
        return self._give(interaction_id, "reward", key, reward=value)

    def stats(self) -> dict[str, int]:
        """Return the loop's counters: interactions, feedback, feedback.<kind>, examples, corrected, ..."""
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
        if isinstance(event, Feedback) and event.correction is not None and self._settings is not None:
            from finetune_pipeline.feedback.corrections import correction_problem

            if problem := correction_problem(self._settings, event.correction):
                raise ValueError(problem)
        return validate_application_event(event)

    def _validated(self, given: Mapping[str, Any]) -> Interaction | Feedback:
        kind = Feedback if given.get("event") == "feedback" or "interaction_id" in given else Interaction
        own = {"loop": self.loop, "created_at": datetime.now(UTC)}
        if "id" not in given:
            own["id"] = uuid7()
        try:
            return kind.model_validate({**own, **given})
        except ValidationError as error:
            raise ValueError(error_message(error)) from error

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
    """Return the id of the event that an application gave a key.

    Raises:
        ValueError: the key is empty, or cannot be encoded.
    """
    if not key:
        raise ValueError("key: found an empty string, expected your own name for this event")
    return uuid5(uuid5(_NAMESPACE, loop), key)


def in_batches(events: Iterable[Interaction | Feedback]) -> Iterator[list[Interaction | Feedback]]:
    """Yield batches for one transaction each: at most 1,000 events, and fewer if their texts are long."""
    batch: list[Interaction | Feedback] = []
    characters = 0
    for event in events:
        batch.append(event)
        if isinstance(event, Feedback):
            characters += len(event.correction or "")
        else:
            characters += len(event.prompt) + len(event.output) + len(event.retrieved_context or "")
            characters += sum(len(turn.content) for turn in event.history)
        if len(batch) >= _BATCH_EVENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _StoreTransport:
    """Writes the store's tables in this process; an event is stored when `send` returns."""

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
        """Do nothing: the process shares one database, which other clients may use."""


class _GatewayTransport:
    """Sends events to a gateway over HTTP, one request per event."""

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
        # The same counters as the store's, which has no others and leaves out those that are 0.
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
        if answer.get("id") != str(event.id) or status not in _KEPT:
            raise FeedbackError(
                f"The gateway {self._url} did not record the event {event.id} (status {status!r:.80}). See its log."
            )
        return str(status)

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        import httpx

        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise FeedbackError(
                f"The gateway {self._url} cannot be reached ({error}). Start it with `finetune serve`, or correct the "
                "url. Then repeat the call with the same id or key; nothing is recorded twice."
            ) from error
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict):
            return answer
        status = f"{response.status_code} {response.reason_phrase}".strip()
        problem = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(problem, dict):
            raise FeedbackError(
                f"{self._url} answered {status} to {response.request.url.path}, without the JSON of a gateway. Is its "
                "address right?"
            )
        message = f"The gateway {self._url} answered {status}: {problem.get('message')}"
        raise IdTakenError(message) if problem.get("code") == "id_taken" else FeedbackError(message)


def _output_text(output: object) -> str:
    """Return an answer as text: a text as it is, and a value of JSON as JSON.

    Raises:
        TypeError: it is neither, or it is a chat message: its tool calls would be lost.
    """
    if isinstance(output, str):
        return output
    if not (isinstance(output, Mapping) and "role" in output):
        try:
            return json.dumps(output, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            pass  # the error below is about the whole answer
    raise TypeError(f"the answer is an object ({type(output).__name__}), expected a text or JSON; return its text")


def _require_output(output: R | None) -> R:
    if output is None:
        raise FeedbackError("Nothing was logged, because there is no output. Set call.output, or return the answer.")
    return output


def _first_argument(function: Callable[P, Any]) -> Callable[P, Any]:
    signature = inspect.signature(function)
    first = next(iter(signature.parameters), None)
    streams = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if first in {None, "self", "cls"} or streams:
        raise TypeError(
            f"{function!r} cannot be decorated: expected a function prompt -> answer. Inside a method or a generator, "
            "use `with client.call(prompt) as call`."
        )

    def prompt_of(*args: P.args, **kwargs: P.kwargs) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments[str(first)]

    return prompt_of


def _hash(output: str | None) -> str | None:
    return None if output is None else text_hash(output)
