"""The end of this process: whether it has come, and what SIGTERM does before it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

#: Set once the buses of the process were stopped for its end: nobody waits any more for a
#: thread that starts now.
process_ends = threading.Event()

#: Called before SIGTERM ends the process, once :func:`catch_sigterm` was.
_stop: Callable[[], None] | None = None


def catch_sigterm(stop: Callable[[], None]) -> None:
    """Call ``stop`` before SIGTERM ends the process, if the program leaves it at its default.

    A handler that the program, or its server, has set or sets later is left alone. Without
    effect outside of the main thread, where Python sets no handlers, and under mod_wsgi,
    which refuses them.
    """
    global _stop

    if threading.current_thread() is not threading.main_thread() or "mod_wsgi" in sys.modules:
        return

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _stop = stop
        signal.signal(signal.SIGTERM, end_by_signal)


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM: stop the buses, then let the signal end the process. A second one does so
    at once.
    """
    signal.signal(number, _exit if _is_first() else signal.SIG_DFL)

    # Python starts no thread while it ends, and the buses stop with it.
    with suppress(RuntimeError):
        call_in_thread(_stop_and_end, number)


def call_in_thread(function: Callable[..., None], *args: Any) -> None:
    """Call a function from a signal handler: in a thread, whose begin is not waited for.

    The program may be interrupted where it holds a lock that the function takes, or in the hub of
    gevent, where nothing may wait.
    """
    _thread.start_new_thread(function, args)


def _stop_and_end(number: int) -> None:
    try:
        if _stop is not None:
            _stop()
    finally:
        if _is_first():
            _exit(number)

        os.kill(os.getpid(), number)


def _is_first() -> bool:
    """Return True in the first process of a container: Linux ignores the default of its signals."""
    return os.getpid() == 1


def _exit(number: int, frame: FrameType | None = None) -> None:
    os._exit(128 + number)
