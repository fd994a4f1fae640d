"""The routes that answer: chat completions, completions, models."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from finetune_pipeline.serving.answers import ChatCompletion, Chunks, TextCompletion, chat_completion, text_completion
from finetune_pipeline.serving.api import ChatRequest, CompletionRequest, ModelCard, ModelList
from finetune_pipeline.serving.errors import GatewayError
from finetune_pipeline.serving.exchange import Exchange, Question, ask, question_of
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import ENGINE, EventStream, allow, body_of, gateway_of, unless_gone
from finetune_pipeline.serving.routing import route

INTERACTION_HEADER = "X-Interaction-Id"
CONFIDENCE_HEADER = "X-Confidence"

Pieces = asyncio.Queue[tuple[str, str] | None]
"""Who answers, and a piece of the answer; None is its end."""

router = APIRouter(dependencies=[Depends(allow("infer"))])
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer."}}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
async def chat_completions(request: Request, asked: Annotated[ChatRequest, Depends(body_of(ChatRequest))]) -> Response:
    """Answer a conversation: by a loop's champion, one of its versions, or what an alias stands for."""
    gateway = gateway_of(request)
    question = question_of(gateway, asked)
    if asked.stream:
        return await _streamed(request, gateway, question, asked, chat=True)
    done = await unless_gone(request.receive, ask(gateway, question))
    created = int(done.interaction.created_at.timestamp())
    body = chat_completion(question.id, created, done.model, done.completion, logprobs=bool(asked.logprobs))
    return _whole(request, done, body)


@router.post("/v1/completions", response_model=TextCompletion, responses=_STREAM)
async def completions(
    request: Request, asked: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))]
) -> Response:
    """Answer a prompt, taken as what a user says."""
    gateway = gateway_of(request)
    question = question_of(gateway, asked)
    if asked.stream:
        return await _streamed(request, gateway, question, asked, chat=False)
    done = await unless_gone(request.receive, ask(gateway, question))
    created = int(done.interaction.created_at.timestamp())
    return _whole(request, done, text_completion(question.id, created, done.model, done.completion))


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """The names that requests can ask for; versions (`loop@v1.2.0`) can be asked for besides."""
    gateway = gateway_of(request)
    return ModelList(data=[_card(gateway, name, loop) for name, loop in sorted(gateway.names.items())])


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> ModelCard:
    """What one name stands for now."""
    gateway = gateway_of(request)
    return _card(gateway, model, route(model, gateway.names).loop)


def _card(gateway: Gateway, name: str, loop: str) -> ModelCard:
    current = gateway.servers[loop].current
    return ModelCard(id=name, created=0, loop=loop, serving=current.name if current else None)


def _whole(request: Request, done: Exchange, body: BaseModel) -> Response:
    request.scope[ENGINE] = done.engine_seconds
    return Response(body.model_dump_json(), media_type="application/json", headers=_headers(done))


def _headers(done: Exchange) -> dict[str, str]:
    confidence = done.completion.confidence
    headers = {INTERACTION_HEADER: str(done.interaction.id)}
    return headers if confidence is None else {**headers, CONFIDENCE_HEADER: f"{confidence:.4f}"}


async def _streamed(
    request: Request, gateway: Gateway, question: Question, asked: ChatRequest | CompletionRequest, *, chat: bool
) -> Response:
    """Answer in pieces. The first one is waited for, so that what cannot be answered has its own status."""
    pieces: Pieces = asyncio.Queue()
    answer = asyncio.create_task(ask(gateway, question, lambda model, piece: pieces.put_nowait((model, piece))))
    answer.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        first = await unless_gone(request.receive, pieces.get())
        model = first[0] if first else (await answer).model
    except BaseException:
        answer.cancel()
        raise
    chunks = Chunks(question.id, int(time.time()), model, chat=chat)
    events = _events(answer, first, pieces, chunks, asked, local=gateway.access.open)
    return EventStream(events, {INTERACTION_HEADER: str(question.id)})


async def _events(
    answer: "asyncio.Task[Exchange]",
    first: tuple[str, str] | None,
    pieces: Pieces,
    chunks: Chunks,
    asked: ChatRequest | CompletionRequest,
    *,
    local: bool,
) -> AsyncGenerator[str, None]:
    try:
        yield chunks.start()
        piece = first
        while piece is not None:
            yield chunks.piece(piece[1])
            piece = await pieces.get()
        done = await answer  # recorded by now: the end of an answer is its acknowledgement
        logprobs = isinstance(asked, ChatRequest) and bool(asked.logprobs)
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        yield chunks.end(done.completion, logprobs=logprobs, with_usage=with_usage)
    except GatewayError as error:
        yield f"data: {json.dumps(error.body(local=local))}\n\n"
    finally:
        answer.cancel()
