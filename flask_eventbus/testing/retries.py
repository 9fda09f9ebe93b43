"""Run receivers as for events of a stream, and retry failed ones on a simulated clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any

from ..codec.records import RetryRecord
from ..event import Event
from ..node import Node
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Failure
from ..routing.subscriptions import Subscription, subscription_for
from ..signals import emit_now, event_dead_lettered
from ..streams.decoder import EntryDecoder
from ..streams.group import Entry
from ..streams.outcomes import Outcome, Outcomes
from ..streams.retry_queue import GONE_AFTER
from .recorder import GivenUp, given_up, receives

#: Identifies the consumer group of a service: Redis URL, prefix and service.
GroupKey = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """A failed attempt of a receiver, as ``eventbus.failures`` returns it."""

    #: The service of the receiver.
    service: str
    #: The receiver's name: ``module.qualname``.
    receiver: str
    #: The event that the receiver got.
    event: Event
    #: The exception that it raised.
    error: BaseException
    #: Seconds until the next attempt; ``None`` if there is none.
    after: float | None

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self.event.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A retry that is not due yet."""

    group: GroupKey
    event: Event
    #: The packed :class:`.RetryRecord`, as in Redis.
    record: bytes
    #: Seconds until the next try if no node has the receiver.
    postpone: float


class RetryRehearsal:
    """Runs receivers and their retries without a worker, and keeps failures and dead letters.

    It stores nothing in Redis. Its clock moves only in :meth:`advance`.

    :param nodes: returns the nodes under test, the newest last.
    """

    def __init__(self, nodes: Callable[[], list[Node]]) -> None:
        self._nodes = nodes
        self._entries = itertools.count(1)
        self._numbers = itertools.count()
        #: The simulated time in seconds since :attr:`_began`, where floats are more exact than
        #: since 1970.
        self._now = 0.0
        self._began = int(time.time())
        #: Heap of retries by their due times; the number keeps the order of equal times.
        self._queue: list[tuple[float, int, Waiting]] = []
        self.failures: list[FailedAttempt] = []
        self.given_up: list[GivenUp] = []

    def clear(self) -> None:
        """Forget failures and dead letters, but keep the retries that are not due yet."""
        self.failures.clear()
        self.given_up.clear()

    def deliveries(self, event: Event) -> list[tuple[Node, Delivery]]:
        """Return the nodes that get an event of a stream, each with its delivery.

        That is the newest node of each service, or every node that reads without a group.
        """
        entry = f"{next(self._entries)}-0"
        found: dict[object, tuple[Node, Delivery]] = {}

        for node in self._nodes():
            delivery = _delivery(node, event, entry) if receives(node, event) else None

            if delivery is not None:
                found[_group_of(node) if delivery.subscription.group else node] = node, delivery

        return list(found.values())

    def run(self, node: Node, delivery: Delivery) -> Sequence[Failure]:
        """Run the receivers of a delivery, or the one receiver of a retry; return the failures."""
        only = delivery.retry.receiver if delivery.retry else None
        return node.dispatcher.dispatch(delivery.event, only=only) or ()

    def record(self, node: Node, delivery: Delivery, failures: Sequence[Failure]) -> list[Failure]:
        """Schedule retries or create dead letters, as a worker does.

        :return: the failures that are raised in the test instead, such as ``pytest.fail()``.
        """
        for failure in failures:
            if not _is_of_the_test(failure):
                self._record_failure(node, delivery, failure)

        return [failure for failure in failures if _is_of_the_test(failure)]

    @property
    def next_due(self) -> float | None:
        """Seconds until the next retry is due; ``None`` if there is no retry."""
        return max(0.0, self._queue[0][0] - self._now) if self._queue else None

    def advance(self, seconds: float) -> int:
        """Move the clock, run the retries that become due, and return the number of attempts."""
        until = self._now + seconds
        attempts = 0

        while self._queue and self._queue[0][0] <= until:
            self._now, _, waiting = heappop(self._queue)
            attempts += self._retry(waiting)

        self._now = until
        return attempts

    def _retry(self, waiting: Waiting) -> bool:
        """Run a retry; postpone it and return False if no node has the receiver."""
        record = RetryRecord.unpacked(waiting.record)
        found = [node for node in self._nodes() if _group_of(node) == waiting.group]

        for node in reversed(found):
            if node.dispatcher.receivers(waiting.event, only=record.receiver):
                delivery = _again(node, record)
                raised = self.record(node, delivery, self.run(node, delivery))
                raise_all(delivery.event, raised)
                return True

        self._postpone(waiting, record)
        return False

    def _postpone(self, waiting: Waiting, record: RetryRecord) -> None:
        """Wait for a node that has the receiver; give up after ``GONE_AFTER`` seconds."""
        if round(self._began + self._now - record.last / 1000, 3) <= GONE_AFTER:
            self._schedule(waiting, waiting.postpone)
            return

        self._give_up(
            GivenUp(
                service=waiting.group[-1],
                reason="gone",
                receiver=record.receiver,
                event=waiting.event,
                error=record.error,
                attempts=record.attempts,
            ),
            waiting.event,
        )

    def _schedule(self, waiting: Waiting, seconds: float) -> None:
        heappush(self._queue, (self._now + seconds, next(self._numbers), waiting))

    def _record_failure(self, node: Node, delivery: Delivery, failure: Failure) -> None:
        service, event, outcome = node.config.service, delivery.event, None

        if delivery.subscription.group:
            outcome = self._outcome(node, delivery, failure)
        else:
            # Without a group there are no retries and no dead letters.
            node.dispatcher.failures.final(event, failure)

        due = outcome.due if outcome is not None else ()
        after = round(due[0] - self._began - self._now, 6) if due else None
        self.failures.append(
            FailedAttempt(
                service=service,
                receiver=failure.name,
                event=event,
                error=failure.error,
                after=after,
            )
        )

        if outcome is None:
            return

        if after is not None:
            # The member that ZADD adds.
            record: Any = outcome.commands[0][-1]
            waiting = Waiting(
                group=_group_of(node),
                event=event,
                record=record,
                postpone=node.config.claim_after,
            )
            self._schedule(waiting, after)

        for letter in outcome.letters:
            self._give_up(given_up(service, letter, event), event)

    def _outcome(self, node: Node, delivery: Delivery, failure: Failure) -> Outcome:
        """Decide between a retry and a dead letter, by the clock of the rehearsal."""
        timing = replace(node.context.timing, retry_jitter=0.0)
        context = replace(node.context, timing=timing)
        outcomes = Outcomes(context, node.dispatcher, now=lambda: self._began + self._now)
        return outcomes.of(delivery, [failure])

    def _give_up(self, letter: GivenUp, event: Event) -> None:
        self.given_up.append(letter)
        emit_now(
            event_dead_lettered,
            letter.service,
            name=event.name,
            receiver=letter.receiver,
            reason=letter.reason,
            event_id=event.id,
            error=letter.error,
        )


def raise_all(event: Event, failures: Sequence[Failure]) -> None:
    """Raise the errors of receivers in the test, if there are any.

    :raises BaseExceptionGroup: several receivers failed.
    """
    __tracebackhide__ = True

    if len(failures) == 1:
        raise failures[0].error

    if failures:
        errors = [failure.error for failure in failures]
        raise BaseExceptionGroup(f"{len(errors)} receivers of {event.name!r} failed", errors)


def _is_of_the_test(failure: Failure) -> bool:
    """Return True for errors that a bus does not retry: of a scope, Ctrl-C, ``pytest.fail()``."""
    return not failure.name or not isinstance(failure.error, Exception | SystemExit)


def _group_of(node: Node) -> GroupKey:
    return node.config.url, node.config.prefix, node.config.service


def _subscription(node: Node, event: Event) -> Subscription:
    return subscription_for(event.name, node.subscriptions) or Subscription(name=event.name)


def _delivery(node: Node, event: Event, entry: str) -> Delivery | None:
    """Decode an event as a node does; return None if the node skips it."""
    decoder = EntryDecoder(node.context)
    new = Entry(event.name, entry, (b"event", node.codec.encode(event)))
    found = decoder.decode([new], {event.name: _subscription(node, event)})
    return next(iter(found.deliveries), None)


def _again(node: Node, record: RetryRecord) -> Delivery:
    event = node.codec.decode(record.event, via="stream")
    running = replace(record, attempts=record.attempts + 1, running=True)
    return Delivery(
        name=event.name,
        entry=record.entry,
        event=replace(event, attempt=running.attempts),
        body=record.event,
        subscription=_subscription(node, event),
        claimed_until=0.0,
        identity=(event.name, record.entry, record.receiver.encode()),
        retry=running,
    )
