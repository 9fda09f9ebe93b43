"""Deliveries: stream events that a process has read and not yet acknowledged or released."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from ..codec.records import RetryRecord
from ..event import Event
from ..routing.subscriptions import Subscription


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
    #: Signal, entry and retry. :class:`InFlight` holds one delivery for each identity.
    identity: tuple[str, str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        digest = b"" if self.retry is None else sha256(self.member).digest()
        self.identity = (self.name, self.entry, digest)

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
        #: Number of deliveries that have not started.
        self._waiting = 0
        #: Monotonic time at which the last delivery started, or the first began to wait.
        self._progressed = 0.0

    def __len__(self) -> int:
        return len(self._deliveries)

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Add deliveries that were read."""
        with self._lock:
            if not self._waiting:
                self._progressed = time.monotonic()

            for delivery in deliveries:
                before = self._deliveries.get(delivery.identity)
                self._waiting += before is None or before.started
                self.memory += delivery.memory - (0 if before is None else before.memory)
                self._deliveries[delivery.identity] = delivery

    @property
    def stalled_for(self) -> float:
        """Seconds since the last delivery started while others wait; 0 if none waits."""
        return time.monotonic() - self._progressed if self._waiting else 0.0

    def start(self, delivery: Delivery, now: float) -> bool:
        """Mark a delivery as started; return False if its claim has expired.

        :param now: the present monotonic time.
        """
        with self._lock:
            if now > delivery.claimed_until:
                return False

            delivery.started = True
            # A later delivery may have the same identity, and waits instead.
            self._waiting -= self._deliveries.get(delivery.identity) is delivery
            self._progressed = now
            return True

    def release_waiting(self) -> list[Delivery]:
        """Remove and return the deliveries that have not started.

        Their claims expire at once, so that :meth:`start` returns False for them.
        """
        with self._lock:
            waiting = [found for found in self._deliveries.values() if not found.started]

            for delivery in waiting:
                delivery.claimed_until = 0.0

            self.remove(waiting)
            return waiting

    def remove(self, deliveries: Iterable[Delivery]) -> None:
        """Remove deliveries that were acknowledged, or that another worker has claimed."""
        with self._lock:
            known = self._deliveries

            for delivery in deliveries:
                # A later delivery may have the same identity.
                if known.get(delivery.identity) is delivery:
                    del known[delivery.identity]
                    self.memory -= delivery.memory
                    self._waiting -= not delivery.started

    def missing(self, name: str, entries: Collection[str]) -> list[str]:
        """Return those ids of ``entries`` whose first attempt is not in flight."""
        with self._lock:
            return [entry for entry in entries if (name, entry, b"") not in self._deliveries]

    def all(self) -> list[Delivery]:
        """Return all deliveries."""
        with self._lock:
            return list(self._deliveries.values())
