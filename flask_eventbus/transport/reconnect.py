"""A thread that reads from Redis, and reconnects with a backoff after an outage."""

from __future__ import annotations

import random
import threading
import time

from ..logs import BoundedLog, get_logger
from .connection import OUTAGE
from .connections import Context

logger = get_logger(__name__)

#: Seconds before the first retry.
FIRST = 0.1


class Backoff:
    """An exponential backoff that doubles from 0.1 seconds, with jitter.

    The jitter shortens each wait by up to half, so that workers do not reconnect at the same
    moment: "equal jitter" in the AWS Architecture Blog's article on exponential backoff.

    :param most: longest wait in seconds.
    """

    def __init__(self, *, most: float) -> None:
        self._most = most
        #: Number of attempts since the last success; set it to 0 after a success.
        self.tries = 0

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        wait: float = min(self._most, FIRST * 2 ** min(self.tries, 30))
        self.tries += 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


class ReadingThread:
    """Reads from Redis in a thread until it is stopped, and reconnects after an outage.

    Subclasses override the methods from :meth:`_connect` to :meth:`_finish`.

    :param kind: the middle part of the thread's name.
    """

    #: Log message for an unexpected error.
    _failed: str

    def __init__(self, context: Context, kind: str) -> None:
        self._name = f"eventbus-{kind}-{context.node}"
        self._app_exists = context.app_exists
        self._counters = context.counters
        self._backoff = Backoff(most=context.timing.max_listener_backoff)
        # Bounded, so that an unstable connection does not fill the log.
        self._log = BoundedLog(logger)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        #: Notified when the thread gets ready, loses Redis or stops.
        self.changed = threading.Condition()

    @property
    def is_own_thread(self) -> bool:
        """Return True if the calling thread is the reading thread."""
        return threading.current_thread() is self._thread

    @property
    def lives(self) -> bool:
        """Return True if the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        """Return True once :meth:`stop` was called."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start the thread unless it was started before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until :meth:`stop` is called."""
        self._stopping.wait(seconds)

    def stop(self) -> None:
        """Tell the thread to end; return immediately."""
        self._stopping.set()

        with self.changed:
            self.changed.notify_all()

    def end(self, deadline: float) -> None:
        """Wait until the thread has ended, or until the deadline.

        The thread may still run afterwards, for example while it resolves a host name.

        :param deadline: monotonic time.
        """
        if self._thread is not None:
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """Mark the thread as stopped; call it in a forked child."""
        # A thread of the parent may have held the lock of the inherited event.
        self._stopping = threading.Event()
        self._stopping.set()

    def _connect(self) -> None:
        """Prepare for reading over a new connection."""

    def _step(self) -> None:
        """Wait for entries or messages for a moment, and handle them.

        Set ``tries`` of the backoff to 0 if Redis has answered.
        """
        raise NotImplementedError

    def _lose(self, error: Exception) -> None:
        """Note the error of :meth:`_connect` or :meth:`_step`."""
        raise NotImplementedError

    def _disconnect(self) -> None:
        """Close the connection, after an error or at the end."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Note that the thread ends without :meth:`stop`."""

    def _run(self) -> None:
        try:
            self._run_steps()
        finally:
            self._disconnect()

        if not self._stopping.is_set():
            self._finish()

    def _run_steps(self) -> None:
        is_connected = False

        while not self._stopping.is_set() and (self._app_exists is None or self._app_exists()):
            try:
                if not is_connected:
                    self._connect()
                    is_connected = True

                self._step()
                continue
            except OUTAGE as error:
                self._lose(error)
            except Exception as error:
                # A defect must not end the thread: the node would receive no more events.
                self._counters.add("reading_failed")
                self._log.error("failed", self._failed, exc_info=error)
                self._lose(error)

            is_connected = False
            self._disconnect()
            self._stopping.wait(self._backoff.next())
