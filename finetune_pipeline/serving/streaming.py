"""Answers in parts, in the order in which the models generate them."""

import asyncio

from fastapi import Request

from finetune_pipeline.inference.protocol import Delta
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import run_while_connected
from finetune_pipeline.serving.interactions import FinishedInteraction, PreparedRequest, answer_all

Part = tuple[int, str, Delta] | tuple[int, FinishedInteraction]
"""The number of an answer, and the name of its model with a delta, or the finished answer, which is recorded."""


class Parts:
    """The parts of answers in progress, to be read once; reading them raises a GatewayError if an answer fails.

    This is no async generator, because closing a generator that nobody has read from runs none of its code.

    Args:
        task: generates the answers.
        queue: the parts after the first; None is the end.
    """

    def __init__(self, task: asyncio.Task[object], first: Part, queue: asyncio.Queue[Part | None]) -> None:
        self._task = task
        self._first: Part | None = first
        self._queue = queue

    def __aiter__(self) -> "Parts":
        return self

    async def __anext__(self) -> Part:
        part, self._first = self._first or await self._queue.get(), None
        if part is None:
            await self._task  # raises if an answer failed
            raise StopAsyncIteration
        return part

    async def aclose(self) -> None:
        """Cancel the answers that are not complete."""
        self._task.cancel()


async def stream_answers(request: Request, gateway: Gateway, prepared: PreparedRequest) -> tuple[str, Parts]:
    """Start to answer a request; return the name of the model and the parts once the first one exists.

    Raises:
        GatewayError: the request cannot be answered.
        ClientDisconnected: the client disconnected.
    """
    queue: asyncio.Queue[Part | None] = asyncio.Queue()
    task = asyncio.create_task(
        answer_all(
            gateway,
            prepared,
            lambda number, model, delta: queue.put_nowait((number, model, delta)),
            lambda number, done: queue.put_nowait((number, done)),
        )
    )
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        # Wait for the first part, so that a request that cannot be answered gets its own HTTP status.
        first = await run_while_connected(request.receive, queue.get())
        if first is None:
            await task  # raises
        assert first is not None
    except BaseException:
        task.cancel()
        raise

    return first[1] if isinstance(first[1], str) else first[1].model, Parts(task, first, queue)
