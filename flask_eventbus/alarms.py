"""States of streams that somebody else made, and in which a service hears nothing any more."""

from __future__ import annotations

from typing import NamedTuple

from .entry_ids import EntryId, id_text

#: Milliseconds by which an id may be ahead of the clock: nobody's clock is wrong by more.
MOST_AHEAD = 24 * 60 * 60 * 1000

#: Milliseconds by which a group may be ahead of the clock: a new one may begin at this moment, by
#: the clock of Redis.
CLOCKS_APART = 60 * 1000

#: Streams that the patterns of a service stand for at most, and that a command looks at.
MOST_NAMES = 1_000


class Alarm(NamedTuple):
    """What is wrong with a stream or with a service's place in it, and what to do."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}"


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
