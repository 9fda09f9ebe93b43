"""Write outcomes to Redis: acknowledgements, retries and dead letters."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import redis

from ..codec.records import DeadLetter
from ..config import Timing
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..signals import emit, event_dead_lettered
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.pipe import Command, RedisClock
from .group import Group
from .outcomes import DeadLimit, Outcome

logger = get_logger(__name__)

#: Most outcomes written in one round trip.
MAX_PER_WRITE = 500

#: Bytes after which a round trip takes no more outcomes. Retries and dead letters hold events.
MAX_BYTES_PER_WRITE = 4 * 1024 * 1024

#: Seconds after which the maintenance thread writes outcomes that no worker thread has written.
WRITE_SOON = 0.05

#: Number of times a second that the maintenance thread looks for due retries.
LOOKS_PER_SECOND = 10

_NAME, _ENTRY = attrgetter("name"), attrgetter("entry")


class Schedule:
    """The time of the maintenance thread's next round. Any thread may move it forward.

    :param clock: the clock of Redis, by which retries are due.
    """

    def __init__(self, clock: RedisClock, timing: Timing) -> None:
        self._clock = clock
        self._expect_within = timing.expect_within
        self._changed = threading.Condition()
        #: Monotonic time at which the thread wakes up, or a time asked for while it runs a round.
        self.next = math.inf
        #: Streams with retries that will be due, by the time to look for them: seconds since 1970
        #: multiplied by :data:`LOOKS_PER_SECOND`.
        self._due: dict[int, set[str]] = {}

    def within(self, seconds: float) -> None:
        """Let the next round begin after ``seconds`` at the latest."""
        at = time.monotonic() + seconds

        # Most calls ask for a round that is planned already, so they need no lock.
        if at < self.next:
            with self._changed:
                self.next = min(at, self.next)
                self._changed.notify_all()

    def expect(self, name: str, due: float) -> None:
        """Look for retries of the signal ``name`` at the time ``due``, in seconds since 1970.

        Ignore a time more than ``Timing.expect_within`` seconds ahead, which bounds the memory.
        """
        left = due - self._clock.now()

        if left <= self._expect_within:
            with self._changed:
                self._due.setdefault(math.ceil(due * LOOKS_PER_SECOND), set()).add(name)

            self.within(left + 1 / LOOKS_PER_SECOND)

    def take_due(self) -> set[str]:
        """Remove and return the signals with retries that are expected to be due."""
        now = self._clock.now() * LOOKS_PER_SECOND if self._due else 0.0

        with self._changed:
            steps = [step for step in self._due if step <= now]
            return set().union(*[self._due.pop(step) for step in steps])

    def wait(self, seconds: float) -> None:
        """Sleep until the next round: for ``seconds``, or less if another thread asked for it."""
        now = self._clock.now() if self._due else 0.0

        with self._changed:
            first = min(self._due, default=None)
            left = seconds if first is None else min(seconds, first / LOOKS_PER_SECOND - now)
            self.next = min(self.next, time.monotonic() + left)

            while (left := self.next - time.monotonic()) > 0:
                self._changed.wait(left)

            self.next = math.inf

    def disown(self) -> None:
        """Forget the lock in a forked child. Another thread may have held it."""
        self._changed = threading.Condition()


class Acknowledger:
    """Writes outcomes in batches, and keeps those that Redis did not accept.

    Any thread may call its methods.

    :param group: the consumer group on the write connection.
    """

    def __init__(self, context: Context, *, group: Group, in_flight: InFlight) -> None:
        self._config = context.config
        self._keys = context.keys
        self._counters = context.counters
        self._timing = context.timing
        self._group = group
        self._in_flight = in_flight
        self._log = BoundedLog(logger)
        #: Deliveries of stream entries that are handled, for :meth:`flush` to acknowledge. An
        #: :class:`.Outcome` of each would hold no more.
        self.handled: deque[Delivery] = deque()
        self._waiting: deque[Outcome] = deque()
        #: Outcomes that Redis refused.
        self._refused: list[Outcome] = []
        #: Monotonic time at which they are written again; infinite once Redis accepted them all.
        self._resend_at = math.inf
        #: Held by the thread that uses the write connection.
        self.lock = threading.RLock()
        self.clock = RedisClock(
            group.pipe, config=self._config, timing=context.timing, lock=self.lock
        )
        #: Told when the maintenance thread has outcomes to write, or a retry to take.
        self.schedule = Schedule(self.clock, context.timing)
        self._limit = DeadLimit(group.pipe, context, lock=self.lock)

    def __len__(self) -> int:
        return len(self.handled) + len(self._waiting) + len(self._refused)

    @property
    def memory(self) -> int:
        """Bytes of the commands of unwritten outcomes. Their deliveries are not counted."""
        if not self._waiting and not self._refused:
            return 0

        return sum(_size_of(each) for each in [*self._waiting, *self._refused] if each.commands)

    @property
    def due_at(self) -> float:
        """Monotonic time at which the first outcome can be written; infinite if none waits."""
        return 0.0 if self.handled or self._waiting else self._resend_at

    def add(self, outcome: Outcome) -> None:
        """Queue an outcome for :meth:`flush`."""
        self._waiting.append(outcome)

    def write(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Write outcomes and those queued. If Redis is away, keep them for :meth:`flush`."""
        self._waiting.extend(outcomes)

        try:
            self.flush()
        except OUTAGE as error:
            # The reader loses Redis as well, and logs it.
            logger.debug("Redis is away; %d outcomes are written later: %s", len(self), error)
        finally:
            # Not in flush(): the maintenance thread itself waits longer after each failure.
            if self.handled or self._waiting:
                self.schedule.within(WRITE_SOON)

    def flush(self) -> None:
        """Write the queued outcomes, and refused ones if it is time to.

        :raises redis.ConnectionError: Redis is away.
        """
        while self.handled or self._waiting or self._resend_at <= time.monotonic():
            with self.lock:
                self._write_batch()

        if self._limit.grown:
            self._limit.enforce()

    def write_all(self) -> None:
        """Write the queued outcomes, and all refused ones without waiting for their time.

        :raises redis.ConnectionError: Redis is away.
        """
        with self.lock:
            self._resend_at = 0.0

        self.flush()

    def _write_batch(self) -> None:
        """Write the oldest queued outcomes, in one round trip."""
        if self._resend_at <= time.monotonic():
            self._waiting.extend(self._refused)
            self._refused.clear()
            self._resend_at = time.monotonic() + self._timing.resend_after

        batch: list[Outcome] = []
        unsure: list[Outcome] = []
        room = MAX_BYTES_PER_WRITE

        # Other threads may add more meanwhile.
        while self._waiting and len(batch) < MAX_PER_WRITE and room > 0:
            outcome = self._waiting.popleft()
            batch.append(outcome)

            if outcome.commands:
                room -= _size_of(outcome)

            if outcome.may_be_written:
                unsure.append(outcome)

        most = min(MAX_PER_WRITE - len(batch), len(self.handled))
        handled = [self.handled.popleft() for _ in range(most)]

        try:
            if unsure:
                self._finish_written(unsure, batch)

            if batch or handled:
                self._send(batch, handled)
        except BaseException:
            for outcome in batch:
                outcome.may_be_written = bool(outcome.commands) and not outcome.is_partly_written

            self._waiting.extendleft(reversed(batch))
            self.handled.extendleft(reversed(handled))
            raise

        if self._resend_at < math.inf and not self._refused and not self._waiting:
            self._resend_at = math.inf
            self._log.over(
                "refused",
                "Redis accepted the outcomes of all events of %r that it had rejected.",
                self._config.service,
                extra={"service": self._config.service},
            )

    def _finish_written(self, unsure: Sequence[Outcome], batch: list[Outcome]) -> None:
        """Finish the outcomes that an earlier write stored, and remove them from the batch.

        The connection may have been lost between a write and its answer.
        """
        answers = self._group.pipe.run([self._pending_query(outcome) for outcome in unsure])

        for outcome, answer in zip(unsure, answers, strict=True):
            if answer is None or answer == []:
                batch.remove(outcome)
                self._finish([outcome], [answer])

    def _pending_query(self, outcome: Outcome) -> Command:
        """Return a command whose answer is empty if the entry or retry is no longer pending."""
        if (member := _member_of(outcome)) is None:
            return self._group.pending_command(outcome.name, outcome.entry)

        return ("ZSCORE", self._keys.retry(outcome.name, self._config.service), member)

    def _send(self, batch: Sequence[Outcome], handled: Sequence[Delivery]) -> None:
        handled_of: dict[str, list[Delivery]] = {}
        acknowledged: dict[str, list[Outcome]] = {}
        # Outcomes that share commands, each with the number of its commands.
        blocks: list[tuple[list[Outcome], int]] = []
        commands: list[Command] = []
        transactions: list[Outcome] = []

        for name, group in groupby(handled, _NAME):
            handled_of.setdefault(name, []).extend(group)

        for name, deliveries in handled_of.items():
            commands.append(self._group.acknowledge_command(name, map(_ENTRY, deliveries)))

        for outcome in batch:
            if outcome.commands or _member_of(outcome) is not None:
                transactions.append(outcome)
            else:
                acknowledged.setdefault(outcome.name, []).append(outcome)

        for name, outcomes in acknowledged.items():
            commands.append(self._group.acknowledge_command(name, map(_ENTRY, outcomes)))
            blocks.append((outcomes, 1))

        for outcome in transactions:
            own: list[Command] = [self._remove_pending(outcome)]

            if outcome.commands:
                own = [("MULTI",), *outcome.commands, *own, ("EXEC",)]

            commands += own
            blocks.append(([outcome], len(own)))

        answers = iter(self._group.pipe.run(commands))

        for deliveries in handled_of.values():
            self._finish_handled(deliveries, next(answers))

        for outcomes, count in blocks:
            self._finish(outcomes, list(islice(answers, count)))

    def _finish_handled(self, deliveries: Sequence[Delivery], answer: Any) -> None:
        """Forget deliveries of one stream, or keep them if Redis refused ``XACK``."""
        if isinstance(answer, Exception):
            outcomes = [Outcome(each.name, each.entry, each) for each in deliveries]
            self._keep_refused(outcomes, answer)
            return

        self._in_flight.remove(deliveries)
        self._counters.add("acked", len(deliveries))

    def _finish(self, outcomes: Sequence[Outcome], answers: Sequence[Any]) -> None:
        """Forget outcomes that Redis accepted, and keep those that it refused.

        :param answers: the answer to ``XACK`` or ``ZREM``, or those to a transaction.
        """
        results = answers[-1] if isinstance(answers[-1], list) else []

        if answers[1:] and isinstance(answers[0], Exception):
            # Redis refused MULTI, and ran the commands after it one by one.
            answers = results = list(answers[1:-1])

        # The refused command of a transaction names the reason; the answer to EXEC does not.
        for answer in (*answers, *results):
            if isinstance(answer, Exception):
                if results:
                    self._keep_failed_commands(outcomes[0], results)

                self._keep_refused(outcomes, answer)
                return

        self._in_flight.remove([each.delivery for each in outcomes if each.delivery])
        self._counters.add("acked", len(outcomes))

        for outcome in outcomes:
            if outcome.due or outcome.letters:
                self._announce(outcome)

    def _keep_failed_commands(self, outcome: Outcome, results: Sequence[Any]) -> None:
        """Keep only the commands of a transaction that failed. Redis executed the others.

        If it acknowledged the entry or the retry, make that pending again, so that the outcome
        outlives this process.
        """
        outcome.commands = [
            command
            for command, result in zip(outcome.commands, results, strict=False)
            if isinstance(result, Exception)
        ]
        outcome.is_partly_written = not isinstance(results[-1], Exception)

        if not outcome.is_partly_written:
            return

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
        self._refused += [
            found for found in outcomes if found.delivery is not None or found.is_partly_written
        ]
        self._resend_at = min(self._resend_at, time.monotonic() + self._timing.resend_after)
        self.schedule.within(self._timing.resend_after)
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
            self.schedule.expect(outcome.name, due)

        for letter in outcome.letters:
            self._counters.add("dead_lettered")
            self._limit.grown.add(outcome.name)
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

    def _add_pending(self, outcome: Outcome) -> Command:
        """Return the command that reverts :meth:`_remove_pending`."""
        if (member := _member_of(outcome)) is not None:
            key = self._keys.retry(outcome.name, self._config.service)
            until = round((self.clock.now() + self._config.claim_after) * 1000)
            return ("ZADD", key, until, member)

        crashes = 0 if outcome.delivery is None else outcome.delivery.crashes or 0
        return self._group.restore_command(outcome.name, outcome.entry, times=crashes + 1)

    def _remove_pending(self, outcome: Outcome) -> Command:
        """Return the command that ends an entry (``XACK``) or a retry (``ZREM``)."""
        if (member := _member_of(outcome)) is None:
            return self._group.acknowledge_command(outcome.name, [outcome.entry])

        return ("ZREM", self._keys.retry(outcome.name, self._config.service), member)


def _size_of(outcome: Outcome) -> int:
    """Return the bytes of the commands. A retry and a dead letter each hold the event."""
    return sum(
        len(part) for command in outcome.commands for part in command if isinstance(part, bytes)
    )


def _member_of(outcome: Outcome) -> bytes | None:
    """Return the bytes in Redis of the retry that ends; ``None`` for an entry of the stream."""
    if outcome.delivery is None or outcome.delivery.retry is None:
        return outcome.undecodable

    return outcome.delivery.member
