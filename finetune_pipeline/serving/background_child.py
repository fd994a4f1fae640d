"""Child processes that work for the gateway in the background, and end with it."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

_STOP_SECONDS = 5.0

_log = logging.getLogger(__name__)


async def run_child(command: Sequence[str], data: str, label: str, what: str) -> None:
    """Run a command that ends with this process, log its output, and wait for it; if this is canceled, end it.

    Args:
        data: for its stdin.
        label: begins each line in the log, such as the loop's name.
        what: names the work in the warning about an exit code.
    """
    tied = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    child = await asyncio.create_subprocess_exec(
        *tied,
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,  # bytes of a line
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with suppress(ConnectionError):  # it has ended already; its output says why
            child.stdin.write(data.encode())
            await child.stdin.drain()
        child.stdin.close()
        async for line in child.stdout:
            _log.info("%s: %s", label, line.decode(errors="replace").rstrip())
        if await child.wait():
            _log.warning("%s: the %s ended with exit code %s", label, what, child.returncode)
    finally:
        if child.returncode is None:
            child.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _STOP_SECONDS)
        if child.returncode is None:
            child.kill()
            await child.wait()
