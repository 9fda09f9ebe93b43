"""The thread that looks after a service's streams: claims, renewals, retries, idle consumers."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from ..config import Config
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.workers import DeliveryQueue, Portions
from ..routing.subscriptions import Subscription
from ..transport.connections import OUTAGE, takes_no_writes
from ..transport.reconnect import Backoff
from .acknowledger import Acknowledger
from .alarms import foreign_consumers
from .group import RELEASED, Group, GroupGoneError
from .orphans import Orphans
from .reclaim import Reclaimer
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds between looks for what others handed back, or left to be tried again: all streams in one
#: round trip, so that their number does not matter.
CHECK_RELEASED_EVERY = 5.0

#: Seconds between looks at what this process has in hand, while it has something.
IN_FLIGHT_PAUSE = 0.05

#: Seconds without a receiver that begins, though events wait, after which nothing more is read;
#: and those after which other workers get what waits: by then a read under way has ended.
PAUSE_READING_AFTER = 1.0
RELEASE_AFTER = 2.5

#: Seconds without a sign of life after which a consumer with nothing pending is removed, and
#: how many signs a consumer gives in that time.
IDLE_CONSUMER = 600.0
SIGNS_OF_LIFE = 4

#: Retries that are taken at once, and the bytes that they have about: Redis is told of each.
MOST_RETRIES = 32
MOST_RETRY_BYTES = 4 * 1024 * 1024

#: Looks for retries in each second: those that are due within one step share a look.
LOOKS_PER_SECOND = 10

#: Seconds until a retry is due beyond which it gets no look of its own: it is found by the look for
#: what others left.
EXPECT_WITHIN = 60.0

#: Seconds between tries while Redis is away, at most.
MOST_BACKOFF = 2.0


class Maintenance:
    """Keeps what this process has in hand, and takes over what others left.

    :param names: the streams that are read, with their subscriptions.
    :param hand_back: called in the thread at its end, to settle and hand back what is left.
    """

    def __init__(
        self,
        *,
        config: Config,
        names: Callable[[], Mapping[str, Subscription]],
        group: Group,
        in_flight: InFlight,
        queue: DeliveryQueue,
        acknowledger: Acknowledger,
        retries: RetryQueue,
        reclaimer: Reclaimer,
        orphans: Orphans,
        counters: Counters,
        node: str,
        hand_back: Callable[[], None],
    ) -> None:
        self._config = config
        self._names = names
        self._hand_back = hand_back
        self._group = group
        self._in_flight = in_flight
        self._queue = queue
        self._acknowledger = acknowledger
        self._retries = retries
        self._reclaimer = reclaimer
        self._orphans = orphans
        self._clock = acknowledger.clock
        self._counters = counters
        self._node = node
        self._log = BoundedLog(logger)
        self._changed = threading.Condition()
        #: The streams with retries that will be due, by the step at which to look for them.
        self._due: dict[int, set[str]] = {}
        self._draining = False
        self._stopping = False
        self._is_disowned = False
        self._thread: threading.Thread | None = None
        #: When each duty is due, by the monotonic clock.
        self._renew_at = self._claim_at = self._released_at = self._consumers_at = 0.0
        self._portions = Portions(max_bytes=config.max_event_bytes, most=MOST_RETRY_BYTES)
        #: The streams with more retries than there was room for.
        self._more_retries: set[str] = set()
        self._is_watching = False
        #: The streams of which something was given away; whoever reads takes it back first.
        self._released_streams: set[str] = set()

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is this one."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            name = f"eventbus-keeper-{self._node}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take nothing over any more; what runs is still kept."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def finish(self, deadline: float) -> None:
        """Let the thread hand back what is left, by a deadline, and end; does not wait for it."""
        self._group.pipe.deadline = deadline

        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def end(self, deadline: float) -> bool:
        """Wait for the thread's end; return False if it still waits for Redis at the deadline."""
        if self._thread is None:
            return True

        self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def disown(self) -> None:
        """In a forked child: end what came along of it."""
        self._changed = threading.Condition()
        self._stopping = self._is_disowned = True

    def expect(self, name: str, due: float) -> None:
        """Look for retries of ``name`` at the time ``due``, in seconds since 1970.

        What is kept for that has a bound, however many retries wait: see :data:`EXPECT_WITHIN`.
        """
        if due - self._clock.now() > EXPECT_WITHIN:
            return

        with self._changed:
            self._due.setdefault(math.ceil(due * LOOKS_PER_SECOND), set()).add(name)
            self._changed.notify_all()

    def wake(self) -> None:
        """Look around now: there are new streams."""
        with self._changed:
            self._claim_at = self._released_at = 0.0
            self._changed.notify_all()

    def watch_in_flight(self) -> None:
        """Look often at what is in hand, until there is nothing any more."""
        if self._is_watching:
            return

        with self._changed:
            self._is_watching = True
            self._changed.notify_all()

    def released_streams(self) -> set[str]:
        """The streams of which something was given away since this was last asked for."""
        found, self._released_streams = self._released_streams, set()
        return found

    # -- the keeping thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        while not self._stopping:
            try:
                self._look_after(time.monotonic())
                backoff.reset()
                pause = self._pause()
            except OUTAGE as error:
                logger.debug("Keeping waits for Redis: %s", error)
                pause = backoff.next()
            except Exception as error:
                # A defect: what is in hand would be another's if nobody renewed it.
                self._counters.add("keeping_failed")
                self._log.error("failed", "The keeper failed; it goes on.", exc_info=error)
                pause = backoff.next()

            with self._changed:
                if not self._stopping:
                    self._changed.wait(pause)

        if not self._is_disowned:
            self._hand_back()

    def _pause(self) -> float:
        now = time.monotonic()

        if self._draining:
            return max(0.001, min(self._renew_at - now, 0.05 if self._acknowledger.is_due else 1.0))

        times = [self._renew_at, self._claim_at, self._released_at, self._consumers_at]
        times.append(self._orphans.look_at)
        return max(0.001, min(min(times) - now, self._until_due, self._soon))

    @property
    def _until_due(self) -> float:
        """Seconds until the next look for retries that were expected here."""
        with self._changed:
            first = min(self._due, default=None)

        return EXPECT_WITHIN if first is None else first / LOOKS_PER_SECOND - self._clock.now()

    @property
    def _soon(self) -> float:
        """Seconds until the next look, for the sake of what is under way."""
        if self._is_watching or self._acknowledger.is_due:
            return IN_FLIGHT_PAUSE

        if (self._reclaimer.has_more or self._more_retries) and self._queue.room > 0:
            return IN_FLIGHT_PAUSE

        return (
            1.0
            if self._reclaimer.has_more or self._more_retries or len(self._acknowledger)
            else 60.0
        )

    def _look_after(self, now: float) -> None:
        names = dict(self._names())

        if self._acknowledger.is_due:
            self._acknowledger.flush()

        if now >= self._renew_at:
            self._renew_at = now + self._config.claim_after / 3

            # Without a stream nothing is in hand, and there may be no Redis to ask.
            if names:
                self._clock.ask()

            self.renew()

        if self._draining:
            return

        # First, so that what is taken in hand meanwhile is not overlooked.
        self._is_watching = False
        self._is_watching = bool(len(self._in_flight))
        self._share()

        if now >= self._claim_at or (self._reclaimer.has_more and self._queue.room > 0):
            self._claim_at = now + self._config.claim_after / 2 * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load
            self._reclaimer.reclaim_idle(names)

        if now >= self._released_at:
            self._released_at = now + CHECK_RELEASED_EVERY * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load
            self._take_what_others_left(names)

        if now >= self._consumers_at:
            self._consumers_at = now + (
                IDLE_CONSUMER / SIGNS_OF_LIFE if names else CHECK_RELEASED_EVERY
            )
            self._remove_idle(names)

        self._run_due(names)
        self._orphans.look()

    def _take_what_others_left(self, names: Mapping[str, Subscription]) -> None:
        """Take what was handed back, and retries of other workers, of the streams that have any."""
        if not names:
            return

        self._clock.ask()
        questions = [
            command
            for name in names
            for command in (self._group.released_command(name), self._retries.due_command(name))
        ]

        with self._acknowledger.lock:
            answers = self._group.pipe.run(questions)

        # A refusal is taken for something: whoever takes it reports it.
        released = {name for name, found in zip(names, answers[::2], strict=True) if found}
        due = {name for name, found in zip(names, answers[1::2], strict=True) if found}
        self._reclaimer.reclaim_released({name: names[name] for name in released})
        self._run_retries({name: names[name] for name in due})
        self._reclaimer.report_granted()

    # -- what is in hand ------------------------------------------------------------------

    def renew(self) -> None:
        """Keep everything in hand from being claimed, and drop what is another's by now.

        :raises redis.ConnectionError: Redis is away.
        """
        lease = time.monotonic() + self._config.claim_after
        by_name: dict[str, list[Delivery]] = {}

        for delivery in self._in_flight.all():
            if delivery.retry is None:
                by_name.setdefault(delivery.name, []).append(delivery)
            else:
                self._renew_retry(delivery, lease)

        for name, deliveries in by_name.items():
            self._renew(name, deliveries, lease)

    def _renew_retry(self, delivery: Delivery, lease: float) -> None:
        try:
            if self._retries.renew(delivery):
                delivery.claimed_until = lease
        except redis.ResponseError as error:
            self._reclaimer.report_refusal(delivery.name, error)

    def _renew(self, name: str, deliveries: Sequence[Delivery], lease: float) -> None:
        try:
            with self._acknowledger.lock:
                kept = self._group.renew(name, [delivery.entry for delivery in deliveries])
                now = time.monotonic()
                # Nobody may have claimed these yet, and this process told nothing of them.
                lost = [
                    delivery
                    for delivery in deliveries
                    if delivery.entry not in kept
                    and not delivery.started
                    and now < delivery.claimed_until
                ]
                kept |= self._reclaimer.restore(name, lost)
        except GroupGoneError:
            # They run, or will: nobody else has them, and they come again with the new group.
            return
        except redis.ResponseError as error:
            self._reclaimer.report_refusal(name, error)
            return

        for delivery in deliveries:
            if delivery.entry in kept:
                delivery.claimed_until = lease
            elif not delivery.started:
                delivery.claimed_until = 0.0

    def _share(self) -> None:
        """Let other workers have what waits here behind receivers that take long."""
        still = self._in_flight.stalled_for

        # What is handed back is found by nobody where Redis does not list it.
        if (
            still >= PAUSE_READING_AFTER
            and self._queue.hold()
            and still >= RELEASE_AFTER
            and not self._group.unlisted
        ):
            self._give_away(self._in_flight.release_waiting())

    def _give_away(self, deliveries: Sequence[Delivery]) -> None:
        by_name: dict[str, dict[str, int]] = {}

        for delivery in deliveries:
            if delivery.retry is None:
                by_name.setdefault(delivery.name, {})[delivery.entry] = delivery.crashes or 0
            else:
                self._retries.release(delivery)
                self._more_retries.add(delivery.name)

        for name, begun in by_name.items():
            try:
                with self._acknowledger.lock:
                    own = {found.id for found in self._group.own_pending(name)}
                    self._released_streams.add(name)
                    self._group.release(name, {id: begun[id] for id in begun if id in own})
            except GroupGoneError as error:
                logger.debug("Nothing of %r is given away: %s", name, error)
            except redis.ResponseError as error:
                self._reclaimer.report_refusal(name, error)

    def _remove_idle(self, names: Mapping[str, Subscription]) -> None:
        for name in names:
            try:
                with self._acknowledger.lock:
                    self._group.report_alive(name)
                    consumers = self._group.consumers(name)
                    self._look_for_foreign(name, [found for found, _, _ in consumers])

                    for consumer, pending, idle in consumers:
                        if not pending and idle > IDLE_CONSUMER and consumer != RELEASED:
                            self._remove(name, consumer)
            except GroupGoneError as error:
                logger.debug("The consumers of %r are gone: %s", name, error)
            except redis.ResponseError as error:
                # Whoever reads says that of all that it does.
                if takes_no_writes(error):
                    logger.debug("Nobody looks for idle consumers of %r: %s", name, error)
                    continue

                self._log.once(
                    f"idle {name}",
                    "Redis does not let this worker remove idle consumers of %r: %s. They stay. %s",
                    name,
                    error,
                    self._group.remedy(name, error),
                )
            else:
                self._log.over(f"idle {name}", "Idle consumers of %r are removed again.", name)

    def _look_for_foreign(self, name: str, consumers: Sequence[str]) -> None:
        others = [found for found in consumers if found != RELEASED]

        if alarm := foreign_consumers(name, self._config.service, others):
            self._reclaimer.report(name, alarm)

    def _remove(self, name: str, consumer: str) -> None:
        count = self._group.remove(name, consumer)

        if count:
            logger.warning(
                "The consumer %s of %r was removed while it read %d events: they are handed to "
                "workers that give signs of life.",
                consumer,
                name,
                count,
            )

    # -- retries --------------------------------------------------------------------------

    def _run_due(self, names: Mapping[str, Subscription]) -> None:
        due, self._more_retries = self._more_retries, set()
        now = self._clock.now() if self._due else 0.0

        with self._changed:
            for step in [step for step in self._due if step <= now * LOOKS_PER_SECOND]:
                due |= self._due.pop(step)

        self._run_retries({name: names[name] for name in due if name in names})

    def _run_retries(self, names: Mapping[str, Subscription]) -> None:
        if names:
            self._clock.ask()

        for name, subscription in names.items():
            try:
                if self._take_retries(name, subscription):
                    self._more_retries.add(name)
            except redis.ResponseError as error:
                self._reclaimer.report_refusal(name, error)

    def _take_retries(self, name: str, subscription: Subscription) -> bool:
        """Take the retries of a stream that are due; return True if there are more."""
        while (room := self._queue.room) > 0:
            memory = self._queue.memory
            most = self._portions.count(room=min(room, MOST_RETRIES), memory=memory, streams=1)

            with self._acknowledger.lock:
                deliveries, given_up, more = self._retries.take(name, subscription, most=most)

            self._portions.note(delivery.memory for delivery in deliveries)
            self._in_flight.add(deliveries)
            self._queue.put(deliveries)
            self._acknowledger.write(given_up)

            if not more or not deliveries:
                return more

        return True
