"""Notices what happened to a stream before its service had handled all of it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import redis

from ..codec.entry_ids import entry_id
from ..counters import BoundedLog, Counters
from ..lifecycle import tell
from ..logs import get_logger
from ..signals import events_trimmed
from ..transport.connections import OUTAGE
from .alarms import far_ahead, past_the_end
from .group import Group, Position

logger = get_logger(__name__)

#: Seconds between looks while there is more to read than is read at once.
OFTEN = 1.0

#: Seconds between looks otherwise.
SELDOM = 30.0


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
        self.busy = False
        self._looked = float("-inf")
        #: By stream, where the group stood at the last loss, and how many of the events that Redis
        #: counts as lost are no new loss.
        self._known: dict[str, tuple[str, int]] = {}
        #: What somebody did to streams, so that this service gets nothing of them, by name.
        self.alarms: dict[str, str] = {}

    def look(self, names: Iterable[str]) -> None:
        """Look at streams, if it is time.

        :raises redis.ConnectionError: Redis is away.
        """
        now = time.monotonic()

        if now - self._looked < (OFTEN if self.busy else SELDOM):
            return

        self._looked = now
        names = list(names)
        self.alarms = {name: self.alarms[name] for name in names if name in self.alarms}

        for name in names:
            self._look_at(name)

    def look_next(self) -> None:
        """Look before the next read: a group that reads on no longer shows what it lost."""
        self._looked = float("-inf")

    def reset(self) -> None:
        """Start again after streams were deleted: their counts start at zero."""
        self._known.clear()
        self.look_next()

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
        adds_up = position.trimmed is not None and not self._group.counts_what_is_skipped(name)
        count = position.trimmed or 0
        told: int | None = None

        try:
            told = self._group.note_loss(name, here, count, anywhere=adds_up)
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
    tell(events_trimmed, service, name=name, count=count)


def report_trimmed_over(name: str, service: str, log: BoundedLog) -> None:
    """Log that a loss which was reported does not go on."""
    log.over(
        f"trimmed {name}",
        "The stream of %r is no longer trimmed past events that %r has not handled.",
        name,
        service,
        extra={"signal": name, "service": service},
    )
