"""Runs receivers as a stream does, and tries those that fail again, in a time of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from ..codec.records import DeadLetter, RetryRecord, words_of
from ..event import Event
from ..node import Node
from ..receivers.delivery import Delivery
from ..receivers.retries import Failure, allowed, judge
from ..routing.subscriptions import Subscription, subscription_for
from ..signals import emit_now, event_dead_lettered
from ..streams.decoder import EntryDecoder, readable
from ..streams.group import Entry
from ..streams.retry_queue import GONE_AFTER
from .expectations import hears
from .recorder import GivenUp, given_up

#: What the processes of a service have in common: where their group is, and its name.
Home = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """A receiver that failed at an event of a stream: what ``eventbus.failures`` has."""

    #: The service whose receiver it is.
    service: str
    #: The receiver's name: ``module.qualname``.
    receiver: str
    #: The event as the receiver saw it.
    event: Event
    #: What it raised.
    error: BaseException
    #: Seconds until it is tried again; ``None`` where it is not.
    after: float | None

    @property
    def attempt(self) -> int:
        """Which attempt it was, from 1."""
        return self.event.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A retry that is not due yet."""

    home: Home
    event: Event
    #: The bytes that Redis would keep of it.
    record: bytes
    #: Seconds until the next look, where no worker has its receiver.
    patience: float


class RetryRehearsal:
    """Plays the streams of services to their receivers, and keeps what becomes of failures.

    Nothing of it is in Redis, and no time passes but by :meth:`advance`.

    :param nodes: the nodes under test, the latest last.
    """

    def __init__(self, nodes: Callable[[], list[Node]]) -> None:
        self._nodes = nodes
        self._entries = itertools.count(1)
        self._numbers = itertools.count()
        #: Seconds that passed so far.
        self._now = 0.0
        #: What waits, with the time when it is due, and a number that keeps the order.
        self._line: list[tuple[float, int, Waiting]] = []
        self.failures: list[FailedAttempt] = []
        self.given_up: list[GivenUp] = []

    def clear(self) -> None:
        """Forget failures and dead letters; what waits still does."""
        self.failures.clear()
        self.given_up.clear()

    # -- attempts -------------------------------------------------------------------------

    def deliveries(self, event: Event) -> list[tuple[Node, Delivery]]:
        """Who gets an event of a stream: one node of each service, or all without a group."""
        entry = f"{next(self._entries)}-0"
        found: dict[object, tuple[Node, Delivery]] = {}

        for node in self._nodes():
            delivery = _delivery(node, event, entry) if hears(node, event) else None

            if delivery is not None:
                found[_home_of(node) if delivery.in_group else node] = node, delivery

        return list(found.values())

    def run(self, node: Node, delivery: Delivery) -> Sequence[Failure]:
        """Run the receivers of a delivery, or the one that is tried again."""
        only = delivery.retry.receiver if delivery.retry else None
        return node.dispatcher.dispatch(delivery.event, only=only).failures

    def settle(self, node: Node, delivery: Delivery, failures: Sequence[Failure]) -> list[Failure]:
        """Decide what follows from failures, as a worker does; those that are the test's own."""
        for failure in failures:
            if not _is_of_the_test(failure):
                self._settle(node, delivery, failure)

        return [failure for failure in failures if _is_of_the_test(failure)]

    # -- time -----------------------------------------------------------------------------

    @property
    def next_due(self) -> float | None:
        """Seconds until something is due; ``None`` where nothing waits."""
        return max(0.0, self._line[0][0] - self._now) if self._line else None

    def advance(self, seconds: float) -> int:
        """Let time pass, and run what becomes due, in its order; how many attempts that were."""
        until = self._now + seconds
        attempts = 0

        while self._line and self._line[0][0] <= until:
            self._now, _, waiting = heappop(self._line)
            attempts += self._try_again(waiting)

        self._now = until
        return attempts

    def _try_again(self, waiting: Waiting) -> bool:
        """Run a receiver once more, in a node that has it; whether there is one."""
        record = RetryRecord.unpacked(waiting.record)
        found = [node for node in self._nodes() if _home_of(node) == waiting.home]

        for node in reversed(found):
            if node.dispatcher.receivers(waiting.event, only=record.receiver):
                delivery = _again(node, record)
                raised = self.settle(node, delivery, self.run(node, delivery))
                raise_all(delivery.event, raised)
                return True

        self._postpone(waiting, record)
        return False

    def _postpone(self, waiting: Waiting, record: RetryRecord) -> None:
        """Leave it to a worker that has its receiver, as long as there may be one."""
        if self._now - record.last / 1000 > GONE_AFTER:
            self._give_up(waiting.home[-1], waiting.event, record, "gone")
        else:
            self._wait(waiting, waiting.patience)

    def _wait(self, waiting: Waiting, seconds: float) -> None:
        heappush(self._line, (self._now + seconds, next(self._numbers), waiting))

    # -- what follows ---------------------------------------------------------------------

    def _settle(self, node: Node, delivery: Delivery, failure: Failure) -> None:
        if not delivery.in_group:
            # Nothing is kept of what every process hears.
            node.dispatcher.failures.final(delivery.event, failure)
            self._note(node, delivery, failure, None)
            return

        verdict = judge(
            failure.error,
            attempts=delivery.event.attempt,
            retries=_retries_for(node, delivery, failure),
            jitter=0.0,
        )
        record = self._record(delivery, failure)
        node.dispatcher.failures.judged(
            delivery.event, failure, verdict, due=time.time() + verdict.after
        )

        if verdict.reason is None:
            self._note(node, delivery, failure, verdict.after)
            self._wait(_waiting(node, delivery, record), verdict.after)
        else:
            self._note(node, delivery, failure, None)
            self._give_up(node.config.service, delivery.event, record, verdict.reason)

    def _note(self, node: Node, delivery: Delivery, failure: Failure, after: float | None) -> None:
        self.failures.append(
            FailedAttempt(
                service=node.config.service,
                receiver=failure.name,
                event=delivery.event,
                error=failure.error,
                after=after,
            )
        )

    def _record(self, delivery: Delivery, failure: Failure) -> RetryRecord:
        now = round(self._now * 1000)
        return RetryRecord(
            entry=delivery.entry,
            event=delivery.body,
            receiver=failure.name,
            attempts=delivery.event.attempt,
            first=now if delivery.retry is None else delivery.retry.first,
            last=now,
            error=words_of(failure.error),
        )

    def _give_up(self, service: str, event: Event, record: RetryRecord, reason: str) -> None:
        letter = DeadLetter(
            reason=reason,
            entry=record.entry,
            fields={b"event": record.event},
            event_id=event.id,
            source=event.source,
            payload=readable(event),
            receiver=record.receiver,
            error=record.error,
            attempts=record.attempts,
            first=record.first,
            last=record.last,
        )
        self.given_up.append(given_up(service, letter, event))
        emit_now(
            event_dead_lettered,
            service,
            name=event.name,
            receiver=letter.receiver,
            reason=letter.reason,
            event_id=letter.event_id,
            error=letter.error,
        )


def raise_all(event: Event, failures: Sequence[Failure]) -> None:
    """Raise in the test what receivers raised, if they did.

    :raises BaseExceptionGroup: several did.
    """
    __tracebackhide__ = True

    if len(failures) == 1:
        raise failures[0].error

    if failures:
        errors = [failure.error for failure in failures]
        raise BaseExceptionGroup(f"{len(errors)} receivers of {event.name!r} failed", errors)


def _is_of_the_test(failure: Failure) -> bool:
    """Whether it is nothing that a bus tries again: the end of a scope, Ctrl-C, pytest.fail()."""
    return not failure.name or not isinstance(failure.error, Exception | SystemExit)


def _home_of(node: Node) -> Home:
    return node.config.url, node.config.prefix, node.config.service


def _subscription(node: Node, event: Event) -> Subscription:
    return subscription_for(event.name, node.subscriptions) or Subscription(name=event.name)


def _delivery(node: Node, event: Event, entry: str) -> Delivery | None:
    """What a node makes of an entry; ``None`` if it leaves it out."""
    decoder = EntryDecoder(
        config=node.config,
        codec=node.codec,
        counters=node.counters,
        siblings=node.registry.siblings,
    )
    came = Entry(event.name, entry, {b"event": node.codec.encode(event)})
    found = decoder.decode([came], {event.name: _subscription(node, event)})
    return next(iter(found.deliveries), None)


def _again(node: Node, record: RetryRecord) -> Delivery:
    event = node.codec.decode(record.event, via="stream")
    leased = replace(record, attempts=record.attempts + 1, running=True)
    return Delivery(
        name=event.name,
        entry=record.entry,
        event=replace(event, attempt=leased.attempts),
        body=record.event,
        subscription=_subscription(node, event),
        claimed_until=0.0,
        retry=leased,
    )


def _waiting(node: Node, delivery: Delivery, record: RetryRecord) -> Waiting:
    return Waiting(
        home=_home_of(node),
        event=delivery.event,
        record=record.packed(),
        patience=node.config.claim_after,
    )


def _retries_for(node: Node, delivery: Delivery, failure: Failure) -> int:
    asked = node.registry.retries_of(delivery.name, failure.receiver)
    return allowed(delivery.subscription.retries, asked, node.config.retries)
