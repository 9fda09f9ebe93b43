"""Lifecycle signals of the bus, for metrics and alarms.

They are blinker signals. The sender is the service's name. Their receivers run one after the
other in a thread of their own, soon after the change. The receivers of ``receiver_failed`` and
``receiver_succeeded`` run in the thread of the receiver, right after it. An exception that a
receiver of a lifecycle signal raises is logged.
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
"""The listener is connected and Redis has confirmed every subscription.

``reconnected``: True if the connection was lost before, so that channel events may have been
missed; ``seconds``: how long it was lost.
"""

listener_lost = _lifecycle.signal("listener_lost")
"""The listener lost its connection to Redis.

``error``: the exception.
"""

publisher_lost = _lifecycle.signal("publisher_lost")
"""The publisher lost its connection to Redis, or Redis refuses writes.

``error``: the exception; ``buffered``: number of events in the buffer.
"""

publisher_restored = _lifecycle.signal("publisher_restored")
"""The publisher is connected again, and Redis accepts writes.

``seconds``: how long it was lost; ``buffered``: number of events that it publishes now.
"""

events_missed = _lifecycle.signal("events_missed")
"""Channel events of a publisher never arrived: their sequence numbers are missing.

``name``: the signal; ``source`` and ``node``: the service and node that published them;
``count``: the exact number of missed events.
"""

events_dropped = _lifecycle.signal("events_dropped")
"""Events were dropped because a buffer was full or a process ended.

``where``: "buffer" (events to publish), "inbox" (events that arrived) or "dead" (the oldest dead
letters, beyond ``EVENTBUS_DEAD_MAXLEN``); ``count``: the number of events.
"""

event_rejected = _lifecycle.signal("event_rejected")
"""A message was not an event of the bus.

``name``: the signal of the channel or stream; ``reason``: the reason of the error, as in
:class:`.DecodeError`; ``error``: the error.
"""

event_conflict = _lifecycle.signal("event_conflict")
"""An event contradicts an earlier one, so one of them is forged. Both are delivered.

The same id or sequence number arrived with other bytes, the sequence number is further ahead than a
node can come, or the same node came with another service's name. ``name``: the signal; ``event``:
the later event.
"""

receiver_succeeded = _lifecycle.signal("receiver_succeeded")
"""A receiver handled an event.

``receiver``: the callable; ``event``: the event; ``seconds``: how long it took.
"""

receiver_failed = _lifecycle.signal("receiver_failed")
"""A receiver raised an exception.

``receiver``: the callable; ``event``: the event; ``error``: the exception.
"""

event_dead_lettered = _lifecycle.signal("event_dead_lettered")
"""A stream event became a dead letter for a receiver.

``name``: the signal; ``receiver``: the receiver's name, empty if the event could not be decoded;
``reason``: ``"retries"``, ``"rejected"``, ``"killed"``, ``"gone"`` or ``"undecodable"``;
``event_id``: the event's id, if it has one; ``error``: the text of the last error.
"""

events_trimmed = _lifecycle.signal("events_trimmed")
"""Redis trimmed events from a stream that this service had not handled.

``name``: the signal; ``count``: the number of events, ``None`` if the server does not report it.
"""


#: Length of the queue of lifecycle signals. Further signals are dropped while it is full.
MAX_QUEUED = 1_000

#: Seconds that a bus waits for receivers of lifecycle signals when it stops.
STOP_TIMEOUT = 1.0


class LifecycleThread:
    """The thread that calls the receivers of a process's lifecycle signals, in order.

    The threads that send these signals hold locks, renew leases or read from Redis, so they must
    not wait for receivers.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Reentrant: a signal handler may interrupt the thread that holds the lock.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[tuple[NamedSignal, str, dict[str, Any]]] = deque()
        self._thread: threading.Thread | None = None
        #: The signal whose receivers are running.
        self._current: NamedSignal | None = None
        #: Number of signals dropped since the queue was last empty.
        self._dropped = 0
        #: True if :meth:`wait` timed out and the receiver is still running.
        self._is_stuck = False

    @property
    def is_own_thread(self) -> bool:
        """Return True if the calling thread is this one."""
        return threading.current_thread() is self._thread

    def put(self, signal: NamedSignal, service: str, values: dict[str, Any]) -> None:
        """Queue a signal; drop it and log an error if the queue is full."""
        # Otherwise a receiver that causes its own signal would be called forever.
        if self.is_own_thread and self._current is signal:
            return

        with self._changed:
            is_full = len(self._queue) >= MAX_QUEUED
            is_first = is_full and not self._dropped

            if is_full:
                self._dropped += 1
            else:
                self._queue.append((signal, service, values))

            has_thread = self._has_thread()
            self._changed.notify_all()

        if is_first:
            logger.error(
                "A receiver of the lifecycle signal %r is too slow: %d signals are queued, and new "
                "ones are dropped. Move the receiver's work to a thread of its own.",
                None if self._current is None else self._current.name,
                MAX_QUEUED,
            )

        if not has_thread:
            self._send_queued()

    def wait(self, timeout: float) -> bool:
        """Wait until all queued signals were sent.

        :param timeout: seconds.
        :return: False if the time was over first, or in this thread itself.
        """
        if self.is_own_thread:
            return False

        with self._changed:
            # Wait once for a receiver that hangs, not again for each bus that stops.
            in_time = self._changed.wait_for(self._is_idle, 0 if self._is_stuck else timeout)
            self._is_stuck = not in_time

        return in_time

    def _is_idle(self) -> bool:
        return not self._queue and self._current is None

    def _has_thread(self) -> bool:
        if self._thread is not None:
            return True

        if process_ends.is_set():
            return False

        self._thread = threading.Thread(target=self._run, name="eventbus-lifecycle", daemon=True)

        try:
            self._thread.start()
        except RuntimeError as error:
            # The process is ending, or it has reached its limit of threads.
            logger.debug("Cannot start the thread for lifecycle signals: %s", error)
            self._thread = None
        except BaseException:
            # A signal handler has interrupted the start: the next signal starts a thread again.
            if not self._thread.is_alive():
                self._thread = None

            raise

        return self._thread is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)

            self._send_queued()

    def _send_queued(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._current = None
                    self._is_stuck = False
                    dropped, self._dropped = self._dropped, 0
                    self._changed.notify_all()
                    break

                signal, service, values = self._queue.popleft()
                self._current = signal

            emit_now(signal, service, **values)

        if dropped:
            logger.error("All queued lifecycle signals were sent; %d were dropped.", dropped)


def emit(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service`` soon, in the thread for lifecycle signals."""
    if signal.receivers:
        _current().put(signal, service, values)


def emit_now(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service`` now, in the calling thread, which must hold no lock.

    An exception that a receiver raises is logged, even ``SystemExit``; the other receivers run.
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


def wait_until_sent(most: float = math.inf) -> bool:
    """Wait until the receivers of all lifecycle signals sent so far have returned.

    :param most: seconds to wait, at most :data:`STOP_TIMEOUT`.
    :return: False if the time was over first.
    """
    return _current().wait(min(STOP_TIMEOUT, max(0.0, most)))


def is_interrupt(error: BaseException) -> bool:
    """Return True if ``error`` is a Ctrl-C, which Python raises only in the main thread."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(error, KeyboardInterrupt)


_thread: LifecycleThread | None = None


def _current() -> LifecycleThread:
    """Return the thread of this process; a forked child gets a new one with an empty queue."""
    global _thread

    if _thread is None or _thread.pid != os.getpid():
        _thread = LifecycleThread()

    return _thread
