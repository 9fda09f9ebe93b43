"""Positions of groups in streams: entries lost by trimming, and alarms about damaged streams."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..codec.records import EntryId, entry_id, id_text
from ..config import TIMING
from ..logs import BoundedLog, Counters, get_logger
from ..signals import emit, events_trimmed
from ..transport.connection import OUTAGE

if TYPE_CHECKING:
    from .group import Group

logger = get_logger(__name__)

#: Maximum time by which an entry id may be ahead of the clock, in milliseconds.
MAX_AHEAD = 24 * 60 * 60 * 1000

#: Maximum time by which a group may be ahead of the clock, in milliseconds. A new group may start
#: at the present time of Redis, whose clock may differ.
CLOCKS_APART = 60 * 1000

#: Maximum number of characters of a consumer's name that an alarm shows.
MAX_SHOWN = 64


class Alarm(NamedTuple):
    """A problem of a stream, or of a service's position in it, and its remedy."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".rstrip()


def past_the_end(
    name: str, service: str, delivered: EntryId, last: EntryId, now: float
) -> Alarm | None:
    """Return an alarm if a group's position lies in the future, so that it misses new entries.

    A group that started at the present time may also be past the last entry. That is no alarm: the
    id of the next entry is larger.

    :param delivered: the last delivered id of the group.
    :param last: the last generated id of the stream.
    :param now: seconds since 1970.
    """
    if delivered <= last or delivered[0] <= now * 1000 + CLOCKS_APART:
        return None

    return Alarm(
        f"{service!r} is at {id_text(delivered)} in the stream of {name!r}, past its end "
        f"({id_text(last)}). It gets no event until the ids of new entries are larger. Another "
        "program or a person moved it.",
        f"Move it back to its position: 'eventbus --service {service} seek {name} --to TIME'.",
    )


def far_ahead(name: str, last: EntryId, now: float) -> Alarm | None:
    """Return an alarm if the last id of a stream lies far in the future.

    :param now: seconds since 1970.
    """
    if last[0] <= now * 1000 + MAX_AHEAD:
        return None

    return Alarm(
        f"The last id of the stream of {name!r} is {id_text(last)}, more than a day in the future. "
        "Redis generates larger ids only, and refuses every event after the largest one.",
        "Remove the entry and reset the id. See docs/damaged-streams.md.",
    )


def too_many_names(key: str, count: int, most: int = TIMING.max_names) -> Alarm | None:
    """Return an alarm if there are more stream names than patterns may match."""
    if count <= most:
        return None

    return Alarm(
        f"{key!r} has {count:,} names of streams. Patterns match {most:,} of them; the "
        "other streams are not read.",
        f"Delete {key!r}. Publishers add the names of their streams again within seconds. See "
        "docs/damaged-streams.md.",
    )


def worker_of(consumer: str) -> tuple[str, int, str] | None:
    """Return host, pid and node from a consumer's name; ``None`` if it is no worker's name."""
    host, pid, node = [*consumer.rsplit("-", 2), "", ""][:3]
    is_own = host and node and pid.isascii() and pid.isdecimal() and len(pid) < 12
    return (host, int(pid), node) if is_own else None


def foreign_consumers(name: str, service: str, consumers: Iterable[str]) -> Alarm | None:
    """Return an alarm if a group has consumers whose names are not those of workers.

    :param consumers: names of the consumers, without that of released entries.
    """
    found = sorted(consumer for consumer in consumers if worker_of(consumer) is None)

    if not found:
        return None

    return Alarm(
        f"The consumer {found[0][:MAX_SHOWN]!r} is in the group of {service!r} at the stream of "
        f"{name!r}, and no worker has this name. Workers do not get the events that it reads.",
        f"Find the program with CLIENT LIST and ACL LOG. {_run_again(name, service)}",
    )


def impossible_count(name: str, service: str, id: str, count: int) -> Alarm:
    """Return an alarm for an entry whose delivery count is too high to be that of workers."""
    return Alarm(
        f"The entry {id} of {name!r} counts as delivered {count} times, which workers of "
        f"{service!r} cannot have done. Another program set the count (XCLAIM RETRYCOUNT), or "
        "'retries' was lowered. The entry is handled as if one worker had started it.",
        "Find the program with CLIENT LIST and ACL LOG.",
    )


def foreign_acknowledgements(name: str, service: str, count: int) -> Alarm:
    """Return an alarm for entries that another program acknowledged before their worker did."""
    return Alarm(
        f"Another program acknowledged {count} entries of {name!r} that a worker of {service!r} "
        "had not handled yet (XACK, XGROUP DELCONSUMER). This worker handles them; other entries "
        "may be lost.",
        f"Find the program with CLIENT LIST and ACL LOG. {_run_again(name, service)}",
    )


def _run_again(name: str, service: str) -> str:
    return (
        "To handle the lost events and all later ones again: 'eventbus --service "
        f"{service} seek {name} --to TIME'."
    )


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a group in its stream."""

    #: Id of the last delivered entry.
    delivered: str
    #: The last generated id of the stream.
    last: str
    #: Number of entries that were trimmed before delivery; ``None`` if Redis has no count.
    trimmed: int | None
    #: True if the first entry of the stream comes after the last delivered one.
    is_behind: bool
    #: Number of entries that the group has passed and that Redis does not count as read. Redis 7.0
    #: omits entries that were trimmed unread. 0 while the group is behind.
    miscounted: int


def position_of(stream: Mapping[str, Any], group: Mapping[str, Any]) -> Position:
    """Return the position of a group from what ``XINFO`` says of the stream and the group."""
    first = stream.get("first-entry")
    # fakeredis omits the last id of an empty stream.
    last = stream.get("last-generated-id", b"0-0").decode()
    delivered = group["last-delivered-id"].decode()
    is_behind = behind(delivered, first[0].decode() if first else last)
    added: int | None = stream.get("entries-added")
    read: int | None = group.get("entries-read")
    trimmed: int | None = 0
    miscounted = 0

    # Redis 6.2 has neither count.
    if added is not None:
        gone = added - int(stream["length"])

        if not is_behind:
            passed = added if delivered == last else gone
            miscounted = 0 if read is None else max(0, passed - read)
        elif read is not None:
            trimmed = max(0, gone - read)
        elif gone and delivered != "0-0":
            # A group at the start of the stream has lost nothing yet.
            trimmed = None

    return Position(delivered, last, trimmed, is_behind, miscounted)


def last_id(info: Any) -> str | None:
    """Return the last generated id from an ``XINFO STREAM`` answer; ``None`` if refused."""
    if isinstance(info, Exception):
        return "0-0" if "no such key" in str(info) else None

    return str(as_dict(info)["last-generated-id"].decode())


def passed(info: Any, position: str) -> int | None:
    """Return the number of entries ever added before the next one a reader at ``position`` gets.

    Return ``None`` if the position is inside the stream, or the server does not count.
    """
    stream = as_dict(info)
    added: int | None = stream.get("entries-added")
    first = stream["first-entry"]

    if added is None or position == stream["last-generated-id"].decode():
        return added

    if first is None or behind(position, first[0].decode()):
        return added - int(stream["length"])

    return None


def behind(id: str, other: str) -> bool:
    """Return True if the entry ``id`` comes before the entry ``other``."""
    return entry_id(id) < entry_id(other)


def as_dict(flat: Any) -> dict[str, Any]:
    """Return the names and values of an ``XINFO`` answer."""
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


class Trims:
    """Detects entries that were trimmed before the group read them.

    Redis 7 counts the entries of a stream and those that a group has read. A pending entry that was
    trimmed is noticed by the worker that claims it.

    :param group: the consumer group on the connection of the calling thread.
    """

    def __init__(self, group: Group, *, service: str, counters: Counters) -> None:
        self._group = group
        self._service = service
        self._counters = counters
        self._log = BoundedLog(logger)
        #: Monotonic time of the last check of all streams, and of the last check of any. Each
        #: stream is checked when its group is joined as well.
        self.checked_at = self.checked_part_at = time.monotonic()
        #: By stream, the position of the group at the last loss, and how many of the entries that
        #: Redis counts as lost were reported or were no loss.
        self._known: dict[str, tuple[str, int]] = {}
        #: Alarms about positions that let this service miss events, by signal.
        self.alarms: dict[str, str] = {}

    def check(self, names: Iterable[str]) -> None:
        """Check the positions in streams.

        :raises redis.ConnectionError: Redis is away.
        """
        self.checked_at = time.monotonic()
        names = list(names)
        self.alarms = {name: self.alarms[name] for name in names if name in self.alarms}
        self.check_part(names)

    def check_part(self, names: Iterable[str]) -> None:
        """Check the positions in some of the streams.

        :raises redis.ConnectionError: Redis is away.
        """
        self.checked_part_at = time.monotonic()

        for name, position in self._group.positions(list(names)).items():
            self._check_stream(name, position)

    def reset(self) -> None:
        """Forget reported losses after streams were deleted, since Redis counts from zero again."""
        self._known.clear()

    def report(self, name: str, count: int | None) -> None:
        """Report ``count`` lost events; ``None`` if the number is unknown."""
        if count != 0:
            report_trimmed(name, count, self._service, self._counters, self._log)

    def _check_stream(self, name: str, position: Position | Exception | None) -> None:
        extra = {"signal": name, "service": self._service}

        if isinstance(position, Exception):
            self._log.once(
                f"refused {name}",
                "Redis does not show %r its position in the stream of %r: %s. Entries that are "
                "trimmed before they are read are not noticed. %s",
                self._service,
                name,
                position,
                self._group.remedy(name, position),
                extra=extra,
            )
            return

        text = "Redis shows %r its position in the stream of %r again."
        self._log.over(f"refused {name}", text, self._service, name, extra=extra)

        if position is None:
            return

        self._check_position(name, position)

        lost = self._new_loss(name, position)

        if lost != 0:
            self.report(name, lost)
        elif position.trimmed is not None:
            report_trimmed_over(name, self._service, self._log)

    def _new_loss(self, name: str, position: Position) -> int | None:
        """Return the lost events that no worker reported; ``None`` if the number is unknown."""
        delivered = position.delivered

        if not position.is_behind:
            # No unread entry is missing. Entries that Redis 7.0 still counts were lost earlier.
            self._known[name] = ("", position.miscounted)
            return 0

        place, known = self._known.get(name, ("", 0))

        if (place == delivered and position.trimmed in (None, known)) or position.trimmed == 0:
            # The loss at this position was reported already.
            return 0

        # Redis 7.0 counts a loss at one position again at every later position.
        adds_up = position.trimmed is not None and not self._group.counts_trimmed_as_read(name)
        count = position.trimmed or 0
        noted: int | None = None

        try:
            noted = self._group.record_trimmed(name, delivered, count, anywhere=adds_up)
        except OUTAGE as error:
            # Another worker may report the loss too. Twice is better than never.
            logger.debug("Could not record a reported loss in Redis: %s", error)

        self._known[name] = (delivered, count)

        if position.trimmed is None:
            return None if noted is None else 0

        known = known if adds_up or place == delivered else 0
        return max(0, count - max(known, noted or 0))

    def _check_position(self, name: str, position: Position) -> None:
        """Report a group past the end of its stream, and an id far in the future."""
        delivered, last = entry_id(position.delivered), entry_id(position.last)
        now, service = time.time(), self._service
        alarm = far_ahead(name, last, now) or past_the_end(name, service, delivered, last, now)
        alarms = {other: text for other, text in self.alarms.items() if other != name}
        extra = {"signal": name, "service": service}

        if alarm is None:
            over = "The stream of %r and the position of %r in it are in order again."
            self._log.over(f"alarm {name}", over, name, service, extra=extra)
        else:
            alarms[name] = str(alarm)

            if name not in self.alarms:
                self._log.error(f"alarm {name}", "%s", alarm, extra=extra)

        self.alarms = alarms


def report_trimmed(
    name: str, count: int | None, service: str, counters: Counters, log: BoundedLog
) -> None:
    """Count, log and signal a loss. ``count`` is ``None`` if the number is unknown."""
    counters.add("trimmed", count or 1)
    log.error(
        f"trimmed {name}",
        "The stream of %r was trimmed past %s events that %r had not handled. They are lost to it. "
        "Raise 'maxlen' of the route, or make the receivers faster.",
        name,
        "an unknown number of" if count is None else count,
        service,
        extra={"signal": name, "service": service},
    )
    emit(events_trimmed, service, name=name, count=count)


def report_trimmed_over(name: str, service: str, log: BoundedLog) -> None:
    """Log that no more entries are lost after a reported loss."""
    text = "The stream of %r is no longer trimmed past events that %r has not handled."
    extra = {"signal": name, "service": service}
    log.over(f"trimmed {name}", text, name, service, extra=extra)
