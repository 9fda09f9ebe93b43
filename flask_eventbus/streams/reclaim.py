"""Takes over what other workers of a service left of its streams."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import redis

from ..codec.entry_ids import entry_id
from ..config import Config
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.workers import DeliveryQueue
from ..routing.subscriptions import Subscription
from ..signals import emit, events_trimmed
from ..transport.connections import OUTAGE
from .acknowledger import Acknowledger
from .alarms import Alarm, far_ahead, past_the_end, set_count, taken_out
from .decoder import EntryDecoder
from .group import (
    LONG_IDLE,
    RELEASED,
    REPORT_KEPT,
    Group,
    GroupGoneError,
    Pending,
    Position,
    behind,
)
from .outcomes import Outcomes

logger = get_logger(__name__)

#: Entries that were handed back and are taken at once, before what is newer is read.
MOST_RELEASED = 100_000

#: Seconds without a refusal after which Redis is said to let a worker look after a stream again.
GRANTED_AFTER = 60.0

#: Entries that are looked up at once: they may be large.
LOOK_UP_COUNT = 32


class Reclaimer:
    """Claims entries that were handed back, or whose worker is silent for too long.

    :param group: on the settler's connection.
    :param retries_of: how often an event that kills its worker is begun once more.
    """

    def __init__(
        self,
        *,
        config: Config,
        group: Group,
        decoder: EntryDecoder,
        in_flight: InFlight,
        queue: DeliveryQueue,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        trims: Trims,
        counters: Counters,
        retries_of: Callable[[Subscription, Event], int],
    ) -> None:
        self._config = config
        self._group = group
        self._decoder = decoder
        self._in_flight = in_flight
        self._queue = queue
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._trims = trims
        self._clock = acknowledger.clock
        self._counters = counters
        self._retries_of = retries_of
        self._log = BoundedLog(logger)
        #: When Redis last refused something of a stream, by the monotonic clock.
        self._refused_at: dict[str, float] = {}
        #: Whether more was left than there was room for.
        self.has_more = False
        #: What somebody did to entries of streams, by name, and until when it is an alarm.
        self._alarms: dict[str, tuple[float, str]] = {}
        #: The streams of which :meth:`reclaim_all_released` left something, for want of memory.
        self.unfinished: set[str] = set()

    @property
    def alarms(self) -> dict[str, str]:
        """What somebody did to entries of streams in the last day, by name."""
        now = time.monotonic()
        return {name: text for name, (until, text) in self._alarms.items() if now < until}

    def reclaim_idle(self, names: Mapping[str, Subscription]) -> None:
        """Take over what is idle for longer than ``EVENTBUS_CLAIM_AFTER``, as much as has room.

        :raises redis.ConnectionError: Redis is away.
        """
        self.has_more = False
        self._claim_all(names, idle=self._config.claim_after, consumer="")

    def reclaim_released(self, names: Mapping[str, Subscription]) -> None:
        """Take over what was handed back, as much as has room.

        :raises redis.ConnectionError: Redis is away.
        """
        self._claim_all(names, idle=LONG_IDLE / 1000, consumer=RELEASED)

    def reclaim_all_released(self, names: Mapping[str, Subscription]) -> None:
        """Take what others, or this process itself, handed back of streams: all that fits.

        What is read afterwards is newer: so it is for the thread that reads, which may call this.
        It reads nothing of the streams in :attr:`unfinished`.

        :raises redis.ConnectionError: Redis is away.
        """
        self.unfinished -= names.keys()
        self._claim_all(names, idle=LONG_IDLE / 1000, consumer=RELEASED, room=MOST_RELEASED)

    def restore(self, name: str, deliveries: Sequence[Delivery]) -> set[str]:
        """Make entries pending again that somebody else acknowledged before they were begun.

        :param deliveries: in hand, and not pending for this consumer.
        :return: the ids of those that were pending for nobody.
        """
        questions = [self._group.pending_command(name, delivery.entry) for delivery in deliveries]
        answers = self._group.pipe.run(questions) if questions else []
        gone = [found for found, answer in zip(deliveries, answers, strict=True) if answer == []]
        position = self._group.position(name) if gone else None

        # A group that was made again has not come that far.
        if position is not None:
            gone = [found for found in gone if not behind(position.delivered, found.entry)]

        if position is None or not gone:
            return set()

        self.report(name, taken_out(name, self._config.service, len(gone)))
        self._group.pipe.run(
            [
                self._group.restore_command(
                    name, found.entry, times=1 if found.crashes is None else found.crashes
                )
                for found in gone
            ]
        )
        return {found.entry for found in gone}

    def report(self, name: str, alarm: Alarm) -> None:
        """Raise an alarm about what somebody did to a stream's group: it stays for a day."""
        text = str(alarm)

        # What lasts is found again and again.
        if self.alarms.get(name) != text:
            extra = {"signal": name, "service": self._config.service}
            self._log.error(f"alarm {name}", "%s", text, extra=extra)

        self._alarms = {**self._alarms, name: (time.monotonic() + REPORT_KEPT, text)}

        try:
            self._group.record_alarm(name, text)
        except (redis.ResponseError, *OUTAGE) as error:
            logger.debug("Only this process knows of the alarm: %s", error)

    def report_refusal(self, name: str, error: Exception) -> None:
        """Log once that Redis refuses to let this worker look after a stream."""
        self._refused_at[name] = time.monotonic()
        self._log.once(
            f"refused {name}",
            "Redis refuses to let this worker look after the stream of %r: %s. What other workers "
            "left of it, and what is to be tried again, waits. %s",
            name,
            error,
            self._group.worker_remedy(name, error),
            level=logging.ERROR,
            extra={"signal": name, "service": self._config.service},
        )

    def report_granted(self) -> None:
        """Log of streams that nothing was refused of lately that this worker looks after them."""
        # Some of what it does is refused, and some is not: one success proves nothing.
        before = time.monotonic() - max(GRANTED_AFTER, self._config.claim_after)

        for name in [name for name, refused in self._refused_at.items() if refused < before]:
            del self._refused_at[name]
            self._log.over(
                f"refused {name}",
                "Redis lets this worker look after the stream of %r again.",
                name,
                extra={"signal": name, "service": self._config.service},
            )

    def _claim_all(
        self,
        names: Mapping[str, Subscription],
        *,
        idle: float,
        consumer: str,
        room: int | None = None,
    ) -> None:
        for name, subscription in names.items():
            try:
                with self._acknowledger.lock:
                    most = max(0, self._queue.room) if room is None else room
                    self._claim(name, subscription, idle, consumer, most)
            except GroupGoneError as error:
                # The reader makes it again.
                logger.debug("Nothing is claimed of %r: %s", name, error)
            except redis.ResponseError as error:
                self.report_refusal(name, error)

    def _claim(
        self, name: str, subscription: Subscription, idle: float, consumer: str, room: int
    ) -> None:
        # What is in hand is idle, too, where it could not be renewed in time.
        most = room + len(self._in_flight) + 1
        pending = self._group.pending(name, idle=idle, consumer=consumer, most=most)
        foreign = set(self._in_flight.missing(name, [found.id for found in pending]))
        stale = [found for found in pending if found.id in foreign]

        # What was handed back is nobody's, whatever the clock says.
        if stale and consumer != RELEASED and not self._is_believed():
            return

        self.has_more = self.has_more or len(stale) > room
        stale = stale[:room]

        for start in range(0, len(stale), LOOK_UP_COUNT):
            if start and self._queue.is_heavy:
                self.has_more = True

                if room == MOST_RELEASED:
                    self.unfinished.add(name)

                return

            self._take_over(name, subscription, stale[start : start + LOOK_UP_COUNT], idle)

    def _is_believed(self) -> bool:
        """Return True if Redis's clock did not step lately, so that idle entries are abandoned."""
        self._clock.ask()
        return self._clock.is_steady

    def _take_over(
        self, name: str, subscription: Subscription, stale: Sequence[Pending], idle: float
    ) -> None:
        entries = {
            entry.id: entry for entry in self._group.look_up(name, [found.id for found in stale])
        }
        present = [found for found in stale if entries[found.id].fields is not None]
        gone = [entries[found.id] for found in stale if entries[found.id].fields is None]
        mine = self._group.claim(name, present, idle=idle)
        times = {found.id: found.times for found in present}
        found = self._decoder.decode(
            [entries[id] for id in times if id in mine], {name: subscription}
        )

        if gone:
            self._forget(name, [entry.id for entry in gone])

        killers = self._mark(found.deliveries, times, subscription)
        self._take([delivery for delivery in found.deliveries if delivery not in killers], name)
        self._acknowledger.write(
            [self._outcomes.skipped(entry) for entry in found.skipped]
            + [self._outcomes.rejected(entry, letter) for entry, letter in found.dead]
            + [self._outcomes.give_up(killer, "killed", _killed(killer)) for killer in killers]
        )

    def _mark(
        self, deliveries: Sequence[Delivery], times: Mapping[str, int], subscription: Subscription
    ) -> list[Delivery]:
        """Note on deliveries how often they were begun; those that were begun too often."""
        killers: list[Delivery] = []

        for delivery in deliveries:
            count = times[delivery.entry]
            most = max(1, self._retries_of(subscription, delivery.event))

            if not self._is_possible(delivery.entry, count, most):
                alarm = set_count(delivery.name, self._config.service, delivery.entry, count)
                self.report(delivery.name, alarm)
                count = 1

            delivery.crashes = count
            delivery.event = replace(delivery.event, attempt=count + 1)

            if count > most:
                killers.append(delivery)

        return killers

    def _is_possible(self, id: str, count: int, most: int) -> bool:
        """Return True if workers may have begun an entry so often, and ended each time.

        :param most: after how often it is begun once more, and given up then.
        """
        age = self._clock.now() - entry_id(id)[0] / 1000
        # A worker was silent for that long before the next one began.
        is_too_young = 0 <= age < (count - 1) * self._config.claim_after
        return count <= most + 1 and not is_too_young

    def _take(self, taken: Sequence[Delivery], name: str) -> None:
        self._counters.add("claimed", len(taken))

        if taken:
            logger.info(
                "%d events of %r that another worker left are taken over.",
                len(taken),
                name,
                extra={"signal": name, "service": self._config.service},
            )

        self._in_flight.add(taken)
        self._queue.put(taken)

    def _forget(self, name: str, ids: Sequence[str]) -> None:
        """Acknowledge what was trimmed while it was pending; who gets to do it tells of it."""
        answer = self._group.pipe.ask(*self._group.acknowledge_command(name, ids))
        self._trims.count(name, int(answer))


def _killed(delivery: Delivery) -> str:
    return (
        f"It was begun {delivery.crashes} times, and each time its worker ended before its "
        "receivers did."
    )


#: Seconds between looks while there is more to read than is read at once.
CHECK_BACKLOG_EVERY = 1.0

#: Seconds between looks otherwise.
CHECK_EVERY = 30.0


class Trims:
    """Compares what a stream has lost with what its group has read.

    Redis 7 counts both. What was pending when it was trimmed is noticed by whoever looks for it.

    :param group: looks, on the connection of the thread that asks.
    """

    def __init__(self, group: Group, *, service: str, counters: Counters) -> None:
        self._group = group
        self._service = service
        self._counters = counters
        self._log = BoundedLog(logger)
        #: Whether the last read left something to be read.
        self.has_backlog = False
        self._looked = float("-inf")
        #: By stream, where the group stood at the last loss, and how many of the events that Redis
        #: counts as lost are no new loss.
        self._known: dict[str, tuple[str, int]] = {}
        #: What somebody did to streams, so that this service gets nothing of them, by name.
        self.alarms: dict[str, str] = {}

    def check(self, names: Iterable[str]) -> None:
        """Look at streams, if it is time.

        :raises redis.ConnectionError: Redis is away.
        """
        now = time.monotonic()

        if now - self._looked < (CHECK_BACKLOG_EVERY if self.has_backlog else CHECK_EVERY):
            return

        self._looked = now
        names = list(names)
        self.alarms = {name: self.alarms[name] for name in names if name in self.alarms}

        for name in names:
            self._look_at(name)

    def check_before_next_read(self) -> None:
        """Look before the next read: a group that reads on no longer shows what it lost."""
        self._looked = float("-inf")

    def reset(self) -> None:
        """Start again after streams were deleted: their counts start at zero."""
        self._known.clear()
        self.check_before_next_read()

    def count(self, name: str, count: int | None) -> None:
        """Tell of so many events that are lost; ``None`` where it is not known how many."""
        if count != 0:
            report_trimmed(name, count, self._service, self._counters, self._log)

    def _look_at(self, name: str) -> None:
        try:
            position = self._group.position(name)
        except redis.ResponseError as refusal:
            self._log.once(
                f"refused {name}",
                "Redis does not tell %r how far it has come in the stream of %r: %s. What is "
                "trimmed before it is read goes unnoticed. %s",
                self._service,
                name,
                refusal,
                self._group.remedy(name, refusal),
                extra={"signal": name, "service": self._service},
            )
            return

        self._log.over(
            f"refused {name}",
            "Redis tells %r again how far it has come in the stream of %r.",
            self._service,
            name,
            extra={"signal": name, "service": self._service},
        )

        if position is None:
            return

        self._watch(name, position)

        lost = self._new_loss(name, position)

        if lost != 0:
            self.count(name, lost)
        elif position.trimmed is not None:
            report_trimmed_over(name, self._service, self._log)

    def _new_loss(self, name: str, position: Position) -> int | None:
        """Return how many events are lost that no worker reported; ``None`` if some number is."""
        here = position.delivered

        if not position.is_behind:
            # Nothing unread is missing: whatever Redis 7.0 counts as unread was lost earlier.
            self._known[name] = ("", position.miscounted)
            return 0

        place, known = self._known.get(name, ("", 0))

        if (place == here and position.trimmed in (None, known)) or position.trimmed == 0:
            # Nothing says whether more is lost of what cannot be counted.
            return 0

        # Redis 7.0 counts what is lost at one place at every later place again.
        adds_up = position.trimmed is not None and not self._group.counts_trimmed_as_read(name)
        count = position.trimmed or 0
        told: int | None = None

        try:
            told = self._group.record_trimmed(name, here, count, anywhere=adds_up)
        except OUTAGE as error:
            # Redis may have noted it: reported twice is better than never.
            logger.debug("A loss is reported that others may report too: %s", error)

        self._known[name] = (here, count)

        if position.trimmed is None:
            return None if told is None else 0

        known = known if adds_up or place == here else 0
        return max(0, count - max(known, told or 0))

    def _watch(self, name: str, position: Position) -> None:
        """Report a group past the end of its stream, and an id far in the future."""
        delivered, last = entry_id(position.delivered), entry_id(position.last)
        now = time.time()
        ahead = far_ahead(name, last, now)
        alarm = ahead or past_the_end(name, self._service, delivered, last, now)
        extra = {"signal": name, "service": self._service}

        if alarm is None:
            self.alarms = {other: self.alarms[other] for other in self.alarms if other != name}
            over = "The stream of %r and the place of %r in it are in order again."
            self._log.over(f"alarm {name}", over, name, self._service, extra=extra)
            return

        if name not in self.alarms:
            self._log.error(f"alarm {name}", "%s", alarm, extra=extra)

        self.alarms = {**self.alarms, name: str(alarm)}


def report_trimmed(
    name: str, count: int | None, service: str, counters: Counters, log: BoundedLog
) -> None:
    """Count, log and signal a loss; ``count`` is ``None`` where nobody knows how many."""
    counters.add("trimmed", count or 1)
    log.error(
        f"trimmed {name}",
        "The stream of %r was trimmed past %s events that %r had not handled: they are lost to "
        "it. Raise 'maxlen' of the route, or handle them faster.",
        name,
        "an unknown number of" if count is None else count,
        service,
        extra={"signal": name, "service": service},
    )
    emit(events_trimmed, service, name=name, count=count)


def report_trimmed_over(name: str, service: str, log: BoundedLog) -> None:
    """Log that a loss which was reported does not go on."""
    log.over(
        f"trimmed {name}",
        "The stream of %r is no longer trimmed past events that %r has not handled.",
        name,
        service,
        extra={"signal": name, "service": service},
    )
