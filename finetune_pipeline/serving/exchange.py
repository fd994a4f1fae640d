"""One question: ask the model, record the exchange, and only then call it answered."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.records import Interaction, Turn, chat_messages
from finetune_pipeline.serving.api import ChatMessage, ChatRequest, CompletionRequest, Generation, Metadata
from finetune_pipeline.serving.errors import BadRequest
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.models import Answered, OnNamedDelta
from finetune_pipeline.serving.routing import Route, route
from finetune_pipeline.settings import LoopSettings


@dataclass(frozen=True)
class Question:
    """What is asked of whom."""

    id: UUID
    route: Route
    prompt: str
    history: tuple[Turn, ...]
    request: GenerateRequest
    user: str | None
    metadata: Metadata


@dataclass(frozen=True)
class Exchange:
    """An answered question, recorded."""

    interaction: Interaction
    completion: Completion
    model: str
    engine_seconds: float


def question_of(gateway: Gateway, asked: ChatRequest | CompletionRequest) -> Question:
    """What a request asks.

    Raises:
        UnknownModel: `model` names nothing.
        BadRequest: the last message is not the user's.
    """
    to = route(asked.model, gateway.names)
    loop = gateway.loops[to.loop]
    if isinstance(asked, ChatRequest):
        prompt, history = _conversation(asked.messages, loop)
        limit, schema = asked.limit, asked.schema_wanted
    else:
        prompt, history, limit, schema = asked.text, (), asked.max_tokens, None
    request = _generate(asked, chat_messages(loop.system_prompt, prompt, history), limit or loop.max_tokens, schema)
    return Question(uuid7(), to, prompt, history, request, asked.user, asked.metadata or Metadata())


async def ask(gateway: Gateway, question: Question, on_delta: OnNamedDelta | None = None) -> Exchange:
    """Answer a question and record the exchange.

    Raises:
        GatewayError: no model could answer, or the exchange could not be recorded.
    """
    server, version = gateway.servers[question.route.loop], question.route.version
    started = time.perf_counter()
    try:
        if version is None:
            answered = await server.answer(question.request, on_delta)
        else:
            answered = await server.answer_by(version, question.request, on_delta)
    except asyncio.CancelledError:
        gateway.metrics.abandoned.labels(question.route.loop).inc()
        raise
    seconds = time.perf_counter() - started
    interaction = _interaction(question, server.loop, answered, seconds)
    await gateway.record(interaction)
    _count(gateway, interaction, answered, seconds)
    return Exchange(interaction, answered.completion, answered.model, seconds)


def _conversation(messages: Sequence[ChatMessage], loop: LoopSettings) -> tuple[str, tuple[Turn, ...]]:
    *earlier, last = messages
    if last.role != "user":
        raise BadRequest(
            f"the last message is of the role {last.role!r}; it has to be the user's, since it is what is answered",
            param="messages",
        )
    if not last.text:
        raise BadRequest("the last message is empty; give at least one character", param="messages")
    turns = [message.turn for message in earlier]
    if turns and turns[0] == Turn(role="system", content=loop.system_prompt):
        turns = turns[1:]  # the loop's own, which is put in front anyway
    return last.text, tuple(turns)


def _generate(
    asked: Generation, messages: list[dict[str, str]], limit: int, schema: dict[str, Any] | None
) -> GenerateRequest:
    return GenerateRequest(
        messages=messages,
        max_tokens=limit,
        temperature=asked.temperature or 0.0,
        top_p=asked.top_p or 1.0,
        seed=None if asked.seed == -1 else asked.seed,  # as in llama.cpp's and vLLM's servers
        stop=asked.stops,
        json_schema=schema,
    )


def _interaction(question: Question, loop: LoopSettings, answered: Answered, seconds: float) -> Interaction:
    completion, said = answered.completion, question.metadata
    return Interaction(
        id=question.id,
        loop=loop.name,
        created_at=datetime.now(UTC),
        prompt=question.prompt,
        history=question.history,
        output=completion.text.replace("\x00", "\ufffd"),  # no store can keep NUL
        model=answered.model[:200],
        confidence=completion.confidence,
        user=question.user,
        domain=said.domain,
        kind=said.kind,
        retrieved_context=said.retrieved_context,
        variant=answered.variant,
        flag=flag(completion.confidence, loop),
        latency_ms=1000 * seconds,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        seed=completion.seed,
    )


def flag(confidence: float | None, loop: LoopSettings) -> str | None:
    """Why a person should look at an answer of this confidence, or None."""
    if confidence is None or confidence >= loop.review_below:
        return None
    return f"confidence {confidence:.2f} is below {loop.review_below:.2f}"


def _count(gateway: Gateway, interaction: Interaction, answered: Answered, seconds: float) -> None:
    metrics, loop = gateway.metrics, interaction.loop
    metrics.answers.labels(loop, answered.model, answered.variant).inc()
    metrics.tokens.labels(loop, "prompt").inc(answered.completion.prompt_tokens)
    metrics.tokens.labels(loop, "answer").inc(answered.completion.completion_tokens)
    metrics.engine.labels(loop).observe(seconds)
    if interaction.confidence is not None:
        metrics.confidence.labels(loop).observe(interaction.confidence)
    if interaction.flag:
        metrics.flagged.labels(loop).inc()
