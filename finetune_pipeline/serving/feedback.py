"""The routes for feedback, interactions from elsewhere, single interactions, and statistics."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from uuid_utils.compat import uuid7

from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.store import StoredInteraction, conflict_message, counters, find_interaction
from finetune_pipeline.records import Feedback, Interaction, not_in_future
from finetune_pipeline.serving.api import FeedbackIn, InteractionIn, InteractionOut, Receipt, StatsOut, Status
from finetune_pipeline.serving.errors import BadRequest, Conflict, IdTaken, NotFound, NotRecorded
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import describe_errors, get_gateway, json_body, require_scope

STORE_SECONDS = 2.0
"""How long a request waits until the store has its event; the event is in the write-ahead log already."""

router = APIRouter(dependencies=[Depends(require_scope("feedback"))])
_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": Receipt, "description": "The event is in the write-ahead log, and will be in the store later."}
}


@router.post("/v1/feedback", response_model=Receipt, responses=_ACCEPTED)
async def feedback(request: Request, body: Annotated[FeedbackIn, Depends(json_body(FeedbackIn))]) -> Response:
    """Record feedback on an answer. It may arrive late, twice, or before its interaction.

    A correction that the loop's output schema does not accept is refused.
    """
    gateway = get_gateway(request)
    if body.loop is not None or len(gateway.loops) == 1:
        loop = gateway.loop_named(body.loop).name
    else:
        found = await _find(gateway, body.interaction_id)
        if found is None:
            raise BadRequest(
                f"The interaction {body.interaction_id} has not arrived, so its loop is unknown. Name it in `loop`: "
                f"{', '.join(gateway.loops)}.",
                param="loop",
            )
        loop = found.interaction.loop
    event = _event(Feedback, body.model_dump(exclude_none=True) | {"loop": loop})
    if event.correction is not None:
        problem = await asyncio.to_thread(correction_problem, gateway.loops[loop], event.correction)
        if problem is not None:
            raise BadRequest(f"{problem}.", param="correction")
    gateway.metrics.feedback.labels(loop, event.kind).inc()
    return await _receipt(gateway, event)


@router.post("/v1/interactions", response_model=Receipt, responses=_ACCEPTED)
async def interactions(request: Request, body: Annotated[InteractionIn, Depends(json_body(InteractionIn))]) -> Response:
    """Record an answer that the application got from a model elsewhere."""
    gateway = get_gateway(request)
    loop = gateway.loop_named(body.loop).name
    return await _receipt(gateway, _event(Interaction, body.model_dump(exclude_none=True) | {"loop": loop}))


@router.get("/v1/interactions/{id}")
async def interaction(request: Request, id: UUID) -> InteractionOut:
    """Return one interaction with its feedback, its reward and the completion to train on."""
    found = await _find(get_gateway(request), id)
    if found is None:
        raise NotFound(f"There is no interaction {id}. Use the `id` of an answer, or its header X-Interaction-Id.")
    example = found.example
    return InteractionOut(
        interaction=found.interaction,
        feedback=list(found.feedback),
        reward=example.reward if example else None,
        target=example.target if example else None,
    )


@router.get("/v1/feedback/stats")
async def stats(request: Request, loop: str | None = None) -> StatsOut:
    """Return the number of interactions, feedback by kind, and examples."""
    gateway = get_gateway(request)
    name = gateway.loop_named(loop).name

    def read() -> dict[str, int]:
        with gateway.database.read() as connection:
            return counters(connection, name)

    counts = await asyncio.to_thread(read)
    fields = ("interactions", "feedback", "examples", "corrected", "implicit", "rewarded", "unmatched", "flagged")
    return StatsOut(
        loop=name,
        by_kind={key.partition(".")[2]: count for key, count in counts.items() if key.startswith("feedback.")},
        pending_bytes=gateway.recorder.pending,
        **{field: counts.get(field, 0) for field in fields},
    )


def _event(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        event = kind.model_validate({"id": uuid7(), "created_at": datetime.now(UTC)} | values)
    except ValidationError as error:
        raise BadRequest(describe_errors(error)) from error
    try:
        not_in_future(event.created_at)
    except ValueError as error:  # the format is right, but the client's clock differs from this one
        raise Conflict(f"created_at: {error}", param="created_at") from None
    return event


async def _receipt(gateway: Gateway, event: Feedback | Interaction) -> Response:
    """Record an event and wait for a moment until the store has it."""
    future = asyncio.wrap_future(await gateway.record(event))
    try:
        outcome = await asyncio.wait_for(asyncio.shield(future), STORE_SECONDS)
    except TimeoutError:
        outcome = None
    if outcome == "dead_lettered":
        raise NotRecorded(f"The store refused this event: {gateway.recorder.dead_letter}")
    if outcome == "conflict":
        raise IdTaken(conflict_message(event), param="id")
    status: Status = outcome or "accepted"
    message = None
    if status == "unmatched" and isinstance(event, Feedback):
        message = (
            f"There is no interaction {event.interaction_id} yet. This feedback counts once it arrives; if it never "
            "does, the id is wrong: use the `id` of an answer, or its header X-Interaction-Id."
        )
    receipt = Receipt(id=event.id, status=status, message=message)
    return JSONResponse(receipt.model_dump(mode="json", exclude_none=True), 202 if status == "accepted" else 200)


async def _find(gateway: Gateway, id: UUID) -> StoredInteraction | None:
    """Return an interaction of the served loops, after the store has all events that were recorded before."""
    newest = gateway.recorder.newest_pending()
    if newest is not None:
        await asyncio.wait({asyncio.wrap_future(newest)}, timeout=STORE_SECONDS)

    def read() -> StoredInteraction | None:
        with gateway.database.read() as connection:
            return find_interaction(connection, id)

    found = await asyncio.to_thread(read)
    return found if found is not None and found.interaction.loop in gateway.loops else None
