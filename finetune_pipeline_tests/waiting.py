"""Waiting for a condition, instead of sleeping for a fixed time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], timeout: float = 300.0, what: str | Callable[[], str] = "", every: float = 0.01
) -> T:
    """Return the first true value of a condition; fail the test when none came within `timeout` seconds.

    The timeout only ends a test that would hang; nothing is asserted about the time that the condition took.

    Args:
        condition: is called again and again.
        timeout: in seconds.
        what: what is waited for, or a function that returns it when the wait has failed.
        every: seconds between two calls; more for a condition that takes time from what is waited for.
    """
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            expected = (what() if callable(what) else what) or "the condition became true"
            raise AssertionError(f"waited {timeout:g} s, but not: {expected}")
        time.sleep(every)
    return value
