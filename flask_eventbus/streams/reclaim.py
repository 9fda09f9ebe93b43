"""Claim entries that other workers of the service left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import redis

from ..codec.records import entry_id
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery
from ..receivers.workers import MAX_BYTES
from ..routing.subscriptions import Subscription
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from .alarms import Alarm, behind, foreign_acknowledgements, impossible_count, report_trimmed
from .decoder import Intake
from .group import (
    LONG_IDLE,
    RELEASED,
    REPORT_KEPT,
    Group,
    GroupGoneError,
    Pending,
)

logger = get_logger(__name__)

#: Most released entries of a stream that are claimed before newer ones are read.
MAX_RELEASED = 100_000

#: Entries read in one round trip. They may be large.
LOOK_UP_COUNT = 32


class Reclaimer:
    """Claims entries that were released, or that are idle for ``EVENTBUS_CLAIM_AFTER`` seconds.

    :param group: the consumer group on the write connection.
    """

    def __init__(
        self,
        context: Context,
        *,
        group: Group,
        intake: Intake,
    ) -> None:
        self._config = context.config
        self._counters = context.counters
        self._timing = context.timing
        self._group = group
        self._intake = intake
        self._in_flight = intake.in_flight
        self._queue = intake.queue
        self._acknowledger = intake.acknowledger
        self._clock = intake.acknowledger.clock
        self._log = BoundedLog(logger)
        #: Monotonic time of the last refusal, by signal.
        self._refused_at: dict[str, float] = {}
        #: True if more entries could be claimed than the queue had room for.
        self.has_more = False
        #: Alarms by signal, each with the monotonic time at which it expires.
        self._alarms: dict[str, tuple[float, str]] = {}
        #: Streams with entries that this process released, or had no memory to claim. Any thread
        #: may add to it.
        self.unfinished: set[str] = set()

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms of the last day about entries that another program changed, by signal."""
        now = time.monotonic()
        return {name: text for name, (until, text) in self._alarms.items() if now < until}

    def reclaim_idle(self, names: Mapping[str, Subscription]) -> None:
        """Claim entries idle for ``EVENTBUS_CLAIM_AFTER`` seconds, as far as the queue has room.

        :raises redis.ConnectionError: Redis is away.
        """
        self.has_more = False
        self._claim_all(self._with_idle_entries(names))

    def _with_idle_entries(self, names: Mapping[str, Subscription]) -> dict[str, Subscription]:
        """Return the streams with entries that are idle; one round trip asks for many streams."""
        found: dict[str, Subscription] = {}
        idle, every, page = self._config.claim_after, list(names), self._timing.page

        for start in range(0, len(every), page):
            asked = every[start : start + page]
            queries = [self._group.idle_command(name, idle) for name in asked]

            with self._acknowledger.lock:
                answers = self._group.pipe.run(queries)

            # A refusal counts as found: the call that claims the entries reports it, and its end.
            for name, answer in zip(asked, answers, strict=True):
                if answer or name in self._group.unlisted:
                    found[name] = names[name]

        return found

    def reclaim_released(self, names: Mapping[str, Subscription]) -> None:
        """Claim released entries, as far as the queue has room.

        :raises redis.ConnectionError: Redis is away.
        """
        self._claim_all(names, RELEASED)

    def reclaim_all_released(self, names: Mapping[str, Subscription]) -> None:
        """Claim all released entries that fit into memory. The reader calls it before it reads.

        Released entries are older than unread ones, so the reader skips the streams in
        :attr:`unfinished`.

        :raises redis.ConnectionError: Redis is away.
        """
        self.unfinished -= names.keys()
        self._claim_all(names, RELEASED, room=MAX_RELEASED)

    def restore(self, name: str, deliveries: Sequence[Delivery]) -> set[str]:
        """Make entries pending again that another program acknowledged before they were started.

        :param deliveries: in flight, read by this consumer first, and not pending for it.
        :return: the ids of the entries that were pending for no consumer.
        """
        queries = [self._group.pending_command(name, delivery.entry) for delivery in deliveries]
        answers = self._group.pipe.run(queries) if queries else []
        gone = [found for found, answer in zip(deliveries, answers, strict=True) if answer == []]
        position = self._group.position(name) if gone else None

        # A group that was created again has not delivered these entries yet.
        if position is not None:
            gone = [found for found in gone if not behind(position.delivered, found.entry)]

        if position is None or not gone:
            return set()

        self.report(name, foreign_acknowledgements(name, self._config.service, len(gone)))
        self._group.pipe.run(
            [self._group.restore_command(name, found.entry, times=1) for found in gone]
        )
        return {found.entry for found in gone}

    def report(self, name: str, alarm: Alarm) -> None:
        """Log an alarm about a stream, and keep it for a day for ``health()`` and ``status``."""
        text = str(alarm)

        # The same alarm is found in every round.
        if self.alarms.get(name) != text:
            extra = {"signal": name, "service": self._config.service}
            self._log.error(f"alarm {name}", "%s", text, extra=extra)

        self._alarms = {**self._alarms, name: (time.monotonic() + REPORT_KEPT, text)}

        try:
            self._group.record_alarm(name, text)
        except (redis.ResponseError, *OUTAGE) as error:
            logger.debug("The alarm is not stored in Redis: %s", error)

    @contextmanager
    def reporting(self, name: str) -> Iterator[None]:
        """Log once if Redis refuses a command that the maintenance of a stream needs.

        If the group is gone, the reader creates it again, and all entries are delivered again.
        """
        try:
            yield
        except GroupGoneError as error:
            logger.debug("The group of %r is gone: %s", name, error)
        except redis.ResponseError as error:
            self._refused_at[name] = time.monotonic()
            self._log.once(
                f"refused {name}",
                "Redis refuses to let this worker maintain the stream of %r: %s. Its retries and "
                "the entries that other workers left wait. %s",
                name,
                error,
                self._group.worker_remedy(name, error),
                level=logging.ERROR,
                extra={"signal": name, "service": self._config.service},
            )

    def report_granted(self) -> None:
        """Log of each stream without a recent refusal that Redis allows its maintenance again."""
        # Redis may refuse one command and accept the next, so one success proves nothing.
        before = time.monotonic() - max(self._timing.granted_after, self._config.claim_after)

        for name in [name for name, refused in self._refused_at.items() if refused < before]:
            del self._refused_at[name]
            self._log.over(
                f"refused {name}",
                "Redis lets this worker maintain the stream of %r again.",
                name,
                extra={"signal": name, "service": self._config.service},
            )

    def _claim_all(
        self, names: Mapping[str, Subscription], consumer: str = "", *, room: int | None = None
    ) -> None:
        for name, subscription in names.items():
            with self.reporting(name), self._acknowledger.lock:
                most = max(0, self._queue.room) if room is None else room
                self._claim(name, subscription, consumer, most)

    def _claim(self, name: str, subscription: Subscription, consumer: str, room: int) -> None:
        idle = LONG_IDLE / 1000 if consumer == RELEASED else self._config.claim_after
        # Deliveries in flight are idle as well if they could not be renewed in time.
        most = room + len(self._in_flight) + 1
        pending = self._group.pending(name, idle=idle, consumer=consumer, most=most)
        missing = set(self._in_flight.missing(name, [found.id for found in pending]))
        stale = [found for found in pending if found.id in missing]

        # Released entries have no owner, whatever the clock says.
        if stale and consumer != RELEASED:
            self._clock.ask()

            # Idle times are wrong after Redis's clock was set.
            if not self._clock.is_steady:
                return

        self.has_more = self.has_more or len(stale) > room
        stale = stale[:room]

        for start in range(0, len(stale), LOOK_UP_COUNT):
            if start and self._queue.memory >= MAX_BYTES:
                self.has_more = True

                if room == MAX_RELEASED:
                    self.unfinished.add(name)

                return

            self._reclaim(name, subscription, stale[start : start + LOOK_UP_COUNT], idle)

    def _reclaim(
        self, name: str, subscription: Subscription, stale: Sequence[Pending], idle: float
    ) -> None:
        extra = {"signal": name, "service": self._config.service}
        entries = {
            entry.id: entry for entry in self._group.look_up(name, [found.id for found in stale])
        }
        present = [found for found in stale if entries[found.id].fields is not None]
        gone = [id for id, entry in entries.items() if entry.fields is None]
        mine = self._group.claim(name, present, idle=idle)
        times = {found.id: found.times for found in present}
        decoded = self._intake.decoder.decode(
            [entries[id] for id in times if id in mine], {name: subscription}
        )

        # They were trimmed while pending. Only the worker that acknowledges them reports the loss.
        if gone and (lost := self._group.pipe.ask(*self._group.acknowledge_command(name, gone))):
            report_trimmed(name, int(lost), self._config.service, self._counters, self._log)

        given_up = self._count_crashes(decoded.deliveries, times, subscription)
        taken = [delivery for delivery in decoded.deliveries if delivery not in given_up]
        decoded.deliveries = taken
        self._counters.add("claimed", len(taken))

        if taken:
            text = "Reclaimed %d events of %r that another worker left."
            logger.info(text, len(taken), name, extra=extra)

        text = "%s workers started the event, and each died before its receivers ended."
        give_up = self._intake.outcomes.give_up
        outcomes = [give_up(found, "killed", text % found.crashes) for found in given_up]
        self._intake.take(decoded, outcomes)

    def _count_crashes(
        self, deliveries: Sequence[Delivery], times: Mapping[str, int], subscription: Subscription
    ) -> list[Delivery]:
        """Set ``crashes`` of deliveries; return those that exceeded the limit."""
        given_up: list[Delivery] = []

        for delivery in deliveries:
            count = times[delivery.entry]
            most = max(1, self._intake.outcomes.most_retries(subscription, delivery.event))

            if not self._is_possible_count(delivery.entry, count, most):
                alarm = impossible_count(delivery.name, self._config.service, delivery.entry, count)
                self.report(delivery.name, alarm)
                count = 1

            delivery.crashes = count
            delivery.event = replace(delivery.event, attempt=count + 1)

            if count > most:
                given_up.append(delivery)

        return given_up

    def _is_possible_count(self, id: str, count: int, most: int) -> bool:
        """Return True if workers can have caused this delivery count.

        :param count: the number of deliveries that Redis shows.
        :param most: crashes after which a worker starts the entry once more before it gives up.
        """
        age = self._clock.now() - entry_id(id)[0] / 1000
        # The next worker claims an entry after that many seconds of silence.
        is_too_young = 0 <= age < (count - 1) * self._config.claim_after
        return count <= most + 1 and not is_too_young
