"""A thread that renews claims, reclaims entries, runs due retries and removes idle consumers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import redis

from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery
from ..receivers.workers import BatchSize
from ..routing.subscriptions import Subscription
from ..transport.connection import OUTAGE, takes_no_writes
from ..transport.connections import Context
from ..transport.reconnect import Backoff
from .alarms import foreign_consumers
from .decoder import Intake
from .group import RELEASED, Group, GroupGoneError
from .reader import StreamReader
from .reclaim import Reclaimer
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds until the next round while it has outcomes to write, or entries and retries to take.
SOON = 0.05

#: Longest time in seconds between two rounds while the last receivers end.
DRAINING_PAUSE = 1.0

#: Number of signs of life that a consumer gives in ``Timing.idle_consumer_after`` seconds.
SIGNS_OF_LIFE = 4

#: Most retries taken in one round trip.
MAX_RETRIES = 32

#: Approximate bytes of the retries taken in one round trip.
MAX_RETRY_BYTES = 4 * 1024 * 1024

#: Most seconds between two attempts while Redis is away.
MAX_BACKOFF = 2.0

#: Seconds after a deadline in which the thread may log the events it left pending.
REPORT_TIME = 0.2


class Maintenance:
    """Renews the claims of this process, and takes entries and retries that other workers left.

    At its end, the thread writes the outcomes and releases the entries that have not started.

    :param group: the consumer group on the write connection.
    """

    def __init__(
        self,
        context: Context,
        *,
        reader: StreamReader,
        group: Group,
        intake: Intake,
        retries: RetryQueue,
        reclaimer: Reclaimer,
    ) -> None:
        self._config = context.config
        self._counters = context.counters
        self._timing = context.timing
        self._node = context.node
        self._reader = reader
        self._group = group
        self._in_flight = intake.in_flight
        self._queue = intake.queue
        self._acknowledger = intake.acknowledger
        self._clock = intake.acknowledger.clock
        self._schedule = intake.acknowledger.schedule
        self._retries = retries
        self._reclaimer = reclaimer
        self._log = BoundedLog(logger)
        self._draining = False
        self._stopping = False
        self._is_disowned = False
        self._thread: threading.Thread | None = None
        # Monotonic times of the next round of each task.
        self._renew_at = self._reclaim_at = self._released_at = self._consumers_at = 0.0
        self._batch_size = BatchSize(max_bytes=context.config.max_event_bytes, most=MAX_RETRY_BYTES)
        #: Streams with due retries that were not taken yet.
        self._more_retries: set[str] = set()

    @property
    def is_own_thread(self) -> bool:
        """Return True if called from the maintenance thread."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            name = f"eventbus-maintenance-{self._node}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take no more entries and retries. Claims of running deliveries are still renewed."""
        self._draining = True
        self._schedule.within(0.0)

    def finish(self, deadline: float) -> None:
        """Let the thread release what is left until the deadline, and end. Return at once."""
        self._group.pipe.deadline = deadline
        self._stopping = True
        self._schedule.within(0.0)

    def end(self, deadline: float) -> None:
        """Wait until the thread has released all entries, or until the deadline."""
        if self._thread is None:
            return

        # The thread itself reports a Redis that is away, shortly after the deadline.
        self._thread.join(timeout=max(0.0, deadline + REPORT_TIME - time.monotonic()))

        if self._thread.is_alive():
            self._report_pending("it does not answer")

    def disown(self) -> None:
        """Stop in a forked child, where the thread does not run."""
        self._schedule.disown()
        self._stopping = self._is_disowned = True

    def wake(self) -> None:
        """Check for idle and released entries now, after streams were joined."""
        self._reclaim_at = self._released_at = 0.0
        self._schedule.within(0.0)

    def _run(self) -> None:
        backoff = Backoff(most=MAX_BACKOFF)

        while not self._stopping:
            try:
                self._run_round(time.monotonic())
                backoff.tries = 0
                pause = self._pause()
            except OUTAGE as error:
                logger.debug("Redis is away; maintenance waits: %s", error)
                pause = backoff.next()
            except Exception as error:
                # A defect of the bus. Without renewal other workers would claim the deliveries.
                self._counters.add("maintenance_failed")
                self._log.error(
                    "failed", "The maintenance of streams failed; it goes on.", exc_info=error
                )
                pause = backoff.next()

            if not self._stopping:
                self._schedule.wait(pause)

        if self._is_disowned:
            return

        try:
            self._release_all()
        except OUTAGE as error:
            self._report_pending(error)
        finally:
            with self._acknowledger.lock:
                self._group.pipe.close()

    def _pause(self) -> float:
        """Return the seconds until the next round, if no other thread asks for an earlier one."""
        now = time.monotonic()
        soon = now + SOON
        times = [self._renew_at, max(soon, self._acknowledger.due_at)]

        if self._draining:
            times.append(now + DRAINING_PAUSE)
        else:
            times += [self._reclaim_at, self._released_at, self._consumers_at]
            times.append(self._retries.search_at)

            if self._reclaimer.has_more or self._more_retries:
                times.append(soon)

            if self._in_flight:
                left = self._timing.pause_reading_after - self._in_flight.stalled_for
                times.append(max(soon, now + left))

        return max(0.001, min(times) - now)

    def _run_round(self, now: float) -> None:
        names = dict(self._reader.joined)

        self._acknowledger.flush()

        if now >= self._renew_at:
            self._renew_at = now + self._config.claim_after / 3

            # Without a stream nothing is in flight, and there may be no Redis.
            if names:
                self._clock.ask()

            self.renew()

        if self._draining:
            return

        self._release_stalled()

        if now >= self._reclaim_at or (self._reclaimer.has_more and self._queue.room > 0):
            self._reclaim_at = now + self._config.claim_after / 2 * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load
            self._reclaimer.reclaim_idle(names)

        if now >= self._released_at:
            self._released_at = now + self._timing.check_released_every * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load
            self._look_for_released_and_due(names)

        if now >= self._consumers_at:
            self._consumers_at = now + (
                self._timing.idle_consumer_after / SIGNS_OF_LIFE
                if names
                else self._timing.check_released_every
            )
            self._remove_idle(names)

        self._take_due_retries(names)

        if now >= self._retries.search_at:
            self._retries.give_up_orphans()

    def _look_for_released_and_due(self, names: Mapping[str, Subscription]) -> None:
        """Claim released entries, and note due retries, of the streams that have any."""
        if not names:
            return

        self._clock.ask()
        every, page = list(names), self._timing.page
        released: dict[str, Subscription] = {}

        # Outcomes are written between two pages.
        for start in range(0, len(every), page):
            asked = every[start : start + page]
            queries = [
                command
                for name in asked
                for command in (self._group.released_command(name), self._retries.due_command(name))
            ]

            with self._acknowledger.lock:
                answers = self._group.pipe.run(queries)

            # A refusal counts as found: the call that takes the entries reports it.
            for name, found, due in zip(asked, answers[::2], answers[1::2], strict=True):
                if found:
                    released[name] = names[name]

                if due:
                    self._more_retries.add(name)

        self._reclaimer.reclaim_released(released)
        self._reclaimer.report_granted()

    def renew(self) -> None:
        """Renew the claims of all deliveries; expire those that another worker has.

        :raises redis.ConnectionError: Redis is away.
        """
        claimed_until = time.monotonic() + self._config.claim_after
        by_name: dict[str, list[Delivery]] = {}

        for delivery in self._in_flight.all():
            if delivery.retry is None:
                by_name.setdefault(delivery.name, []).append(delivery)
                continue

            with self._reclaimer.reporting(delivery.name):
                if self._retries.renew(delivery):
                    delivery.claimed_until = claimed_until

        for name, deliveries in by_name.items():
            # If the group is gone, they run nevertheless.
            with self._reclaimer.reporting(name), self._acknowledger.lock:
                self._renew(name, deliveries, claimed_until)

    def _renew(self, name: str, deliveries: Sequence[Delivery], claimed_until: float) -> None:
        kept = self._group.renew(name, [delivery.entry for delivery in deliveries])
        now = time.monotonic()
        # No longer pending, although this process did not acknowledge them. An entry that was
        # claimed may be acknowledged by the worker that had it, after a long pause.
        lost = [
            delivery
            for delivery in deliveries
            if delivery.entry not in kept
            and not delivery.started
            and delivery.crashes is None
            and now < delivery.claimed_until
        ]
        kept |= self._reclaimer.restore(name, lost)

        for delivery in deliveries:
            if delivery.entry in kept:
                delivery.claimed_until = claimed_until
            elif not delivery.started:
                delivery.claimed_until = 0.0

    def _release_stalled(self) -> None:
        """Release queued deliveries to other workers if the receivers here take long."""
        stalled = self._in_flight.stalled_for

        # Without XPENDING no worker would find released entries.
        if (
            stalled >= self._timing.pause_reading_after
            and self._queue.hold()
            and stalled >= self._timing.release_after
            and not self._group.unlisted
        ):
            self._release(self._in_flight.release_waiting())

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        crashes: dict[str, dict[str, int]] = {}

        for delivery in deliveries:
            if delivery.retry is None:
                crashes.setdefault(delivery.name, {})[delivery.entry] = delivery.crashes or 0
            else:
                self._retries.release(delivery)
                self._more_retries.add(delivery.name)

        for name, counts in crashes.items():
            with self._reclaimer.reporting(name), self._acknowledger.lock:
                # Under the lock: the reader waits for it before it claims them.
                self._reclaimer.unfinished.add(name)
                self._group.release_own(name, counts)

    def _remove_idle(self, names: Iterable[str]) -> None:
        """Remove consumers of workers that died long ago, and report those of other programs."""
        every, page = list(names), self._timing.page

        for start in range(0, len(every), page):
            with self._acknowledger.lock:
                found = self._group.report_alive(every[start : start + page])

            for name, consumers in found.items():
                self._remove_idle_of(name, consumers)

    def _remove_idle_of(
        self, name: str, consumers: list[tuple[str, int, float]] | Exception
    ) -> None:
        try:
            if isinstance(consumers, Exception):
                raise consumers

            with self._acknowledger.lock:
                self._check_consumers(name, consumers)
        except GroupGoneError as error:
            logger.debug("The consumers of %r are gone: %s", name, error)
        except redis.ResponseError as error:
            # The reader reports a Redis that takes no writes.
            if takes_no_writes(error):
                logger.debug("Idle consumers of %r are not removed: %s", name, error)
                return

            self._log.once(
                f"idle {name}",
                "Redis does not let this worker remove idle consumers of %r: %s. They stay in "
                "the group. %s",
                name,
                error,
                self._group.remedy(name, error),
            )
        else:
            self._log.over(f"idle {name}", "Idle consumers of %r are removed again.", name)

    def _check_consumers(self, name: str, found: Sequence[tuple[str, int, float]]) -> None:
        consumers = [consumer for consumer in found if consumer[0] != RELEASED]
        names = [consumer for consumer, _, _ in consumers]

        if alarm := foreign_consumers(name, self._config.service, names):
            self._reclaimer.report(name, alarm)

        for consumer, pending, idle in consumers:
            if pending or idle <= self._timing.idle_consumer_after:
                continue

            if count := self._group.remove(name, consumer):
                logger.warning(
                    "The idle consumer %s of %r was removed while it read %d events. Other workers "
                    "get them.",
                    consumer,
                    name,
                    count,
                )

    def _take_due_retries(self, names: Mapping[str, Subscription]) -> None:
        # Kept until they are taken: Redis may be away in between.
        self._more_retries |= self._schedule.take_due()
        self._more_retries &= names.keys()

        if self._more_retries:
            self._clock.ask()

        for name in list(self._more_retries):
            has_more = False

            with self._reclaimer.reporting(name):
                has_more = self._take_retries(name, names[name])

            if not has_more:
                self._more_retries.discard(name)

    def _take_retries(self, name: str, subscription: Subscription) -> bool:
        """Take due retries of a stream. Return True if more are due."""
        while (room := self._queue.room) > 0:
            memory = self._queue.memory
            most = self._batch_size.count(room=min(room, MAX_RETRIES), memory=memory, streams=1)

            with self._acknowledger.lock:
                deliveries, given_up, more = self._retries.take(name, subscription, most=most)

            self._batch_size.update(delivery.memory for delivery in deliveries)
            self._in_flight.add(deliveries)
            self._queue.put(deliveries)
            self._acknowledger.write(given_up)

            if not more or not deliveries:
                return more

        return True

    def _release_all(self) -> None:
        """Write outcomes, and release entries and retries that have not started."""
        if not self._reader.known:
            return

        self._acknowledger.write_all()

        with self._acknowledger.lock:
            for delivery in self._in_flight.all():
                if delivery.retry is not None and not delivery.started:
                    self._retries.release(delivery)

            # Refused streams were reported already.
            for name in self._reader.known - self._reader.catalogue.refused.keys():
                self._release_stream(name)

    def _release_stream(self, name: str) -> None:
        read = [found for found in self._in_flight.all() if found.name == name]
        first = {found.entry: found for found in read if found.retry is None}
        crashes: dict[str, int] = {}

        try:
            for found in self._group.own_pending(name):
                # An entry read once and not in flight did not arrive, so it did not crash.
                times = found.times if found.times > 1 else 0
                delivery = first.get(found.id)

                if delivery is None or not delivery.started:
                    crashes[found.id] = times if delivery is None else delivery.crashes or 0

            self._group.release(name, crashes)
            self._group.leave(name)
        except GroupGoneError as error:
            logger.debug("Nothing of %r is released: %s", name, error)
        except redis.ResponseError as error:
            logger.error(
                "Redis refuses to release the entries of %r: %s. Another worker claims them after "
                "%g s. %s",
                name,
                error,
                self._config.claim_after,
                self._group.worker_remedy(name, error),
                extra={"signal": name, "service": self._config.service},
            )

    def _report_pending(self, reason: object) -> None:
        if self._in_flight:
            logger.error(
                "Redis is away (%s): %d events that were read stay pending. Another worker claims "
                "them after %g s, and those already handled are delivered again.",
                reason,
                len(self._in_flight),
                self._config.claim_after,
            )
