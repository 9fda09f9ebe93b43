"""Deliveries: stream events that a process has read and not yet acknowledged or released."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from ..codec.records import RetryRecord
from ..event import Event
from ..routing.subscriptions import Subscription

_MEMORY = attrgetter("memory")


@dataclass(slots=True, eq=False)
class Delivery:
    """A stream entry, or one retry of it, read by this process and not yet acknowledged."""

    #: Name of the signal.
    name: str
    #: Id of the entry in the stream.
    entry: str
    event: Event
    #: The encoded event, as it was read.
    body: bytes
    subscription: Subscription
    #: Monotonic time at which the claim expires; renewed while the delivery is in flight.
    claimed_until: float
    #: Signal, entry, and a hash of the retry; that is empty for a first attempt. :class:`InFlight`
    #: holds one delivery for each identity.
    identity: tuple[str, str, bytes]
    #: Approximate memory use in bytes.
    memory: int = 0
    #: Number of workers that started this entry and died; ``None`` if none started it.
    crashes: int | None = None
    #: The retry to run; ``None`` for a first attempt.
    retry: RetryRecord | None = None
    #: The retry's bytes in Redis, if encoding :attr:`retry` again gives other bytes.
    stored_member: bytes = b""
    #: True once the receivers have started.
    started: bool = False

    @property
    def member(self) -> bytes:
        """The bytes of the retry in Redis, encoded on demand to keep the event in memory once."""
        if self.retry is None:
            return b""

        return self.stored_member or self.retry.packed()


class InFlight:
    """The deliveries of this process that are not yet acknowledged. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._deliveries: dict[tuple[str, str, bytes], Delivery] = {}
        #: Approximate memory use of all deliveries, in bytes.
        self.memory = 0
        #: Deliveries that have not started. The thread that removes one may start or release it.
        #: A set removes an item without a lock.
        self._waiting: set[Delivery] = set()
        #: Monotonic time at which the last delivery started, or the first began to wait.
        self._progressed = 0.0

    def __len__(self) -> int:
        return len(self._deliveries)

    def add(self, deliveries: Collection[Delivery]) -> None:
        """Add deliveries that were read."""
        with self._lock:
            known = self._deliveries

            if not self._waiting:
                self._progressed = time.monotonic()

            for delivery in deliveries:
                before = known.setdefault(delivery.identity, delivery)

                if before is not delivery:
                    known[delivery.identity] = delivery
                    self.memory -= before.memory

            self.memory += sum(map(_MEMORY, deliveries))
            self._waiting.update(deliveries)

    @property
    def stalled_for(self) -> float:
        """Seconds since the last delivery started while others wait; 0 if none waits."""
        return time.monotonic() - self._progressed if self._waiting else 0.0

    def start(self, delivery: Delivery, now: float) -> bool:
        """Mark a delivery as started; return False if its claim has expired, or was released.

        :param now: the present monotonic time.
        """
        if now > delivery.claimed_until:
            return False

        try:
            self._waiting.remove(delivery)
        except KeyError:
            return False

        delivery.started = True
        self._progressed = now
        return True

    def release_waiting(self) -> list[Delivery]:
        """Remove and return the deliveries that have not started; :meth:`start` refuses them."""
        waiting: list[Delivery] = []

        with suppress(KeyError):
            while True:
                waiting.append(self._waiting.pop())

        self.remove(waiting)
        return waiting

    def remove(self, deliveries: Collection[Delivery]) -> None:
        """Remove deliveries that were acknowledged, or that another worker has claimed."""
        with self._lock:
            known = self._deliveries
            self._waiting.difference_update(deliveries)

            for delivery in deliveries:
                found = known.pop(delivery.identity, None)

                if found is delivery:
                    self.memory -= delivery.memory
                elif found is not None:
                    # A later delivery has the same identity.
                    known[delivery.identity] = found

    def missing(self, name: str, entries: Collection[str]) -> list[str]:
        """Return those ids of ``entries`` whose first attempt is not in flight."""
        with self._lock:
            return [entry for entry in entries if (name, entry, b"") not in self._deliveries]

    def all(self) -> list[Delivery]:
        """Return all deliveries."""
        with self._lock:
            return list(self._deliveries.values())
