"""Comparisons in the background of the gateway: one at a time, in a child process that ends with the gateway."""

import asyncio
from collections.abc import Mapping

from finetune_pipeline.database import Database
from finetune_pipeline.pipeline.comparison_child import COMMAND
from finetune_pipeline.registry.requested_comparisons import next_pending
from finetune_pipeline.serving.background_child import run_child
from finetune_pipeline.settings import LoopSettings

COMPARE_SECONDS = 1.0
"""Interval at which the table of comparisons is read."""


async def compare_next(loops: Mapping[str, LoopSettings], database: Database) -> None:
    """Do the oldest comparison that waits in a child process, and wait for it; do nothing if none waits."""
    waiting = await asyncio.to_thread(next_pending, database, list(loops))
    if waiting is not None:
        settings = loops[waiting.loop].model_dump_json()
        await run_child([*COMMAND, waiting.id], settings, waiting.loop, f"comparison {waiting.id}")
