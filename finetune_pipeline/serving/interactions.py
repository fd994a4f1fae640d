"""One request to a model: generate the answer, record the interaction, and only then return it."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from uuid_utils.compat import uuid7

from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.records import Interaction, Turn, chat_messages
from finetune_pipeline.serving.api import ChatMessage, ChatRequest, CompletionRequest, Metadata
from finetune_pipeline.serving.errors import BadRequest
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.loop_server import OnNamedDelta
from finetune_pipeline.serving.routing import Route, route


@dataclass(frozen=True)
class PendingInteraction:
    """A valid request, before it is answered."""

    id: UUID
    route: Route
    prompt: str
    history: tuple[Turn, ...]
    request: GenerateRequest
    user: str | None
    metadata: Metadata


@dataclass(frozen=True)
class FinishedInteraction:
    """An answered and recorded request."""

    interaction: Interaction
    completion: Completion
    model: str
    engine_seconds: float


def prepare(gateway: Gateway, body: ChatRequest | CompletionRequest) -> PendingInteraction:
    """Find the loop for a request and apply the loop's defaults.

    Raises:
        UnknownModel: `model` is unknown.
        BadRequest: the last message is not the user's, or empty.
    """
    destination = route(body.model, gateway.names)
    loop = gateway.loops[destination.loop]
    if isinstance(body, ChatRequest):
        prompt, history = _split_conversation(body.messages, loop.system_prompt)
        max_tokens, schema = body.completion_limit, body.output_schema
    else:
        prompt, history, max_tokens, schema = body.text, (), body.max_tokens, None
    request = GenerateRequest(
        messages=chat_messages(loop.system_prompt, prompt, history),
        max_tokens=max_tokens or loop.max_tokens,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=None if body.seed == -1 else body.seed,  # as in llama.cpp's and vLLM's servers
        stop=body.stop_texts,
        json_schema=schema,
    )
    return PendingInteraction(uuid7(), destination, prompt, history, request, body.user, body.metadata or Metadata())


def _split_conversation(messages: list[ChatMessage], system_prompt: str) -> tuple[str, tuple[Turn, ...]]:
    """Return the last message as prompt, and the messages before it as history without the loop's system prompt."""
    *earlier, last = messages
    if last.role != "user":
        raise BadRequest(
            f"The last message has the role {last.role!r}; it must have the role 'user', because it is the prompt.",
            param="messages",
        )
    if not last.text:
        raise BadRequest("The last message is empty; give at least one character.", param="messages")
    turns = [message.turn for message in earlier]
    if turns and turns[0] == Turn(role="system", content=system_prompt):
        turns = turns[1:]
    return last.text, tuple(turns)


async def answer(
    gateway: Gateway, pending: PendingInteraction, on_delta: OnNamedDelta | None = None
) -> FinishedInteraction:
    """Generate the answer, record the interaction, and count it.

    Raises:
        GatewayError: no model could answer, or the interaction could not be recorded.
    """
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
    interaction = Interaction(
        id=pending.id,
        loop=loop.name,
        created_at=datetime.now(UTC),
        prompt=pending.prompt,
        history=pending.history,
        output=completion.text.replace("\x00", "\ufffd"),  # databases cannot store NUL
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
    )
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
