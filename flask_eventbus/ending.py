"""Forks and the end of this process: steps after a fork, and the handler of SIGTERM."""

from __future__ import annotations

import _thread
import logging  # noqa: F401 - it registers its lock first; see below
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Seconds to wait for Redis to take the buffered events when a process ends.
FLUSH_AT_EXIT = 5.0

#: Held while a part of the package is imported late, and during a fork. A child could never import
#: a module that another thread of its parent was importing when it forked.
importing = threading.RLock()

# A fork takes the locks in the reverse order of registration: this one before that of logging,
# which a module needs for its logger while it is imported.
os.register_at_fork(
    before=importing.acquire,
    after_in_parent=importing.release,
    after_in_child=importing.release,
)

#: Advice to the kernel of Linux: empty this memory in a forked child. Python has no name for it.
_WIPE_ON_FORK = 18


def _page_of_this_process() -> mmap.mmap | None:
    """Return a page of memory that starts with 1, and with 0 in a forked child.

    Return ``None`` if the kernel has no such memory.
    """
    if sys.platform != "linux":
        return None

    found = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    try:
        found.madvise(_WIPE_ON_FORK)
    except OSError:
        return None

    try:
        # An emulator that accepts any advice follows none.
        found.madvise(-1)
    except OSError:
        found[0] = 1
        return found

    return None


#: See :func:`_page_of_this_process`.
page = _page_of_this_process()

_steps: list[Callable[[], None]] = []
#: The process id for which the steps ran, or are running in the thread that holds the lock.
_child_started = os.getpid()
#: The process id for which all steps have run.
_process = os.getpid()
#: One lock per process id: the parent's lock may have been held when it forked.
_locks: dict[int, threading.RLock] = {}


def after_fork(step: Callable[[], None]) -> Callable[[], None]:
    """Run ``step`` in each forked child, after the steps registered before it."""
    _steps.append(step)
    return step


def notice_fork() -> None:
    """Run the steps once if this process was forked since they last ran.

    It makes a system call only if the kernel does not mark the memory of a child.
    """
    if (page is None or not page[0]) and os.getpid() != _process:
        _run_steps()


def _run_steps() -> None:
    global _child_started, _process
    this = os.getpid()

    # Another thread of the child may call this at the same time; it waits for the steps.
    with _locks.setdefault(this, threading.RLock()):
        if _child_started == this:
            return

        _child_started = this

        for step in _steps:
            step()

        _process = this

        if page is not None:
            page[0] = 1

        _locks.clear()


def _forked() -> None:
    global _child_started
    # In a new PID namespace a child may have the same process id as its parent.
    _child_started = 0
    _run_steps()


os.register_at_fork(after_in_child=_forked)


#: Set once the buses were stopped at the end of the process. Threads that start later are not
#: waited for.
process_ends = threading.Event()

#: Called before SIGTERM ends the process; set by :func:`catch_sigterm`.
_stop: Callable[[], None] | None = None


def catch_sigterm(stop: Callable[[], None]) -> None:
    """Call ``stop`` before SIGTERM ends the process, unless the program handles SIGTERM itself.

    A handler that the program or its server sets, now or later, is not replaced. This does
    nothing outside of the main thread, where Python cannot set handlers, and under mod_wsgi, which
    refuses them. It does nothing in children of multiprocessing and billiard either, because
    ``terminate()`` must end those at once: a child that waits for a lock runs no Python handler.
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


def stop_with_pools(stop: Callable[[], None], owner: object) -> None:
    """Call ``stop`` at the end of a pool worker, which runs no atexit functions.

    :param owner: ``stop`` is called for as long as this object exists.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        if util := sys.modules.get(name):
            util.register_after_fork(owner, _finalizer(util, stop))

    # Celery sends a signal before a pool worker ends with os._exit().
    if celery := sys.modules.get("celery.signals"):
        celery.worker_process_shutdown.connect(
            lambda **extra: stop(), weak=False, dispatch_uid="flask_eventbus"
        )


def _finalizer(util: Any, stop: Callable[[], None]) -> Callable[[object], None]:
    def prepare_child(_: object) -> None:
        # terminate() must end the child at once, and it has inherited the handler.
        if signal.getsignal(signal.SIGTERM) is end_by_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        util.Finalize(None, stop, exitpriority=0)

    return prepare_child


def _has_parent(processes: Any) -> bool:
    """Return True if this process was started by the given module, such as multiprocessing."""
    return processes is not None and processes.current_process()._parent_pid is not None


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM: stop the buses, then let the signal end the process.

    A second SIGTERM ends the process at once.
    """
    signal.signal(number, _exit if _is_first() else signal.SIG_DFL)

    try:
        call_in_thread(_stop_and_end, number)
    except RuntimeError:
        # Python cannot start threads while it exits; atexit stops the buses then. If the process
        # has reached its limit of threads, let it exit now.
        if threading.main_thread().is_alive():
            raise SystemExit(128 + number) from None


def call_in_thread(function: Callable[..., None], *args: Any) -> None:
    """Call a function from a signal handler, in a new thread, without waiting for it to start.

    The signal may have interrupted code that holds a lock which the function needs, or the hub of
    gevent, which must not block.
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
    """Return True for process 1 of a container, where Linux ignores default signal actions."""
    return os.getpid() == 1


def _exit(number: int, frame: FrameType | None = None) -> None:
    os._exit(128 + number)


#: The signals that each thread had blocked before it forked.
_masks = threading.local()


def _hold_sigterm() -> None:
    """Block SIGTERM during a fork: Python loses a signal that the child gets too early."""
    if signal.getsignal(signal.SIGTERM) is end_by_signal:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    if (before := _masks.__dict__.pop("before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


os.register_at_fork(
    before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_release_sigterm
)
