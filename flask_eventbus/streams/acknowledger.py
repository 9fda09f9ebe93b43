"""Tells Redis how receivers ended: acknowledged, to be tried again, or given up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeVar

import redis

from ..codec.records import DeadLetter
from ..config import Config
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..signals import emit, event_dead_lettered
from ..transport.clock import RedisClock
from ..transport.connections import OUTAGE
from ..transport.keys import StreamKeys
from ..transport.pipe import Command
from .dead_limit import DeadLimit
from .group import Group
from .outcomes import Outcome

T = TypeVar("T")

logger = get_logger(__name__)

#: Outcomes that are told in one round trip.
MOST_PER_WRITE = 500

#: Bytes after which no more outcomes are told in that round trip: they hold events.
MOST_BYTES_PER_WRITE = 4 * 1024 * 1024

#: Seconds after which Redis is told again what it refused.
RESEND_AFTER = 5.0


class Acknowledger:
    """Writes outcomes in batches; what Redis did not take waits for the next time.

    Any thread may use it.

    :param expect: told of the name and the time of each retry that is due.
    """

    def __init__(
        self,
        *,
        config: Config,
        keys: StreamKeys,
        group: Group,
        in_flight: InFlight,
        counters: Counters,
        expect: Callable[[str, float], None],
    ) -> None:
        self._config = config
        self._keys = keys
        self._group = group
        self._in_flight = in_flight
        self._counters = counters
        self._expect = expect
        self._log = BoundedLog(logger)
        self._waiting: deque[Outcome] = deque()
        #: First attempts at which no receiver failed: an acknowledgement is all.
        self._handled: deque[Delivery] = deque()
        #: What Redis refused, and when it is told again, by the monotonic clock.
        self._refusals: deque[tuple[float, Outcome]] = deque()
        #: Held by the thread that uses the connection.
        self.lock = threading.RLock()
        self.clock = RedisClock(group.pipe, config=config, lock=self.lock)
        self._limit = DeadLimit(
            group.pipe, config=config, keys=keys, counters=counters, lock=self.lock
        )

    def __len__(self) -> int:
        return len(self._handled) + len(self._waiting) + len(self._refusals)

    @property
    def memory(self) -> int:
        """The bytes of the outcomes that wait, beside those of their deliveries."""
        refused = [outcome for _, outcome in list(self._refusals)]
        return sum(outcome.size for outcome in [*self._waiting, *refused])

    @property
    def is_due(self) -> bool:
        """Whether there is something to tell now."""
        if self._handled or self._waiting:
            return True

        first = self._refusals[0][0] if self._refusals else float("inf")
        return first <= time.monotonic()

    def acknowledge(self, delivery: Delivery) -> None:
        """Keep for :meth:`flush` that no receiver failed at a first attempt."""
        self._handled.append(delivery)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome for :meth:`flush`, which the keeper calls before long."""
        self._waiting.append(outcome)

    def write(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Tell Redis, now if it is there; else :meth:`flush` does it later."""
        self._waiting.extend(outcomes)

        try:
            self.flush()
        except OUTAGE as error:
            # The reader meets the same loss, and tells of it.
            logger.debug("%d outcomes wait for Redis: %s", len(self), error)

    def flush(self) -> None:
        """Tell Redis what waits.

        :raises redis.ConnectionError: Redis is away.
        """
        while self.is_due:
            with self.lock:
                self._call_up_refusals()
                handled, batch = _taken(self._handled), _batch(self._waiting)

                try:
                    batch = self._without_kept(batch)
                    self._send(handled, batch)
                except BaseException:
                    self._handled.extendleft(reversed(handled))
                    self._put_back(batch)
                    raise

        self._note_taken()

        self._limit.enforce()

    def write_all(self) -> None:
        """Tell Redis what waits, and what it refused, once more.

        :raises redis.ConnectionError: Redis is away.
        """
        self._waiting.extend(outcome for _, outcome in self._refusals)
        self._refusals.clear()
        self.flush()

    def close(self) -> None:
        """Close the connection."""
        with self.lock:
            self._group.pipe.close()

    def _note_taken(self) -> None:
        """Log once that Redis took all that it had refused."""
        if not self._refusals:
            self._log.over(
                "refused",
                "Redis took the outcomes of all events of %r that it had refused.",
                self._config.service,
                extra={"service": self._config.service},
            )

    def _call_up_refusals(self) -> None:
        now = time.monotonic()

        while self._refusals and self._refusals[0][0] <= now:
            self._waiting.append(self._refusals.popleft()[1])

    def _put_back(self, batch: Sequence[Outcome]) -> None:
        for outcome in batch:
            outcome.doubtful = bool(outcome.commands) and not outcome.is_torn

        self._waiting.extendleft(reversed(batch))

    def _without_kept(self, batch: list[Outcome]) -> list[Outcome]:
        """Settle what Redis got, though the answer was lost; what is left."""
        doubtful = [outcome for outcome in batch if outcome.doubtful]

        if not doubtful:
            return batch

        answers = self._group.pipe.run([self._question(outcome) for outcome in doubtful])

        for outcome, answer in zip(doubtful, answers, strict=True):
            if answer is None or answer == []:
                batch.remove(outcome)
                self._settled([outcome], answer)

        return batch

    def _question(self, outcome: Outcome) -> Command:
        """The command whose answer is empty if what :meth:`_end` ends has ended."""
        if outcome.delivery is None or not outcome.is_retry:
            return self._group.pending_command(outcome.name, outcome.entry)

        key = self._keys.retry(outcome.name, self._config.service)
        return ("ZSCORE", key, outcome.delivery.member)

    def _send(self, handled: Sequence[Delivery], batch: Sequence[Outcome]) -> None:
        plain: dict[str, list[Outcome]] = {}
        done = [list(found) for _, found in groupby(handled, attrgetter("name"))]
        commands = [
            self._group.acknowledge_command(found[0].name, [delivery.entry for delivery in found])
            for found in done
        ]
        #: How many answers each group of outcomes gets.
        told: list[tuple[int, list[Outcome]]] = []

        for outcome in batch:
            if outcome.commands:
                block = self._transaction(outcome)
                commands += block
                told.append((len(block), [outcome]))
            elif not outcome.is_retry:
                plain.setdefault(outcome.name, []).append(outcome)
            else:
                commands.append(self._end(outcome))
                told.append((1, [outcome]))

        for name, outcomes in plain.items():
            commands.append(
                self._group.acknowledge_command(name, [found.entry for found in outcomes])
            )
            told.append((1, outcomes))

        answers = self._group.pipe.run(commands) if commands else []

        for deliveries, answer in zip(done, answers, strict=False):
            self._acknowledged(deliveries, answer)

        answers = answers[len(done) :]

        for count, outcomes in told:
            own, answers = answers[:count], answers[count:]
            # A transaction that is refused says why where it is, and not at its end.
            refusal = next((answer for answer in own if isinstance(answer, Exception)), None)
            self._settled(outcomes, refusal or own[-1])

    def _acknowledged(self, deliveries: Sequence[Delivery], answer: Any) -> None:
        if isinstance(answer, Exception):
            outcomes = [Outcome(found.name, found.entry, delivery=found) for found in deliveries]
            self._refused(outcomes, answer)
            return

        self._in_flight.remove(deliveries)
        self._counters.add("acked", len(deliveries))

    def _settled(self, outcomes: Sequence[Outcome], answer: Any) -> None:
        refusal = answer if isinstance(answer, Exception) else None

        if isinstance(answer, list):
            refusal = next((part for part in answer if isinstance(part, Exception)), None)

            if refusal is not None:
                self._keep_refused(outcomes[0], answer)

        if refusal is not None:
            self._refused(outcomes, refusal)
            return

        done = [outcome.delivery for outcome in outcomes if outcome.delivery is not None]
        self._in_flight.remove(done)
        self._counters.add("acked", len(outcomes))

        for outcome in outcomes:
            if outcome.due or outcome.letters:
                self._tell(outcome)

    def _keep_refused(self, outcome: Outcome, answers: Sequence[Any]) -> None:
        """Leave of a transaction what has failed: the rest of it took effect, its end as well."""
        outcome.commands = [
            command
            for command, answer in zip(outcome.commands, answers, strict=False)
            if isinstance(answer, Exception)
        ]

        outcome.is_torn = not isinstance(answers[-1], Exception)

        if outcome.is_torn:
            self._take_back(outcome)

    def _take_back(self, outcome: Outcome) -> None:
        """Let Redis have it as what is in this process's hands: it is not to end with it."""
        try:
            self._group.pipe.ask(*self._beginning(outcome))
        except (redis.ResponseError, *OUTAGE) as error:
            logger.debug("What is left of %s is in memory only: %s", outcome.entry, error)
        else:
            outcome.is_torn = False

    def _refused(self, outcomes: Sequence[Outcome], refusal: Exception) -> None:
        """Keep them in hand, and tell Redis again: what succeeded is not to run twice.

        What became no delivery is found once more when it has been pending for long enough.
        """
        again = time.monotonic() + RESEND_AFTER
        kept = [found for found in outcomes if found.delivery is not None or found.is_torn]
        self._refusals.extend((again, outcome) for outcome in kept)
        self._counters.add("unsettled", len(outcomes))
        self._log.error(
            "refused",
            "Redis rejected the outcomes of %d events of %r: %s. They are sent again every %g s "
            "until it takes them. %s",
            len(outcomes),
            outcomes[0].name,
            refusal,
            RESEND_AFTER,
            self._group.worker_remedy(outcomes[0].name, refusal),
            extra={"signal": outcomes[0].name, "service": self._config.service},
        )

    def _tell(self, outcome: Outcome) -> None:
        self._counters.add("retries", len(outcome.due))

        for due in outcome.due:
            self._expect(outcome.name, due)

        for letter in outcome.letters:
            self._counters.add("dead_lettered")
            self._limit.note(outcome.name)
            self._report(outcome, letter)
            emit(
                event_dead_lettered,
                self._config.service,
                name=outcome.name,
                receiver=letter.receiver,
                reason=letter.reason,
                event_id=letter.event_id,
                error=letter.error,
            )

    def _report(self, outcome: Outcome, letter: DeadLetter) -> None:
        # What a receiver raised was logged with its attempt.
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
        return [("MULTI",), *outcome.commands, self._end(outcome), ("EXEC",)]

    def _beginning(self, outcome: Outcome) -> Command:
        """What undoes :meth:`_end`."""
        delivery = outcome.delivery

        if outcome.undo:
            return outcome.undo

        if delivery is None or not outcome.is_retry:
            begun = 0 if delivery is None else delivery.crashes or 0
            return self._group.restore_command(outcome.name, outcome.entry, times=begun + 1)

        key = self._keys.retry(outcome.name, self._config.service)
        until = round((self.clock.now() + self._config.claim_after) * 1000)
        return ("ZADD", key, until, delivery.member)

    def _end(self, outcome: Outcome) -> Command:
        """What takes it out of this process's hands."""
        if outcome.delivery is None or not outcome.is_retry:
            return self._group.acknowledge_command(outcome.name, [outcome.entry])

        key = self._keys.retry(outcome.name, self._config.service)
        return ("ZREM", key, outcome.delivery.member)


def _batch(waiting: deque[Outcome]) -> list[Outcome]:
    """As many outcomes as are told at once, by their number and by their bytes, oldest first."""
    batch: list[Outcome] = []
    room = MOST_BYTES_PER_WRITE

    while waiting and len(batch) < MOST_PER_WRITE and room > 0:
        batch.append(waiting.popleft())
        room -= batch[-1].size

    return batch


def _taken(waiting: deque[T]) -> list[T]:
    """As many as are told at once, oldest first; other threads may add meanwhile."""
    return [waiting.popleft() for _ in range(min(len(waiting), MOST_PER_WRITE))]
