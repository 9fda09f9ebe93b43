"""Parse a place in a stream: an entry's id, a time, or an age."""

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

#: Least digits of milliseconds since 1970; a shorter number such as 20261122 is a date.
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
    #: True for a time; False for the id of an entry.
    is_moment: bool = False
    #: The age in milliseconds, for :meth:`at`; ``None`` if the place is not an age.
    age: int | None = None

    def at(self, now: int) -> Place:
        """Return the place; an age is counted back from ``now``, in milliseconds since 1970.

        ``now`` must be Redis's time, as the ids of entries are.
        """
        return self if self.age is None else _moment(now - self.age)

    @property
    def position(self) -> EntryId:
        """Last delivered id of a group at this place: after an entry, before a time."""
        return before_moment(self.first[0]) if self.is_moment else self.first


def clock(milliseconds: int) -> str:
    """Return milliseconds since 1970 as local time, to the second."""
    moment = _utc(milliseconds)
    return f"{milliseconds} ms" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def iso(milliseconds: int) -> str | None:
    """Return milliseconds since 1970 in ISO 8601, in UTC; ``None`` for 0."""
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
        # A time without an offset is local time.
        return _moment(int(moment.timestamp() * 1000))
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{short(text)} is not a place in a stream. {_EXAMPLES}") from error


def read_age(text: str) -> int:
    """Return an age such as ``7d`` in milliseconds.

    :raises ValueError: the text is not an age.
    """
    found = _AGE.fullmatch(text)

    if found is None:
        raise ValueError(
            f"{short(text)} is not an age. Write a number and a unit: '30s', '15m', '12h' or '7d'."
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
        # Raises if local time cannot represent it.
        return moment.astimezone().astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        # An id may be any number, if a program chose it.
        return None
