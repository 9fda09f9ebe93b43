"""Deliveries that wait for a thread: in order, or in order per key where there are several."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from zlib import crc32

from .delivery import Delivery

#: Seconds of work that one process takes on ahead: what others could do meanwhile, if it is slow.
AHEAD = 0.25

#: Deliveries that wait at most, however fast they are handled.
MOST_AHEAD = 1_000

#: Bytes of memory that deliveries take at most which wait or run.
MOST_BYTES = 64 * 1024 * 1024

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


class Lineup:
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
