"""Decide the outcome of a delivery: acknowledged, retried, or a dead letter. Trim dead letters."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import redis

from ..codec.records import DeadLetter, RetryRecord, words_of
from ..event import Event, opened
from ..logs import BoundedLog, get_logger, traceback_of
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher, Failure, judge
from ..routing.options import Receiver
from ..routing.subscriptions import Subscription, allowed
from ..signals import emit, events_dropped
from ..text import plain
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.keys import remedy, right_of
from ..transport.pipe import Command, Pipe

logger = get_logger(__name__)

#: Maximum length in characters of the readable payload in a dead letter.
MAX_PAYLOAD = 4_000


@dataclass(slots=True)
class Outcome:
    """The commands that end one entry, or one retry of it, in Redis."""

    name: str
    entry: str
    #: The delivery that ends; ``None`` for an entry that became no delivery.
    delivery: Delivery | None = None
    #: The bytes of a retry that became no delivery, since they cannot be decoded. Another program
    #: may have stored none.
    undecodable: bytes | None = None
    #: Commands of the transaction that ends it; empty if it is only acknowledged.
    commands: list[Command] = field(default_factory=list)
    #: Dead letters among the commands.
    letters: list[DeadLetter] = field(default_factory=list)
    #: Times at which the retries among the commands are due, in seconds since 1970.
    due: list[float] = field(default_factory=list)
    #: True if the connection was lost before the answer: Redis may have executed the commands.
    may_be_written: bool = False
    #: True if the acknowledgement succeeded but another command of the transaction failed.
    is_partly_written: bool = False


class Outcomes:
    """Makes the outcome of a delivery from the failures of its receivers.

    :param now: returns the time in seconds since 1970.
    """

    def __init__(
        self, context: Context, dispatcher: Dispatcher, *, now: Callable[[], float]
    ) -> None:
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._registry = context.registry
        self._dispatcher = dispatcher
        self._now = now

    def retries(self, subscription: Subscription, name: str, receiver: Receiver) -> int:
        """Return the subscription's retries, else the receiver's, else ``EVENTBUS_RETRIES``."""
        own = self._registry.retries_of(name, receiver)
        return allowed(subscription.retries, own, self._config.retries)

    def most_retries(self, subscription: Subscription, event: Event) -> int:
        """Return the most retries of an event's receivers: the crashes its workers may have."""
        receivers = self._dispatcher.receivers(event)
        counts = [self.retries(subscription, event.name, receiver) for receiver in receivers]
        return max(counts, default=self._config.retries)

    def of(self, delivery: Delivery, failures: Sequence[Failure]) -> Outcome:
        """Return the outcome of a delivery whose receivers have run."""
        outcome = Outcome(delivery.name, delivery.entry, delivery)

        for failure in failures:
            if failure.name:
                self._add_failure(outcome, delivery, failure)
            else:
                # The receiver succeeded; only its teardown failed.
                self._dispatcher.failures.final(delivery.event, failure)

        return outcome

    def give_up(self, delivery: Delivery, reason: str, error: str) -> Outcome:
        """Return the dead letter of a delivery whose receivers do not run."""
        if (record := delivery.retry) is None:
            letter = self._letter(delivery, reason, error, attempts=delivery.crashes or 0)
        else:
            letter = self._letter(
                delivery,
                reason,
                error,
                attempts=record.attempts,
                receiver=record.receiver,
                traceback=record.traceback,
            )

        return self.dead(delivery.name, letter, delivery=delivery)

    def dead(
        self,
        name: str,
        letter: DeadLetter,
        *,
        delivery: Delivery | None = None,
        undecodable: bytes | None = None,
    ) -> Outcome:
        """Return a dead letter: of a delivery, or of an entry or a retry that became none."""
        outcome = Outcome(name, letter.entry, delivery, undecodable)
        self._add_letter(outcome, letter)
        return outcome

    def _add_failure(self, outcome: Outcome, delivery: Delivery, failure: Failure) -> None:
        """Add the retry of the receiver that failed, or its dead letter."""
        record = delivery.retry
        attempts = 1 if record is None else record.attempts
        verdict = judge(
            failure.error,
            attempts=attempts,
            retries=self.retries(delivery.subscription, delivery.name, failure.receiver),
            jitter=self._timing.retry_jitter,
            first=self._timing.first_retry,
        )
        now = self._now()
        due = now + verdict.after
        error, traceback = words_of(failure.error), traceback_of(failure.error)
        self._dispatcher.failures.judged(
            delivery.event,
            failure,
            verdict,
            due=due,
            is_known=record is not None and record.traceback == traceback,
        )

        if verdict.reason is not None:
            letter = self._letter(
                delivery,
                verdict.reason,
                error,
                attempts=attempts,
                receiver=failure.name,
                traceback=traceback,
            )
            self._add_letter(outcome, letter)
            return

        failed = RetryRecord(
            entry=delivery.entry,
            event=delivery.body,
            receiver=failure.name,
            attempts=attempts,
            first=round(now * 1000) if record is None else record.first,
            last=round(now * 1000),
            error=error,
            traceback=traceback,
        )
        key = self._keys.retry(delivery.name, self._config.service)
        outcome.due.append(due)
        outcome.commands.append(("ZADD", key, round(due * 1000), failed.packed()))

    def _letter(
        self,
        delivery: Delivery,
        reason: str,
        error: str,
        *,
        attempts: int,
        receiver: str = "",
        traceback: str = "",
    ) -> DeadLetter:
        now = round(self._now() * 1000)
        return DeadLetter(
            reason=reason,
            entry=delivery.entry,
            fields={b"event": delivery.body},
            event_id=delivery.event.id,
            source=delivery.event.source,
            payload=readable(delivery.event),
            receiver=receiver,
            error=error,
            traceback=traceback,
            attempts=attempts,
            first=now if delivery.retry is None else delivery.retry.first,
            last=now,
        )

    def _add_letter(self, outcome: Outcome, letter: DeadLetter) -> None:
        key = self._keys.dead(outcome.name, self._config.service)
        outcome.letters.append(letter)
        outcome.commands.append(("XADD", key, "*", *letter.as_fields()))


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
        self, pipe: Pipe, context: Context, *, lock: AbstractContextManager[object]
    ) -> None:
        self._pipe = pipe
        self._service = context.config.service
        self._most = context.config.dead_maxlen
        self._command = context.command
        self._keys = context.keys
        self._counters = context.counters
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
        keys, service = self._keys, self._service
        dropped: dict[str, int] = {}
        names, self.grown = sorted(self.grown), set()

        try:
            trims: list[Command] = [
                ("XTRIM", keys.dead(name, service), "MAXLEN", "~", self._most) for name in names
            ]
            dropped = {
                name: count for name, count in zip(names, self._run(trims), strict=True) if count
            }
            self._uncounted.update(dropped)
            names = sorted(self._uncounted)
            counts: list[Command] = [
                ("INCRBY", keys.dead_dropped(name, service), self._uncounted[name])
                for name in names
            ]

            # A count that Redis refuses is added with the next dead letter.
            for name, answer in zip(names, self._run(counts), strict=True):
                if answer is not None:
                    del self._uncounted[name]
        except OUTAGE as error:
            logger.debug("Redis is away; dead letters are trimmed and counted later: %s", error)
            self.grown.update(names)

        return dropped

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands. A refusal is logged, and its answer is ``None``."""
        answers = self._pipe.run(commands) if commands else []

        for place, command in enumerate(commands):
            right, key = str(command[0]), str(command[1])
            state = f"refused {right} {key}"

            if not isinstance(error := answers[place], redis.ResponseError):
                self._log.over(state, "Redis lets the bus run %s of %r again.", right, key)
                continue

            answers[place] = None
            self._log.once(
                state,
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

        return answers

    def _report_dropped(self, name: str, count: int) -> None:
        self._counters.add("dead_dropped", count)
        self._log.error(
            f"dropped {name}",
            "%r has more than %d dead letters of %r: the %d oldest were dropped. Retry or drop "
            "dead letters (%s dead list), or raise 'EVENTBUS_DEAD_MAXLEN'.",
            self._service,
            self._most,
            name,
            count,
            self._command,
        )
        emit(events_dropped, self._service, where="dead", count=count)
