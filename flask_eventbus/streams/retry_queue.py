"""The retries of a service: a sorted set for each signal, scored by the time a retry is due.

A worker leases a retry: it sets the score to the end of its lease, so that no other takes it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import redis

from ..codec.records import MAX_ERROR_CHARS, BadRecordError, DeadLetter, RetryRecord
from ..config import SIGNAL_NAME
from ..errors import DecodeError
from ..event import Event
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.keys import SEARCH, grant_its_user
from ..transport.pipe import Command, Pipe
from .acknowledger import Acknowledger
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

T = TypeVar("T")

#: Seconds since the last attempt after which a retry without a receiver is given up. A
#: deployment may take as long.
GONE_AFTER = 3_600.0

#: Seconds that a retry is due before it counts as read by no worker.
OVERDUE = 60.0

#: Most signals in one search.
MAX_NAMES = 10_000

#: Most retries given up in one round trip of a search.
MAX_PER_STEP = 100


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

    :param knows: returns True if a receiver with that name is connected for an event.
    :param retries_of: returns the number of retries that the subscription allows a receiver.
    :param receives: returns True if this process reads the stream of a signal, or may soon.
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
        receives: Callable[[str], bool],
    ) -> None:
        self._pipe = pipe
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._codec = context.codec
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._lock = acknowledger.lock
        self._clock = acknowledger.clock
        self._knows = knows
        self._retries_of = retries_of
        self._receives = receives
        self._log = BoundedLog(logger)
        #: Signals whose retries the Redis user may not read, so none are this service's.
        self._forbidden: set[str] = set()
        #: Monotonic time of the next :meth:`give_up_orphans`.
        wait = self._timing.search_orphans_every * random.uniform(0.1, 1.0)  # noqa: S311 - spreads load
        self.search_at = time.monotonic() + wait

    def take(
        self, name: str, subscription: Subscription, *, most: int
    ) -> tuple[list[Delivery], list[Outcome], bool]:
        """Lease retries that are due.

        :return: the retries to run, the outcomes of those given up, and True if more are due.
        :raises redis.ConnectionError: Redis is away.
        """
        taken, count = self._lease_due(
            name, lambda member: self._judge(name, subscription, member), most=most
        )
        deliveries = [found for found in taken if isinstance(found, Delivery)]
        given_up = [found for found in taken if isinstance(found, Outcome)]
        return deliveries, given_up, count >= most

    def due_command(self, name: str) -> Command:
        """Return a command whose answer is empty if no retry is due."""
        return self._find_due(name, round(self._clock.now() * 1000), most=1)

    def give_up_orphans(self) -> None:
        """Give up old retries of signals that no worker reads any more.

        Until they are overdue and old, another process of the service may run them. Only the
        maintenance thread calls this, at :attr:`search_at`.

        :raises redis.ConnectionError: Redis is away.
        """
        self.search_at = time.monotonic() + self._timing.search_orphans_every

        for name in self._orphaned_signals():
            try:
                self._give_up_orphans_of(name)
            except redis.exceptions.NoPermissionError as error:
                self._forbidden.add(name)
                logger.debug("The Redis user may not read the retries of %r: %s", name, error)
            except redis.ResponseError as error:
                logger.debug("Could not read the retries of %r: %s", name, error)

    def _orphaned_signals(self) -> list[str]:
        """Return the signals that have a stream which this process does not read."""
        try:
            with self._lock:
                members = self._pipe.ask("SMEMBERS", self._keys.names)
        except redis.ResponseError as error:
            self._log.once(
                "refused",
                "Redis does not let %r list the streams (%s). Retries of signals that it no longer "
                "subscribes to are not given up. %s",
                self._config.service,
                error,
                grant_its_user({self._keys.names: SEARCH}),
            )
            return []

        self._log.over("refused", "Redis lets %r list the streams again.", self._config.service)
        names = sorted(name.decode(errors="replace") for name in members)
        return [
            name
            for name in islice(names, MAX_NAMES)
            if SIGNAL_NAME.fullmatch(name)
            and name not in self._forbidden
            and not self._receives(name)
        ]

    def _give_up_orphans_of(self, name: str) -> None:
        count = MAX_PER_STEP

        while count >= MAX_PER_STEP:
            with self._lock:
                given_up, _ = self._lease_due(
                    name,
                    lambda member: self._judge_orphan(name, member),
                    most=MAX_PER_STEP,
                    overdue=OVERDUE,
                )

            self._acknowledger.write(given_up)
            count = len(given_up)

    def _lease_due(
        self,
        name: str,
        judge: Callable[[bytes], tuple[T | None, int | None]],
        *,
        most: int,
        overdue: float = 0.0,
    ) -> tuple[list[T], int]:
        """Lease retries that have been due for ``overdue`` seconds. The caller holds the lock.

        A transaction sets an older score to the time of the search, and adds what that lacks to
        the end of the lease. If two workers add at the same time, only the first one gets the end
        of its lease as the answer.

        :param judge: returns the item to return for a member of the sorted set, and its new score
            in milliseconds since 1970. Without a score, the member is not leased.
        :return: the items of the leased members, and the number of members found.
        """
        key = self._keys.retry(name, self._config.service)
        due_until = round((self._clock.now() - overdue) * 1000)
        found = self._pipe.ask(*self._find_due(name, due_until, most=most))
        leases: list[tuple[bytes, T | None, int]] = []
        commands: list[Command] = []

        for member in found:
            result, until = judge(member)

            if until is not None:
                leases.append((member, result, until))
                # First GT, so that the sum of two leases is not far in the future: a worker that
                # came second may be lost before it corrects the score.
                commands += [
                    ("ZADD", key, "XX", "GT", due_until, member),
                    ("ZADD", key, "XX", "INCR", until - due_until, member),
                ]

        answers = self._run([("MULTI",), *commands, ("EXEC",)]) if commands else [[]]
        taken: list[T] = []
        again: list[Command] = []

        for (member, result, until), score in zip(leases, _list_of(answers[-1])[1::2], strict=True):
            # Another worker has it, or ended it. Both have added to the score, so it is too high.
            if score is not None and abs(float(score) - until) >= 1:
                again.append(("ZADD", key, "XX", until, member))
            elif score is not None and result is not None:
                taken.append(result)

        self._run(again)
        return taken, len(found)

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands, or raise the first error."""
        answers = self._pipe.run(commands) if commands else []
        _check(answers)
        return answers

    def _find_due(self, name: str, due_until: int, *, most: int) -> Command:
        key = self._keys.retry(name, self._config.service)
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

    def _judge(
        self, name: str, subscription: Subscription, member: bytes
    ) -> tuple[Delivery | Outcome | None, int]:
        """Return the delivery of a due retry or its outcome, and the score that it gets."""
        stored = self._decode(name, member)

        if isinstance(stored, Outcome):
            return stored, self._lease_until()

        record, event = stored.record, stored.event

        # Redis's clock was set, so the lease may have expired although its worker runs.
        if record.running and not self._clock.is_steady:
            return None, self._postponed_until()

        if not self._knows(event, record.receiver):
            # Another worker may have the receiver.
            if not self._is_old(record):
                return None, self._postponed_until()

            return self._give_up_gone(name, subscription, stored), self._lease_until()

        delivery = self._delivery(name, subscription, stored)
        delivery.event = replace(event, attempt=record.attempts + 1)
        allowed = self._retries_of(subscription, event, record.receiver)

        if record.running and record.attempts > allowed:
            text = f"{record.attempts} attempts were made; the worker died in the last one."
            return self._outcomes.give_up(delivery, "killed", text), self._lease_until()

        return delivery, self._lease_until()

    def _judge_orphan(self, name: str, member: bytes) -> tuple[Outcome | None, int | None]:
        """Return the outcome of a retry that no worker reads; ``None`` if it is not old."""
        stored = self._decode(name, member)

        if isinstance(stored, Outcome):
            return stored, self._lease_until()

        if not self._is_old(stored.record):
            return None, None

        subscription = Subscription(name=name, via="stream")
        return self._give_up_gone(name, subscription, stored), self._lease_until()

    def _decode(self, name: str, member: bytes) -> _StoredRetry | Outcome:
        """Decode a member of the sorted set, or return the outcome of one that is damaged."""
        try:
            record = RetryRecord.unpacked(member)
            event, memory = self._codec.decode_for_queue(record.event, via="stream")

            if event.name != name:
                raise BadRecordError(f"it holds an event of {event.name!r}")
        except (BadRecordError, DecodeError) as error:
            return self._undecodable(name, member, error)

        return _StoredRetry(member, record, event, memory)

    def _give_up_gone(self, name: str, subscription: Subscription, stored: _StoredRetry) -> Outcome:
        record = stored.record
        text = (
            f"No worker of {self._config.service!r} has the receiver {record.receiver!r}, and its "
            f"last attempt was over an hour ago. Its last error: {record.error}"
        )
        delivery = self._delivery(name, subscription, stored)
        return self._outcomes.give_up(delivery, "gone", text)

    def _undecodable(self, name: str, member: bytes, error: Exception) -> Outcome:
        now = round(self._clock.now() * 1000)
        letter = DeadLetter(
            reason="undecodable",
            entry="",
            fields={b"record": member},
            error=f"The record of a retry cannot be decoded: {error}"[:MAX_ERROR_CHARS],
            first=now,
            last=now,
        )
        return self._outcomes.undecodable_retry(name, member, letter)

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
