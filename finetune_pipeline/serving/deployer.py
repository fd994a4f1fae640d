"""Deployment in the background of the gateway, where Dagster does not run, and after its run has ended.

The gateway reads the table of targets every few seconds, and asks those that serve the champion once a minute whether
they still do. If there is something to do, a child process does it: uploads and comparisons must not delay answers, and
the libraries that they import stay out of the gateway.

`python -m finetune_pipeline.serving.deployer` is the child. It gets the loop's settings as JSON on stdin.
"""

import asyncio
import signal
import sys

from finetune_pipeline.database import Database
from finetune_pipeline.pipeline.deploy import reconcile, unsettled_targets
from finetune_pipeline.serving.background_child import run_child
from finetune_pipeline.settings import LoopSettings

DEPLOY_SECONDS = 5.0
"""Interval at which the table of targets is read."""

COMMAND = [sys.executable, "-m", "finetune_pipeline.serving.deployer"]
"""The command of the child."""


async def deploy_due(loop: LoopSettings, database: Database) -> None:
    """Bring the loop's due targets to the champion in a child process, and wait for it; no child if all serve it."""
    if not await asyncio.to_thread(unsettled_targets, loop, database):
        return
    await run_child(COMMAND, loop.model_dump_json(), loop.name, "deployment")


def main() -> None:
    """Reconcile the due targets of the loop on stdin."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that leases are given back
    loop = LoopSettings.model_validate_json(sys.stdin.buffer.read())
    reconcile(loop, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
