"""The threads in which receivers run, and the events that wait for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from zlib import crc32

from ..config import Config
from ..coroutines import kept_loop
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..signals import emit, events_dropped
from .delivery import Delivery
from .dispatcher import Dispatcher

logger = get_logger(__name__)

#: Events that wait at most, and the memory that they take: what Redis would otherwise hold for
#: a slow reader, before it cuts it off at 32 MB.
MOST_EVENTS = 10_000
MOST_BYTES = 64 * 1024 * 1024

#: Events a dispatching thread takes at once when it is alone.
BATCH = 64

#: Bytes of memory after which it takes no more at once.
BATCH_BYTES = 1024 * 1024


class Inbox:
    """A bounded line of events; when it is full, the oldest give way.

    On a channel the newest word counts: a cache that hears late hears the last price.

    :param work: notified when there is something for the takers; its lock guards the line,
        together with what else they wait for.
    :param rest: a condition of the same lock, notified when nothing is left.
    """

    def __init__(
        self,
        work: threading.Condition,
        rest: threading.Condition,
        *,
        most_events: int = MOST_EVENTS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._work = work
        self._rest = rest
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._taken = 0
        #: Whether its takers are to end once nothing is left.
        self.closed = False

    def __len__(self) -> int:
        return len(self._events) + self._taken

    def put(self, batch: Sequence[tuple[Event, int]]) -> int:
        """Add events with the memory they take; return how many older ones gave way."""
        with self._work:
            self._events.extend(batch)
            self._bytes += sum(size for _, size in batch)
            dropped = self._trim()
            self._work.notify(len(batch))

        return dropped

    def pick(self, most: int = BATCH) -> list[Event]:
        """Some events, in order; each is to be given back to :meth:`done`.

        The caller holds the lock.
        """
        picked: list[Event] = []
        room = BATCH_BYTES

        while self._events and len(picked) < most and room > 0:
            event, size = self._events.popleft()
            picked.append(event)
            room -= size

        self._bytes -= BATCH_BYTES - room
        self._taken += len(picked)
        return picked

    def done(self, count: int) -> None:
        """Tell that ``count`` events which were taken are dispatched."""
        with self._work:
            self._taken -= count

            if not self._taken and not self._events:
                self._rest.notify_all()

    def close(self) -> None:
        """Let the takers end once nothing is left."""
        with self._work:
            self.closed = True
            self._work.notify_all()

    def clear(self) -> int:
        """Drop what waits, and return how many events that was."""
        with self._work:
            count = len(self._events)
            self._events.clear()
            self._bytes = 0

        return count

    def _trim(self) -> int:
        dropped = 0

        while len(self._events) > self._most_events or (
            self._bytes > self._most_bytes and len(self._events) > 1
        ):
            _, size = self._events.popleft()
            self._bytes -= size
            dropped += 1

        return dropped


#: Deliveries of streams that a thread takes at once when it is alone: they are settled together.
DELIVERIES = 512

#: Seconds that threads get to end once nothing is left for them: an event loop closes.
END = 1.0


class WorkerThreads:
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
        return len(self._inbox) + len(self.queue)

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
        emit(events_dropped, self._config.service, where="inbox", count=dropped)

    def close(self) -> None:
        """Let the threads end by themselves, once nothing waits for them."""
        self._inbox.close()

    def finish(self, deadline: float) -> None:
        """Let receivers have what waits on channels, and what runs, until the deadline."""
        self.queue.clear()

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
        self.queue.close()

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
        self.queue = DeliveryQueue(self._work, self._rest, width=self._config.concurrency)

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

                if self._stream_next and (deliveries := self.queue.pick(number, most_deliveries)):
                    return [], deliveries

                if events := self._inbox.pick(most):
                    return events, []

                if deliveries := self.queue.pick(number, most_deliveries):
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
            self.queue.done(deliveries, time.monotonic() - begin)

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


#: Seconds of work that one process takes on ahead: what others could do meanwhile, if it is slow.
AHEAD = 0.25

#: Deliveries that wait at most, however fast they are handled.
MOST_AHEAD = 1_000

#: Bytes of memory that deliveries take at most which wait or run.


#: Entries of one stream that are asked for at once: of the largest events that
#: ``EVENTBUS_MAX_EVENT_BYTES`` allows by default, those are :data:`MOST_BYTES`.
MOST_READ = 64

#: Bytes that one answer is to have at most, by the largest entry of those before: Redis cuts off a
#: client whose answer is larger than ``client-output-buffer-limit normal``.
READ_BYTES = 16 * 1024 * 1024

#: Bytes of memory after which a thread takes no more deliveries at once.
PICK_BYTES = 4 * 1024 * 1024

#: Seconds that handling is taken to last before the first was handled.
GUESS = 0.02

_MEMORY = attrgetter("memory")


class Portions:
    """How many entries to ask Redis for, so that they fit into memory.

    Redis counts entries, not bytes: the largest of the last answers stands for those to come.

    :param max_bytes: the size of the largest event: what the first answer may be full of.
    :param most: bytes that one answer is to have at most.
    """

    def __init__(self, *, max_bytes: int, most: int = READ_BYTES) -> None:
        self._max_bytes = max_bytes
        self._most = most
        self._largest = max_bytes

    def count(self, *, room: int, memory: int, streams: int) -> int:
        """How many entries of each of so many streams.

        :param room: how many deliveries may be added.
        :param memory: the bytes that those take which are there.
        """
        fitting = min(MOST_BYTES - memory, self._most) // self._largest
        return max(1, min(MOST_READ, min(room, fitting) // streams))

    def note(self, sizes: Iterable[int]) -> None:
        """Note the sizes in bytes of the events of an answer; of none, if it is empty."""
        # What comes after a pause may be anything.
        self._largest = max(1, self._largest // 8, max(sizes, default=self._max_bytes))


class DeliveryQueue:
    """A line for each thread, and one for all: a key's events wait in the same line.

    Nothing is dropped here: whoever reads looks at :attr:`room` first.

    :param work: notified when there is something for the threads; its lock guards the lines,
        together with what else the threads wait for.
    :param rest: a condition of the same lock, notified when something is done.
    :param width: how many threads there are.
    """

    def __init__(self, work: threading.Condition, rest: threading.Condition, *, width: int) -> None:
        self._work = work
        self._rest = rest
        self._width = width
        self._line: deque[Delivery] = deque()
        self._own: list[deque[Delivery]] = [deque() for _ in range(width)]
        self._own_next = [True] * width
        self._waiting = 0
        self._taken = 0
        #: The bytes of memory that all of them take, about.
        self.memory = 0
        #: Seconds that one delivery lasts, about.
        self._pace = GUESS
        self._closed = False
        #: How many threads are at it, and whether all of them have been for long.
        self._busy = 0
        self._held = False

    def __len__(self) -> int:
        return self._waiting + self._taken

    @property
    def room(self) -> int:
        """How many more may be read: as much as is handled in :data:`AHEAD` seconds.

        Nothing while what is here takes :data:`MOST_BYTES`, unless a thread has nothing to do.
        """
        if self._held or (self.is_heavy and self._waiting):
            return 0

        ahead = int(self._width * AHEAD / max(self._pace, 1e-9))
        return min(max(ahead, self._width), MOST_AHEAD) - self._waiting

    @property
    def is_heavy(self) -> bool:
        """Return True if what is here takes as much memory as it may."""
        return self.memory >= MOST_BYTES

    def wait_for_room(self, timeout: float) -> bool:
        """Whether more may be read within ``timeout`` seconds."""
        with self._rest:
            return self._rest.wait_for(lambda: self._is_inviting, timeout)

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """Add deliveries, in order; after the end nothing is added, and they are handed back."""
        if not deliveries:
            return

        with self._work:
            if self._closed:
                return

            for delivery in deliveries:
                self._line_of(delivery).append(delivery)

            self._waiting += len(deliveries)
            self.memory += sum(map(_MEMORY, deliveries))
            # Which thread is to wake is a matter of keys.
            self._work.notify_all()

    def pick(self, number: int, most: int) -> list[Delivery]:
        """Some that thread ``number`` is to handle; to be given back to :meth:`done`.

        The caller holds the lock.
        """
        own, line = self._own[number], self._line

        # Turn about, so that neither waits for an end of the other.
        if own and (self._own_next[number] or not line):
            line = own

        self._own_next[number] = line is not own
        picked: list[Delivery] = []
        room = PICK_BYTES

        while line and len(picked) < most and room > 0:
            picked.append(line.popleft())
            room -= picked[-1].memory

        self._waiting -= len(picked)
        self._taken += len(picked)
        self._busy += bool(picked)
        return picked

    def done(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Tell that what was picked is handled, and how long that took."""
        count = len(deliveries)

        with self._rest:
            self._taken -= count
            self.memory -= sum(map(_MEMORY, deliveries))
            self._busy -= 1
            # Slow at once, fast by and by: a single slow one is a reason to read less.
            pace = seconds / count
            self._pace = max(pace, 0.7 * self._pace + 0.3 * pace)
            self._held = False

            if self._is_inviting or not len(self):
                self._rest.notify_all()

    def hold(self) -> bool:
        """If all threads are busy, let nothing be read until one is done; whether they are."""
        with self._rest:
            self._held = self._busy >= self._width
            return self._held

    def clear(self) -> list[Delivery]:
        """Give up what waits, and return it."""
        with self._rest:
            left = [delivery for line in (*self._own, self._line) for delivery in line]

            for line in (*self._own, self._line):
                line.clear()

            self._waiting = 0
            self.memory -= sum(map(_MEMORY, left))
            self._rest.notify_all()

        return left

    def close(self) -> None:
        """Take nothing more, and let nobody wait for room."""
        with self._rest:
            self._closed = True
            self._rest.notify_all()

    @property
    def _is_inviting(self) -> bool:
        # Half empty, so that each read is worth its round trip.
        return self._closed or (
            self.room > self._waiting and (self.memory < MOST_BYTES // 2 or not self._waiting)
        )

    def _line_of(self, delivery: Delivery) -> deque[Delivery]:
        if delivery.event.key is None or self._width == 1:
            return self._line

        name = f"{delivery.name}\0{delivery.event.key}"
        return self._own[crc32(name.encode(errors="replace")) % self._width]
