"""Streams of answers, without a model."""

import asyncio

from finetune_pipeline.inference.protocol import Delta
from finetune_pipeline.serving.http import EventStream
from finetune_pipeline.serving.streaming import Parts


def test_a_stream_that_ends_before_its_first_event_cancels_the_answers():
    async def cancelled():
        task = asyncio.create_task(asyncio.Event().wait())
        parts = Parts(task, (0, "notes", Delta(text="a")), asyncio.Queue())

        async def events():
            async for part in parts:
                yield str(part)

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.Event().wait()  # the client reads nothing

        await EventStream(events(), {}, parts)({"type": "http"}, receive, send)
        await asyncio.wait([task], timeout=10)
        return task.cancelled()

    assert asyncio.run(cancelled())
