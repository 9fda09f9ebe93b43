"""The retries of a service: a sorted set for each signal, scored by the time a retry is due.

A worker leases a retry: it sets the score to the end of its lease, so that no other takes it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from typing import Any

import redis

from ..codec.records import MAX_ERROR_CHARS, BadRecordError, DeadLetter, RetryRecord
from ..config import SIGNAL_NAME
from ..errors import DecodeError
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.keys import SEARCH, grant_its_user
from ..transport.pipe import Command, Pipe
from .acknowledger import Acknowledger
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

#: Seconds since the last attempt after which a retry without a receiver is given up. A
#: deployment may take as long.
GONE_AFTER = 3_600.0

#: Seconds that a retry is due before it counts as read by no worker.
OVERDUE = 60.0

#: Most signals in one search.
MAX_NAMES = 10_000

#: Most retries given up in one round trip of a search.
MAX_PER_STEP = 100


class RetryQueue:
    """Leases retries that are due, so that only one worker runs each.

    :param receives: returns True if this process reads the stream of a signal, or may soon.
    """

    def __init__(
        self,
        pipe: Pipe,
        context: Context,
        *,
        dispatcher: Dispatcher,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        receives: Callable[[str], bool],
    ) -> None:
        self._pipe = pipe
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._codec = context.codec
        self._dispatcher = dispatcher
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._lock = acknowledger.lock
        self._clock = acknowledger.clock
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
        """Lease retries that are due. The caller holds the lock.

        A worker decodes only what it has leased, so that many workers cost little more than one.

        :return: the retries to run, the outcomes of those given up, and True if more are due.
        :raises redis.ConnectionError: Redis is away.
        """
        due_until, until = round(self._clock.now() * 1000), self._lease_until()
        found = self._pipe.ask(*self._find_due(name, due_until, most=most))
        leased, later = self._lease(name, found, due_until, until)
        deliveries: list[Delivery] = []
        given_up: list[Outcome] = []

        for member in leased:
            stored = self._decode(name, subscription, member)
            result = stored if isinstance(stored, Outcome) else self._judge(*stored)

            if isinstance(result, Delivery):
                deliveries.append(result)
            elif result is not None:
                given_up.append(result)
            else:
                later.append(("ZADD", self._key(name), "XX", self._postponed_until(), member))

        self._run(later)
        return deliveries, given_up, len(found) >= most

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
        subscription = Subscription(name=name, via="stream")

        while True:
            with self._lock:
                given_up = self._lease_orphans(name, subscription)

            self._acknowledger.write(given_up)

            if len(given_up) < MAX_PER_STEP:
                return

    def _lease_orphans(self, name: str, subscription: Subscription) -> list[Outcome]:
        """Lease overdue retries that are to be given up. The caller holds the lock."""
        due_until, until = round((self._clock.now() - OVERDUE) * 1000), self._lease_until()
        found = self._pipe.ask(*self._find_due(name, due_until, most=MAX_PER_STEP))
        outcomes: dict[bytes, Outcome] = {}

        for member in found:
            stored = self._decode(name, subscription, member)
            outcome = stored if isinstance(stored, Outcome) else self._judge_orphan(*stored)

            if outcome is not None:
                outcomes[member] = outcome

        leased, later = self._lease(name, list(outcomes), due_until, until)
        self._run(later)
        return [outcomes[member] for member in leased]

    def _lease(
        self, name: str, members: Sequence[bytes], due_until: int, until: int
    ) -> tuple[list[bytes], list[Command]]:
        """Lease retries that are due.

        A transaction sets an older score to the time of the search, and adds what that lacks to
        the end of the lease. If two workers add at the same time, only the first one gets the end
        of its lease as the answer.

        :param due_until: the time of the search, in milliseconds since 1970.
        :param until: the end of the lease.
        :return: the retries that this worker has leased, and commands for the others, to be run.
        """
        key = self._key(name)
        commands: list[Command] = []
        leased: list[bytes] = []
        later: list[Command] = []

        for member in members:
            # First GT, so that the sum of two leases is not far in the future: a worker that came
            # second may be lost before it corrects the score.
            commands += [
                ("ZADD", key, "XX", "GT", due_until, member),
                ("ZADD", key, "XX", "INCR", until - due_until, member),
            ]

        for member, score in zip(members, self._execute(commands)[1::2], strict=True):
            if score is not None and abs(float(score) - until) >= 1:
                # Another worker has it. Both have added to the score, so set what that one set.
                first = min(round(float(score)) - (until - due_until), self._lease_until())
                later.append(("ZADD", key, "XX", first, member))
            elif score is not None:
                leased.append(member)

        return leased, later

    def _key(self, name: str) -> str:
        return self._keys.retry(name, self._config.service)

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands, or raise the first error."""
        answers = self._pipe.run(commands) if commands else []
        _check(answers)
        return answers

    def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to the commands of a transaction, or raise the first error."""
        # A refused command names the reason, and the answer to EXEC after it does not.
        answers = self._run([("MULTI",), *commands, ("EXEC",)] if commands else [])
        results: list[Any] = answers[-1] if answers else []
        _check(results)
        return results

    def _find_due(self, name: str, due_until: int, *, most: int) -> Command:
        return ("ZRANGEBYSCORE", self._key(name), "-inf", due_until, "LIMIT", 0, most)

    def renew(self, delivery: Delivery) -> bool:
        """Extend the lease of a retry. Return False if another worker ended it.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._key(delivery.name)

        with self._lock:
            member = delivery.member
            score, _ = self._run(
                [("ZSCORE", key, member), ("ZADD", key, "XX", self._lease_until(), member)]
            )

        return score is not None

    def record_start(self, delivery: Delivery, record: RetryRecord) -> bool:
        """Count the attempt in Redis before it runs. Return False if another worker started it.

        If this process dies in the attempt, other workers see the count.

        :raises redis.ConnectionError: Redis is away.
        :raises redis.ResponseError: Redis refuses.
        """
        key = self._key(delivery.name)
        running = replace(record, attempts=record.attempts + 1, running=True)
        member = running.packed()

        with self._lock:
            removed, added = self._execute(
                [("ZREM", key, delivery.member), ("ZADD", key, self._lease_until(), member)]
            )

            if removed:
                delivery.retry, delivery.stored_member = running, b""
            elif added:
                # Not if the other worker has stored the same bytes.
                self._pipe.ask("ZREM", key, member)

        return bool(removed)

    def postponed(self, delivery: Delivery, record: RetryRecord) -> Outcome:
        """Return the outcome of a retry whose receiver was disconnected after its start.

        The attempt is not counted, and another worker may have the receiver.
        """
        waiting = replace(record, attempts=record.attempts - 1, running=False).packed()
        command: Command = ("ZADD", self._key(delivery.name), self._postponed_until(), waiting)
        return Outcome(delivery.name, delivery.entry, delivery, commands=[command])

    def release(self, delivery: Delivery) -> None:
        """End the lease of a retry that was not started, so that it is due at once.

        :raises redis.ConnectionError: Redis is away.
        """
        key = self._key(delivery.name)

        with self._lock:
            # XX: another worker may have started or ended it.
            self._pipe.run([("ZADD", key, "XX", round(self._clock.now() * 1000), delivery.member)])

    def _judge(self, delivery: Delivery, record: RetryRecord) -> Delivery | Outcome | None:
        """Return a leased retry to run, the outcome of one given up, or ``None`` to postpone it."""
        # Redis's clock was set, so the lease may have expired although its worker runs.
        if record.running and not self._clock.is_steady:
            return None

        receivers = self._dispatcher.receivers(delivery.event, only=record.receiver)

        if not receivers:
            # Another worker may have the receiver.
            return self._judge_orphan(delivery, record)

        retries = self._outcomes.retries(delivery.subscription, delivery.name, receivers[0])

        if record.running and record.attempts > retries:
            text = f"{record.attempts} attempts were made; the worker died in the last one."
            return self._outcomes.give_up(delivery, "killed", text)

        return delivery

    def _judge_orphan(self, delivery: Delivery, record: RetryRecord) -> Outcome | None:
        """Return the outcome of a retry without a receiver; ``None`` if it is not old."""
        if abs(self._clock.now() - record.last / 1000) <= GONE_AFTER:
            return None

        text = (
            f"No worker of {self._config.service!r} has the receiver {record.receiver!r}, and its "
            f"last attempt was over an hour ago. Its last error: {record.error}"
        )
        return self._outcomes.give_up(delivery, "gone", text)

    def _decode(
        self, name: str, subscription: Subscription, member: bytes
    ) -> tuple[Delivery, RetryRecord] | Outcome:
        """Decode a member of the sorted set, or return the dead letter of one that is damaged."""
        try:
            record = RetryRecord.unpacked(member)
            event, memory = self._codec.decode_for_queue(record.event, via="stream")

            if event.name != name:
                raise BadRecordError(f"it holds an event of {event.name!r}")
        except (BadRecordError, DecodeError) as error:
            now = round(self._clock.now() * 1000)
            letter = DeadLetter(
                reason="undecodable",
                entry="",
                fields={b"record": member},
                error=f"The record of a retry cannot be decoded: {error}"[:MAX_ERROR_CHARS],
                first=now,
                last=now,
            )
            return self._outcomes.dead(name, letter, undecodable=member)

        # Another program may have packed the same record differently.
        stored_member = b"" if record.packed() == member else member
        delivery = Delivery(
            name=name,
            entry=record.entry,
            event=replace(event, attempt=record.attempts + 1),
            body=record.event,
            subscription=subscription,
            claimed_until=time.monotonic() + self._config.claim_after,
            identity=(name, record.entry, sha256(member).digest()),
            retry=record,
            stored_member=stored_member,
            memory=memory + len(stored_member),
        )
        return delivery, record

    def _postponed_until(self) -> int:
        # Random, so that it is not always this worker that finds it due.
        pause = random.uniform(0.2, 1.0) * min(self._config.claim_after, self._timing.max_postpone)  # noqa: S311 - spreads load
        return round((self._clock.now() + pause) * 1000)

    def _lease_until(self) -> int:
        return round((self._clock.now() + self._config.claim_after) * 1000)


def _check(answers: Iterable[object]) -> None:
    """Raise the first error."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
