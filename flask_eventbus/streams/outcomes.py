"""What deliveries come to: acknowledged, to be tried again, or given up as dead letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..codec.records import DeadLetter, RetryRecord, words_of
from ..config import Config
from ..event import Event
from ..logs import traceback_of
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher
from ..receivers.retries import Failure, FailureLog, allowed, judge
from ..routing.bus_signal import Receiver
from ..routing.subscriptions import Subscription
from ..transport.clock import RedisClock
from ..transport.keys import StreamKeys
from ..transport.pipe import Command
from .decoder import readable
from .group import Entry


class RetryCounts:
    """Of what the subscription, the receiver and the settings say, the count that goes first.

    :param asked: how often a receiver asks to be tried again at an event ``name``.
    """

    def __init__(
        self,
        *,
        config: Config,
        dispatcher: Dispatcher,
        asked: Callable[[str, Receiver], int | None],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._asked = asked

    def after(self, delivery: Delivery, failure: Failure) -> int:
        """The count of a receiver that failed at a delivery."""
        return self._of(delivery.subscription, delivery.name, failure.receiver)

    def of_receiver(self, subscription: Subscription, event: Event, name: str) -> int:
        """The count of the receiver called so, which is connected."""
        receivers = self._dispatcher.receivers(event, only=name)
        return self._of(subscription, event.name, receivers[0])

    def of_event(self, subscription: Subscription, event: Event) -> int:
        """The highest count of an event's receivers: how often it may end its worker."""
        receivers = self._dispatcher.receivers(event)
        counts = [self._of(subscription, event.name, receiver) for receiver in receivers]
        return max(counts, default=self._config.retries)

    def _of(self, subscription: Subscription, name: str, receiver: Receiver) -> int:
        asked = self._asked(name, receiver)
        return allowed(subscription.retries, asked, self._config.retries)


@dataclass(slots=True)
class Outcome:
    """What Redis is to be told of one entry, or of one retry."""

    name: str
    entry: str
    #: All of them take effect, or none; empty where an acknowledgement is all.
    commands: Sequence[Command] = ()
    #: What it settles; ``None`` for an entry that became no delivery.
    delivery: Delivery | None = None
    #: What became of the receivers that failed.
    letters: Sequence[DeadLetter] = ()
    #: When the retries are due, in seconds since 1970.
    due: Sequence[float] = ()
    #: Whether Redis may have got it: the answer was lost.
    doubtful: bool = False
    #: Whether Redis took the end of it, and not the rest.
    is_torn: bool = False
    #: What undoes the end of one without a delivery, if it is no entry of the stream.
    undo: Command = ()

    @property
    def size(self) -> int:
        """The bytes that Redis is told: a record of a retry has the event once more."""
        return sum(
            len(part) for command in self.commands for part in command if isinstance(part, bytes)
        )

    @property
    def is_retry(self) -> bool:
        """Whether it is of one receiver that was tried again."""
        return self.delivery is not None and self.delivery.retry is not None


class Outcomes:
    """Judges how receivers ended.

    :param retries_of: how often the receiver called so is tried again at a delivery.
    :param failures: where failures are logged, with what follows.
    """

    def __init__(
        self,
        *,
        config: Config,
        keys: StreamKeys,
        retries_of: Callable[[Delivery, Failure], int],
        failures: FailureLog,
        clock: RedisClock,
    ) -> None:
        self._config = config
        self._keys = keys
        self._retries_of = retries_of
        self._failures = failures
        self._clock = clock

    def of(self, delivery: Delivery, failures: Sequence[Failure]) -> Outcome:
        """What a delivery came to."""
        if not failures:
            return Outcome(delivery.name, delivery.entry, (), delivery)

        commands: list[Command] = []
        letters: list[DeadLetter] = []
        due: list[float] = []

        for failure in failures:
            if failure.name:
                self._judge(delivery, failure, commands, letters, due)
            else:
                # The receiver is done, and only its teardown failed: nothing is tried again.
                self._failures.final(delivery.event, failure)

        return Outcome(delivery.name, delivery.entry, commands, delivery, letters, due)

    def give_up(self, delivery: Delivery, reason: str, error: str) -> Outcome:
        """What a delivery comes to that is not even begun."""
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
            delivery.name, delivery.entry, [self._bury(delivery.name, letter)], delivery, [letter]
        )

    def rejected(self, entry: Entry, letter: DeadLetter) -> Outcome:
        """What an entry comes to that is no event."""
        return Outcome(entry.name, entry.id, [self._bury(entry.name, letter)], letters=[letter])

    def skipped(self, entry: Entry) -> Outcome:
        """What an entry comes to that is not for this service."""
        return Outcome(entry.name, entry.id)

    def _judge(
        self,
        delivery: Delivery,
        failure: Failure,
        commands: list[Command],
        letters: list[DeadLetter],
        due: list[float],
    ) -> None:
        attempts = 1 if delivery.retry is None else delivery.retry.attempts
        retries = self._retries_of(delivery, failure)
        verdict = judge(failure.error, attempts=attempts, retries=retries)
        now = self._clock.now()
        last = "" if delivery.retry is None else delivery.retry.traceback
        self._failures.judged(
            delivery.event,
            failure,
            verdict,
            due=now + verdict.after,
            is_known=last == traceback_of(failure.error),
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
        commands.append(self._bury(delivery.name, letter))

    def _record(
        self, delivery: Delivery, failure: Failure, attempts: int, now: float
    ) -> RetryRecord:
        moment = round(now * 1000)
        return RetryRecord(
            entry=delivery.entry,
            event=delivery.body,
            receiver=failure.name,
            attempts=attempts,
            first=moment if delivery.retry is None else delivery.retry.first,
            last=moment,
            error=words_of(failure.error),
            traceback=traceback_of(failure.error),
        )

    def _letter(self, delivery: Delivery, reason: str, error: str, *, attempts: int) -> DeadLetter:
        now = round(self._clock.now() * 1000)
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

    def _bury(self, name: str, letter: DeadLetter) -> Command:
        key = self._keys.dead(name, self._config.service)
        return ("XADD", key, "*", *letter.as_fields())
