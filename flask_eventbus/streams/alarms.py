"""States of streams that somebody else made, and in which a service hears nothing any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..codec.entry_ids import EntryId, id_text

#: Milliseconds by which an id may be ahead of the clock: nobody's clock is wrong by more.
MOST_AHEAD = 24 * 60 * 60 * 1000

#: Milliseconds by which a group may be ahead of the clock: a new one may begin at this moment, by
#: the clock of Redis.
CLOCKS_APART = 60 * 1000

#: Characters of a name that others chose that an alarm shows.
MOST_SHOWN = 64

#: Streams that the patterns of a service stand for at most, and that a command looks at.
MOST_NAMES = 1_000


class Alarm(NamedTuple):
    """What is wrong with a stream or with a service's place in it, and what to do."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".rstrip()


def past_the_end(
    name: str, service: str, delivered: EntryId, last: EntryId, now: float
) -> Alarm | None:
    """Return an alarm for a group that misses the next entries, because it stands in the future.

    A group that began at a moment may be past the last entry too: the next one comes after it.

    :param delivered: the last id that the group was given.
    :param last: the last id that the stream gave to an entry.
    :param now: seconds since 1970.
    """
    if delivered <= last or delivered[0] <= now * 1000 + CLOCKS_APART:
        return None

    return Alarm(
        f"{service!r} stands at {id_text(delivered)} in the stream of {name!r}, past its end "
        f"({id_text(last)}): it gets no event until ids have come that far. Somebody moved it.",
        f"Move it back to where it was: 'eventbus --service {service} seek {name} --to TIME'.",
    )


def far_ahead(name: str, last: EntryId, now: float) -> Alarm | None:
    """Return an alarm for a stream whose last id lies far in the future.

    :param now: seconds since 1970.
    """
    if last[0] <= now * 1000 + MOST_AHEAD:
        return None

    return Alarm(
        f"The last id of the stream of {name!r} is {id_text(last)}, more than a day in the future: "
        "Redis gives larger ones only, and refuses every event once there is none.",
        "Remove the entry and set the id back, see 'A damaged stream' in docs/streams.md.",
    )


def too_many_names(key: str, count: int) -> Alarm | None:
    """Return an alarm for more names of streams than patterns stand for."""
    if count <= MOST_NAMES:
        return None

    return Alarm(
        f"{key!r} has {count:,} names of streams. Patterns stand for {MOST_NAMES:,} of them; the "
        "streams of the others are not heard.",
        f"Delete {key!r}: publishers note the names of their streams again within seconds. See 'A "
        "damaged stream' in docs/streams.md.",
    )


def worker_of(consumer: str) -> tuple[str, int, str] | None:
    """Return the host, pid and node in a consumer's name; ``None`` if no worker is called so."""
    host, pid, node = [*consumer.rsplit("-", 2), "", ""][:3]
    is_own = host and node and pid.isascii() and pid.isdecimal() and len(pid) < 12
    return (host, int(pid), node) if is_own else None


def foreign_consumers(name: str, service: str, consumers: Iterable[str]) -> Alarm | None:
    """Return an alarm for consumers of a group that are called like no worker.

    :param consumers: their names, without that of entries that were handed back.
    """
    found = sorted(consumer for consumer in consumers if worker_of(consumer) is None)

    if not found:
        return None

    return Alarm(
        f"The consumer {found[0][:MOST_SHOWN]!r} is in the group of {service!r} at the stream of "
        f"{name!r}, and no worker is called so. What it reads and acknowledges, no worker gets.",
        f"Find out who it is, with CLIENT LIST and ACL LOG. {_brought_back(name, service)}",
    )


def set_count(name: str, service: str, id: str, count: int) -> Alarm:
    """Return an alarm for an entry that was delivered more often than workers can have done it."""
    return Alarm(
        f"The entry {id} of {name!r} counts as delivered {count} times, which workers of "
        f"{service!r} cannot have done. Somebody set the count (XCLAIM RETRYCOUNT), or 'retries' "
        "was lowered. It is handled as if it had been begun once.",
        "Find out who did it, with CLIENT LIST and ACL LOG.",
    )


def taken_out(name: str, service: str, count: int) -> Alarm:
    """Return an alarm for entries that somebody acknowledged before a worker had handled them."""
    return Alarm(
        f"Somebody else acknowledged {count} entries of {name!r} that a worker of {service!r} had "
        "yet to handle (XACK, XGROUP DELCONSUMER). That worker handles them; others may be lost.",
        f"Find out who did it, with CLIENT LIST and ACL LOG. {_brought_back(name, service)}",
    )


def _brought_back(name: str, service: str) -> str:
    return (
        "To run again what was lost, and all that came after it: 'eventbus --service "
        f"{service} seek {name} --to TIME'."
    )
