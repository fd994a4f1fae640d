"""The routes that generate: chat completions, completions, and the list of models."""

import json
import time
from collections.abc import AsyncGenerator
from itertools import accumulate
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from uuid_utils.compat import uuid7

from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.api import ChatRequest, CompletionRequest, Generation, ModelEntry, ModelList
from finetune_pipeline.serving.completion_format import (
    ChatCompletion,
    CompletionChunks,
    TextCompletion,
    completion_response,
)
from finetune_pipeline.serving.errors import BadRequest, GatewayError
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import (
    CONFIDENCE_HEADER,
    ENGINE_SECONDS,
    ID_HEADERS,
    IGNORED_HEADER,
    INTERACTION_HEADER,
    REPLAYED_HEADER,
    EventStream,
    get_gateway,
    given_id,
    id_headers,
    json_body,
    require_scope,
    run_while_connected,
)
from finetune_pipeline.serving.interactions import FinishedInteraction, PreparedRequest, RequestId, answer_all, prepare
from finetune_pipeline.serving.routing import route
from finetune_pipeline.serving.streaming import stream_answers

IGNORED_IN_HEADER = 20
"""Most names of ignored fields in the header; more are shown as `...`."""

IGNORED_HEADER_BYTES = 4096
"""Largest value of that header. A name of 100 characters can have 1200 bytes when it is quoted."""

may_infer = require_scope("infer")
MayInfer = Annotated[Caller, Depends(may_infer)]
_chat_body, _completion_body = json_body(ChatRequest), json_body(CompletionRequest)
router = APIRouter(dependencies=[Depends(may_infer)])
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer."}}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation with a loop's champion, or with the version or alias that `model` names."""
    caller = await may_infer(request)
    return await _respond(request, await _chat_body(request), caller)


@router.post("/v1/completions", response_model=TextCompletion, responses=STREAM)
async def completions(request: Request) -> Response:
    """Answer a prompt, which is sent to the model as a user's message."""
    caller = await may_infer(request)
    return await _respond(request, await _completion_body(request), caller)


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


async def _respond(request: Request, body: ChatRequest | CompletionRequest, caller: Caller) -> Response:
    gateway = get_gateway(request)
    prepared = prepare(gateway, body, caller, request_id(request, body), body.conversations)
    headers = request_headers(request, prepared)
    if not body.stream:
        started = time.perf_counter()
        answers = await run_while_connected(request.receive, answer_all(gateway, prepared))
        first = answers[0]
        # Several answers are generated at the same time, partly one after the other.
        seconds = first.engine_seconds if len(answers) == 1 else time.perf_counter() - started
        request.scope[ENGINE_SECONDS] = seconds
        content = completion_response(body, prepared, int(first.interaction.created_at.timestamp()), answers)
        headers |= answer_headers(first)
        return Response(content.model_dump_json(), media_type="application/json", headers=headers)

    model, parts = await stream_answers(request, gateway, prepared)
    chunks = CompletionChunks(body, prepared, int(time.time()), model)

    async def events() -> AsyncGenerator[str, None]:
        finished: dict[int, FinishedInteraction] = {}
        try:
            yield chunks.start()
            async for part in parts:
                if len(part) == 3:
                    yield chunks.delta(part[0], part[2])
                else:  # an answer is recorded before the client sees its end
                    finished[part[0]] = part[1]
                    yield chunks.end(*part)
            yield chunks.finish([finished[number] for number in sorted(finished)])
        except GatewayError as error:
            yield f"data: {json.dumps(error.body(local=gateway.access.open))}\n\n"

    return EventStream(events(), headers, parts)


def request_id(request: Request, body: Generation) -> RequestId:
    """Return the id for a request, the client's or a new one; from now on, error responses have it too.

    Raises:
        BadRequest: the header X-Interaction-Id is not a UUID, or differs from the one in the metadata.
    """
    try:
        in_header = given_id(request.scope)
    except ValueError as error:
        raise BadRequest(f"{INTERACTION_HEADER}: {error}", param=INTERACTION_HEADER) from error
    in_body = body.metadata.interaction_id if body.metadata else None
    if None not in (in_header, in_body) and in_header != in_body:
        raise BadRequest(
            "The header X-Interaction-Id and metadata.interaction_id differ; send one of them.",
            param="metadata.interaction_id",
        )
    chosen = in_header or in_body
    id = chosen or uuid7()
    request.scope[ID_HEADERS] = id_headers(id, recorded=body.recorded)
    return RequestId(id, chosen is not None)


def request_headers(request: Request, prepared: PreparedRequest) -> dict[str, str]:
    """Return the headers with the interaction's id and the names of ignored fields, which are logged too."""
    headers: dict[str, str] = dict(request.scope[ID_HEADERS])
    if prepared.ignored_fields:
        get_gateway(request).log_ignored(prepared.ignored_fields)
        names = [quote(name[:100]) for name in prepared.ignored_fields[:IGNORED_IN_HEADER]]
        sizes = accumulate(len(f"{name}, ") for name in names)
        shown = [name for name, size in zip(names, sizes, strict=True) if size + len("...") <= IGNORED_HEADER_BYTES]
        headers[IGNORED_HEADER] = ", ".join(shown + ["..."] * (len(shown) < len(prepared.ignored_fields)))
    return headers


def answer_headers(done: FinishedInteraction) -> dict[str, str]:
    """Return the headers with the confidence of an answer, and that it was recorded before."""
    headers = {}
    if done.completion.confidence is not None:
        headers[CONFIDENCE_HEADER] = f"{done.completion.confidence:.4f}"
    if done.replayed:
        headers[REPLAYED_HEADER] = "true"
    return headers
