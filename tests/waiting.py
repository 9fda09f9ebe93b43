"""Waiting in tests: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, timeout: float = 30.0, what: str = "") -> T:
    """Return the condition's value as soon as it is true.

    :param timeout: how long to wait, in seconds; enough for a machine with much else to do.
    :param what: what is awaited, for the failure: "the server is gone".
    """
    deadline = time.monotonic() + timeout

    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"Not so after {timeout} s: {what or condition}")

        time.sleep(0.01)

    return result
