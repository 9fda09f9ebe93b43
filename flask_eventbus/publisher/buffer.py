"""The events of a node that wait to be written, bounded in number and in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ..errors import PublishError
from ..logs import Counters, get_logger
from ..signals import emit, events_dropped
from .message import Message
from .outage import Outage

logger = get_logger(__name__)


#: Bytes that wait in memory at most, whatever ``EVENTBUS_BUFFER_SIZE`` counts.
MOST_BYTES = 64 * 1024 * 1024


class Buffer:
    """The events of a node that wait to be written, in the order in which they were sent.

    Events for channels and events for streams have a line each, so that the oldest channel
    event is found at once, however many stream events wait before it. Both lines are bounded
    together; while stream events are held, channel events have the bound for themselves.

    A signal handler, or a finalizer, may send in the very thread that is in here and holds
    the lock: so it is reentrant, each statement leaves things whole, and an event is counted
    among those of its lane only when it leaves its line.
    """

    def __init__(self, *, most_events: int, most_bytes: int = MOST_BYTES) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        #: Guards the lines.
        self.lock = threading.RLock()
        #: The same lock, where something is awaited: notified when there is room again.
        self.changed = threading.Condition(self.lock)
        self._channels = MessageQueue()
        self._streams = MessageQueue()
        #: True while Redis takes no stream events: channel events do not wait for them.
        self.streams_paused = False
        #: What is being written.
        self._in_flight: Sequence[Message] = ()
        #: Threads that wait for something of it to leave.
        self._waiting = 0
        #: How often something has left: who waits in vain can tell a slow Redis from none.
        self.departures = 0

    def __len__(self) -> int:
        return len(self._channels.events) + len(self._streams.events) + len(self._in_flight)

    def __iter__(self) -> Iterator[Message]:
        waiting = [*self._channels.events, *self._streams.events]
        return iter([*self._in_flight, *sorted(waiting, key=_number)])

    @property
    def bytes(self) -> int:
        """The bytes of those that are not being written."""
        return self._channels.bytes + self._streams.bytes

    @property
    def is_waiting(self) -> bool:
        """Return True if there is something to write now that is not being written."""
        return bool(self._channels.events or (self._streams.events and not self.streams_paused))

    @property
    def is_empty(self) -> bool:
        """Return True if nothing waits, not even what is held."""
        return not (self._channels.events or self._streams.events)

    @property
    def in_flight(self) -> Sequence[Message]:
        """What is being written."""
        return self._in_flight

    @property
    def has_channel_events(self) -> bool:
        """Whether something waits for those who listen now."""
        return bool(self._channels.events)

    @property
    def has_stream_events(self) -> bool:
        """Whether something waits for a stream."""
        return bool(self._streams.events)

    def next_sender(self) -> Message | None:
        """The first event whose sender would write what may be written now."""
        waiting = self._channels.events if self.streams_paused else self
        return next((message for message in waiting if message.may_write), None)

    def is_full(self, size: int) -> bool:
        """Return True if an event of ``size`` bytes may not fit."""
        return len(self) + 1 >= self._most_events or self.bytes + size > self._most_bytes

    def has_room(self, message: Message) -> bool:
        """Return True if an event fits; one that is larger than all has the buffer alone."""
        if self.streams_paused and not message.route_state.is_stream:
            return self._channels.has_room(message.size, self._most_events, self._most_bytes)

        fits = len(self) < self._most_events and self.bytes + message.size <= self._most_bytes
        return fits or self.is_empty

    def put(self, message: Message) -> None:
        """Add an event at the end, whether there is room or not."""
        self._queue_of(message).append(message)

    def can_make_room(self, message: Message) -> bool:
        """Return True if an event fits once everything is dropped that may be."""
        if self.streams_paused and not message.route_state.is_stream:
            return True

        kept = self._streams
        count = len(kept.events) + len(self._in_flight)
        fits = count < self._most_events and kept.bytes + message.size <= self._most_bytes
        return fits or not kept.events

    def drop_oldest(self) -> Message | None:
        """Give up the oldest channel event that is not being written.

        Its number is missed by others. What goes into a stream is never given up.
        """
        while oldest := self._channels.first():
            # Unless whoever interrupts this dropped it.
            if self._channels.remove(oldest):
                oldest.assign_seq()
                return oldest

        return None

    def take(self, *, most_events: int, most_bytes: int) -> Sequence[Message]:
        """Take the next events in hand, until :meth:`settle` or :meth:`put_back`."""
        batch: list[Message] = []
        size = 0
        # Now, and each before it leaves its line: who is interrupted here loses none.
        self._in_flight = batch

        while len(batch) < most_events and size < most_bytes and (head := self._head()):
            batch.append(head)

            # Whoever interrupts this may have dropped it.
            if not self._queue_of(head).remove(head) or head.withdrawn:
                batch.pop()
            else:
                head.assign_seq()
                size += head.size

        return batch

    def mark_sent(self) -> Sequence[Message]:
        """Note that what is in hand is being sent, and return it.

        What its sender withdrew meanwhile is not sent.
        """
        with self.lock:
            if any(message.withdrawn for message in self._in_flight):
                self._in_flight = [message for message in self._in_flight if not message.withdrawn]

            for message in self._in_flight:
                message.unanswered += 1

            return self._in_flight

    def take_stream_event(self) -> Sequence[Message]:
        """Take the first stream event in hand, though such events are held."""
        batch: list[Message] = []
        self._in_flight = batch

        while not batch and (first := self._streams.first()):
            batch.append(first)

            if not self._streams.remove(first) or first.withdrawn:
                batch.pop()

        return batch

    def put_back(self, left: Sequence[Message] | None = None) -> None:
        """Put what is in hand, or what is left of it, back to the heads of the lines."""
        with self.changed:
            for message in reversed(self._in_flight if left is None else left):
                self._queue_of(message).push(message)

            self._in_flight = ()

    def finish(self, held: Sequence[Message] = ()) -> None:
        """Let go of what is in hand.

        :param held: what Redis does not take now: it goes back to the heads of the lines.
        """
        with self.lock:
            if held:
                self.put_back(held)

            self._in_flight = ()
            self.departures += 1

            if self._waiting:
                self.changed.notify_all()

    def clear(self) -> list[Message]:
        """Give up everything, and return it."""
        with self.changed:
            left = list(self)
            self._channels = MessageQueue()
            self._streams = MessageQueue()
            self.finish()

        return left

    def wait_for_room(self, message: Message, timeout: float) -> bool:
        """Return True if an event fits within ``timeout`` seconds."""
        return self._wait_for(lambda: self.has_room(message), timeout)

    def wait_until_left(self, number: int, timeout: float) -> bool:
        """Whether all events up to ``number`` have left within ``timeout`` seconds."""
        with self.changed:
            return self._wait_for(lambda: self._oldest > number, timeout)

    @property
    def _oldest(self) -> float:
        lines = (self._in_flight, self._channels.events, self._streams.events)
        return min((line[0].number for line in lines if line), default=float("inf"))

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._waiting += 1

        try:
            return self.changed.wait_for(condition, timeout)
        finally:
            self._waiting -= 1

    def _queue_of(self, message: Message) -> MessageQueue:
        return self._streams if message.route_state.is_stream else self._channels

    def _head(self) -> Message | None:
        """The next event to write: the older one of the first of both lines."""
        channel = self._channels.first()

        if self.streams_paused:
            return channel

        stream = self._streams.first()

        if channel is None or stream is None:
            return channel or stream

        return channel if channel.number < stream.number else stream


class MessageQueue:
    """Events of one kind in the order in which they were sent, and the bytes of them all."""

    __slots__ = ("bytes", "events")

    def __init__(self) -> None:
        self.events: deque[Message] = deque()
        self.bytes = 0

    def first(self) -> Message | None:
        """The oldest one."""
        try:
            return self.events[0]
        except IndexError:
            return None

    def has_room(self, size: int, most_events: int, most_bytes: int) -> bool:
        """Return True if an event of ``size`` bytes fits, or the line is empty."""
        fits = len(self.events) < most_events and self.bytes + size <= most_bytes
        return fits or not self.events

    def append(self, message: Message) -> None:
        """Add one at the end."""
        self.events.append(message)
        self.bytes += message.size

    def push(self, message: Message) -> None:
        """Put one back to the head."""
        self.events.appendleft(message)
        self.bytes += message.size

    def remove(self, message: Message) -> bool:
        """Take the oldest one out; return False if it is not in the line any more."""
        try:
            self.events.remove(message)
        except ValueError:
            return False

        self.bytes -= message.size
        return True


def _number(message: Message) -> int:
    return message.number


class Overflow:
    """Drops the oldest channel events for new ones; what is for a stream is never dropped."""

    def __init__(self, *, buffer: Buffer, outage: Outage, counters: Counters, service: str) -> None:
        self._buffer = buffer
        self._outage = outage
        self._counters = counters
        self._service = service

    def drop_for(self, message: Message) -> int:
        """Make room for an event, and return how many were dropped for it.

        A channel event that finds only stream events waiting is dropped itself.

        :raises PublishError: the event is for a stream, and only such events wait.
        """
        if self._buffer.can_make_room(message):
            return self._drop_until_there_is_room(message)

        if message.route_state.is_stream:
            raise self._refusal(message)

        message.assign_seq()
        message.finish(PublishError("The buffer was full.", event_id=message.id))
        return 1

    def tell(self, count: int) -> None:
        """Count, log and signal that events were dropped."""
        self._counters.add("dropped", count)

        if not self._outage.overflowed:
            self._outage.overflowed = True
            logger.error(
                "The buffer is full with %d events of %d bytes: from now on the oldest are dropped "
                "until Redis takes events again. health() counts them.",
                len(self._buffer),
                self._buffer.bytes,
            )

        emit(events_dropped, self._service, where="buffer", count=count)

    def _drop_until_there_is_room(self, message: Message) -> int:
        dropped = 0

        while not self._buffer.has_room(message) and (oldest := self._buffer.drop_oldest()):
            oldest.finish(PublishError("The buffer was full.", event_id=oldest.id))
            dropped += 1

        return dropped

    def _refusal(self, message: Message) -> PublishError:
        reason = self._outage.error or "Redis does not answer"
        return PublishError(
            f"The event {message.id} of {message.route_state.name!r} was not taken: {reason}, and "
            f"the buffer is full with {len(self._buffer)} events for streams, which are never "
            "dropped. Send it again when Redis is back, or raise 'EVENTBUS_BUFFER_SIZE'.",
            event_id=message.id,
        )
