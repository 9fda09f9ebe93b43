"""Runs a node in the foreground until it is told to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .ending import call_in_thread, end_by_signal
from .errors import ConfigError
from .logs import get_logger
from .node import Node

logger = get_logger(__name__)

#: Seconds between looks: one that waits without end misses a signal that comes right before.
LOOK = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Handlers that no program has set.
_DEFAULTS = (signal.default_int_handler, end_by_signal)


def run_until_signal(node: Node) -> None:
    """Listen until SIGTERM or Ctrl-C, then let receivers finish and flush.

    A second signal ends the process at once, with the exit code 128 plus its number. Only
    the main thread may call this, since only it gets signals. A handler that the program
    set before is called at the first signal; the node stops even if it raises.

    :raises ConfigError: this Redis will never do what is needed to listen.
    """
    with told_by_signal() as told:
        try:
            node.start()

            while not told.wait(LOOK) and node.fatal is None:
                pass
        finally:
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
    """Yield what SIGTERM or Ctrl-C sets until the end of the block; a second one ends at once.

    The program's own handler is called too.
    """
    told = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    numbers: list[int] = []

    def end(number: int, frame: FrameType | None) -> Any:
        if numbers:
            os._exit(128 + number)

        numbers.append(number)
        call_in_thread(told.set)
        handler = before.get(number)

        if callable(handler) and handler not in _DEFAULTS:
            handler(number, frame)

    for number in _SIGNALS:
        signal.signal(number, end)

    try:
        yield told
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)
