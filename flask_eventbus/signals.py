"""The bus's own lifecycle, as blinker signals: what a shop hangs its metrics and alarms on.

The sender is always the service's name. Receivers run one after the other in a thread that has
nothing else to do, soon after what they tell of; those of ``receiver_failed`` and
``receiver_succeeded`` run in the thread of the receiver, right after it. A receiver that raises is
logged and stops nothing.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from inspect import iscoroutine
from typing import Any

from blinker import NamedSignal, Namespace

from .coroutines import run_coroutine
from .ending import process_ends
from .logs import get_logger

logger = get_logger(__name__)


_lifecycle = Namespace()

listener_connected = _lifecycle.signal("listener_connected")
"""The listener is connected and everything subscribed is confirmed.

``reconnected``: whether a connection was lost before, so that events may have been missed;
``seconds``: how long.
"""

listener_lost = _lifecycle.signal("listener_lost")
"""The listener lost Redis.

``error``: the exception that told it.
"""

publisher_lost = _lifecycle.signal("publisher_lost")
"""The publisher lost Redis, or Redis takes no writes, so that streams wait.

``error``: the exception; ``buffered``: how many events wait.
"""

publisher_restored = _lifecycle.signal("publisher_restored")
"""The publisher has Redis again, and it takes everything.

``seconds``: how long it did not; ``buffered``: how many events are on their way now.
"""

events_missed = _lifecycle.signal("events_missed")
"""Channel events of a publisher never arrived, told by their sequence.

``name``: the signal; ``source`` and ``node``: who published them; ``count``: exactly how many.
"""

events_dropped = _lifecycle.signal("events_dropped")
"""Events were given up because a buffer was full or a process ended.

``where``: "buffer" (on the way out), "inbox" (on the way in) or "dead" (the oldest dead letters,
beyond ``EVENTBUS_DEAD_MAXLEN``); ``count``: how many.
"""

event_rejected = _lifecycle.signal("event_rejected")
"""Bytes on a channel were not an event of the bus.

``name``: the signal of the channel; ``reason``: the word of the error; ``error``: the error.
"""

event_conflict = _lifecycle.signal("event_conflict")
"""An event contradicts another one: one of the two is forged, and both are delivered.

The same id or number came with other bytes, or its node under another service's name. ``name``: the
signal; ``event``: the event that came later.
"""

receiver_succeeded = _lifecycle.signal("receiver_succeeded")
"""A receiver handled an event.

``receiver``: the callable; ``event``: the event; ``seconds``: how long it took.
"""

receiver_failed = _lifecycle.signal("receiver_failed")
"""A receiver raised.

``receiver``: the callable; ``event``: the event; ``error``: what it raised.
"""

event_dead_lettered = _lifecycle.signal("event_dead_lettered")
"""A stream event is given up for a receiver.

``name``: the signal; ``receiver``: its name, empty if the event was not even read; ``reason``:
``"retries"``, ``"rejected"``, ``"killed"``, ``"gone"`` or ``"undecodable"``; ``event_id``: its id,
if it has one; ``error``: the words of the last error.
"""

events_trimmed = _lifecycle.signal("events_trimmed")
"""A stream was trimmed past events that this service had not handled.

``name``: the signal; ``count``: how many; ``None`` where the server cannot tell.
"""


#: Signals that wait for their receivers at most; those that come then are left out.
MOST_WAITING = 1_000

#: Seconds that a bus which stops waits for receivers of lifecycle signals.
TOLD = 1.0


class Teller:
    """The thread in which a process calls the receivers of its lifecycle signals, in order.

    Whoever sends a signal may hold locks, renew leases or read from Redis, and goes on at once.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Reentrant: a signal handler may interrupt the thread that holds it.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[NamedSignal, str, dict[str, Any]]] = deque()
        self._thread: threading.Thread | None = None
        #: The signal whose receivers run.
        self._now: NamedSignal | None = None
        #: How many were sent and left out since the thread was last done with all.
        self._left_out = 0
        #: Whether a wait for it was in vain, and its receiver still runs.
        self._is_stuck = False

    @property
    def is_own_thread(self) -> bool:
        """Return True in the thread that calls the receivers."""
        return threading.current_thread() is self._thread

    def put(self, signal: NamedSignal, service: str, values: dict[str, Any]) -> None:
        """Send a signal soon."""
        # A receiver that causes what it is told of would be told of it for ever.
        if self.is_own_thread and self._now is signal:
            return

        with self._changed:
            is_full = len(self._waiting) >= MOST_WAITING
            is_first = is_full and not self._left_out

            if is_full:
                self._left_out += 1
            else:
                self._waiting.append((signal, service, values))

            has_thread = self._has_thread()
            self._changed.notify_all()

        if is_first:
            logger.error(
                "A receiver of the lifecycle signal %r takes so long that %d signals wait for "
                "their receivers. Those that come now are left out. Let the receiver hand its work "
                "to a thread of its own.",
                None if self._now is None else self._now.name,
                MOST_WAITING,
            )

        if not has_thread:
            self._tell_waiting()

    def wait(self, timeout: float) -> bool:
        """Wait until all receivers were called; return False if that takes longer."""
        if self.is_own_thread:
            return False

        with self._changed:
            # One that hangs is waited for once, and not by each bus that stops.
            in_time = self._changed.wait_for(self._is_done, 0 if self._is_stuck else timeout)
            self._is_stuck = not in_time

        return in_time

    def _is_done(self) -> bool:
        return not self._waiting and self._now is None

    def _has_thread(self) -> bool:
        if self._thread is not None:
            return True

        if process_ends.is_set():
            return False

        self._thread = threading.Thread(target=self._run, name="eventbus-lifecycle", daemon=True)

        try:
            self._thread.start()
        except RuntimeError as error:
            # At the end of a process, or when it has all the threads that it may have.
            logger.debug("There is no thread for lifecycle signals: %s", error)
            self._thread = None

        return self._thread is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)

            self._tell_waiting()

    def _tell_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._now = None
                    self._is_stuck = False
                    left_out, self._left_out = self._left_out, 0
                    self._changed.notify_all()
                    break

                signal, service, values = self._waiting.popleft()
                self._now = signal

            tell_here(signal, service, **values)

        if left_out:
            logger.error(
                "All lifecycle signals that waited were sent; %d were left out meanwhile.", left_out
            )


def tell(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service`` soon, in the thread for lifecycle signals."""
    if signal.receivers:
        _current().put(signal, service, values)


def tell_here(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service`` now, in the calling thread, which holds no lock.

    A receiver that raises is logged, even ``SystemExit``, and stops no other.
    """
    if not signal.receivers or signal.is_muted:
        return

    for receiver in list(signal.receivers_for(service)):
        try:
            result = receiver(service, **values)

            if iscoroutine(result):
                run_coroutine(result)
        except BaseException as error:
            if is_interrupt(error):
                raise

            logger.exception("A receiver of the lifecycle signal %r raised.", signal.name)


def wait_until_told(most: float = math.inf) -> bool:
    """Wait for the receivers of what was sent so far.

    :param most: how many seconds, if less than :data:`TOLD`.
    :return: False if that is not enough.
    """
    return _current().wait(min(TOLD, max(0.0, most)))


def is_interrupt(error: BaseException) -> bool:
    """Whether it is somebody's Ctrl-C, which only the main thread gets."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(error, KeyboardInterrupt)


_teller: Teller | None = None


def _current() -> Teller:
    """The teller of this process: a forked child has one of its own, and an empty one."""
    global _teller

    if _teller is None or _teller.pid != os.getpid():
        _teller = Teller()

    return _teller
