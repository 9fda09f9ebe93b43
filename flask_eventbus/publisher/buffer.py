"""Hold the events of a node in memory until they are written to Redis."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

from .message import Message

#: Size limit of the buffer in bytes. ``EVENTBUS_BUFFER_SIZE`` limits the number of events.
MAX_BYTES = 64 * 1024 * 1024

#: Largest number of events in a queue whose bytes are not counted yet, and largest size of each.
UNCOUNTED_EVENTS = 1_000
UNCOUNTED_BYTES = 4 * 1024

#: Places that are kept free for threads that add an event at the same moment without the lock.
SPARE_PLACES = 100


class Buffer:
    """Holds the events of a node until they are written, in the order in which they were sent.

    Channel events and stream events have a queue each, so that the oldest channel event is found
    fast. The limits apply to both queues together. While streams are paused, the limits apply to
    channel events alone.

    While there is much room, senders add events without the lock. Otherwise many threads would wait
    for it in turn at each event, and each wait costs two switches between threads. The bytes of
    these events are counted later, under the lock. The queues are therefore nearly, but not
    exactly, in the order of the numbers of events: two threads that send at the same moment may add
    their events in the other order.

    A signal handler or a finalizer may send an event while its own thread holds the lock. The lock
    is therefore reentrant, and each statement leaves the buffer in a valid state. An event gets its
    ``seq`` only when it leaves its queue.

    :param most_events: largest number of events.
    :param most_bytes: largest size of all events, in bytes.
    """

    def __init__(self, *, most_events: int, most_bytes: int = MAX_BYTES) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        #: Guards the state of the writer, and the queues; events are also added without it.
        self.lock = threading.RLock()
        #: Condition on :attr:`lock`; notified when events have left, and by the writer.
        self.changed = threading.Condition(self.lock)
        self.channels = MessageQueue()
        self.streams = MessageQueue()
        #: True while Redis accepts no writes; only channel events are then taken.
        self.streams_paused = False
        #: The batch that is being written.
        self.in_flight: Sequence[Message] = ()
        #: Number of threads that wait for events to leave.
        self._waiting = 0
        #: Number of uncounted events that fit into each queue in any case.
        self._free = 0
        #: Number of batches that have left. If it grows during a wait, Redis is slow but present.
        self.departures = 0

    def __len__(self) -> int:
        return len(self.channels.events) + len(self.streams.events) + len(self.in_flight)

    def __iter__(self) -> Iterator[Message]:
        waiting = [*self.channels.events, *self.streams.events]
        return iter([*self.in_flight, *sorted(waiting, key=attrgetter("number"))])

    @property
    def bytes(self) -> int:
        """Size in bytes of the events that are not in flight."""
        channels, streams = self.channels, self.streams
        uncounted = sum(channels.uncounted) + sum(streams.uncounted)
        return channels.counted + streams.counted + uncounted

    @property
    def is_locked_here(self) -> bool:
        """Return True if the calling thread holds the lock, as below a signal handler."""
        # The condition asks its lock for this too; there is no public name for it.
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]

    @property
    def is_empty(self) -> bool:
        """Return True if both queues are empty, paused streams included."""
        return not (self.channels.events or self.streams.events)

    def next_sender(self) -> Message | None:
        """Return the first event whose blocked sender may be woken to write the next batch."""
        waiting = [*self.channels.events] if self.streams_paused else self
        return next((message for message in waiting if message.may_write), None)

    def is_full(self, size: int) -> bool:
        """Return True if an event of ``size`` bytes may not fit."""
        return len(self) + 1 >= self._most_events or self.bytes + size > self._most_bytes

    def has_much_room(self, message: Message) -> bool:
        """Return True if an event fits in any case, also if other threads add events meanwhile.

        Such an event can be added without the lock.
        """
        queue = self.streams if message.route_state.is_stream else self.channels
        return len(queue.uncounted) < self._free and message.size <= UNCOUNTED_BYTES

    def has_room(self, message: Message, *, drops_channels: bool = False) -> bool:
        """Return True if an event fits; an event of any size fits into an empty buffer.

        The caller holds the lock.

        :param drops_channels: True if all channel events would be dropped for it.
        """
        self._count()

        # This counts all events, so an event that fits here fits in any case.
        if (
            len(self.channels.events) + len(self.streams.events) + len(self.in_flight)
            < self._most_events
            and self.channels.bytes + self.streams.bytes + message.size <= self._most_bytes
        ):
            return True

        queued = size = in_flight = 0

        if not drops_channels:
            queued, size = len(self.channels.events), self.channels.bytes

        if not self.streams_paused or message.route_state.is_stream:
            queued += len(self.streams.events)
            size += self.streams.bytes
            in_flight = len(self.in_flight)

        fits = queued + in_flight < self._most_events and size + message.size <= self._most_bytes
        return fits or not queued

    def put(self, message: Message) -> None:
        """Append an event without checking the limits, with the lock or without it."""
        queue = self.streams if message.route_state.is_stream else self.channels
        queue.events.append(message)
        queue.uncounted.append(message.size)

    def take_back(self, message: Message) -> bool:
        """Remove an event that was added after the end; return False if it has left its queue.

        It is then accepted: it leaves with its batch, or has left.
        """
        with self.changed:
            is_removed = self._queue_of(message).remove(message)
            message.promised = not is_removed

            if is_removed and self._waiting:
                self.changed.notify_all()

            return is_removed

    def _count(self) -> None:
        """Count the bytes of the events that were added, and how many more fit in any case."""
        # Until the room is known, other threads add no event without the lock.
        self._free = 0
        events = len(self.in_flight)
        size = 2 * UNCOUNTED_EVENTS * UNCOUNTED_BYTES

        for queue in (self.channels, self.streams):
            if queue.uncounted:
                queue.count()

            events += len(queue.events)
            size += queue.counted

        places = self._most_events - events - SPARE_PLACES
        self._free = min(places // 2, UNCOUNTED_EVENTS) if size <= self._most_bytes else 0

    def drop_oldest(self) -> Message | None:
        """Remove and return the oldest queued channel event; ``None`` if there is none.

        The event gets a ``seq``, so that listeners detect the gap.
        """
        while self.channels.events:
            try:
                oldest = self.channels.events[0]
            except IndexError:
                return None  # a signal handler has just dropped it

            # False if a signal handler has dropped it in the meantime.
            if self.channels.remove(oldest):
                oldest.assign_seq()
                return oldest

        return None

    def take(
        self, most_events: int, most_bytes: int, *, tries_stream: bool = False
    ) -> Sequence[Message]:
        """Move the next events from their queues to :attr:`in_flight`, and return them.

        They stay in flight until :meth:`finish` or :meth:`put_back`.

        :param tries_stream: True to take stream events alone, although streams may be paused.
        """
        batch: list[Message] = []
        channels, streams = self.channels, self.streams
        size = 0
        # Each event joins the batch before it leaves its queue, so that none is lost if a signal
        # handler raises here.
        self.in_flight = batch
        self._count()

        while len(batch) < most_events and size < most_bytes:
            takes_channel = channels.events and not tries_stream
            takes_stream = streams.events and (tries_stream or not self.streams_paused)

            if takes_channel and takes_stream:
                queue = _older(channels, streams)
            elif takes_channel:
                queue = channels
            elif takes_stream:
                queue = streams
            else:
                break

            try:
                head = queue.events[0]
            except IndexError:
                # A signal handler has just dropped it.
                continue

            batch.append(head)

            # A signal handler may have dropped it in the meantime.
            if not queue.remove(head) or head.withdrawn:
                batch.pop()
                continue

            size += head.size

            if queue is not streams:
                head.assign_seq()

        return batch

    def mark_sent(self) -> Sequence[Message]:
        """Mark the batch in flight as sent, and return it without withdrawn events."""
        with self.lock:
            kept = []

            for message in self.in_flight:
                if not message.withdrawn:
                    message.unanswered += 1
                    kept.append(message)

            self.in_flight = kept
            return kept

    def withdraw(self, message: Message) -> None:
        """Remove an event whose sender gets an error; one in flight leaves with its batch."""
        with self.changed:
            message.withdrawn = True

            if self._queue_of(message).remove(message) and self._waiting:
                self.changed.notify_all()

    def put_back(self, left: Sequence[Message] | None = None) -> None:
        """End the batch in flight; put it back at the front of the queues.

        Withdrawn events leave the buffer.

        :param left: the events to put back, if not all of the batch.
        """
        with self.changed:
            for message in reversed(self.in_flight if left is None else left):
                if not message.withdrawn:
                    self._queue_of(message).push(message)

            self.in_flight = ()

    def finish(self, held: Sequence[Message] = ()) -> None:
        """End the batch in flight.

        :param held: events that Redis did not accept; they return to the front of the queues.
        """
        with self.lock:
            if held:
                self.put_back(held)

            self.in_flight = ()
            self.departures += 1

            if self._waiting:
                self.changed.notify_all()

    def clear(self, *, flushed: bool = False) -> list[Message]:
        """Remove and return all events, the batch in flight included.

        :param flushed: True if all events sent before the end have left. Those that were added
            since are left to their senders, which :meth:`take_back` them, unless they could not.
        """
        with self.changed:
            left = list(self.in_flight)
            queued = self.channels.clear() + self.streams.clear()
            self.finish()

            if flushed:
                for message in queued:
                    if not message.promised:
                        self.put(message)

                queued = [message for message in queued if message.promised]

        return left + sorted(queued, key=attrgetter("number"))

    def wait_for_room(self, message: Message, timeout: float) -> bool:
        """Return True if an event fits within ``timeout`` seconds."""
        return self._wait_for(lambda: self.has_room(message), timeout)

    def wait_until_left(self, number: int, timeout: float) -> bool:
        """Return True if all events up to ``number`` have left within ``timeout`` seconds."""
        with self.changed:
            return self._wait_for(lambda: self._first_number > number, timeout)

    @property
    def _first_number(self) -> float:
        queues = (self.in_flight, self.channels.events, self.streams.events)
        return min((queue[0].number for queue in queues if queue), default=float("inf"))

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._waiting += 1

        try:
            return self.changed.wait_for(condition, timeout)
        finally:
            self._waiting -= 1

    def _queue_of(self, message: Message) -> MessageQueue:
        return self.streams if message.route_state.is_stream else self.channels


class MessageQueue:
    """A queue of channel events or of stream events, and their size in bytes.

    Only events are added without the lock of the buffer. The bytes are the sum of those counted and
    those uncounted; it does not matter in which order events are counted and removed.
    """

    __slots__ = ("counted", "events", "uncounted")

    def __init__(self) -> None:
        self.events: deque[Message] = deque()
        self.counted = 0
        #: The sizes of events that are not counted yet.
        self.uncounted: deque[int] = deque()

    @property
    def bytes(self) -> int:
        """Size of the events in bytes."""
        return self.counted + sum(self.uncounted)

    def count(self) -> None:
        """Count the bytes of the events that were added."""
        while self.uncounted:
            try:
                size = self.uncounted.popleft()
            except IndexError:
                return  # a signal handler has counted it

            self.counted += size

    def push(self, message: Message) -> None:
        """Put an event back at the front."""
        self.events.appendleft(message)
        self.counted += message.size

    def remove(self, message: Message) -> bool:
        """Remove an event; return False if it is no longer in the queue."""
        try:
            self.events.remove(message)
        except ValueError:
            return False

        self.counted -= message.size
        return True

    def clear(self) -> list[Message]:
        """Remove and return all events."""
        removed: list[Message] = []

        while self.events:
            try:
                head = self.events[0]
            except IndexError:
                break  # a signal handler has removed it

            removed.append(head)

            if not self.remove(head):
                removed.pop()

        return removed


def _older(channels: MessageQueue, streams: MessageQueue) -> MessageQueue:
    """Return the queue whose first event was sent earlier; both have events."""
    try:
        is_older = channels.events[0].number < streams.events[0].number
    except IndexError:
        # A signal handler has just dropped one of the two; take() looks again.
        return channels

    return channels if is_older else streams
