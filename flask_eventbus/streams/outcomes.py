"""Decide the outcome of a delivery: acknowledged, retried, or a dead letter. Trim dead letters."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import redis

from ..codec.records import DeadLetter, RetryRecord, words_of
from ..config import Config
from ..event import Event, opened
from ..logs import BoundedLog, Counters, get_logger, traceback_of
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher, Failure, FailureLog, allowed, judge
from ..routing.options import Receiver
from ..routing.subscriptions import Subscription
from ..signals import emit, events_dropped
from ..text import plain
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.keys import StreamKeys, remedy, right_of
from ..transport.pipe import Command, Pipe
from .group import Entry

logger = get_logger(__name__)

#: Maximum length in characters of the readable payload in a dead letter.
MAX_PAYLOAD = 4_000


class RetryCounts:
    """Numbers of retries: the subscription's, else the receiver's, else ``EVENTBUS_RETRIES``."""

    def __init__(self, context: Context, dispatcher: Dispatcher) -> None:
        self._config = context.config
        self._registry = context.registry
        self._dispatcher = dispatcher

    def after(self, delivery: Delivery, failure: Failure) -> int:
        """Return the retries of the receiver that failed at a delivery."""
        return self._of(delivery.subscription, delivery.name, failure.receiver)

    def of_receiver(self, subscription: Subscription, event: Event, name: str) -> int:
        """Return the retries of the connected receiver ``name``."""
        receivers = self._dispatcher.receivers(event, only=name)
        return self._of(subscription, event.name, receivers[0])

    def of_event(self, subscription: Subscription, event: Event) -> int:
        """Return the most retries of an event's receivers: the crashes its workers may have."""
        receivers = self._dispatcher.receivers(event)
        counts = [self._of(subscription, event.name, receiver) for receiver in receivers]
        return max(counts, default=self._config.retries)

    def _of(self, subscription: Subscription, name: str, receiver: Receiver) -> int:
        own = self._registry.retries_of(name, receiver)
        return allowed(subscription.retries, own, self._config.retries)


@dataclass(slots=True)
class Outcome:
    """The commands that end one entry, or one retry of it, in Redis."""

    name: str
    entry: str
    #: Commands of the transaction that ends it; empty if it is only acknowledged.
    commands: Sequence[Command] = ()
    #: The delivery that ends; ``None`` for an entry that became no delivery.
    delivery: Delivery | None = None
    #: Dead letters among the commands.
    letters: Sequence[DeadLetter] = ()
    #: Times at which the retries among the commands are due, in seconds since 1970.
    due: Sequence[float] = ()
    #: True if the connection was lost before the answer: Redis may have executed the commands.
    may_be_written: bool = False
    #: True if the acknowledgement succeeded but another command of the transaction failed.
    is_partly_written: bool = False
    #: The bytes of a retry that became no delivery, since they cannot be decoded. Another program
    #: may have stored none.
    undecodable: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of the commands. A retry and a dead letter each hold the event."""
        return sum(
            len(part) for command in self.commands for part in command if isinstance(part, bytes)
        )

    @property
    def member(self) -> bytes | None:
        """The bytes in Redis of the retry that it ends; ``None`` for an entry of the stream."""
        if self.delivery is None or self.delivery.retry is None:
            return self.undecodable

        return self.delivery.member


class Outcomes:
    """Makes the outcome of a delivery from the failures of its receivers.

    :param retries_of: returns the number of retries allowed after a failure.
    :param failures: logs each failure, and whether a retry or a dead letter follows.
    :param now: returns the time in seconds since 1970.
    """

    def __init__(
        self,
        context: Context,
        *,
        retries_of: Callable[[Delivery, Failure], int],
        failures: FailureLog,
        now: Callable[[], float],
    ) -> None:
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._retries_of = retries_of
        self._failures = failures
        self._now = now

    def of(self, delivery: Delivery, failures: Sequence[Failure]) -> Outcome:
        """Return the outcome of a delivery whose receivers have run."""
        if not failures:
            return Outcome(delivery.name, delivery.entry, (), delivery)

        commands: list[Command] = []
        letters: list[DeadLetter] = []
        due: list[float] = []

        for failure in failures:
            if failure.name:
                self._add_failure(delivery, failure, commands, letters, due)
            else:
                # The receiver succeeded; only its teardown failed.
                self._failures.final(delivery.event, failure)

        return Outcome(delivery.name, delivery.entry, commands, delivery, letters, due)

    def give_up(self, delivery: Delivery, reason: str, error: str) -> Outcome:
        """Return the dead letter of a delivery whose receivers do not run."""
        record = delivery.retry
        letter = self._letter(delivery, reason, error, attempts=delivery.crashes or 0)

        if record is not None:
            letter = replace(
                letter,
                receiver=record.receiver,
                attempts=record.attempts,
                first=record.first,
                traceback=record.traceback,
            )

        return Outcome(
            delivery.name,
            delivery.entry,
            [self._add_dead_letter(delivery.name, letter)],
            delivery,
            [letter],
        )

    def rejected(self, entry: Entry, letter: DeadLetter) -> Outcome:
        """Return the dead letter of an entry that cannot be decoded."""
        return Outcome(
            entry.name, entry.id, [self._add_dead_letter(entry.name, letter)], letters=[letter]
        )

    def undecodable_retry(self, name: str, member: bytes, letter: DeadLetter) -> Outcome:
        """Return the dead letter of a retry whose record cannot be decoded."""
        command = self._add_dead_letter(name, letter)
        return Outcome(name, "", [command], letters=[letter], undecodable=member)

    def skipped(self, entry: Entry) -> Outcome:
        """Return the acknowledgement of an entry that this service does not handle."""
        return Outcome(entry.name, entry.id)

    def _add_failure(
        self,
        delivery: Delivery,
        failure: Failure,
        commands: list[Command],
        letters: list[DeadLetter],
        due: list[float],
    ) -> None:
        attempts = 1 if delivery.retry is None else delivery.retry.attempts
        retries = self._retries_of(delivery, failure)
        verdict = judge(
            failure.error,
            attempts=attempts,
            retries=retries,
            jitter=self._timing.retry_jitter,
            first=self._timing.first_retry,
        )
        now = self._now()
        last_traceback = "" if delivery.retry is None else delivery.retry.traceback
        self._failures.judged(
            delivery.event,
            failure,
            verdict,
            due=now + verdict.after,
            is_known=last_traceback == traceback_of(failure.error),
        )

        if verdict.reason is None:
            record = self._record(delivery, failure, attempts, now)
            due.append(now + verdict.after)
            key = self._keys.retry(delivery.name, self._config.service)
            commands.append(("ZADD", key, round(due[-1] * 1000), record.packed()))
            return

        letter = replace(
            self._letter(delivery, verdict.reason, words_of(failure.error), attempts=attempts),
            receiver=failure.name,
            traceback=traceback_of(failure.error),
        )

        if delivery.retry is not None:
            letter = replace(letter, first=delivery.retry.first)

        letters.append(letter)
        commands.append(self._add_dead_letter(delivery.name, letter))

    def _record(
        self, delivery: Delivery, failure: Failure, attempts: int, now: float
    ) -> RetryRecord:
        now_ms = round(now * 1000)
        return RetryRecord(
            entry=delivery.entry,
            event=delivery.body,
            receiver=failure.name,
            attempts=attempts,
            first=now_ms if delivery.retry is None else delivery.retry.first,
            last=now_ms,
            error=words_of(failure.error),
            traceback=traceback_of(failure.error),
        )

    def _letter(self, delivery: Delivery, reason: str, error: str, *, attempts: int) -> DeadLetter:
        now = round(self._now() * 1000)
        return DeadLetter(
            reason=reason,
            entry=delivery.entry,
            fields={b"event": delivery.body},
            event_id=delivery.event.id,
            source=delivery.event.source,
            payload=readable(delivery.event),
            error=error,
            attempts=attempts,
            first=now,
            last=now,
        )

    def _add_dead_letter(self, name: str, letter: DeadLetter) -> Command:
        key = self._keys.dead(name, self._config.service)
        return ("XADD", key, "*", *letter.as_fields())


def readable(event: Event) -> str:
    """Return the payload as JSON, as in ``tail --json``, cut to :data:`MAX_PAYLOAD`."""
    payload = plain(dict(opened(event).payload))
    return json.dumps(payload, ensure_ascii=False, allow_nan=False)[:MAX_PAYLOAD]


class DeadLimit:
    """Trims streams of dead letters that are longer than ``EVENTBUS_DEAD_MAXLEN``.

    It uses ``XTRIM``, which returns the number of removed entries. ``XADD MAXLEN`` does not.

    :param lock: held by the thread that uses the connection.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        config: Config,
        keys: StreamKeys,
        counters: Counters,
        lock: AbstractContextManager[object],
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._most = config.dead_maxlen
        self._keys = keys
        self._counters = counters
        self._lock = lock
        self._log = BoundedLog(logger)
        #: Signals with new dead letters since their stream of dead letters was last trimmed.
        self.grown: set[str] = set()
        #: Dropped dead letters not yet counted in Redis, by signal.
        self._uncounted: Counter[str] = Counter()

    def enforce(self) -> None:
        """Trim the streams that grew. If Redis is away, the next call does it."""
        with self._lock:
            dropped = self._trim_and_count()

        for name, count in dropped.items():
            self._report_dropped(name, count)

    def _trim_and_count(self) -> dict[str, int]:
        """Return the number of dropped dead letters by signal, and add to the counts in Redis."""
        keys, service = self._keys, self._config.service
        dropped: dict[str, int] = {}
        names, self.grown = sorted(self.grown), set()

        try:
            answers = self._run(
                [("XTRIM", keys.dead(name, service), "MAXLEN", "~", self._most) for name in names]
            )
            dropped = {name: count for name, count in zip(names, answers, strict=True) if count}
            self._uncounted.update(dropped)
            names = sorted(self._uncounted)
            answers = self._run(
                [
                    ("INCRBY", keys.dead_dropped(name, service), self._uncounted[name])
                    for name in names
                ]
            )
        except OUTAGE as error:
            logger.debug("Redis is away; dead letters are trimmed and counted later: %s", error)
            self.grown.update(names)
            return dropped

        # A count that Redis refused is added with the next dead letter.
        for name, answer in zip(names, answers, strict=True):
            if answer is not None:
                del self._uncounted[name]

        return dropped

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands. A refusal is logged, and its answer is ``None``."""
        answers = self._pipe.run(commands) if commands else []

        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, redis.ResponseError):
                self._log_refusal(command, answer)
            else:
                right, key = str(command[0]), str(command[1])
                text = "Redis lets the bus run %s of %r again."
                self._log.over(f"refused {right} {key}", text, right, key)

        return [None if isinstance(answer, redis.ResponseError) else answer for answer in answers]

    def _log_refusal(self, command: Command, error: redis.ResponseError) -> None:
        right, key = str(command[0]), str(command[1])
        self._log.once(
            f"refused {right} {key}",
            "Redis refuses %s of %r: %s. %s %s",
            right,
            key,
            error,
            "'EVENTBUS_DEAD_MAXLEN' has no effect."
            if right == "XTRIM"
            else "Dropped dead letters are not counted.",
            remedy(error, {key: right_of(command)}),
            level=logging.ERROR,
        )

    def _report_dropped(self, name: str, count: int) -> None:
        self._counters.add("dead_dropped", count)
        self._log.error(
            f"dropped {name}",
            "%r has more than %d dead letters of %r: the %d oldest were dropped. Retry or drop "
            "dead letters (flask eventbus dead list), or raise 'EVENTBUS_DEAD_MAXLEN'.",
            self._config.service,
            self._most,
            name,
            count,
        )
        emit(events_dropped, self._config.service, where="dead", count=count)
