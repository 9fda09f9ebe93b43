"""Alarms about damaged streams: states that another program caused, with the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..codec.entry_ids import EntryId, id_text
from ..timing import TIMING

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
