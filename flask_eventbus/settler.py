"""Tells Redis how receivers ended: acknowledged, to be tried again, or given up."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import Age, Config
from .connections import OUTAGE
from .counters import BoundedLog, Counters
from .deliveries import Delivery, Hand
from .dispatcher import Failure
from .group import Entry, Group
from .lifecycle import tell
from .logs import get_logger
from .pipe import Command
from .records import MOST_TRACEBACK, DeadLetter, RetryRecord, travelling, words_of
from .retries import judge
from .signals import event_dead_lettered
from .stream_intake import readable
from .streams import StreamKeys

logger = get_logger(__name__)

#: Outcomes that are told in one round trip.
MOST_AT_ONCE = 500

#: Seconds after which Redis is told again what it refused.
TELL_AGAIN = 5.0


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


class Settler:
    """Writes outcomes in batches; what Redis did not take waits for the next time.

    Any thread may use it.

    :param retries_of: how often the receiver called so is tried again at a delivery.
    :param expect: told of the name and the time of each retry that is due.
    """

    def __init__(
        self,
        *,
        config: Config,
        keys: StreamKeys,
        group: Group,
        hand: Hand,
        counters: Counters,
        retries_of: Callable[[Delivery, Failure], int],
        expect: Callable[[str, float], None],
    ) -> None:
        self._config = config
        self._keys = keys
        self._group = group
        self._hand = hand
        self._counters = counters
        self._retries_of = retries_of
        self._expect = expect
        self._log = BoundedLog(logger)
        self._waiting: deque[Outcome] = deque()
        #: What Redis refused, and when it is told again, by the monotonic clock.
        self._refusals: deque[tuple[float, Outcome]] = deque()
        #: Held by the thread that uses the connection.
        self.turn = threading.RLock()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._refusals)

    @property
    def is_due(self) -> bool:
        """Whether there is something to tell now."""
        first = self._refusals[0][0] if self._refusals else float("inf")
        return bool(self._waiting) or first <= time.monotonic()

    def outcome(self, delivery: Delivery, failures: Sequence[Failure]) -> Outcome:
        """What a delivery came to, for :meth:`settle`."""
        if not failures:
            return Outcome(delivery.name, delivery.entry, (), delivery)

        commands: list[Command] = []
        letters: list[DeadLetter] = []
        due: list[float] = []

        for failure in failures:
            # The end of a scope is no receiver: it is logged, and nothing can be tried again.
            if failure.name:
                self._judge(delivery, failure, commands, letters, due)

        return Outcome(delivery.name, delivery.entry, commands, delivery, letters, due)

    def give_up(self, delivery: Delivery, reason: str, error: str) -> Outcome:
        """What a delivery comes to that is not even begun."""
        record = delivery.record
        letter = self._letter(delivery, reason, error, attempts=delivery.begun or 0)

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

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome for :meth:`flush`, which the keeper calls before long."""
        self._waiting.append(outcome)

    def settle(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Tell Redis, now if it is there; else :meth:`flush` does it later."""
        self._waiting.extend(outcomes)

        try:
            self.flush()
        except OUTAGE as error:
            # The reader meets the same loss, and tells of it.
            logger.debug("%d outcomes wait for Redis: %s", len(self._waiting), error)

    def flush(self) -> None:
        """Tell Redis what waits.

        :raises redis.ConnectionError: Redis is away.
        """
        while self.is_due:
            with self.turn:
                batch = self._take()

                try:
                    batch = self._without_kept(batch)
                    self._write(batch)
                except BaseException:
                    self._put_back(batch)
                    raise

    def close(self) -> None:
        """Close the connection."""
        with self.turn:
            self._group.pipe.close()

    def _take(self) -> list[Outcome]:
        batch: list[Outcome] = []
        now = time.monotonic()

        while self._refusals and self._refusals[0][0] <= now:
            self._waiting.append(self._refusals.popleft()[1])

        while self._waiting and len(batch) < MOST_AT_ONCE:
            batch.append(self._waiting.popleft())

        return batch

    def _put_back(self, batch: Sequence[Outcome]) -> None:
        for outcome in batch:
            outcome.doubtful = bool(outcome.commands)

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
        if outcome.delivery is None or outcome.delivery.record is None:
            return self._group.look_for(outcome.name, outcome.entry)

        key = self._keys.retry(outcome.name, self._config.service)
        return ("ZSCORE", key, outcome.delivery.member)

    def _write(self, batch: Sequence[Outcome]) -> None:
        plain: dict[str, list[Outcome]] = {}
        commands: list[Command] = []
        #: How many answers each group of outcomes gets.
        told: list[tuple[int, list[Outcome]]] = []

        for outcome in batch:
            if outcome.commands:
                block = self._transaction(outcome)
                commands += block
                told.append((len(block), [outcome]))
            elif not _is_retry(outcome):
                plain.setdefault(outcome.name, []).append(outcome)
            else:
                commands.append(self._end(outcome))
                told.append((1, [outcome]))

        for name, outcomes in plain.items():
            commands.append(self._group.acknowledge(name, [found.entry for found in outcomes]))
            told.append((1, outcomes))

        answers = self._group.pipe.run(commands) if commands else []

        for count, outcomes in told:
            own, answers = answers[:count], answers[count:]
            # A transaction that is refused says why where it is, and not at its end.
            refusal = next((answer for answer in own if isinstance(answer, Exception)), None)
            self._settled(outcomes, refusal or own[-1])

    def _settled(self, outcomes: Sequence[Outcome], answer: Any) -> None:
        refusal = answer if isinstance(answer, Exception) else None

        if isinstance(answer, list):
            refusal = next((part for part in answer if isinstance(part, Exception)), None)

            if refusal is not None:
                _keep_refused(outcomes[0], answer)

        if refusal is not None:
            self._refused(outcomes, refusal)
            return

        done = [outcome.delivery for outcome in outcomes if outcome.delivery is not None]
        self._hand.let_go(done)
        self._counters.add("acked", len(outcomes))

        for outcome in outcomes:
            if outcome.due or outcome.letters:
                self._tell(outcome)

    def _refused(self, outcomes: Sequence[Outcome], refusal: Exception) -> None:
        """Keep them in hand, and tell Redis again: what succeeded is not to run twice."""
        again = time.monotonic() + TELL_AGAIN
        self._refusals.extend((again, outcome) for outcome in outcomes)
        self._counters.add("unsettled", len(outcomes))
        self._log.error(
            "refused",
            "Redis refuses to take what became of %d events of %r: %s. It is told again every %g "
            "s. Correct what it complains of.",
            len(outcomes),
            outcomes[0].name,
            refusal,
            TELL_AGAIN,
        )

    def _tell(self, outcome: Outcome) -> None:
        self._counters.add("retries", len(outcome.due))

        for due in outcome.due:
            self._expect(outcome.name, due)

        for letter in outcome.letters:
            self._counters.add("dead_lettered")
            self._log.error(
                f"dead {letter.reason}",
                "The event %s of %r is a dead letter of %r (%s, %s): %s",
                letter.event_id or f"in the entry {letter.entry}",
                outcome.name,
                self._config.service,
                letter.receiver or "no receiver",
                letter.reason,
                letter.error,
            )
            tell(
                event_dead_lettered,
                self._config.service,
                name=outcome.name,
                receiver=letter.receiver,
                reason=letter.reason,
                event_id=letter.event_id,
                error=letter.error,
            )

    def _transaction(self, outcome: Outcome) -> list[Command]:
        return [("MULTI",), *outcome.commands, self._end(outcome), ("EXEC",)]

    def _end(self, outcome: Outcome) -> Command:
        """What takes it out of this process's hands."""
        if outcome.delivery is None or outcome.delivery.record is None:
            return self._group.acknowledge(outcome.name, [outcome.entry])

        key = self._keys.retry(outcome.name, self._config.service)
        return ("ZREM", key, outcome.delivery.member)

    def _judge(
        self,
        delivery: Delivery,
        failure: Failure,
        commands: list[Command],
        letters: list[DeadLetter],
        due: list[float],
    ) -> None:
        attempts = 1 if delivery.record is None else delivery.record.attempts
        retries = self._retries_of(delivery, failure)
        verdict = judge(failure.error, attempts=attempts, retries=retries)
        now = time.time()

        if verdict.reason is None:
            record = self._record(delivery, failure, attempts, now)
            due.append(now + verdict.after)
            key = self._keys.retry(delivery.name, self._config.service)
            commands.append(("ZADD", key, round(due[-1] * 1000), record.packed()))
            return

        letter = replace(
            self._letter(delivery, verdict.reason, words_of(failure.error), attempts=attempts),
            receiver=failure.name,
            traceback=_traceback_of(failure.error),
        )

        if delivery.record is not None:
            letter = replace(letter, first=delivery.record.first)

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
            first=moment if delivery.record is None else delivery.record.first,
            last=moment,
            error=words_of(failure.error),
            traceback=_traceback_of(failure.error),
        )

    def _letter(self, delivery: Delivery, reason: str, error: str, *, attempts: int) -> DeadLetter:
        now = round(time.time() * 1000)
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
        return ("XADD", key, *_limit(self._config.maxlen), "*", *letter.as_fields())


def _limit(maxlen: int | Age) -> Command:
    if isinstance(maxlen, Age):
        return ("MINID", "~", round((time.time() - maxlen.seconds) * 1000))

    return ("MAXLEN", "~", maxlen)


def _keep_refused(outcome: Outcome, answers: Sequence[Any]) -> None:
    """Leave of a transaction what has failed: the rest of it took effect."""
    outcome.commands = [
        command
        for command, answer in zip(outcome.commands, answers, strict=False)
        if isinstance(answer, Exception)
    ]


def _is_retry(outcome: Outcome) -> bool:
    return outcome.delivery is not None and outcome.delivery.record is not None


def _traceback_of(error: BaseException) -> str:
    return travelling("".join(traceback.format_exception(error)))[-MOST_TRACEBACK:]
