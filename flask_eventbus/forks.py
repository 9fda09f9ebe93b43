"""What a forked child does before it uses anything that its parent had.

Python calls hooks after ``os.fork()``. A server that forks in C, such as uWSGI, calls none: there
the child is known by its process id, which is compared wherever something may be inherited.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

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
