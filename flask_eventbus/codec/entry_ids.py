"""Parse, compare and format the ids of stream entries."""

from __future__ import annotations

import re

#: An entry id as a pair of numbers, which sorts like ids in Redis.
EntryId = tuple[int, int]

#: Largest value of each of the two numbers.
MAX_PART = 2**64 - 1

#: The id before the first entry.
EARLIEST: EntryId = (0, 0)

_ID = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)


def entry_id(text: str | bytes) -> EntryId:
    """Parse an id; without a second number it is the first id of its millisecond.

    :raises ValueError: the text is not an entry id.
    """
    found = _ID.fullmatch(text if isinstance(text, str) else text.decode(errors="replace"))

    if found is None:
        raise ValueError(f"{text!r} is not an entry id")

    numbers = int(found[1]), int(found[2] or 0)

    if max(numbers) > MAX_PART:
        raise ValueError(f"{text!r} is not an entry id: its numbers have 64 bits each")

    return numbers


def is_entry_id(text: str) -> bool:
    """Return True if ``text`` is an entry id with both numbers, as Redis writes it."""
    try:
        return id_text(entry_id(text)) == text
    except ValueError:
        return False


def id_text(found: EntryId) -> str:
    """Return an id as Redis writes it."""
    return f"{found[0]}-{found[1]}"


def id_before(found: EntryId) -> EntryId:
    """Return the id directly before ``found``.

    Groups and ``XREAD`` read the entries *after* an id, so start here to read ``found`` first.
    """
    if found[1]:
        return found[0], found[1] - 1

    return (found[0] - 1, MAX_PART) if found[0] else EARLIEST


def before_moment(milliseconds: int) -> EntryId:
    """Return the id before all entries of a moment, in milliseconds since 1970."""
    return id_before((max(0, milliseconds), 0))
