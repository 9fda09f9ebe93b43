"""The retries of a service: a sorted set for each signal, scored by the time a retry is due.

A worker leases a retry: it sets the score to the end of its lease, so that no other takes it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..codec.records import MAX_ERROR_CHARS, BadRecordError, DeadLetter, RetryRecord
from ..errors import DecodeError
from ..event import Event
from ..logs import get_logger
from ..receivers.delivery import Delivery
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.pipe import Command, Pipe
from .acknowledger import Acknowledger
from .group import Entry
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

#: Seconds since the last attempt after which a retry without a receiver is given up. A
#: deployment may take as long.
GONE_AFTER = 3_600.0

#: Seconds that a retry is due before it counts as read by no worker.
OVERDUE = 60.0


@dataclass(frozen=True, slots=True)
class _StoredRetry:
    """A member of the sorted set, decoded."""

    member: bytes
    record: RetryRecord
    event: Event
    #: Approximate bytes of memory that the event takes.
    memory: int


class RetryQueue:
    """Leases retries that are due, so that only one worker runs each.

    :param lock: held by the thread that uses the connection. Callers of :meth:`take`,
        :meth:`take_orphans` and :meth:`signals` hold it.
    :param knows: returns True if a receiver with that name is connected for an event.
    :param retries_of: returns the number of retries that the subscription allows a receiver.
    """

    def __init__(
        self,
        pipe: Pipe,
        context: Context,
        *,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        knows: Callable[[Event, str], bool],
        retries_of: Callable[[Subscription, Event, str], int],
    ) -> None:
        self._pipe = pipe
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._codec = context.codec
        self._outcomes = outcomes
        self._lock = acknowledger.lock
        self._clock = acknowledger.clock
        self._knows = knows
        self._retries_of = retries_of

    def take(
        self, name: str, subscription: Subscription, *, most: int
    ) -> tuple[list[Delivery], list[Outcome], bool]:
        """Lease retries that are due.

        :return: the retries to run, the outcomes of those given up, and True if more are due.
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

    def due_command(self, name: str) -> Command:
        """Return a command whose answer is empty if no retry is due."""
        return self._find_due(name, most=1)

    def take_orphans(self, name: str, *, most: int) -> tuple[list[Outcome], bool]:
        """Give up old retries of a signal that no worker takes.

        :return: their outcomes, and True if more may follow.
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
        """Lease retries that have been due for ``overdue`` seconds.

        :param lease: returns the commands that lease a member of the sorted set.
        :return: the number of retries found; ``None`` if another worker changed the set meanwhile.
        """
        key = self._keys.retry(name, self._config.service)

        # Records may be large, so read one before WATCH.
        if not _list_of(self._pipe.ask(*self._find_due(name, most=1, overdue=overdue))):
            return 0

        find = self._find_due(name, most=most, overdue=overdue)
        watched, answer = self._pipe.run([("WATCH", key), find])
        _check([watched])
        members = _list_of(answer)
        commands: list[Command] = [("MULTI",)]

        try:
            for member in members:
                commands += lease(member)
        except BaseException:
            # Closing ends the WATCH, which would abort the next transaction.
            self._pipe.close()
            raise

        answers = self._pipe.run([*commands, ("EXEC",)])
        _check(answers)

        # EXEC answers None if another worker changed the set. The next call finds what it left.
        return None if answers[-1] is None else len(members)

    def _find_due(self, name: str, *, most: int, overdue: float = 0.0) -> Command:
        key = self._keys.retry(name, self._config.service)
        due_until = round((self._clock.now() - overdue) * 1000)
        return ("ZRANGEBYSCORE", key, "-inf", due_until, "LIMIT", 0, most)

    def renew(self, delivery: Delivery) -> bool:
        """Extend the lease of a retry. Return False if another worker ended it.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._keys.retry(delivery.name, self._config.service)

        with self._lock:
            score = self._pipe.ask("ZSCORE", key, delivery.member)

            if score is not None:
                self._pipe.ask("ZADD", key, "XX", self._lease_until(), delivery.member)

        return score is not None

    def record_start(self, delivery: Delivery, record: RetryRecord) -> bool:
        """Count the attempt in Redis before it runs. Return False if another worker started it.

        If this process dies in the attempt, other workers see the count.

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
            removed, added = _list_of(answers[-1])

            if not removed:
                # The other worker may have stored the same bytes, so remove the member only if
                # this call added it.
                if added:
                    self._pipe.ask("ZREM", key, member)

                return False

            delivery.retry, delivery.stored_member = running, b""
            return True

    def postponed(self, delivery: Delivery, record: RetryRecord) -> Outcome:
        """Return the outcome of a retry whose receiver was disconnected after its start.

        The attempt is not counted, and another worker may have the receiver.
        """
        waiting = replace(record, attempts=record.attempts - 1, running=False)
        key = self._keys.retry(delivery.name, self._config.service)
        command: Command = ("ZADD", key, self._postponed_until(), waiting.packed())
        return Outcome(delivery.name, delivery.entry, [command], delivery)

    def release(self, delivery: Delivery) -> None:
        """End the lease of a retry that was not started, so that it is due at once.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._keys.retry(delivery.name, self._config.service)

        with self._lock:
            # XX: another worker may have started or ended it.
            self._pipe.run([("ZADD", key, "XX", round(self._clock.now() * 1000), delivery.member)])

    def _lease(
        self,
        name: str,
        subscription: Subscription,
        member: bytes,
        deliveries: list[Delivery],
        given_up: list[Outcome],
    ) -> list[Command]:
        stored = self._decode(name, member, given_up)

        if stored is None:
            return [self._lease_command(name, member)]

        record, event = stored.record, stored.event

        # Redis's clock was set, so the lease may have expired although its worker runs.
        if record.running and not self._clock.is_steady:
            return [self._postpone_command(name, member)]

        if not self._knows(event, record.receiver):
            # Another worker may have the receiver.
            if not self._is_old(record):
                return [self._postpone_command(name, member)]

            given_up.append(self._give_up_gone(name, subscription, stored))
            return [self._lease_command(name, member)]

        delivery = self._delivery(name, subscription, stored)
        delivery.event = replace(event, attempt=record.attempts + 1)
        allowed = self._retries_of(subscription, event, record.receiver)

        if record.running and record.attempts > allowed:
            text = f"{record.attempts} attempts were made; the worker died in the last one."
            given_up.append(self._outcomes.give_up(delivery, "killed", text))
        else:
            deliveries.append(delivery)

        return [self._lease_command(name, member)]

    def _lease_orphan(self, name: str, member: bytes, given_up: list[Outcome]) -> list[Command]:
        stored = self._decode(name, member, given_up)

        if stored is not None:
            if not self._is_old(stored.record):
                return []

            subscription = Subscription(name=name, via="stream")
            given_up.append(self._give_up_gone(name, subscription, stored))

        return [self._lease_command(name, member)]

    def _decode(self, name: str, member: bytes, given_up: list[Outcome]) -> _StoredRetry | None:
        """Decode a member of the sorted set, or give it up and return ``None``."""
        try:
            record = RetryRecord.unpacked(member)
            event, memory = self._codec.decode_for_queue(record.event, via="stream")

            if event.name != name:
                raise BadRecordError(f"it holds an event of {event.name!r}")
        except (BadRecordError, DecodeError) as error:
            given_up.append(self._give_up_undecodable(name, member, error))
            return None

        return _StoredRetry(member, record, event, memory)

    def _give_up_gone(self, name: str, subscription: Subscription, stored: _StoredRetry) -> Outcome:
        record = stored.record
        text = (
            f"No worker of {self._config.service!r} has the receiver {record.receiver!r}, and its "
            f"last attempt was over an hour ago. Its last error: {record.error}"
        )
        delivery = self._delivery(name, subscription, stored)
        return self._outcomes.give_up(delivery, "gone", text)

    def _lease_command(self, name: str, member: bytes) -> Command:
        """Return the command that keeps a record from other workers until the lease expires."""
        key = self._keys.retry(name, self._config.service)
        return ("ZADD", key, "XX", self._lease_until(), member)

    def _postpone_command(self, name: str, member: bytes) -> Command:
        """Return the command that leaves a record to other workers for some seconds."""
        key = self._keys.retry(name, self._config.service)
        return ("ZADD", key, "XX", self._postponed_until(), member)

    def _give_up_undecodable(self, name: str, member: bytes, error: Exception) -> Outcome:
        now = round(self._clock.now() * 1000)
        letter = DeadLetter(
            reason="undecodable",
            entry="",
            fields={b"record": member},
            error=f"The record of a retry cannot be decoded: {error}"[:MAX_ERROR_CHARS],
            first=now,
            last=now,
        )
        outcome = self._outcomes.rejected(Entry(name, "0-0", None), letter)
        key = self._keys.retry(name, self._config.service)
        outcome.commands = [*outcome.commands, ("ZREM", key, member)]
        outcome.undo = ("ZADD", key, self._lease_until(), member)
        return outcome

    def _delivery(self, name: str, subscription: Subscription, stored: _StoredRetry) -> Delivery:
        record = stored.record
        # Another program may have packed the same record differently.
        stored_member = b"" if record.packed() == stored.member else stored.member
        return Delivery(
            name=name,
            entry=record.entry,
            event=stored.event,
            body=record.event,
            subscription=subscription,
            claimed_until=time.monotonic() + self._config.claim_after,
            retry=record,
            stored_member=stored_member,
            memory=stored.memory + len(stored_member),
        )

    def _postponed_until(self) -> int:
        # Random, so that it is not always this worker that finds it due.
        pause = random.uniform(0.2, 1.0) * min(self._config.claim_after, self._timing.max_postpone)  # noqa: S311 - spreads load
        return round((self._clock.now() + pause) * 1000)

    def _is_old(self, record: RetryRecord) -> bool:
        return abs(self._clock.now() - record.last / 1000) > GONE_AFTER

    def _lease_until(self) -> int:
        return round((self._clock.now() + self._config.claim_after) * 1000)


def _check(answers: Iterable[object]) -> None:
    """Raise the first error. In a transaction that one names the reason, and EXEC does not."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


def _list_of(answer: object) -> list[Any]:
    if isinstance(answer, Exception):
        raise answer

    found = list(answer) if isinstance(answer, list) else []
    _check(found)
    return found
