"""Ids of stream entries, and the records of events not handled: retries and dead letters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import msgpack

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


#: Number of characters stored of an error's text, and of its traceback.
MAX_ERROR_CHARS = 500
MAX_TRACEBACK_CHARS = 4_000

#: The reasons of dead letters: see :data:`.event_dead_lettered`.
REASONS = ("retries", "rejected", "killed", "gone", "undecodable")


class BadRecordError(Exception):
    """The bytes of a retry cannot be decoded: another program changed them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRecord:
    """A retry of an event for one receiver: a member of the sorted set ``...:retry:SERVICE``."""

    #: The id of the entry in the stream.
    entry: str
    #: The bytes of the event, as they arrived.
    event: bytes
    #: The receiver's name: ``module.qualname``.
    receiver: str
    #: Number of attempts, including the running one.
    attempts: int
    #: Times at which the first and the last attempt failed, in milliseconds since 1970.
    first: int
    last: int
    #: Type and text of the last error.
    error: str
    #: The end of its traceback.
    traceback: str = ""
    #: True while an attempt runs; other workers leave the record alone until its score.
    running: bool = False

    def packed(self) -> bytes:
        """Return the record as one msgpack map."""
        body: bytes = msgpack.packb({name: getattr(self, name) for name in self.__slots__})
        return body

    @classmethod
    def unpacked(cls, body: bytes) -> Self:
        """Decode a record.

        :raises BadRecordError: the bytes are not a record.
        """
        try:
            found = msgpack.unpackb(body)
            record = cls(**{name: found[name] for name in cls.__slots__})
        except Exception as error:
            raise BadRecordError(f"{type(error).__name__}: {error}") from error

        for name, kind in _KINDS.items():
            if type(getattr(record, name)) is not kind:
                raise BadRecordError(f"{name!r} is no {kind.__name__}")

        for name, most in _MAX.items():
            if not 0 <= getattr(record, name) <= most:
                raise BadRecordError(f"{name!r} is not from 0 to {most}")

        return record


_KINDS: dict[str, type] = {
    "entry": str,
    "event": bytes,
    "receiver": str,
    "attempts": int,
    "first": int,
    "last": int,
    "error": str,
    "traceback": str,
    "running": bool,
}

#: Largest values; for times, the last second that :class:`~datetime.datetime` can represent.
_MAX = {"attempts": 1_000_000, "first": 253_402_300_799_000, "last": 253_402_300_799_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter: an entry of the stream ``...:dead:SERVICE``, whose fields people can read."""

    reason: str
    #: The id of the entry in the signal's stream.
    entry: str
    #: The fields of that entry; for an event ``{b"event": ...}``.
    fields: Mapping[bytes, bytes]
    #: The event's id, its source, and its payload as JSON; empty if they could not be decoded.
    event_id: str = ""
    source: str = ""
    payload: str = ""
    #: The receiver that failed; empty if none did.
    receiver: str = ""
    error: str = ""
    traceback: str = ""
    attempts: int = 0
    #: Times at which the first and the last attempt failed, in milliseconds since 1970; 0 if none.
    first: int = 0
    last: int = 0

    def as_fields(self) -> list[str | bytes]:
        """Return field names and values in one list, as ``XADD`` takes them."""
        words = {
            "reason": self.reason,
            "receiver": self.receiver,
            "error": self.error[:MAX_ERROR_CHARS],
            "attempts": str(self.attempts),
            "first_failed": _moment(self.first),
            "last_failed": _moment(self.last),
            "entry": self.entry,
            "id": self.event_id,
            "source": self.source,
            "payload": self.payload,
            "traceback": self.traceback[-MAX_TRACEBACK_CHARS:],
        }
        fields: list[str | bytes] = []

        for name, value in words.items():
            fields += (name, value.encode(errors="replace"))
        for field, content in self.fields.items():
            # Prefix foreign fields, since they may have the same names as the fields above.
            fields += (field if field == b"event" else b"entry." + field, content)

        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Self:
        """Decode the fields of an entry; missing fields are empty."""

        def text(name: str) -> str:
            return fields.get(name.encode(), b"").decode(errors="replace")

        return cls(
            reason=text("reason"),
            receiver=text("receiver"),
            error=text("error"),
            attempts=int(text("attempts")[:9]) if text("attempts").isdecimal() else 0,
            first=_milliseconds(text("first_failed")),
            last=_milliseconds(text("last_failed")),
            entry=text("entry"),
            event_id=text("id"),
            source=text("source"),
            payload=text("payload"),
            traceback=text("traceback"),
            fields={
                field.removeprefix(b"entry."): content
                for field, content in fields.items()
                if field == b"event" or field.startswith(b"entry.")
            },
        )


def words_of(error: BaseException) -> str:
    """Return the type and text of an error, bounded, as it is stored."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as second:
        text = f"{type(error).__name__} (str() of it raised {type(second).__name__})"

    return escape_surrogates(text)[:MAX_ERROR_CHARS]


def escape_surrogates(text: str) -> str:
    """Escape lone surrogates, which file names in another encoding contain."""
    return text.encode(errors="backslashreplace").decode()


def _moment(milliseconds: int) -> str:
    if not milliseconds:
        return ""

    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _milliseconds(moment: str) -> int:
    try:
        return round(datetime.fromisoformat(moment).timestamp() * 1000)
    except ValueError:
        return 0
