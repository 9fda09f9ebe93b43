"""What waits to be tried again: a sorted set of records, each leased while it is tried."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..codec.codec import Codec
from ..codec.records import MOST_ERROR, BadRecordError, DeadLetter, RetryRecord
from ..config import Config
from ..errors import DecodeError
from ..event import Event
from ..logs import get_logger
from ..receivers.delivery import Delivery
from ..routing.subscriptions import Subscription
from ..transport.clock import RedisClock
from ..transport.keys import StreamKeys
from ..transport.pipe import Command, Pipe
from .group import Entry
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

#: Seconds that a receiver may be unknown to every worker before its retries are given up: a
#: deployment may take its time.
GONE_AFTER = 3_600.0

#: Seconds after which a retry that is due is taken for one that no worker reads.
OVERDUE = 60.0

#: Seconds for which a worker that lacks a receiver leaves its retries to the others, at most.
MOST_POSTPONE = 10.0


class RetryQueue:
    """Takes retries that are due, one worker each.

    :param lock: what whoever uses the connection holds, callers of its methods included.
    :param knows: whether a receiver of that name is connected for an event.
    :param retries_of: how often the receiver called so is tried again at events of a subscription.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        config: Config,
        keys: StreamKeys,
        codec: Codec,
        outcomes: Outcomes,
        lock: AbstractContextManager[object],
        clock: RedisClock,
        knows: Callable[[Event, str], bool],
        retries_of: Callable[[Subscription, Event, str], int],
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._keys = keys
        self._codec = codec
        self._outcomes = outcomes
        self._lock = lock
        self._clock = clock
        self._knows = knows
        self._retries_of = retries_of

    def take(
        self, name: str, subscription: Subscription, *, most: int
    ) -> tuple[list[Delivery], list[Outcome], bool]:
        """Lease retries that are due; what is given up of them instead; whether there are more.

        :raises redis.ConnectionError: Redis is away.
        """
        deliveries: list[Delivery] = []
        given_up: list[Outcome] = []

        def lease(member: bytes) -> list[Command]:
            return self._lease(name, subscription, member, deliveries, given_up)

        count = self._take(name, lease, most=most)

        if count is None:
            return [], [], True

        return deliveries, given_up, count >= most

    def first_due(self, name: str) -> Command:
        """The command whose answer is empty if no retry is due."""
        return self._look(name, most=1)

    def take_orphans(self, name: str, *, most: int) -> tuple[list[Outcome], bool]:
        """Give up retries of a signal that nobody takes; return them, and True if there are more.

        :raises redis.ConnectionError: Redis is away.
        """
        given_up: list[Outcome] = []

        def lease(member: bytes) -> list[Command]:
            return self._lease_orphan(name, member, given_up)

        count = self._take(name, lease, most=most, overdue=OVERDUE)
        return ([], True) if count is None else (given_up, len(given_up) >= most)

    def signals(self) -> list[str]:
        """Return the signals that have a stream.

        :raises redis.ResponseError: Redis refuses.
        """
        found = self._pipe.ask("SMEMBERS", self._keys.names)
        return sorted(name.decode(errors="replace") for name in found)

    def _take(
        self,
        name: str,
        lease: Callable[[bytes], list[Command]],
        *,
        most: int,
        overdue: float = 0.0,
    ) -> int | None:
        """Lease retries that have been due for so many seconds.

        :return: how many were looked at; ``None`` if another worker was faster.
        """
        key = self._keys.retry(name, self._config.service)

        # They may be large: one tells that there are some.
        if not _members(self._pipe.ask(*self._look(name, most=1, overdue=overdue))):
            return 0

        look = self._look(name, most=most, overdue=overdue)
        watched, answer = self._pipe.run([("WATCH", key), look])
        _check([watched])
        members = _members(answer)
        commands: list[Command] = [("MULTI",)]

        try:
            for member in members:
                commands += lease(member)
        except BaseException:
            # What is watched would make another's transaction void.
            self._pipe.close()
            raise

        answers = self._pipe.run([*commands, ("EXEC",)])
        _check(answers)

        # None: another worker was at it, and the next look finds what it left.
        return None if answers[-1] is None else len(members)

    def _look(self, name: str, *, most: int, overdue: float = 0.0) -> Command:
        key = self._keys.retry(name, self._config.service)
        until = round((self._clock.now() - overdue) * 1000)
        return ("ZRANGEBYSCORE", key, "-inf", until, "LIMIT", 0, most)

    def renew(self, delivery: Delivery) -> bool:
        """Keep a retry that is being tried; whether it still is there.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._keys.retry(delivery.name, self._config.service)

        with self._lock:
            score = self._pipe.ask("ZSCORE", key, delivery.member)

            if score is not None:
                self._pipe.ask("ZADD", key, "XX", self._lease_until(), delivery.member)

        return score is not None

    def record_start(self, delivery: Delivery, record: RetryRecord) -> bool:
        """Note in Redis that a retry is being tried; not if another worker has begun it.

        If it ends this process, that is to be known.

        :raises redis.ConnectionError: Redis is away.
        :raises redis.ResponseError: Redis refuses.
        """
        key = self._keys.retry(delivery.name, self._config.service)
        running = replace(record, attempts=record.attempts + 1, running=True)
        member = running.packed()

        with self._lock:
            answers = self._pipe.run(
                [
                    ("MULTI",),
                    ("ZREM", key, delivery.member),
                    ("ZADD", key, self._lease_until(), member),
                    ("EXEC",),
                ]
            )
            _check(answers)
            removed, added = _members(answers[-1])

            if not removed:
                # Whoever has removed it may have added the very same.
                if added:
                    self._pipe.ask("ZREM", key, member)

                return False

            delivery.retry, delivery.stored_member = running, b""
            return True

    def postponed(self, delivery: Delivery, record: RetryRecord) -> Outcome:
        """The outcome of a retry whose receiver was gone after it had begun: as if it had not.

        Another worker may have the receiver.
        """
        waiting = replace(record, attempts=record.attempts - 1, running=False)
        key = self._keys.retry(delivery.name, self._config.service)
        command: Command = ("ZADD", key, self._postponed_until(), waiting.packed())
        return Outcome(delivery.name, delivery.entry, [command], delivery)

    def put_back(self, delivery: Delivery) -> None:
        """Undo the lease of a retry that was not begun.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._keys.retry(delivery.name, self._config.service)

        with self._lock:
            # Not where another worker has begun it meanwhile, or ended it.
            self._pipe.run([("ZADD", key, "XX", round(self._clock.now() * 1000), delivery.member)])

    def _lease(
        self,
        name: str,
        subscription: Subscription,
        member: bytes,
        deliveries: list[Delivery],
        given_up: list[Outcome],
    ) -> list[Command]:
        key = self._keys.retry(name, self._config.service)

        try:
            record = RetryRecord.unpacked(member)
            event, memory = self._event(name, record)
        except (BadRecordError, DecodeError) as error:
            given_up.append(self._bad(name, member, error))
            return [self._keep(key, member)]

        # Its worker may live, and see its lease end by a step of Redis's clock.
        if record.running and not self._clock.is_steady:
            return [("ZADD", key, "XX", self._postponed_until(), member)]

        if not self._knows(event, record.receiver):
            return self._postpone(name, subscription, record, member, event, given_up)

        delivery = self._delivery(name, subscription, record, member, event, memory)
        delivery.event = replace(event, attempt=record.attempts + 1)
        allowed = self._retries_of(subscription, event, record.receiver)

        if record.running and record.attempts > allowed:
            words = f"It was tried {record.attempts} times; the last worker ended before it did."
            given_up.append(self._outcomes.give_up(delivery, "killed", words))
            return [self._keep(key, member)]

        deliveries.append(delivery)
        return [self._keep(key, member)]

    def _lease_orphan(self, name: str, member: bytes, given_up: list[Outcome]) -> list[Command]:
        key = self._keys.retry(name, self._config.service)

        try:
            record = RetryRecord.unpacked(member)
            event, _ = self._event(name, record)
        except (BadRecordError, DecodeError) as error:
            given_up.append(self._bad(name, member, error))
            return [self._keep(key, member)]

        if not self._is_old(record):
            return []

        subscription = Subscription(name=name, via="stream")
        given_up.append(self._gone(name, subscription, record, member, event))
        return [self._keep(key, member)]

    def _gone(
        self,
        name: str,
        subscription: Subscription,
        record: RetryRecord,
        member: bytes,
        event: Event,
    ) -> Outcome:
        delivery = self._delivery(name, subscription, record, member, event, 0)
        words = (
            f"No worker of {self._config.service!r} has the receiver {record.receiver!r} any "
            f"more. Its last error: {record.error}"
        )
        return self._outcomes.give_up(delivery, "gone", words)

    def _keep(self, key: str, member: bytes) -> Command:
        """The command that keeps a record from other workers, for as long as a lease lasts."""
        return ("ZADD", key, "XX", self._lease_until(), member)

    def _event(self, name: str, record: RetryRecord) -> tuple[Event, int]:
        event, memory = self._codec.decode_to_wait(record.event, via="stream")

        if event.name != name:
            raise BadRecordError(f"its event is one of {event.name!r}")

        return event, memory

    def _postpone(
        self,
        name: str,
        subscription: Subscription,
        record: RetryRecord,
        member: bytes,
        event: Event,
        given_up: list[Outcome],
    ) -> list[Command]:
        """Leave it to a worker that has its receiver, as long as there may be one."""
        key = self._keys.retry(name, self._config.service)

        if self._is_old(record):
            given_up.append(self._gone(name, subscription, record, member, event))
            return [self._keep(key, member)]

        return [("ZADD", key, "XX", self._postponed_until(), member)]

    def _bad(self, name: str, member: bytes, error: Exception) -> Outcome:
        now = round(self._clock.now() * 1000)
        letter = DeadLetter(
            reason="undecodable",
            entry="",
            fields={b"record": member},
            error=f"A record of a retry does not read: {error}"[:MOST_ERROR],
            first=now,
            last=now,
        )
        outcome = self._outcomes.rejected(Entry(name, "0-0", None), letter)
        key = self._keys.retry(name, self._config.service)
        outcome.commands = [*outcome.commands, ("ZREM", key, member)]
        outcome.undo = ("ZADD", key, self._lease_until(), member)
        return outcome

    def _delivery(
        self,
        name: str,
        subscription: Subscription,
        record: RetryRecord,
        member: bytes,
        event: Event,
        memory: int,
    ) -> Delivery:
        odd = b"" if record.packed() == member else member
        return Delivery(
            name=name,
            entry=record.entry,
            event=event,
            body=record.event,
            subscription=subscription,
            claimed_until=time.monotonic() + self._config.claim_after,
            retry=record,
            stored_member=odd,
            memory=memory + len(odd),
        )

    def _postponed_until(self) -> int:
        # Not for as long each time, so that it is due when another looks.
        pause = random.uniform(0.2, 1.0) * min(self._config.claim_after, MOST_POSTPONE)  # noqa: S311 - spreads load
        return round((self._clock.now() + pause) * 1000)

    def _is_old(self, record: RetryRecord) -> bool:
        return abs(self._clock.now() - record.last / 1000) > GONE_AFTER

    def _lease_until(self) -> int:
        return round((self._clock.now() + self._config.claim_after) * 1000)


def _check(answers: Iterable[object]) -> None:
    """Raise the first refusal: of a transaction, the one that tells why."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


def _members(answer: object) -> list[Any]:
    if isinstance(answer, Exception):
        raise answer

    found = list(answer) if isinstance(answer, list) else []
    _check(found)
    return found
