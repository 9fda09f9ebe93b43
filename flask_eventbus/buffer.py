"""The events of a node that wait to be written, bounded in number and in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from .outgoing import Outgoing

#: Bytes that wait in memory at most, whatever ``EVENTBUS_BUFFER_SIZE`` counts.
MOST_BYTES = 64 * 1024 * 1024


class Buffer:
    """A line of events in the order in which they were sent.

    A signal handler, or a finalizer, may send in the very thread that is in here and holds
    the lock: so it is reentrant, each statement leaves things whole, and an event is counted
    among those of its lane only when it leaves the line.
    """

    def __init__(self, *, most_events: int, most_bytes: int = MOST_BYTES) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        #: Guards the line.
        self.lock = threading.RLock()
        #: The same lock, where something is awaited: notified when there is room again.
        self.changed = threading.Condition(self.lock)
        self._line: deque[Outgoing] = deque()
        self._bytes = 0
        #: What is being written.
        self._in_hand: Sequence[Outgoing] = ()
        #: Threads that wait for something of it to leave.
        self._waiting = 0
        #: How often something has left: who waits in vain can tell a slow Redis from none.
        self.departures = 0

    def __len__(self) -> int:
        return len(self._line) + len(self._in_hand)

    def __iter__(self) -> Iterator[Outgoing]:
        return iter([*self._in_hand, *self._line])

    @property
    def bytes(self) -> int:
        """The bytes of those that are not being written."""
        return self._bytes

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to write that is not being written."""
        return bool(self._line)

    @property
    def in_hand(self) -> Sequence[Outgoing]:
        """What is being written."""
        return self._in_hand

    def first_writer(self) -> Outgoing | None:
        """The first event whose sender would write what waits."""
        return next((outgoing for outgoing in list(self._line) if outgoing.would_write), None)

    @property
    def has_channel_events(self) -> bool:
        """Whether something waits for those who listen now."""
        return any(not outgoing.lane.is_stream for outgoing in list(self._line))

    def has_room(self, size: int) -> bool:
        """Whether an event of ``size`` bytes fits; one that is larger than all has it alone."""
        count = len(self._line) + len(self._in_hand)
        fits = count < self._most_events and self._bytes + size <= self._most_bytes
        return fits or not self._line

    def put(self, outgoing: Outgoing) -> None:
        """Add an event at the end, whether there is room or not."""
        size = outgoing.size
        self._line.append(outgoing)
        self._bytes += size

    def can_make_room(self, size: int) -> bool:
        """Whether an event of ``size`` bytes fits once everything is dropped that may be."""
        kept = [outgoing for outgoing in list(self._line) if outgoing.lane.is_stream]
        count = len(kept) + len(self._in_hand)
        fits = count < self._most_events and sum(o.size for o in kept) + size <= self._most_bytes
        return fits or not kept

    def drop_oldest(self) -> Outgoing | None:
        """Give up the oldest channel event that is not being written.

        Its number is missed by others. What goes into a stream is never given up.
        """
        outgoing = self._pop_channel_event()

        if outgoing is not None:
            outgoing.take_its_turn()

        return outgoing

    def take(self, *, most_events: int, most_bytes: int) -> Sequence[Outgoing]:
        """Take the next events in hand, until :meth:`settle` or :meth:`put_back`."""
        batch: list[Outgoing] = []
        size = 0
        # Now, and each before it leaves the line: who is interrupted here loses none.
        self._in_hand = batch

        while len(batch) < most_events and size < most_bytes and (head := self._head()):
            batch += head

            # Whoever interrupts this may have dropped it.
            if not self._remove(head[0]) or head[0].withdrawn:
                batch.pop()
            else:
                head[0].take_its_turn()
                size += head[0].size

        return batch

    def put_back(self) -> None:
        """Put what is in hand back to the head of the line."""
        with self.changed:
            size = sum(outgoing.size for outgoing in self._in_hand)
            self._line.extendleft(reversed(self._in_hand))
            self._bytes += size
            self._in_hand = ()

    def settle(self) -> None:
        """Let go of what is in hand."""
        with self.lock:
            self._in_hand = ()
            self.departures += 1

            if self._waiting:
                self.changed.notify_all()

    def clear(self) -> list[Outgoing]:
        """Give up everything, and return it."""
        with self.changed:
            left = list(self)
            self._line.clear()
            self._bytes = 0
            self.settle()

        return left

    def wait_for_room(self, size: int, timeout: float) -> bool:
        """Whether an event of ``size`` bytes fits within ``timeout`` seconds."""
        return self._wait_for(lambda: self.has_room(size), timeout)

    def wait_until_left(self, number: int, timeout: float) -> bool:
        """Whether all events up to ``number`` have left within ``timeout`` seconds."""
        with self.changed:
            return self._wait_for(lambda: self._oldest > number, timeout)

    @property
    def _oldest(self) -> float:
        for line in (self._in_hand, self._line):
            if line:
                return line[0].number

        return float("inf")

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._waiting += 1

        try:
            return self.changed.wait_for(condition, timeout)
        finally:
            self._waiting -= 1

    def _pop_channel_event(self) -> Outgoing | None:
        # Mostly the first is one; all are looked through in a copy, which is made in one step:
        # whoever interrupts this may change the line.
        return self._first_channel_event(self._head()) or self._first_channel_event(
            list(self._line)
        )

    def _head(self) -> Sequence[Outgoing]:
        try:
            return (self._line[0],)
        except IndexError:
            return ()

    def _first_channel_event(self, line: Sequence[Outgoing]) -> Outgoing | None:
        for outgoing in line:
            if not outgoing.lane.is_stream and self._remove(outgoing):
                return outgoing

        return None

    def _remove(self, outgoing: Outgoing) -> bool:
        try:
            self._line.remove(outgoing)
        except ValueError:
            return False

        self._bytes -= outgoing.size
        return True
