"""Events that were read and wait for a dispatching thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from ..event import Event

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
