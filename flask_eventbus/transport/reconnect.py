"""A thread that reads from Redis, and reconnects with a backoff after an outage."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from ..logs import BoundedLog, Counters, get_logger
from .connection import OUTAGE

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


#: Longest wait between two attempts to connect, in seconds.
MOST_BACKOFF = 1.0


class Reading:
    """Calls ``read`` in a thread, repeatedly, until it is stopped.

    :param failed: log message for an unexpected error.
    :param thread: name of the thread.
    :param read: connects, and reads until :attr:`goes_on` is False or an error is raised. It
        sets ``tries`` of the given backoff to 0 once it is connected.
    :param lost: called with the error that ended ``read``.
    :param close: closes the connection; called after every ``read``.
    :param app_exists: returns False once the app is gone; the thread then stops.
    :param ended: called if the thread ends without :meth:`stop`.
    """

    def __init__(
        self,
        *,
        failed: str,
        thread: str,
        read: Callable[[Backoff], None],
        lost: Callable[[Exception], None],
        close: Callable[[], None],
        app_exists: Callable[[], bool],
        counters: Counters,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._failed = failed
        self._name = thread
        self._read = read
        self._lost = lost
        self._close = close
        self._app_exists = app_exists
        self._counters = counters
        self._ended = ended
        self._log = BoundedLog(logger)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

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

    @property
    def goes_on(self) -> bool:
        """Return True if the thread should continue to read."""
        return not self._stopping.is_set() and self._app_exists()

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

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        while self.goes_on:
            try:
                self._read(backoff)
            except OUTAGE as error:
                self._lost(error)
            except Exception as error:
                # A defect must not end the thread: the node would receive no more events.
                self._counters.add("reading_failed")
                self._log.error("failed", self._failed, exc_info=error)
                self._lost(error)
            finally:
                self._close()

            self._stopping.wait(backoff.next())

        if not self.is_stopping:
            self._ended()
