"""Comparisons in the background of the gateway: one at a time, in a child process that ends with the gateway.

`python -m finetune_pipeline.serving.comparer ID` is the child. It gets the loop's settings as JSON on stdin.
"""

import asyncio
import signal
import sys
from collections.abc import Mapping

from finetune_pipeline.database import Database
from finetune_pipeline.pipeline.comparisons import run_comparison
from finetune_pipeline.registry.requested_comparisons import next_pending
from finetune_pipeline.serving.background_child import run_child
from finetune_pipeline.settings import LoopSettings

COMPARE_SECONDS = 1.0
"""Interval at which the table of comparisons is read."""

COMMAND = [sys.executable, "-m", "finetune_pipeline.serving.comparer"]
"""The command of the child, without the comparison's id."""


async def compare_next(loops: Mapping[str, LoopSettings], database: Database) -> None:
    """Do the oldest comparison that waits in a child process, and wait for it; do nothing if none waits."""
    waiting = await asyncio.to_thread(next_pending, database, list(loops))
    if waiting is not None:
        settings = loops[waiting.loop].model_dump_json()
        await run_child([*COMMAND, waiting.id], settings, waiting.loop, f"comparison {waiting.id}")


def main() -> None:
    """Do the comparison whose id is the first argument."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the lease is given back
    loop = LoopSettings.model_validate_json(sys.stdin.buffer.read())
    run_comparison(loop, sys.argv[1], lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
