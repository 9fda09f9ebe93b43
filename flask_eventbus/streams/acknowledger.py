"""Write outcomes of deliveries to Redis: acknowledgements, retries and dead letters."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import redis

from ..codec.records import DeadLetter
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..signals import emit, event_dead_lettered
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.pipe import Command, RedisClock
from .dead_limit import DeadLimit
from .group import Group
from .outcomes import Outcome

logger = get_logger(__name__)

#: Most outcomes written in one round trip.
MOST_PER_WRITE = 500

#: Bytes after which a round trip takes no more outcomes. Retries and dead letters hold events.
MOST_BYTES_PER_WRITE = 4 * 1024 * 1024


class Acknowledger:
    """Writes outcomes in batches, and keeps those that Redis did not accept.

    Any thread may call its methods.

    :param group: the consumer group on the write connection.
    :param expect: called with the signal's name and the due time, in seconds since 1970, of
        each retry that was written.
    """

    def __init__(
        self,
        context: Context,
        *,
        group: Group,
        in_flight: InFlight,
        expect: Callable[[str, float], None],
    ) -> None:
        self._config = context.config
        self._keys = context.keys
        self._counters = context.counters
        self._timing = context.timing
        self._group = group
        self._in_flight = in_flight
        self._expect = expect
        self._log = BoundedLog(logger)
        self._waiting: deque[Outcome] = deque()
        #: First attempts without a failure. They need an acknowledgement only.
        self._handled: deque[Delivery] = deque()
        #: Outcomes that Redis refused, each with the monotonic time of its next attempt.
        self._refusals: deque[tuple[float, Outcome]] = deque()
        #: Held by the thread that uses the write connection.
        self.lock = threading.RLock()
        self.clock = RedisClock(
            group.pipe, config=self._config, timing=context.timing, lock=self.lock
        )
        self._limit = DeadLimit(
            group.pipe,
            config=self._config,
            keys=self._keys,
            counters=self._counters,
            lock=self.lock,
        )

    def __len__(self) -> int:
        return len(self._handled) + len(self._waiting) + len(self._refusals)

    @property
    def memory(self) -> int:
        """Bytes of the commands of unwritten outcomes. Their deliveries are not counted."""
        refused = [outcome for _, outcome in list(self._refusals)]
        return sum(outcome.size for outcome in [*self._waiting, *refused])

    @property
    def is_due(self) -> bool:
        """Return True if an outcome can be written now."""
        if self._handled or self._waiting:
            return True

        first = self._refusals[0][0] if self._refusals else float("inf")
        return first <= time.monotonic()

    def acknowledge(self, delivery: Delivery) -> None:
        """Queue the acknowledgement of a first attempt without a failure, for :meth:`flush`."""
        self._handled.append(delivery)

    def add(self, outcome: Outcome) -> None:
        """Queue an outcome for :meth:`flush`, which the maintenance thread calls soon."""
        self._waiting.append(outcome)

    def write(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Write outcomes and those queued. If Redis is away, keep them for :meth:`flush`."""
        self._waiting.extend(outcomes)

        try:
            self.flush()
        except OUTAGE as error:
            # The reader loses Redis as well, and logs it.
            logger.debug("Redis is away; %d outcomes are written later: %s", len(self), error)

    def flush(self) -> None:
        """Write the queued outcomes, and refused ones whose next attempt is due.

        :raises redis.ConnectionError: Redis is away.
        """
        while self.is_due:
            with self.lock:
                self._queue_due_refusals()
                handled, batch = _pop_handled(self._handled), _pop_batch(self._waiting)

                try:
                    batch = self._without_written(batch)
                    self._send(handled, batch)
                except BaseException:
                    self._handled.extendleft(reversed(handled))
                    self._queue_again(batch)
                    raise

        self._log_recovery()
        self._limit.enforce()

    def write_all(self) -> None:
        """Write the queued outcomes, and all refused ones without waiting for their time.

        :raises redis.ConnectionError: Redis is away.
        """
        self._waiting.extend(outcome for _, outcome in self._refusals)
        self._refusals.clear()
        self.flush()

    def close(self) -> None:
        """Close the write connection."""
        with self.lock:
            self._group.pipe.close()

    def _log_recovery(self) -> None:
        """Log once that Redis accepted all outcomes it had refused."""
        if not self._refusals:
            self._log.over(
                "refused",
                "Redis accepted the outcomes of all events of %r that it had rejected.",
                self._config.service,
                extra={"service": self._config.service},
            )

    def _queue_due_refusals(self) -> None:
        now = time.monotonic()

        while self._refusals and self._refusals[0][0] <= now:
            self._waiting.append(self._refusals.popleft()[1])

    def _queue_again(self, batch: Sequence[Outcome]) -> None:
        for outcome in batch:
            outcome.may_be_written = bool(outcome.commands) and not outcome.is_partly_written

        self._waiting.extendleft(reversed(batch))

    def _without_written(self, batch: list[Outcome]) -> list[Outcome]:
        """Return the outcomes still to write; finish those that an earlier write stored.

        The connection may have been lost between a write and its answer.
        """
        unsure = [outcome for outcome in batch if outcome.may_be_written]

        if not unsure:
            return batch

        answers = self._group.pipe.run([self._pending_query(outcome) for outcome in unsure])

        for outcome, answer in zip(unsure, answers, strict=True):
            if answer is None or answer == []:
                batch.remove(outcome)
                self._finish([outcome], answer)

        return batch

    def _pending_query(self, outcome: Outcome) -> Command:
        """Return a command whose answer is empty if the entry or retry is no longer pending."""
        if not (member := outcome.member):
            return self._group.pending_command(outcome.name, outcome.entry)

        return ("ZSCORE", self._keys.retry(outcome.name, self._config.service), member)

    def _send(self, handled: Sequence[Delivery], batch: Sequence[Outcome]) -> None:
        acknowledged: dict[str, list[Outcome]] = {}
        by_stream = [list(found) for _, found in groupby(handled, attrgetter("name"))]
        commands = [
            self._group.acknowledge_command(found[0].name, [delivery.entry for delivery in found])
            for found in by_stream
        ]
        # The outcomes of each block of commands, with the number of its answers.
        blocks: list[tuple[int, list[Outcome]]] = []

        for outcome in batch:
            if outcome.commands:
                transaction = self._transaction(outcome)
                commands += transaction
                blocks.append((len(transaction), [outcome]))
            elif outcome.member:
                commands.append(self._remove_pending(outcome))
                blocks.append((1, [outcome]))
            else:
                acknowledged.setdefault(outcome.name, []).append(outcome)

        for name, outcomes in acknowledged.items():
            commands.append(
                self._group.acknowledge_command(name, [found.entry for found in outcomes])
            )
            blocks.append((1, outcomes))

        answers = self._group.pipe.run(commands) if commands else []

        for deliveries, answer in zip(by_stream, answers, strict=False):
            self._finish_handled(deliveries, answer)

        answers = answers[len(by_stream) :]

        for count, outcomes in blocks:
            own, answers = answers[:count], answers[count:]
            # The refused command of a transaction names the reason; the answer to EXEC does not.
            refusal = next((answer for answer in own if isinstance(answer, Exception)), None)
            self._finish(outcomes, refusal or own[-1])

    def _finish_handled(self, deliveries: Sequence[Delivery], answer: Any) -> None:
        if isinstance(answer, Exception):
            outcomes = [Outcome(found.name, found.entry, delivery=found) for found in deliveries]
            self._keep_refused(outcomes, answer)
            return

        self._in_flight.remove(deliveries)
        self._counters.add("acked", len(deliveries))

    def _finish(self, outcomes: Sequence[Outcome], answer: Any) -> None:
        """Forget outcomes that Redis accepted, and keep those that it refused.

        :param answer: of ``XACK`` or ``ZREM``, or the list of answers of a transaction.
        """
        answers = answer if isinstance(answer, list) else [answer]
        refusal = next((found for found in answers if isinstance(found, Exception)), None)

        if refusal is not None:
            if isinstance(answer, list):
                self._keep_failed_commands(outcomes[0], answer)

            self._keep_refused(outcomes, refusal)
            return

        done = [outcome.delivery for outcome in outcomes if outcome.delivery is not None]
        self._in_flight.remove(done)
        self._counters.add("acked", len(outcomes))

        for outcome in outcomes:
            if outcome.due or outcome.letters:
                self._announce(outcome)

    def _keep_failed_commands(self, outcome: Outcome, answers: Sequence[Any]) -> None:
        """Keep only the commands of a transaction that failed. Redis executed the others."""
        outcome.commands = [
            command
            for command, answer in zip(outcome.commands, answers, strict=False)
            if isinstance(answer, Exception)
        ]

        outcome.is_partly_written = not isinstance(answers[-1], Exception)

        if outcome.is_partly_written:
            self._restore_pending(outcome)

    def _restore_pending(self, outcome: Outcome) -> None:
        """Make the entry or retry pending again, so that its outcome outlives this process."""
        try:
            self._group.pipe.ask(*self._add_pending(outcome))
        except (redis.ResponseError, *OUTAGE) as error:
            logger.debug("The outcome of %s is kept in memory only: %s", outcome.entry, error)
        else:
            outcome.is_partly_written = False

    def _keep_refused(self, outcomes: Sequence[Outcome], refusal: Exception) -> None:
        """Keep refused outcomes to write them again, so that no receiver runs twice.

        An outcome without a delivery is dropped: its entry stays pending and is claimed again.
        """
        again = time.monotonic() + self._timing.resend_after
        kept = [
            found for found in outcomes if found.delivery is not None or found.is_partly_written
        ]
        self._refusals.extend((again, outcome) for outcome in kept)
        self._counters.add("outcomes_refused", len(outcomes))
        self._log.error(
            "refused",
            "Redis rejected the outcomes of %d events of %r: %s. They are written again every %g s "
            "until Redis accepts them. %s",
            len(outcomes),
            outcomes[0].name,
            refusal,
            self._timing.resend_after,
            self._group.worker_remedy(outcomes[0].name, refusal),
            extra={"signal": outcomes[0].name, "service": self._config.service},
        )

    def _announce(self, outcome: Outcome) -> None:
        self._counters.add("retries", len(outcome.due))

        for due in outcome.due:
            self._expect(outcome.name, due)

        for letter in outcome.letters:
            self._counters.add("dead_lettered")
            self._limit.note(outcome.name)
            self._log_dead_letter(outcome, letter)
            emit(
                event_dead_lettered,
                self._config.service,
                name=outcome.name,
                receiver=letter.receiver,
                reason=letter.reason,
                event_id=letter.event_id,
                error=letter.error,
            )

    def _log_dead_letter(self, outcome: Outcome, letter: DeadLetter) -> None:
        # The error of a receiver was logged with its attempt.
        if letter.reason in ("retries", "rejected"):
            return

        self._log.error(
            f"dead {letter.reason}",
            "The event %s of %r is a dead letter of %r (%s, %s): %s",
            letter.event_id or f"in the entry {letter.entry}",
            outcome.name,
            self._config.service,
            letter.receiver or "no receiver",
            letter.reason,
            letter.error,
            extra={
                "event_id": letter.event_id,
                "signal": outcome.name,
                "service": self._config.service,
                "receiver": letter.receiver,
                "attempt": letter.attempts or None,
            },
        )

    def _transaction(self, outcome: Outcome) -> list[Command]:
        return [("MULTI",), *outcome.commands, self._remove_pending(outcome), ("EXEC",)]

    def _add_pending(self, outcome: Outcome) -> Command:
        """Return the command that reverts :meth:`_remove_pending`."""
        if member := outcome.member:
            key = self._keys.retry(outcome.name, self._config.service)
            until = round((self.clock.now() + self._config.claim_after) * 1000)
            return ("ZADD", key, until, member)

        crashes = 0 if outcome.delivery is None else outcome.delivery.crashes or 0
        return self._group.restore_command(outcome.name, outcome.entry, times=crashes + 1)

    def _remove_pending(self, outcome: Outcome) -> Command:
        """Return the command that ends an entry (``XACK``) or a retry (``ZREM``)."""
        if not (member := outcome.member):
            return self._group.acknowledge_command(outcome.name, [outcome.entry])

        return ("ZREM", self._keys.retry(outcome.name, self._config.service), member)


def _pop_batch(waiting: deque[Outcome]) -> list[Outcome]:
    """Remove and return the oldest outcomes that one round trip may carry."""
    batch: list[Outcome] = []
    room = MOST_BYTES_PER_WRITE

    while waiting and len(batch) < MOST_PER_WRITE and room > 0:
        batch.append(waiting.popleft())
        room -= batch[-1].size

    return batch


def _pop_handled(handled: deque[Delivery]) -> list[Delivery]:
    """Remove and return the oldest deliveries of one round trip. Other threads may add more."""
    return [handled.popleft() for _ in range(min(len(handled), MOST_PER_WRITE))]
