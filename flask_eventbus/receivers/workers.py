"""The worker threads that run receivers, and the queues of events that wait for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from zlib import crc32

from ..coroutines import kept_loop
from ..event import Event
from ..logs import BoundedLog, get_logger
from ..signals import emit, events_dropped
from ..transport.connections import Context
from .delivery import Delivery
from .dispatcher import Dispatcher

logger = get_logger(__name__)

#: Maximum number of queued events, and their maximum memory use in bytes. Events that are not
#: read stay in the output buffer of Redis, which disconnects a subscriber at 32 MB.
MAX_EVENTS = 10_000
MAX_BYTES = 64 * 1024 * 1024

#: Maximum number of channel events that a single worker thread takes at once.
BATCH = 64

#: Memory use in bytes above which it takes no more events at once.
BATCH_BYTES = 1024 * 1024


class EventQueue:
    """A bounded queue of channel events; when it is full, the oldest events are dropped.

    On a channel the newest events matter most: a slow price display shows the latest price.

    :param work: notified when an event is added. Its lock guards this queue and the other queues
        of the threads.
    :param rest: a condition with the same lock, notified when no event is left.
    """

    def __init__(
        self,
        work: threading.Condition,
        rest: threading.Condition,
        *,
        most_events: int = MAX_EVENTS,
        most_bytes: int = MAX_BYTES,
    ) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._work = work
        self._rest = rest
        #: The events that wait.
        self.waiting: deque[Event] = deque()
        #: The memory use of each of them, in bytes.
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._taken = 0
        #: True if the worker threads should end once the queue is empty.
        self.closed = False

    def __len__(self) -> int:
        return len(self.waiting) + self._taken

    def put(self, events: Sequence[Event], sizes: Sequence[int]) -> int:
        """Add events; return how many were dropped.

        :param sizes: the memory use of each event, in bytes.
        """
        dropped = 0

        with self._work:
            self.waiting.extend(events)
            self._sizes.extend(sizes)
            self._bytes += sum(sizes)

            while len(self.waiting) > self._most_events or (
                self._bytes > self._most_bytes and len(self.waiting) > 1
            ):
                self.waiting.popleft()
                self._bytes -= self._sizes.popleft()
                dropped += 1

            self._work.notify(len(events))

        return dropped

    def pick(self, most: int = BATCH) -> list[Event]:
        """Remove and return events, in order. Call :meth:`done` with their number later.

        The caller holds the lock.

        :param most: maximum number of events.
        """
        picked: list[Event] = []
        room = BATCH_BYTES

        while self.waiting and len(picked) < most and room > 0:
            picked.append(self.waiting.popleft())
            room -= self._sizes.popleft()

        self._bytes -= BATCH_BYTES - room
        self._taken += len(picked)
        return picked

    def done(self, count: int) -> bool:
        """Report that ``count`` of the events that were taken are dispatched.

        :return: True if no event is left.
        """
        with self._work:
            self._taken -= count
            is_empty = not self._taken and not self.waiting

            if is_empty:
                self._rest.notify_all()

        return is_empty

    def close(self) -> None:
        """Let the worker threads end once the queue is empty."""
        with self._work:
            self.closed = True
            self._work.notify_all()

    def clear(self) -> int:
        """Drop all queued events, and return their number."""
        with self._work:
            count = len(self.waiting)
            self.waiting.clear()
            self._sizes.clear()
            self._bytes = 0

        return count


#: Maximum number of stream deliveries that a single worker thread takes at once. They are
#: acknowledged together.
DELIVERIES = 512

#: Seconds to wait for the threads to end once the queues are empty, while event loops close.
END = 1.0


class WorkerThreads:
    """``EVENTBUS_CONCURRENCY`` worker threads; a single thread keeps the order of events.

    The threads take work from two queues. When the queue of channel events is full, the oldest
    events are dropped. Stream deliveries that wait when the threads end are released.
    """

    def __init__(self, context: Context, dispatcher: Dispatcher) -> None:
        self._config = context.config
        self._dispatcher = dispatcher
        self._counters = context.counters
        self._timing = context.timing
        self._node = context.node
        self._log = BoundedLog(logger)
        self._make_queues()
        self._stream_next = True
        #: True if events were dropped since the queue of channel events was last empty.
        self._is_dropping = False
        self._forced = False
        #: Number of channel events that the single thread has taken and not started.
        self._not_started = 0
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self._event_queue) + len(self.queue)

    @property
    def is_own_thread(self) -> bool:
        """Return True if the calling thread is a worker thread."""
        return threading.current_thread() in self._threads

    def start(self, handle: Callable[[Sequence[Delivery]], float]) -> None:
        """Start the threads unless they were started before.

        :param handle: runs the receivers of stream deliveries and acknowledges them; returns the
            seconds that the receivers took.
        """
        if self._threads:
            return

        for number in range(self._config.concurrency):
            name = f"eventbus-receiver-{number}-{self._node}"
            thread = threading.Thread(
                target=self._run, args=(number, handle), name=name, daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def put(self, events: Sequence[Event], sizes: Sequence[int]) -> None:
        """Queue channel events.

        :param sizes: the memory use of each event, in bytes.
        """
        dropped = self._event_queue.put(events, sizes)

        if not dropped:
            return

        self._is_dropping = True
        self._counters.add("dropped", dropped)
        self._log.warning(
            "dropped",
            "Receivers are slower than events come. The oldest queued events are dropped; health() "
            "counts them. Raise 'EVENTBUS_CONCURRENCY', or make the receivers faster.",
        )
        emit(events_dropped, self._config.service, where="inbox", count=dropped)

    def close(self) -> None:
        """Let the threads end once the queues are empty."""
        self._event_queue.close()

    def finish(self, deadline: float) -> None:
        """Run the queued channel events until the deadline, and drop queued deliveries.

        :param deadline: monotonic time.
        """
        self.queue.clear()

        with self._rest:
            left = max(0.0, deadline - time.monotonic())
            in_time = self._rest.wait_for(lambda: not len(self), left)

        if not in_time:
            self._force()

        self.close()

    def end(self, deadline: float) -> None:
        """Wait up to :data:`END` seconds for the threads to end, and not past the deadline.

        :param deadline: monotonic time.
        """
        # After the grace, receivers may run on for long: do not wait for them.
        end = time.monotonic() + (0.1 if self._forced else END)

        for thread in self._threads:
            thread.join(timeout=max(0.0, min(end, deadline) - time.monotonic()))

    def disown(self) -> None:
        """Drop all work; call it in a forked child, which may be a fork of a worker thread."""
        self._forced = True
        # A thread of the parent may have held the inherited lock.
        self._make_queues()
        self._event_queue.close()
        self.queue.close()

    def _make_queues(self) -> None:
        lock = threading.RLock()
        self._work = threading.Condition(lock)
        self._rest = threading.Condition(lock)
        self._event_queue = EventQueue(self._work, self._rest)
        #: The queue of stream deliveries.
        self.queue = DeliveryQueue(
            self._work, self._rest, width=self._config.concurrency, most=self._timing.max_ahead
        )

    def _force(self) -> None:
        self._forced = True
        left = self._event_queue.clear() + self._not_started
        self._counters.add("dropped", left)
        logger.error(
            "Receivers were still running after the grace of %g s. Stream events are delivered "
            "again; %d channel events that had arrived are lost. Raise 'EVENTBUS_GRACE', or make "
            "the receivers faster.",
            self._config.grace,
            left,
        )

    def _run(self, number: int, handle: Callable[[Sequence[Delivery]], float]) -> None:
        alone = self._config.concurrency == 1
        handled = self._counters.tally("handled")

        with kept_loop():
            while True:
                events, deliveries = self._take(number, alone)

                if deliveries:
                    self._handle_all(deliveries, handle)
                elif events:
                    self._dispatcher.dispatch_all(self._to_run(events), handled)

                    if self._event_queue.done(len(events)) and self._is_dropping:
                        self._is_dropping = False
                        self._log.over("dropped", "Receivers have caught up; no event is dropped.")
                else:
                    return

                # Free the memory while the thread waits.
                del events, deliveries

    def _take(self, number: int, alone: bool) -> tuple[list[Event], list[Delivery]]:
        """Return the next events or deliveries; two empty lists tell the thread to end."""
        most, most_deliveries = (BATCH, DELIVERIES) if alone else (1, 1)
        events = self._event_queue

        with self._work:
            while True:
                # Alternate between the two queues, so that neither starves.
                self._stream_next = not self._stream_next

                if self.queue.waiting and (self._stream_next or not events.waiting):
                    deliveries = self.queue.pick(number, most_deliveries)

                    # None if all of them wait in the lines of other threads.
                    if deliveries:
                        return [], deliveries

                if events.waiting:
                    return events.pick(most), []

                if events.closed:
                    return [], []

                self._work.wait()

    def _handle_all(
        self, deliveries: Sequence[Delivery], handle: Callable[[Sequence[Delivery]], float]
    ) -> None:
        seconds = 0.0

        try:
            seconds = handle(deliveries)
        except Exception:
            # A defect must not end the thread. Entries that are not acknowledged stay pending.
            self._counters.add("handling_failed")
            logger.exception("%d stream events were not handled.", len(deliveries))
        finally:
            self.queue.done(deliveries, seconds)

    def _to_run(self, events: Sequence[Event]) -> Iterator[Event]:
        """Yield events, until the threads are forced to end."""
        for left, event in zip(range(len(events) - 1, -1, -1), events, strict=True):
            if self._forced:
                return

            # With several threads, each takes one event at a time.
            self._not_started = left
            yield event


#: Seconds of work that a process reads ahead. Other workers could do this work meanwhile.
AHEAD = 0.25

#: Maximum number of entries of one stream in one answer. With the default of
#: ``EVENTBUS_MAX_EVENT_BYTES``, so many of the largest events take :data:`MAX_BYTES`.
MAX_READ = 64

#: Maximum size of one answer in bytes, estimated from the entries before. Redis disconnects a
#: client whose answer exceeds ``client-output-buffer-limit normal``.
READ_BYTES = 16 * 1024 * 1024

#: Memory use in bytes above which a thread takes no more deliveries at once.
PICK_BYTES = 4 * 1024 * 1024

#: Assumed seconds that the receivers of one delivery take, until the first was handled.
GUESS = 0.02


class BatchSize:
    """Computes how many entries to read at once, so that they fit into memory.

    ``COUNT`` limits the number of entries, not their size. The largest entry of the last answers
    is the estimate for the next answer.

    :param max_bytes: maximum size of an event in bytes; the estimate for the first answer.
    :param most: maximum size of an answer in bytes.
    """

    def __init__(self, *, max_bytes: int, most: int = READ_BYTES) -> None:
        self._max_bytes = max_bytes
        self._most = most
        self._largest = max_bytes

    def count(self, *, room: int, memory: int, streams: int) -> int:
        """Return the number of entries to read from each stream.

        :param room: number of deliveries that the queue has room for.
        :param memory: memory use of the present deliveries in bytes.
        :param streams: number of streams to read.
        """
        fitting = min(MAX_BYTES - memory, self._most) // self._largest
        return max(1, min(MAX_READ, min(room, fitting) // streams))

    def update(self, sizes: Iterable[int]) -> None:
        """Update the estimate with the sizes in bytes of the entries of an answer."""
        # After an empty answer, the next entry may have any size.
        self._largest = max(1, self._largest // 8, max(sizes, default=self._max_bytes))


class DeliveryQueue:
    """The queue of stream deliveries: one line for each thread, and one shared by all threads.

    Events with the same key wait in the line of one thread, so that they keep their order. The
    queue drops nothing: a reader checks :attr:`room` before it reads.

    :param work: notified when a delivery is added. Its lock guards this queue and the other queues
        of the threads.
    :param rest: a condition with the same lock, notified when deliveries are done.
    :param width: number of threads.
    :param most: maximum number of queued deliveries.
    """

    def __init__(
        self, work: threading.Condition, rest: threading.Condition, *, width: int, most: int
    ) -> None:
        self._work = work
        self._rest = rest
        self._width = width
        self._most = most
        self._line: deque[Delivery] = deque()
        self._own: list[deque[Delivery]] = [deque() for _ in range(width)]
        self._own_next = [True] * width
        #: Number of deliveries that wait, and of those that threads handle.
        self.waiting = 0
        self._taken = 0
        #: Approximate memory use of all deliveries, in bytes.
        self.memory = 0
        #: Approximate seconds that the receivers of one delivery take.
        self._pace = GUESS
        self._closed = False
        #: Number of threads that handle deliveries.
        self._busy = 0
        #: True while reading pauses, because all threads have been busy for long.
        self._held = False

    def __len__(self) -> int:
        return self.waiting + self._taken

    @property
    def room(self) -> int:
        """Number of deliveries that may be read: those handled in :data:`AHEAD` seconds.

        0 while the deliveries take :data:`MAX_BYTES` of memory and some of them wait.
        """
        if self._held or (self.waiting and self.memory >= MAX_BYTES):
            return 0

        ahead = int(self._width * AHEAD / max(self._pace, 1e-9))
        return min(max(ahead, self._width), self._most) - self.waiting

    def wait_for_room(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds until a read is worth a round trip, and return the room.

        Return 0 if the queue is still too full.
        """
        with self._rest:
            return self._rest.wait_for(self._enough_room, timeout)

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """Add deliveries, in order; add none once the queue is closed."""
        if not deliveries:
            return

        with self._work:
            if self._closed:
                return

            if self._width == 1:
                self._line.extend(deliveries)
            else:
                for delivery in deliveries:
                    self._line_of(delivery).append(delivery)

            for delivery in deliveries:
                self.memory += delivery.memory

            self.waiting += len(deliveries)
            # Wake all threads: the keys decide which of them has work.
            self._work.notify_all()

    def _line_of(self, delivery: Delivery) -> deque[Delivery]:
        key = delivery.event.key

        if key is None:
            return self._line

        name = f"{delivery.name}\0{key}"
        return self._own[crc32(name.encode(errors="replace")) % self._width]

    def pick(self, number: int, most: int) -> list[Delivery]:
        """Remove and return deliveries for thread ``number``. Pass them to :meth:`done` later.

        The caller holds the lock.

        :param most: maximum number of deliveries.
        """
        own, line = self._own[number], self._line

        # Alternate between the two lines, so that neither starves.
        if own and (self._own_next[number] or not line):
            line = own

        self._own_next[number] = line is not own
        picked: list[Delivery] = []
        room = PICK_BYTES

        while line and len(picked) < most and room > 0:
            picked.append(line.popleft())
            room -= picked[-1].memory

        self.waiting -= len(picked)
        self._taken += len(picked)
        self._busy += bool(picked)
        return picked

    def done(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Report that deliveries are handled, and how many seconds their receivers took."""
        count = len(deliveries)

        with self._rest:
            self._taken -= count
            self._busy -= 1

            for delivery in deliveries:
                self.memory -= delivery.memory

            # A slow delivery counts at once and fast ones gradually, so that less is read ahead.
            pace = seconds / count
            self._pace = max(pace, 0.7 * self._pace + 0.3 * pace)
            self._held = False

            if not (self.waiting or self._taken) or self._enough_room():
                self._rest.notify_all()

    def hold(self) -> bool:
        """If all threads are busy, pause reading until one is done, and return True."""
        with self._rest:
            self._held = self._busy >= self._width
            return self._held

    def clear(self) -> None:
        """Remove the deliveries that wait."""
        with self._rest:
            for line in (*self._own, self._line):
                self.memory -= sum(delivery.memory for delivery in line)
                line.clear()

            self.waiting = 0
            self._rest.notify_all()

    def close(self) -> None:
        """Accept no more deliveries, and wake the readers that wait for room."""
        with self._rest:
            self._closed = True
            self._rest.notify_all()

    def _enough_room(self) -> int:
        """Return the room if the queue is half empty, so that a round trip reads many; else 0."""
        room = self.room
        is_half_empty = room > self.waiting and (self.memory < MAX_BYTES // 2 or not self.waiting)
        # A closed queue holds up no reader.
        return max(1, room) if is_half_empty or self._closed else 0
