"""Where in a stream something is, as a person writes it: an entry's id, a time, or an age."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from reprlib import repr as short
from typing import Any

from ..codec.entry_ids import EARLIEST, MOST, EntryId, before_moment

_ID = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)
_AGE = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

#: Digits that milliseconds since 1970 have in our time; 20261122 is meant to be a date.
_DIGITS = 12

_EXAMPLES = (
    "Write an entry's id such as '1700000000000-0', a time such as '2026-11-22T14:00', or an age "
    "such as '2h'."
)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a stream: an entry, or a moment with all the entries of its millisecond."""

    first: EntryId
    last: EntryId
    #: Whether it is a moment, and not an entry that somebody named.
    is_moment: bool = False
    #: For an age: the milliseconds before now at which the moment is; see :meth:`at`.
    age: int | None = None

    def at(self, now: int) -> Place:
        """The place itself, or the moment that an age means at the time ``now``, in milliseconds.

        Ids of entries are Redis's time, so this is to be, too.
        """
        return self if self.age is None else _moment(now - self.age)

    @property
    def position(self) -> EntryId:
        """Where a group stands for which this is next: behind a named entry, before a moment."""
        return before_moment(self.first[0]) if self.is_moment else self.first


def clock(milliseconds: int) -> str:
    """A time in milliseconds since 1970 as this machine's clock shows it, to the second."""
    moment = _utc(milliseconds)
    return f"{milliseconds} ms" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def iso(milliseconds: int) -> str | None:
    """A time in milliseconds since 1970 as programs read it; ``None`` if there is none."""
    moment = _utc(milliseconds) if milliseconds else None
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def read_place(text: str) -> Place:
    """Read a place; ``earliest`` is before the first entry.

    :raises ValueError: the text names no place.
    """
    if text == "earliest":
        return Place(EARLIEST, EARLIEST)

    if found := _AGE.fullmatch(text):
        return Place(EARLIEST, EARLIEST, is_moment=True, age=_milliseconds(found))

    if (found := _ID.fullmatch(text)) and (found[2] or text == "0" or len(text) >= _DIGITS):
        return _entry(found)

    try:
        moment = datetime.fromisoformat(text)
        # Without an offset it is this machine's time, as clocks here show it.
        return _moment(int(moment.timestamp() * 1000))
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{short(text)} is no place in a stream. {_EXAMPLES}") from error


def read_age(text: str) -> int:
    """Return the milliseconds of an age that is written as ``7d``.

    :raises ValueError: the text is no age.
    """
    found = _AGE.fullmatch(text)

    if found is None:
        raise ValueError(
            f"{short(text)} is no age. Write a number and a unit: '30s', '15m', '12h' or '7d'."
        )

    return _milliseconds(found)


def _entry(found: re.Match[str]) -> Place:
    first = _numbers(found)

    if max(first) > MOST:
        raise ValueError(f"{found[0]!r} is too large for an entry's id. {_EXAMPLES}")

    return Place(first, first) if found[2] else _moment(first[0])


def _moment(milliseconds: int) -> Place:
    milliseconds = max(0, milliseconds)
    return Place((milliseconds, 0), (milliseconds, MOST), is_moment=True)


def _numbers(found: re.Match[Any]) -> EntryId:
    return int(found[1]), int(found[2] or 0)


def _milliseconds(age: re.Match[str]) -> int:
    return int(age[1]) * _SECONDS[age[2]] * 1000


def _utc(milliseconds: int) -> datetime | None:
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
        # Whether this place's time can be told, too.
        return moment.astimezone().astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        # An id may be any number: somebody may have chosen it.
        return None
