"""What pages read again and again, such as a loop's figures: kept in memory, and read again in the background.

Counting in a store of 100,000 interactions takes a second, and a page should be there at once. So a value that is no
longer fresh is still shown, while a thread reads it for the next visit. An action of a user clears the cache.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from finetune_pipeline.database import Database
from finetune_pipeline.settings import LoopSettings

R = TypeVar("R")

FRESH_SECONDS = 15
"""A value that is older is read again."""

KEPT_SECONDS = 300
"""A value that is older is not shown any more: the page waits for the new one."""

DELAY_SECONDS = 1.0
"""Time until the thread begins: the page that is being shown comes first."""

_MAX_VALUES = 100

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_values: dict[Any, tuple[float, Any]] = {}
_reading: set[Any] = set()
_cleared = 0


def read(function: Callable[..., R], loop: LoopSettings, database: Database, *arguments: Any) -> R:
    """Return what a function reads of a loop; pages share the value, so nothing may change it."""
    key = (function.__module__, function.__qualname__, loop.model_dump_json(), arguments)

    def call() -> R:
        before = _cleared
        value = function(loop, database, *arguments)
        with _lock:
            if before == _cleared:  # else an action may have changed what was read
                while len(_values) >= _MAX_VALUES:
                    _values.pop(next(iter(_values)))
                _values[key] = (time.monotonic(), value)
        return value

    known: tuple[float, R] | None = _values.get(key)
    age = time.monotonic() - known[0] if known is not None else KEPT_SECONDS
    if known is None or age >= KEPT_SECONDS:
        return call()
    if age > FRESH_SECONDS:
        _in_background(key, call)
    return known[1]


def clear() -> None:
    """Drop all values, as after an action."""
    global _cleared
    with _lock:
        _cleared += 1
        _values.clear()


def _in_background(key: Any, call: Callable[[], object]) -> None:
    with _lock:
        if key in _reading:
            return
        _reading.add(key)

    def work() -> None:
        try:
            call()
        except Exception as error:  # the next visit reads it itself and shows the error
            _log.warning("reading %s failed: %s", key[1], error)
            with _lock:
                _values.pop(key, None)
        finally:
            with _lock:
                _reading.discard(key)

    timer = threading.Timer(DELAY_SECONDS, work)
    timer.daemon = True
    timer.start()
