"""A thread that reads until it is told otherwise, and connects again whenever that ends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from ..logs import BoundedLog, Counters, get_logger
from .connections import OUTAGE

logger = get_logger(__name__)

#: Seconds before the first retry.
FIRST = 0.1


class Backoff:
    """Doubles from 0.1 s up to ``most`` seconds, with jitter so that workers do not return as one.

    Jitter takes up to half of each wait away, as in "equal jitter" of the AWS Architecture
    Blog's article on exponential backoff.
    """

    def __init__(self, *, most: float) -> None:
        self._most = most
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait now."""
        wait: float = min(self._most, FIRST * 2 ** min(self._tries, 30))
        self._tries += 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing

    def reset(self) -> None:
        """Begin again, after a success."""
        self._tries = 0


#: Seconds between tries to connect, at most.
MOST_BACKOFF = 1.0


class Reading:
    """Runs ``read`` in a thread, again and again.

    :param failed: what the log says of a defect.
    :param read: connects and reads until :attr:`goes_on` is false, or raises; resets the backoff
        it is given when it gets through.
    :param lost: told why reading ended; called with an outage, or a defect.
    :param close: closes the connection, however reading ended.
    :param wanted: whether there still is what the events are for.
    :param ended: called when the thread ends though nobody said to stop.
    """

    def __init__(
        self,
        *,
        failed: str,
        thread: str,
        read: Callable[[Backoff], None],
        lost: Callable[[Exception], None],
        close: Callable[[], None],
        wanted: Callable[[], bool],
        counters: Counters,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._failed = failed
        self._name = thread
        self._read = read
        self._lost = lost
        self._close = close
        self._wanted = wanted
        self._counters = counters
        self._ended = ended
        self._log = BoundedLog(logger)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return threading.current_thread() is self._thread

    @property
    def lives(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    @property
    def goes_on(self) -> bool:
        """Whether there is more to read."""
        return not self.is_stopping and self._wanted()

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait so long, or until it is told to stop."""
        self._stopping.wait(seconds)

    def stop(self) -> None:
        """Let the thread end."""
        self._stopping.set()

    def end(self, deadline: float) -> None:
        """Wait for the thread's end until the deadline; it may look for a host that is away."""
        if self._thread is not None:
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: end what came along of it."""
        # Another thread of the parent may hold the lock of the one that was inherited.
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
                # A defect of ours, or of what answers: to read no more would be worse.
                self._counters.add("reading_failed")
                self._log.error("failed", self._failed, exc_info=error)
                self._lost(error)
            finally:
                self._close()

            self._stopping.wait(backoff.next())

        if not self.is_stopping:
            self._ended()
