"""The ids of stream entries, as Redis writes and orders them."""

from __future__ import annotations

import re

#: An entry's id as its two numbers, which sort as Redis does.
EntryId = tuple[int, int]

#: Each of an id's numbers has 64 bits.
MOST = 2**64 - 1

#: Before the first entry.
EARLIEST: EntryId = (0, 0)

_ID = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)


def entry_id(text: str | bytes) -> EntryId:
    """Read an id; without its second number it is the first id of its millisecond.

    :raises ValueError: the text is no id.
    """
    found = _ID.fullmatch(text if isinstance(text, str) else text.decode(errors="replace"))

    if found is None:
        raise ValueError(f"{text!r} is no id of an entry")

    numbers = int(found[1]), int(found[2] or 0)

    if max(numbers) > MOST:
        raise ValueError(f"{text!r} is no id of an entry: its numbers have 64 bits each")

    return numbers


def is_entry_id(text: str) -> bool:
    """Return True if a text is an entry's id with both numbers, as Redis writes it."""
    try:
        return id_text(entry_id(text)) == text
    except ValueError:
        return False


def id_text(found: EntryId) -> str:
    """Return an id as Redis writes it."""
    return f"{found[0]}-{found[1]}"


def id_before(found: EntryId) -> EntryId:
    """Return the id directly before another.

    Groups and ``XREAD`` read what comes *after* an id, so this is where to begin with ``found``.
    """
    if found[1]:
        return found[0], found[1] - 1

    return (found[0] - 1, MOST) if found[0] else EARLIEST


def before_moment(milliseconds: int) -> EntryId:
    """Return the place before all entries of a millisecond (since 1970) and of later ones."""
    return id_before((max(0, milliseconds), 0))
