"""Comparisons in the background of the console: one at a time, in a child process that ends with the console.

A gateway does the same where one runs; whoever claims a comparison does it.
"""

import logging
import os
import subprocess
import sys
import threading

from finetune_pipeline.console.known_loops import known_loops
from finetune_pipeline.database import Database, DatabaseError
from finetune_pipeline.pipeline.comparison_child import COMMAND
from finetune_pipeline.registry.requested_comparisons import next_pending
from finetune_pipeline.settings import LoopSettings, SettingsError

COMPARE_SECONDS = 1.0
"""Interval at which the table of comparisons is read."""

_STOP_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Comparer:
    """Does the comparisons that wait, from a thread, until it is stopped."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stopped = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="comparer", daemon=True)

    def start(self) -> None:
        """Begin to look for comparisons that wait."""
        self._thread.start()

    def stop(self) -> None:
        """End; a comparison in progress is given back, and its answers so far are kept."""
        self._stopped.set()
        if (child := self._child) is not None:
            child.terminate()
        self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        while not self._stopped.wait(COMPARE_SECONDS):
            try:
                loops = known_loops()
                waiting = next_pending(self._database, list(loops))
            except (DatabaseError, SettingsError) as error:  # the pages say so; perhaps it is corrected
                _log.warning("comparisons wait: %s", error)
                continue
            if waiting is not None:
                self._compare(loops[waiting.loop], waiting.id)

    def _compare(self, loop: LoopSettings, id: str) -> None:
        tied = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
        with subprocess.Popen([*tied, *COMMAND, id], stdin=subprocess.PIPE) as child:
            self._child = child
            if self._stopped.is_set():  # in between
                child.terminate()
            child.communicate(loop.model_dump_json().encode())
        self._child = None
        if child.returncode and not self._stopped.is_set():
            _log.warning("%s: the comparison %s ended with exit code %s", loop.name, id, child.returncode)
