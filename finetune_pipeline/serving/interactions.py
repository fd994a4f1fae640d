"""Requests to models, of any API: apply the loop's defaults, generate the answers, record them, and only then return.

`prepare` makes one pending interaction of each answer that a request asks for, and `answer_all` answers them.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID, uuid5

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.inference.protocol import SEEDS, Completion, Delta, GenerateRequest
from finetune_pipeline.records import EventMetadata, Interaction, Turn, chat_messages
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.api import (
    GATEWAY_METADATA,
    MAX_CHOICES,
    ChatMessage,
    FunctionDefinition,
    Generation,
    Metadata,
)
from finetune_pipeline.serving.errors import BadRequest, IdTaken
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.loop_server import OnNamedDelta
from finetune_pipeline.serving.routing import Route, route
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.validation_messages import error_message

_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(EventMetadata)
Conversation = tuple[str, tuple[Turn, ...], str]
"""The prompt, the messages before it without the loop's system prompt, and the beginning of the answer."""


@dataclass(frozen=True)
class RequestId:
    """The id of a request, which is its first interaction's, and whether the client chose it."""

    id: UUID
    chosen: bool


@dataclass(frozen=True)
class PendingInteraction:
    """A valid request for one answer, before it is answered.

    Attributes:
        extra: metadata to record in addition to domain, kind and retrieved_context.
        request_hash: identifies request and API key, if the client chose the id; else None.
        kept: what to record under GATEWAY_METADATA; empty if nothing refers to the interaction later.
        recorded: whether the interaction is recorded.
    """

    id: UUID
    route: Route
    prompt: str
    history: tuple[Turn, ...]
    request: GenerateRequest
    user: str | None
    metadata: Metadata
    extra: dict[str, Any]
    request_hash: str | None
    kept: dict[str, Any]
    recorded: bool


@dataclass(frozen=True)
class PreparedRequest:
    """A valid request: what to answer, the function that is called, and unknown fields.

    Attributes:
        pending: one for each answer, conversation by conversation; the first has the id of the request.
        choices: number of answers to each conversation.
        function: the name of the function whose arguments are the answers; None for text.
        ignored_fields: paths of unknown fields.
    """

    pending: list[PendingInteraction]
    choices: int
    function: str | None
    ignored_fields: list[str]

    @property
    def id(self) -> UUID:
        """The id of the request, which is its first interaction's."""
        return self.pending[0].id


@dataclass(frozen=True)
class FinishedInteraction:
    """An answered and recorded request; `replayed` if it was answered and recorded before."""

    interaction: Interaction
    completion: Completion
    model: str
    engine_seconds: float
    replayed: bool = False


def prepare(
    gateway: Gateway,
    body: Generation,
    caller: Caller,
    id: RequestId,
    conversations: Sequence[Sequence[ChatMessage]],
    kept: dict[str, Any] | None = None,
) -> PreparedRequest:
    """Find the loop for a request and apply the loop's defaults.

    Args:
        conversations: to answer, each `body.choices` times.
        kept: what later requests need, to be recorded in the interactions' metadata with the function's name.

    Raises:
        UnknownModel: `model` is unknown.
        BadRequest: the request cannot be answered as it is.
    """
    destination = route(body.model, gateway.names)
    loop = gateway.loops[destination.loop]
    function = _check_fields(body, loop)
    given = [_split_conversation(messages, loop.system_prompt) for messages in conversations]
    count = len(given) * body.choices
    if count > MAX_CHOICES:
        raise BadRequest(f"The request asks for {count} answers, at most {MAX_CHOICES} are allowed.", param="n")
    kept = {**kept, "function": function.name if function else None} if kept else {}
    metadata = body.metadata or Metadata()
    extra = dict(metadata.model_extra or {})
    if extra:
        _check_metadata(extra, kept)
    request_hash = _request_hash(body, caller) if id.chosen else None
    pending = []
    for number in range(count):
        prompt, history, _ = given[number // body.choices]
        one = PendingInteraction(
            id=uuid5(id.id, f"choice {number}") if number else id.id,
            route=destination,
            prompt=prompt or " ",  # a stored prompt is never empty
            history=history,
            request=_generate_request(body, loop, gateway.constraints[loop.name], given, number),
            user=body.user if body.user is not None else body.safety_identifier,
            metadata=metadata,
            extra=extra,
            request_hash=request_hash,
            kept=kept,
            recorded=body.recorded,
        )
        pending.append(one)
    return PreparedRequest(pending, body.choices, function.name if function else None, body.ignored_fields)


def _check_fields(body: Generation, loop: LoopSettings) -> FunctionDefinition | None:
    """Check the fields of a request, and return the function whose arguments are the answer.

    Raises:
        BadRequest: the loop rejects an unknown field, or fields do not fit together.
    """
    ignored = body.ignored_fields
    if ignored and loop.serving.unknown_fields == "reject":
        raise BadRequest(
            f"Unknown fields: {', '.join(map(repr, ignored[:10]))}. Leave them out, or set serving.unknown_fields to "
            "ignore.",
            param=ignored[0][:200],
        )
    try:
        function = body.forced_function
    except ValueError as error:
        raise BadRequest(str(error), param="tool_choice") from error
    if (contradiction := body.contradiction) is not None:
        raise BadRequest(contradiction[1], param=contradiction[0])
    return function


def _generate_request(
    body: Generation, loop: LoopSettings, loop_schema: dict[str, Any] | None, given: Sequence[Conversation], number: int
) -> GenerateRequest:
    """Return what the model gets for one of the answers.

    Raises:
        BadRequest: the answer has a schema and a given beginning.
    """
    prompt, history, prefill = given[number // body.choices]
    schema = body.answer_schema
    if schema is not None and prefill:
        raise BadRequest(
            "A JSON Schema cannot be combined with the beginning of an answer (the last message, of the assistant); "
            "leave one of them out.",
            param="messages",
        )
    # A given beginning of the answer may not be JSON of the loop's schema.
    if schema is None and not (prefill or body.asks_for_text or body.ignore_eos or body.scores_prompt):
        schema = loop_schema
    return GenerateRequest(
        messages=None if body.scores_prompt else chat_messages(loop.system_prompt, prompt, history),
        prompt=prompt if body.scores_prompt else None,
        score_prompt=body.scores_prompt,
        max_tokens=loop.max_tokens if body.completion_limit is None else body.completion_limit,
        # Each answer of a request has a seed of its own. -1 is a random one, as in llama.cpp's and vLLM's servers.
        seed=None if body.seed in (None, -1) else (body.seed + number % body.choices) % SEEDS,
        prefill=prefill,
        json_schema=schema,
        **body.sampling,
    )


def _request_hash(body: Generation, caller: Caller) -> str:
    """Return what identifies a request and its API key."""
    identity = f"{type(body).__name__}\n{caller.key!r}\n{body.model_dump_json(exclude_none=True, by_alias=True)}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _check_metadata(extra: dict[str, Any], kept: dict[str, Any]) -> None:
    """Raise BadRequest unless the metadata can be recorded together with the gateway's own."""
    own = {**kept, "request": "0" * 64, "finish_reason": "length"}
    try:
        _METADATA.validate_python({**extra, GATEWAY_METADATA: own})
    except ValidationError as error:
        raise BadRequest(f"metadata: {error_message(error)}", param="metadata") from error


def _split_conversation(messages: Sequence[ChatMessage], system_prompt: str) -> Conversation:
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise BadRequest(
                f"messages[{number}].content: is missing in a message with the role {message.role!r}; send a text.",
                param=f"messages[{number}].content",
            )
    earlier, prefill = list(messages), ""
    if len(earlier) > 1 and earlier[-1].role == "assistant" and earlier[-2].role == "user":
        prefill = earlier.pop().text
    last = earlier.pop()
    if last.role != "user":
        raise BadRequest(
            f"The last message has the role {last.role!r}; it must have the role 'user', because it is the prompt. An "
            "assistant's message may follow it as the beginning of the answer.",
            param="messages",
        )
    turns = [message.turn for message in earlier]
    if turns and turns[0] == Turn(role="system", content=system_prompt):
        turns = turns[1:]
    return last.text, tuple(turns), prefill


async def answer_all(
    gateway: Gateway,
    prepared: PreparedRequest,
    on_delta: Callable[[int, str, Delta], None] | None = None,
    on_finished: Callable[[int, FinishedInteraction], None] | None = None,
) -> list[FinishedInteraction]:
    """Answer all interactions of a request; if one cannot be answered, the others are canceled.

    Args:
        on_delta: called with the number of the answer, the name of the model, and each delta.
        on_finished: called with each answer that is complete and recorded.

    Raises:
        GatewayError: as `answer` does.
    """
    # One request takes at most the slots of one batch, so that it does not fill the queue.
    slots = asyncio.Semaphore(gateway.loops[prepared.pending[0].route.loop].serving.parallel)

    async def one(number: int, pending: PendingInteraction) -> FinishedInteraction:
        def forward(model: str, delta: Delta) -> None:
            assert on_delta is not None
            on_delta(number, model, delta)

        async with slots:
            done = await answer(gateway, pending, forward if on_delta else None)
        if on_finished:
            on_finished(number, done)
        return done

    if len(prepared.pending) == 1:
        return [await one(0, prepared.pending[0])]
    tasks = [asyncio.create_task(one(number, pending)) for number, pending in enumerate(prepared.pending)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answer(
    gateway: Gateway, pending: PendingInteraction, on_delta: OnNamedDelta | None = None
) -> FinishedInteraction:
    """Generate the answer, record the interaction, and count it.

    If the client chose the id and the same request was answered before, its recorded answer is returned. While the same
    request is being answered, this waits for it.

    Raises:
        IdTaken: another request, or another API key, used the id.
        GatewayError: no model could answer, or the interaction could not be recorded.
    """
    if pending.request_hash is None:
        return await _generate(gateway, pending, on_delta)
    while (running := gateway.answering.get(pending.id)) is not None:
        running_hash, ended = running
        if running_hash != pending.request_hash:
            raise _id_taken(pending.id)
        await ended.wait()
    ended = asyncio.Event()
    gateway.answering[pending.id] = pending.request_hash, ended
    try:
        stored = await gateway.find(pending.id)
        if stored is None:
            return await _generate(gateway, pending, on_delta)
        own = (stored.metadata or {}).get(GATEWAY_METADATA)
        if not isinstance(own, dict) or own.get("request") != pending.request_hash:
            raise _id_taken(pending.id)
        done = _replayed(stored, pending, "length" if own.get("finish_reason") == "length" else "stop")
        if on_delta and done.completion.text:
            on_delta(done.model, Delta(text=done.completion.text))
        return done
    finally:
        del gateway.answering[pending.id]
        ended.set()


def _id_taken(id: UUID) -> IdTaken:
    return IdTaken(
        f"The interaction {id} exists already, of another request or another API key. Use a new id for each request, "
        "and the same id only to send the same request again.",
        param="interaction_id",
    )


def _replayed(
    stored: Interaction, pending: PendingInteraction, finish_reason: Literal["stop", "length"]
) -> FinishedInteraction:
    """Return the recorded answer of the same request; log-probabilities are not recorded."""
    completion = Completion(
        text=stored.output.removeprefix(pending.request.prefill),
        token_ids=[],
        finish_reason=finish_reason,
        prompt_tokens=stored.prompt_tokens or 0,
        completion_tokens=stored.completion_tokens or 0,
        prompt_seconds=0.0,
        generation_seconds=0.0,
        confidence=stored.confidence,
        seed=stored.seed,
    )
    return FinishedInteraction(stored, completion, stored.model or stored.loop, 0.0, replayed=True)


async def _generate(
    gateway: Gateway, pending: PendingInteraction, on_delta: OnNamedDelta | None
) -> FinishedInteraction:
    server, version = gateway.servers[pending.route.loop], pending.route.version
    metrics, loop = gateway.metrics, server.loop
    started = time.perf_counter()
    try:
        if version is None:
            answered = await server.answer(pending.request, on_delta)
        else:
            answered = await server.answer_with(version, pending.request, on_delta)
    except asyncio.CancelledError:
        metrics.abandoned.labels(loop.name).inc()
        raise
    seconds = time.perf_counter() - started
    completion, confidence = answered.completion, answered.completion.confidence
    flag = None
    if confidence is not None and confidence < loop.review_below:
        flag = f"confidence {confidence:.2f} is below {loop.review_below:.2f}"
    own, extra = dict(pending.kept), pending.extra
    if pending.request_hash is not None:
        own["request"] = pending.request_hash
    if own:
        extra = {**extra, GATEWAY_METADATA: {**own, "finish_reason": completion.finish_reason}}
    interaction = Interaction(
        id=pending.id,
        loop=loop.name,
        created_at=datetime.now(UTC),
        prompt=pending.prompt,
        history=pending.history,
        output=(pending.request.prefill + completion.text).replace("\x00", "\ufffd"),  # databases cannot store NUL
        model=answered.model[:200],
        confidence=confidence,
        user=pending.user,
        domain=pending.metadata.domain,
        kind=pending.metadata.kind,
        retrieved_context=pending.metadata.retrieved_context,
        variant=answered.variant,
        flag=flag,
        latency_ms=1000 * seconds,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        seed=completion.seed,
        metadata=extra or None,
    )
    if pending.recorded:
        await gateway.record(interaction)
    metrics.answers.labels(loop.name, answered.model, answered.variant).inc()
    metrics.tokens.labels(loop.name, "prompt").inc(completion.prompt_tokens)
    metrics.tokens.labels(loop.name, "completion").inc(completion.completion_tokens)
    metrics.engine.labels(loop.name).observe(seconds)
    if confidence is not None:
        metrics.confidence.labels(loop.name).observe(confidence)
    if flag:
        metrics.flagged.labels(loop.name).inc()
    return FinishedInteraction(interaction, completion, answered.model, seconds)
