"""Read many streams with two blocking reads: one of the busy streams, one of the silent ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial

import redis

from ..logs import get_logger
from ..transport.pipe import wait_for_replies
from ..transport.timed_connection import TOO_LATE
from .group import Entry, Group, GroupGoneError, read_one_by_one

logger = get_logger(__name__)

#: Number of streams up to which one read of all of them is cheap enough.
FEW = 16

#: Seconds since its last entry for which a stream counts as busy.
BUSY_FOR = 10.0

#: Seconds of a round below which no further read is sent in it. ``BLOCK 0`` would wait forever.
LEAST_WAIT = 0.005


class SplitRead:
    """Reads many streams, so that an entry does not cost time for each stream without one.

    Each read names its streams, and Redis and this process handle all of these names again for
    each answer. So the streams are divided for a round of up to ``longest`` seconds: one read waits
    for the busy streams, and is sent again after each answer; another waits for the silent ones.
    In a round, no stream changes sides: if both reads waited for a stream, its entries could
    arrive in the wrong order. Both reads end with the round. Once a silent stream gets an entry,
    the round ends within ``block`` seconds.

    Only the reading thread may call its methods, except :meth:`interrupt`.

    :param busy: the consumer group on the connection that reads busy streams.
    :param silent: the consumer group on the connection that reads the others.
    :param block: seconds that the read of the busy streams waits.
    :param longest: seconds of a round in which no silent stream gets an entry.
    """

    def __init__(self, busy: Group, silent: Group, *, block: float, longest: float) -> None:
        self._busy, self._silent = self._halves = (_Half(busy), _Half(silent))
        self._block = block
        self._longest = longest
        #: Seconds after the end of a round after which its answers count as lost.
        self._patience = max(0.0, busy.pipe.timeout - longest)
        #: Monotonic time at which the round ends, and the streams that are busy in it.
        self.ends_at = 0.0
        self._busy_names: list[str] = []
        #: Monotonic time of the last entry of each stream that had one lately.
        self._entry_at: dict[str, float] = {}
        #: Streams whose last answer had as many entries as the read asked for: more may be unread.
        self.unfinished: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        """Return True during a round: Redis has a read that it has not answered yet."""
        return any(half.names for half in self._halves)

    def read(
        self, streams: Collection[str], count: Callable[[int], int]
    ) -> tuple[list[Entry], dict[str, Exception]] | None:
        """Wait up to ``block`` seconds until one of the reads is answered, and return its entries.

        :param streams: names of the streams to read. A read that waits already may name others.
        :param count: returns how many entries to read from each of so many streams.
        :return: the entries, and by name the errors of the streams that Redis refuses; ``None``
            without an answer.
        :raises GroupGoneError: if a stream or its group does not exist. Call :meth:`discard`.
        """
        if not self.is_waiting:
            self._begin(streams)

        self._send(streams, count)
        return self._take_answers(self._block)

    def add(self, streams: Collection[str]) -> None:
        """Read streams that are new in this round with the busy ones."""
        self._busy_names += streams

    def finish(self) -> tuple[list[Entry], dict[str, Exception]] | None:
        """Return the entries of the reads that were answered, and send no other.

        :return: as :meth:`read` does.
        :raises GroupGoneError: if a stream or its group does not exist. Call :meth:`discard`.
        """
        return self._take_answers(0.0)

    def discard(self) -> None:
        """End the round without its entries: they are pending, and joining the groups finds them.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        for half in self._halves:
            try:
                if half.names:
                    half.receive()
            except GroupGoneError as error:
                logger.debug("A stream of a read that ends is gone: %s", error)

    def interrupt(self) -> None:
        """Abort the wait for Redis with a connection error; any thread may call it."""
        for half in self._halves:
            half.group.pipe.interrupt()

    def close(self) -> None:
        """Close the connections; entries of a lost answer are pending."""
        for half in self._halves:
            half.names = []
            half.group.pipe.close()

    def _begin(self, streams: Collection[str]) -> None:
        now = time.monotonic()
        self.ends_at = now + self._longest
        self._entry_at = {
            name: at
            for name, at in self._entry_at.items()
            if now - at < BUSY_FOR and name in streams
        }
        self._busy_names = list(self._entry_at)
        self.unfinished &= self._entry_at.keys()

    def _send(self, streams: Collection[str], count: Callable[[int], int]) -> None:
        left = self.ends_at - time.monotonic()

        if left < LEAST_WAIT:
            return

        if not self._busy.names:
            names = [name for name in self._busy_names if name in streams]
            self._busy.send(names, count, min(left, self._block))

        if not self._silent.names:
            busy = set(self._busy_names)
            self._silent.send([name for name in streams if name not in busy], count, left)

    def _take_answers(self, timeout: float) -> tuple[list[Entry], dict[str, Exception]] | None:
        waiting = {half.group.pipe: half for half in self._halves if half.names}
        answered = wait_for_replies(list(waiting), timeout)

        if not answered:
            if time.monotonic() > self.ends_at + self._patience:
                raise redis.TimeoutError(TOO_LATE)

            return None

        return self._receive([waiting[pipe] for pipe in answered])

    def _receive(self, halves: Sequence[_Half]) -> tuple[list[Entry], dict[str, Exception]]:
        entries: list[Entry] = []
        refusals: dict[str, Exception] = {}

        for half in halves:
            self.unfinished -= set(half.names)
            found, refused = half.receive()
            entries += found
            refusals |= refused
            counts = Counter(entry.name for entry in found)
            self._entry_at |= dict.fromkeys(counts, time.monotonic())
            self.unfinished |= {name for name, count in counts.items() if count >= half.count}

            # So that these streams change sides.
            if found and half is self._silent:
                self.ends_at = min(self.ends_at, time.monotonic() + self._block)

        return entries, refusals


class _Half:
    """A read over its own connection."""

    def __init__(self, group: Group) -> None:
        self.group = group
        #: The streams of the read that Redis has not answered yet; empty if there is none.
        self.names: list[str] = []
        #: Number of entries that the last read asked for, of each stream.
        self.count = 1

    def send(self, names: list[str], count: Callable[[int], int], block: float) -> None:
        if names:
            self.count = count(len(names))
            self.group.send_read(names, count=self.count, block=block)
            self.names = names

    def receive(self) -> tuple[list[Entry], dict[str, Exception]]:
        names, self.names = self.names, []

        try:
            return self.group.receive_read(), {}
        except redis.ResponseError as error:
            logger.debug("Redis refuses to read one of the streams: %s", error)

        return read_one_by_one(names, partial(self.group.read, count=self.count))
