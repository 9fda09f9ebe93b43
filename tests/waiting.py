"""Waiting in tests: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, timeout: float = 30.0, what: str = "") -> T:
    """Return the condition's value as soon as it is true.

    It is asked a hundred times a second, and in a long wait, which asking must not slow down,
    twenty times.

    :param timeout: how long to wait, in seconds; enough for a machine with much else to do.
    :param what: what is awaited, for the failure: "the server is gone".
    """
    start = time.monotonic()

    while not (result := condition()):
        waited = time.monotonic() - start

        if waited > timeout:
            raise AssertionError(f"Not so after {timeout} s: {what or condition}")

        time.sleep(min(max(waited / 20, 0.01), 0.05))

    return result
