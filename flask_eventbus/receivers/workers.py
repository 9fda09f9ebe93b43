"""The threads in which receivers run, and the events that wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ..config import Config
from ..coroutines import kept_loop
from ..counters import BoundedLog, Counters
from ..event import Event
from ..lifecycle import tell
from ..logs import get_logger
from ..signals import events_dropped
from .delivery import Delivery
from .dispatcher import Dispatcher
from .inbox import BATCH, Inbox
from .lineup import Lineup

logger = get_logger(__name__)

#: Deliveries of streams that a thread takes at once when it is alone: they are settled together.
DELIVERIES = 512

#: Seconds that threads get to end once nothing is left for them: an event loop closes.
END = 1.0


class Pool:
    """As many threads as ``EVENTBUS_CONCURRENCY``; with one, events keep their order.

    They serve two lines: events of channels, of which the oldest give way when it is full, and
    deliveries of streams, which are handed back when the threads end before they began.

    :param handle: handles deliveries of streams, and settles them.
    """

    def __init__(
        self,
        *,
        config: Config,
        dispatcher: Dispatcher,
        counters: Counters,
        node: str,
        handle: Callable[[Sequence[Delivery]], None],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._counters = counters
        self._node = node
        self._log = BoundedLog(logger)
        self._handle = handle
        self._make_lines()
        self._stream_next = True
        self._forced = False
        #: Events of channels that the only thread has taken and not begun.
        self._not_begun = 0
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self._inbox) + len(self.lineup)

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of them."""
        return threading.current_thread() in self._threads

    def start(self) -> None:
        """Start the threads, once."""
        if self._threads:
            return

        for number in range(self._config.concurrency):
            name = f"eventbus-receiver-{number}-{self._node}"
            thread = threading.Thread(target=self._run, args=(number,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def put(self, batch: Sequence[tuple[Event, int]]) -> None:
        """Let receivers run for events, given with the memory they take, in bytes."""
        dropped = self._inbox.put(batch)

        if not dropped:
            return

        self._counters.add("dropped", dropped)
        self._log.warning(
            "dropped",
            "Receivers are slower than events come: the oldest that wait are dropped. Raise "
            "'EVENTBUS_CONCURRENCY', or make the receivers shorter. health() counts them.",
        )
        tell(events_dropped, self._config.service, where="inbox", count=dropped)

    def close(self) -> None:
        """Let the threads end by themselves, once nothing waits for them."""
        self._inbox.close()

    def finish(self, deadline: float) -> None:
        """Let receivers have what waits on channels, and what runs, until the deadline."""
        self.lineup.clear()

        with self._rest:
            left = max(0.0, deadline - time.monotonic())
            in_time = self._rest.wait_for(lambda: not len(self), left)

        if not in_time:
            self._force()

        self.close()

    def end(self, deadline: float) -> None:
        """Wait for the end of the threads: for a moment, and not longer than to the deadline."""
        # Those that run in vain are not waited for; of the others, an event loop may have to close.
        end = time.monotonic() + (0.1 if self._forced else END)

        for thread in self._threads:
            thread.join(timeout=max(0.0, min(end, deadline) - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: let the thread that forked end, if it is one of these."""
        self._forced = True
        # Another thread of the parent may hold the lock of those that were inherited.
        self._make_lines()
        self._inbox.close()
        self.lineup.close()

    @property
    def is_forced(self) -> bool:
        """Whether the grace is over: nothing is begun any more."""
        return self._forced

    def _make_lines(self) -> None:
        lock = threading.RLock()
        self._work = threading.Condition(lock)
        self._rest = threading.Condition(lock)
        self._inbox = Inbox(self._work, self._rest)
        #: What was read of streams.
        self.lineup = Lineup(self._work, self._rest, width=self._config.concurrency)

    def _force(self) -> None:
        self._forced = True
        left = self._inbox.clear() + self._not_begun
        self._counters.add("dropped", left)
        logger.error(
            "Receivers were still running after the grace of %g s. Events of streams come again, "
            "and %d of channels that had arrived are not handled. Raise 'EVENTBUS_GRACE', or make "
            "the receivers shorter.",
            self._config.grace,
            left,
        )

    def _run(self, number: int) -> None:
        alone = self._config.concurrency == 1

        with kept_loop():
            while True:
                events, deliveries = self._take(number, alone)

                if deliveries:
                    self._handle_all(deliveries)
                elif events:
                    self._dispatch(events)
                    self._inbox.done(len(events))

                    if not len(self._inbox):
                        self._log.over("dropped", "Receivers have caught up; no event is dropped.")
                else:
                    return

                # Not kept while the thread waits for the next.
                del events, deliveries

    def _take(self, number: int, alone: bool) -> tuple[list[Event], list[Delivery]]:
        """What is next, of one line or the other; nothing of both at the end."""
        most, most_deliveries = (BATCH, DELIVERIES) if alone else (1, 1)

        with self._work:
            while True:
                self._stream_next = not self._stream_next

                if self._stream_next and (deliveries := self.lineup.pick(number, most_deliveries)):
                    return [], deliveries

                if events := self._inbox.pick(most):
                    return events, []

                if deliveries := self.lineup.pick(number, most_deliveries):
                    return [], deliveries

                if self._inbox.closed:
                    return [], []

                self._work.wait()

    def _handle_all(self, deliveries: Sequence[Delivery]) -> None:
        begin = time.monotonic()

        try:
            self._handle(deliveries)
        except Exception:
            # A defect: the thread is needed for the next. What was not settled stays pending.
            self._counters.add("handling_failed")
            logger.exception("%d events of streams were not handled.", len(deliveries))
        finally:
            self.lineup.done(deliveries, time.monotonic() - begin)

    def _dispatch(self, events: Sequence[Event]) -> None:
        for position, event in enumerate(events, start=1):
            if self._forced:
                return

            # With several threads, each takes one event at a time.
            self._not_begun = len(events) - position

            try:
                self._dispatcher.dispatch_once(event)
            except Exception:
                logger.exception(
                    "The event %s of %r was not dispatched.",
                    event.id,
                    event.name,
                    extra=event.fields,
                )
