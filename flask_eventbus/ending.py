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

_steps: list[Callable[[], None]] = []
#: The process whose steps have run, or run right now in the thread that holds the lock.
_begun = os.getpid()
#: The process whose steps have all run.
_process = os.getpid()
#: One lock per process: a parent's lock may have been held when it forked.
_locks: dict[int, threading.RLock] = {}


def after_fork(step: Callable[[], None]) -> Callable[[], None]:
    """Let ``step`` run in each forked child, after those that were registered before."""
    _steps.append(step)
    return step


def notice_fork() -> None:
    """Run the steps, once, if this process was forked since they last ran.

    It costs a system call, a tenth of a microsecond: call it once per ``send()``, not in loops.
    """
    if os.getpid() != _process:
        _begin_child()


def _begin_child() -> None:
    global _begun, _process
    this = os.getpid()

    # Another thread of the child may come at the same time, and waits here until all is done.
    with _locks.setdefault(this, threading.RLock()):
        if _begun == this:
            return

        _begun = this

        for step in _steps:
            step()

        _process = this
        _locks.clear()


def _forked() -> None:
    global _begun
    # In a namespace of its own, a child may have the process id of its parent.
    _begun = 0
    _begin_child()


os.register_at_fork(after_in_child=_forked)


#: Set once the buses of the process were stopped for its end: nobody waits any more for a
#: thread that starts now.
process_ends = threading.Event()

#: Called before SIGTERM ends the process, once :func:`catch_sigterm` was.
_stop: Callable[[], None] | None = None


def catch_sigterm(stop: Callable[[], None]) -> None:
    """Call ``stop`` before SIGTERM ends the process, if the program leaves it at its default.

    A handler that the program, or its server, has set or sets later is left alone. Without
    effect outside of the main thread, where Python sets no handlers, under mod_wsgi, which refuses
    them, and in children of multiprocessing and billiard: ``terminate()`` is to end those at once,
    also in the moment before they wait for a lock, where Python calls no handler.
    """
    global _stop

    if threading.current_thread() is not threading.main_thread() or "mod_wsgi" in sys.modules:
        return

    if any(
        _has_parent(sys.modules.get(f"{name}.process")) for name in ("multiprocessing", "billiard")
    ):
        return

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _stop = stop
        signal.signal(signal.SIGTERM, end_by_signal)


def leave_sigterm() -> None:
    """Undo :func:`catch_sigterm`, for a child that inherits the handler."""
    if signal.getsignal(signal.SIGTERM) is end_by_signal:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _has_parent(processes: Any) -> bool:
    """Return True in a process that this module for processes has started."""
    return processes is not None and processes.current_process()._parent_pid is not None


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


#: The signals that each thread blocked before it forked.
_masks = threading.local()


def _hold_sigterm() -> None:
    """Before a fork: Python forgets a signal that the child gets before its first step."""
    if signal.getsignal(signal.SIGTERM) is end_by_signal:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    if (before := _masks.__dict__.pop("before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


os.register_at_fork(
    before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_release_sigterm
)
