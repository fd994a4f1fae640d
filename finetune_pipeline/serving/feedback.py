"""The routes that learn: feedback, interactions had elsewhere, one interaction, statistics."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from uuid_utils.compat import uuid7

from finetune_pipeline.feedback.store import Exchange, conflict, counters, find
from finetune_pipeline.records import Feedback, Interaction, not_in_future
from finetune_pipeline.serving.api import FeedbackIn, InteractionIn, InteractionOut, Receipt, StatsOut, Status
from finetune_pipeline.serving.errors import BadRequest, Conflict, IdTaken, NotFound, NotRecorded
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import allow, body_of, gateway_of, what_is_wrong

PATIENCE_SECONDS = 2.0
"""How long a request waits until the store has what the journal has; then it is told that it is safe all the same."""

router = APIRouter(dependencies=[Depends(allow("feedback"))])
_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": Receipt, "description": "Safe in the journal; in the store as soon as that can take it."}
}


@router.post("/v1/feedback", response_model=Receipt, responses=_ACCEPTED)
async def feedback(request: Request, given: Annotated[FeedbackIn, Depends(body_of(FeedbackIn))]) -> Response:
    """Say what a person or a validator thought of an answer. It may come late, twice, or before its interaction."""
    gateway = gateway_of(request)
    loop = await _loop_of(gateway, given)
    event = _event(Feedback, given.model_dump(exclude_none=True) | {"loop": loop})
    gateway.metrics.feedback.labels(loop, event.kind).inc()
    return await _receipt(gateway, event)


@router.post("/v1/interactions", response_model=Receipt, responses=_ACCEPTED)
async def interactions(request: Request, given: Annotated[InteractionIn, Depends(body_of(InteractionIn))]) -> Response:
    """Log an exchange that the application had with a model elsewhere."""
    gateway = gateway_of(request)
    loop = gateway.loop_named(given.loop).name
    return await _receipt(gateway, _event(Interaction, given.model_dump(exclude_none=True) | {"loop": loop}))


@router.get("/v1/interactions/{id}")
async def interaction(request: Request, id: UUID) -> InteractionOut:
    """One interaction with its feedback, and what it teaches."""
    found = await _find(gateway_of(request), id)
    if found is None:
        raise NotFound(f"there is no interaction {id}; its id is the `id` of the answer, and in X-Interaction-Id")
    example = found.example
    return InteractionOut(
        interaction=found.interaction,
        feedback=list(found.feedback),
        reward=example.reward if example else None,
        target=example.target if example else None,
    )


@router.get("/v1/feedback/stats")
async def stats(request: Request, loop: str | None = None) -> StatsOut:
    """How much feedback of which kind there is."""
    gateway = gateway_of(request)
    name = gateway.loop_named(loop).name
    counts = await asyncio.to_thread(_tally, gateway, name)
    named = ("interactions", "feedback", "examples", "corrected", "rewarded", "unmatched", "flagged")
    kinds = {key.partition(".")[2]: value for key, value in counts.items() if key.startswith("feedback.")}
    return StatsOut(
        loop=name,
        by_kind=kinds,
        pending_bytes=gateway.recorder.pending,
        **{key: counts.get(key, 0) for key in named},
    )


def _event(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        event = kind.model_validate({"id": uuid7(), "created_at": datetime.now(UTC)} | values)
    except ValidationError as error:
        raise BadRequest(what_is_wrong(error)) from error
    try:
        not_in_future(event.created_at)
    except ValueError as error:  # a conflict of two clocks: the form is right
        raise Conflict(f"created_at: {error}", param="created_at") from None
    return event


async def _receipt(gateway: Gateway, event: Feedback | Interaction) -> Response:
    future = asyncio.wrap_future(await gateway.record(event))
    try:
        outcome = await asyncio.wait_for(asyncio.shield(future), PATIENCE_SECONDS)
    except TimeoutError:
        outcome = None
    if outcome == "refused":
        raise NotRecorded(f"the store refused this event, and it was put aside: {gateway.recorder.refused}")
    if outcome == "conflict":
        raise IdTaken(conflict(event), param="id")
    status: Status = outcome or "accepted"
    receipt = Receipt(id=event.id, status=status)
    return JSONResponse(receipt.model_dump(mode="json"), 202 if status == "accepted" else 200)


async def _loop_of(gateway: Gateway, given: FeedbackIn) -> str:
    if given.loop is not None or len(gateway.loops) == 1:
        return gateway.loop_named(given.loop).name
    found = await _find(gateway, given.interaction_id)
    if found is None:
        raise BadRequest(
            f"the interaction {given.interaction_id} has not arrived, so its loop is not known; name it in `loop`: "
            f"{', '.join(gateway.loops)}",
            param="loop",
        )
    return found.interaction.loop


async def _find(gateway: Gateway, id: UUID) -> Exchange | None:
    def look() -> Exchange | None:
        with gateway.database.read() as connection:
            found = find(connection, id)
        return found if found is not None and found.interaction.loop in gateway.loops else None

    newest = gateway.recorder.settled()
    if newest is not None:
        await asyncio.wait({asyncio.wrap_future(newest)}, timeout=PATIENCE_SECONDS)
    return await asyncio.to_thread(look)


def _tally(gateway: Gateway, loop: str) -> dict[str, int]:
    with gateway.database.read() as connection:
        return counters(connection, loop)
