"""The routes of OpenAI's Responses API; earlier responses are read from the store."""

import time
from collections.abc import AsyncGenerator
from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from finetune_pipeline.records import Interaction, Turn
from finetune_pipeline.serving.access import Caller
from finetune_pipeline.serving.api import ChatMessage
from finetune_pipeline.serving.completions import (
    STREAM,
    MayInfer,
    answer_headers,
    may_infer,
    request_headers,
    request_id,
)
from finetune_pipeline.serving.errors import BadRequest, GatewayError, NotFound, PreviousResponseNotFound
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import ENGINE_SECONDS, EventStream, get_gateway, json_body, run_while_connected
from finetune_pipeline.serving.interactions import answer_all, prepare
from finetune_pipeline.serving.responses_format import (
    ResponseEvents,
    ResponseObject,
    ResponseRecord,
    finished_response,
    stored_response,
)
from finetune_pipeline.serving.responses_schema import ResponsesRequest
from finetune_pipeline.serving.routing import route
from finetune_pipeline.serving.streaming import stream_answers

_body = json_body(ResponsesRequest)
router = APIRouter(dependencies=[Depends(may_infer)])


@router.post("/v1/responses", response_model=ResponseObject, responses=STREAM)
async def responses(request: Request) -> Response:
    """Answer messages, or continue the conversation of an earlier response."""
    caller = await may_infer(request)
    body = await _body(request)
    gateway, id = get_gateway(request), request_id(request, body)
    loop = gateway.loops[route(body.model, gateway.names).loop]
    conversation = await _conversation(gateway, body, caller)
    if conversation[-1].role != "user":
        raise BadRequest("The last item of the input must be a user's message, which is the prompt.", param="input")
    record = ResponseRecord(
        key=caller.key,
        # The loop's own system prompt is not recorded.
        instructions=body.instructions is not None and body.instructions != loop.system_prompt,
        previous_response_id=body.previous_response_id,
    )
    prepared = prepare(gateway, body, caller, id, [conversation], kept=record.model_dump())
    headers = request_headers(request, prepared)
    if not body.stream:
        [done] = await run_while_connected(request.receive, answer_all(gateway, prepared))
        request.scope[ENGINE_SECONDS] = done.engine_seconds
        content = finished_response(body, prepared, int(done.interaction.created_at.timestamp()), done)
        headers |= answer_headers(done)
        return Response(content.model_dump_json(), media_type="application/json", headers=headers)

    model, parts = await stream_answers(request, gateway, prepared)
    events = ResponseEvents(body, prepared, int(time.time()), model)

    async def lines() -> AsyncGenerator[str, None]:
        try:
            yield events.start()
            async for part in parts:
                yield events.delta(part[2]) if len(part) == 3 else events.finish(part[1])
        except GatewayError as error:
            yield events.failed(error, local=gateway.access.open)

    return EventStream(lines(), headers, parts)


@router.get("/v1/responses/{id}")
async def response(
    request: Request, id: str, caller: MayInfer, stream: Literal["false"] | None = None
) -> ResponseObject:
    """Return a recorded response, to requests with the key that it was created with. It cannot be streamed."""
    found = await _find(get_gateway(request), id, caller)
    if found is None:
        raise NotFound(f"Response with id {id[:100]!r} not found.", param="response_id")
    return stored_response(*found)


async def _conversation(gateway: Gateway, body: ResponsesRequest, caller: Caller) -> list[ChatMessage]:
    """Return instructions, the conversation of the previous response, and the input.

    Raises:
        BadRequest: there is no such previous response for this caller, or it is a tool call.
        NotFound: there is no such item for this caller.
    """
    messages = [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
    if body.previous_response_id is not None:
        found = await _find(gateway, body.previous_response_id, caller)
        if found is None:
            raise PreviousResponseNotFound(
                f"Previous response with id {body.previous_response_id!r} not found.", param="previous_response_id"
            )
        interaction, record = found
        if record.function is not None:
            raise BadRequest(
                f"The previous response is a call of the function {record.function!r}. Earlier tool calls are not "
                "supported yet; send the conversation as text, without previous_response_id.",
                param="previous_response_id",
            )
        earlier = interaction.history[1:] if record.instructions else interaction.history
        turns = [*earlier, Turn(role="user", content=interaction.prompt), _answer_of(interaction)]
        messages += [ChatMessage(role=turn.role, content=turn.content) for turn in turns]
    for item in body.items:
        if item.reference is None:
            messages.append(item.message)
            continue
        kind, _, id = item.reference.partition("_")
        if kind == "fc":
            raise BadRequest(
                f"{item.reference}: earlier tool calls are not supported yet; send them and their results as text.",
                param="input",
            )
        found = await _find(gateway, id, caller) if kind == "msg" else None
        if found is None or found[1].function is not None:
            raise NotFound(f"Item with id {item.reference!r} not found.", param="input")
        answer = _answer_of(found[0])
        messages.append(ChatMessage(role=answer.role, content=answer.content))
    return messages


async def _find(gateway: Gateway, id: str, caller: Caller) -> tuple[Interaction, ResponseRecord] | None:
    """Return a recorded response of the served loops and this caller; None if there is none."""
    try:
        interaction_id = UUID(id)
    except ValueError:
        return None
    interaction = await gateway.find(interaction_id)
    if interaction is None or interaction.loop not in gateway.loops:
        return None
    record = ResponseRecord.of(interaction)
    if record is None or record.key != caller.key:
        return None
    return interaction, record


def _answer_of(interaction: Interaction) -> Turn:
    return Turn(role="assistant", content=interaction.output)
