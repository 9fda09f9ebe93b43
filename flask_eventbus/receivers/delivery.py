"""What a process has in hand of the streams: read, and neither acknowledged nor handed back."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from ..codec.records import RetryRecord
from ..event import Event
from ..routing.subscriptions import Subscription


@dataclass(slots=True, eq=False, kw_only=True)
class Delivery:
    """An event of a stream that this process is to handle."""

    #: The signal whose stream it came from.
    name: str
    #: The id of its entry in the stream.
    entry: str
    event: Event
    #: The event's bytes, as they came.
    body: bytes
    subscription: Subscription
    #: The bytes of memory that it takes, about.
    memory: int = 0
    #: Until when it is this process's, by the monotonic clock; renewed while it is in hand.
    claimed_until: float
    #: How often it was begun by workers that did not end it; ``None`` where nobody began it.
    crashes: int | None = None
    #: What is tried again of it; ``None`` for a first attempt.
    retry: RetryRecord | None = None
    #: The bytes of that in Redis, where the record is packed otherwise.
    stored_member: bytes = b""
    #: Whether its receivers run, or have run.
    started: bool = False
    #: What is in hand once: an entry, or a retry of one receiver that failed at it.
    identity: tuple[str, str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        member = self.member
        self.identity = (self.name, self.entry, sha256(member).digest() if member else b"")

    @property
    def member(self) -> bytes:
        """The bytes of the record in Redis, made anew: the event in them is kept once."""
        if self.retry is None:
            return b""

        return self.stored_member or self.retry.packed()

    @property
    def in_group(self) -> bool:
        """Whether it is acknowledged; without a group there is nobody who would know."""
        return self.subscription.group


class InFlight:
    """The deliveries that this process has, for whoever renews them or hands them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[str, str, bytes], Delivery] = {}
        #: The bytes of memory that all of it takes, about.
        self.memory = 0
        #: How many were not begun yet.
        self._waiting = 0
        #: When something was begun, or was there to begin with, by the monotonic clock.
        self._moved = 0.0

    def __len__(self) -> int:
        return len(self._deliveries)

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Note what was read."""
        with self._lock:
            if not self._waiting:
                self._moved = time.monotonic()

            for delivery in deliveries:
                before = self._deliveries.get(delivery.identity)
                self._waiting += before is None or before.started
                self.memory += delivery.memory - (0 if before is None else before.memory)
                self._deliveries[delivery.identity] = delivery

    @property
    def stalled_for(self) -> float:
        """For how many seconds something waits to be begun, and nothing was; 0 if nothing waits."""
        return time.monotonic() - self._moved if self._waiting else 0.0

    def start(self, delivery: Delivery) -> bool:
        """Note that the receivers of a delivery begin; not if it is no more this process's."""
        with self._lock:
            now = time.monotonic()

            if now > delivery.claimed_until:
                return False

            delivery.started = True
            self._waiting -= 1
            self._moved = now
            return True

    def release_waiting(self) -> list[Delivery]:
        """Let go of what was not begun: :meth:`start` refuses it from now on."""
        with self._lock:
            waiting = [found for found in self._deliveries.values() if not found.started]

            for delivery in waiting:
                delivery.claimed_until = 0.0

            self._forget(waiting)
            return waiting

    def remove(self, deliveries: Iterable[Delivery]) -> None:
        """Forget what is settled, or no more this process's."""
        with self._lock:
            self._forget(deliveries)

    def _forget(self, deliveries: Iterable[Delivery]) -> None:
        known = self._deliveries

        for delivery in deliveries:
            # Another of the same entry may have come since.
            if known.get(delivery.identity) is delivery:
                del known[delivery.identity]
                self.memory -= delivery.memory
                self._waiting -= not delivery.started

    def first_attempts(self, name: str) -> list[Delivery]:
        """What is in hand of a stream, retries left out."""
        return [found for found in self.all() if found.name == name and found.retry is None]

    def retries(self) -> list[Delivery]:
        """What is being tried again."""
        return [found for found in self.all() if found.retry is not None]

    def missing(self, name: str, entries: Collection[str]) -> list[str]:
        """Those of ``entries`` that are not in hand."""
        with self._lock:
            return [entry for entry in entries if (name, entry, b"") not in self._deliveries]

    def all(self) -> list[Delivery]:
        """Everything in hand."""
        with self._lock:
            return list(self._deliveries.values())
