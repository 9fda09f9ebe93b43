"""Runs a node in the foreground until it is told to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .errors import ConfigError
from .logs import get_logger
from .node import Node

logger = get_logger(__name__)

#: Seconds between looks: one that waits without end misses a signal that comes right before.
LOOK = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_until_signal(node: Node) -> None:
    """Listen until SIGTERM or Ctrl-C, then let receivers finish and flush.

    A second signal ends the process at once, with the exit code 128 plus its number. Only
    the main thread may call this, since only it gets signals.

    :raises ConfigError: this Redis will never do what is needed to listen.
    """
    with told_by_signal() as told:
        node.start()

        while not told.wait(LOOK) and node.fatal is None:
            pass

        fatal = node.fatal
        logger.info("Finishing what runs, for %g s at most.", node.config.grace)
        node.stop()

    if fatal is not None:
        raise ConfigError(
            f"{node.config.service!r} cannot listen: this Redis has no streams ({fatal}). Use "
            "Redis 6.2 or later, or Valkey, or subscribe with 'via': 'channel'."
        ) from fatal


@contextmanager
def told_by_signal() -> Iterator[threading.Event]:
    """What is set by SIGTERM or Ctrl-C until the end of the block; a second one ends at once."""
    told = threading.Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    numbers: list[int] = []

    def end(number: int, frame: FrameType | None) -> Any:
        if numbers:
            os._exit(128 + number)

        numbers.append(number)
        # The main thread may be interrupted where it holds the very lock that set() takes.
        threading.Thread(target=told.set, daemon=True).start()

    for number in _SIGNALS:
        signal.signal(number, end)

    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
