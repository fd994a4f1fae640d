"""The routes that generate: chat completions, completions, and the list of models."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from finetune_pipeline.serving.api import ChatRequest, CompletionRequest, ModelEntry, ModelList
from finetune_pipeline.serving.errors import GatewayError
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import (
    ENGINE_SECONDS,
    EventStream,
    get_gateway,
    json_body,
    require_scope,
    run_while_connected,
)
from finetune_pipeline.serving.interactions import FinishedInteraction, answer, prepare
from finetune_pipeline.serving.responses import ChatCompletion, CompletionChunks, TextCompletion, completion_response
from finetune_pipeline.serving.routing import route

INTERACTION_HEADER = "X-Interaction-Id"
CONFIDENCE_HEADER = "X-Confidence"

router = APIRouter(dependencies=[Depends(require_scope("infer"))])
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer."}}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
async def chat_completions(request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]) -> Response:
    """Answer a conversation with a loop's champion, or with the version or alias that `model` names."""
    return await _respond(request, body)


@router.post("/v1/completions", response_model=TextCompletion, responses=_STREAM)
async def completions(
    request: Request, body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]
) -> Response:
    """Answer a prompt, which is sent to the model as a user's message."""
    return await _respond(request, body)


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """List the loops and aliases; versions (`loop@v1.2.0`) can be requested too."""
    gateway = get_gateway(request)
    return ModelList(data=[_card(gateway, name, loop) for name, loop in sorted(gateway.names.items())])


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> ModelEntry:
    """Return what one name stands for now."""
    gateway = get_gateway(request)
    return _card(gateway, model, route(model, gateway.names).loop)


def _card(gateway: Gateway, name: str, loop: str) -> ModelEntry:
    current = gateway.servers[loop].current
    return ModelEntry(id=name, created=0, loop=loop, serving=current.name if current else None)


async def _respond(request: Request, body: ChatRequest | CompletionRequest) -> Response:
    gateway = get_gateway(request)
    pending = prepare(gateway, body)
    chat = isinstance(body, ChatRequest)
    logprobs = isinstance(body, ChatRequest) and bool(body.logprobs)
    if not body.stream:
        done = await run_while_connected(request.receive, answer(gateway, pending))
        created = int(done.interaction.created_at.timestamp())
        content = completion_response(pending.id, created, done.model, done.completion, chat=chat, logprobs=logprobs)
        headers = {INTERACTION_HEADER: str(pending.id)}
        if done.completion.confidence is not None:
            headers[CONFIDENCE_HEADER] = f"{done.completion.confidence:.4f}"
        request.scope[ENGINE_SECONDS] = done.engine_seconds
        return Response(content.model_dump_json(), media_type="application/json", headers=headers)

    deltas: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()  # model name and text; None is the end
    task = asyncio.create_task(answer(gateway, pending, lambda model, text: deltas.put_nowait((model, text))))
    task.add_done_callback(lambda _: deltas.put_nowait(None))
    try:
        # Wait for the first delta, so that a request that cannot be answered gets its own HTTP status.
        first = await run_while_connected(request.receive, deltas.get())
        model = first[0] if first else (await task).model
    except BaseException:
        task.cancel()
        raise
    chunks = CompletionChunks(pending.id, int(time.time()), model, chat=chat)
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield chunks.start()
            delta = first
            while delta is not None:
                yield chunks.delta(delta[1])
                delta = await deltas.get()
            done: FinishedInteraction = await task  # recorded by now, before the client sees the end
            yield chunks.end(done.completion, logprobs=logprobs, with_usage=with_usage)
        except GatewayError as error:
            yield f"data: {json.dumps(error.body(local=gateway.access.open))}\n\n"
        finally:
            task.cancel()

    return EventStream(events(), {INTERACTION_HEADER: str(pending.id)})
