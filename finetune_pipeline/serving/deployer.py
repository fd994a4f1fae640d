"""Deployment in the background of the gateway, where Dagster does not run, and after its run has ended.

The gateway reads the table of targets every few seconds. If one is due, a child process brings it to the champion:
uploads and comparisons must not delay answers, and the libraries that they import stay out of the gateway.

`python -m finetune_pipeline.serving.deployer` is the child. It gets the loop's settings as JSON on stdin.
"""

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress

from finetune_pipeline.database import Database
from finetune_pipeline.pipeline.deploy import due_targets, reconcile
from finetune_pipeline.settings import LoopSettings

DEPLOY_SECONDS = 5.0
"""Interval at which the table of targets is read."""

COMMAND = [sys.executable, "-m", "finetune_pipeline.serving.deployer"]
"""The command of the child."""

_STOP_SECONDS = 5.0

_log = logging.getLogger(__name__)


async def deploy_due(loop: LoopSettings, database: Database) -> None:
    """Bring the loop's due targets to the champion in a child process, and wait for it; do nothing if none is due."""
    if not await asyncio.to_thread(due_targets, loop, database):
        return
    tied = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    child = await asyncio.create_subprocess_exec(
        *tied,
        *COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,  # bytes of a line
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with suppress(ConnectionError):  # it has ended already; its output says why
            child.stdin.write(loop.model_dump_json().encode())
            await child.stdin.drain()
        child.stdin.close()
        async for line in child.stdout:
            _log.info("%s: %s", loop.name, line.decode(errors="replace").rstrip())
        if await child.wait():
            _log.warning("%s: the deployment ended with exit code %s", loop.name, child.returncode)
    finally:
        if child.returncode is None:
            child.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _STOP_SECONDS)
        if child.returncode is None:
            child.kill()
            await child.wait()


def main() -> None:
    """Reconcile the due targets of the loop on stdin."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that leases are given back
    loop = LoopSettings.model_validate_json(sys.stdin.buffer.read())
    reconcile(loop, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
