"""What is kept of a stream event that was not handled: to be tried again, or for a person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import msgpack

#: Characters that are kept of an error's text, and of its traceback.
MOST_ERROR = 500
MOST_TRACEBACK = 4_000

#: Why something is a dead letter, for a person to read: see :data:`.event_dead_lettered`.
REASONS = ("retries", "rejected", "killed", "gone", "undecodable")


class BadRecordError(Exception):
    """A record that was changed by somebody else, and does not read any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRecord:
    """A receiver that failed at an event: a member of the sorted set ``...:retry:SERVICE``."""

    #: The id of the entry in the stream.
    entry: str
    #: The event's bytes, as they came.
    event: bytes
    #: The receiver's name: ``module.qualname``.
    receiver: str
    #: How many attempts were made, the one that is being made included.
    attempts: int
    #: When the first and the last of them failed, in milliseconds since 1970.
    first: int
    last: int
    #: What the last one raised, in words.
    error: str
    #: The end of its traceback.
    traceback: str = ""
    #: Whether an attempt is being made: until the time of its score it is left alone.
    running: bool = False

    def packed(self) -> bytes:
        """Its bytes: one msgpack map."""
        body: bytes = msgpack.packb({name: getattr(self, name) for name in self.__slots__})
        return body

    @classmethod
    def unpacked(cls, body: bytes) -> Self:
        """The record that some bytes are.

        :raises BadRecordError: they are none.
        """
        try:
            found = msgpack.unpackb(body)
            record = cls(**{name: found[name] for name in cls.__slots__})
        except Exception as error:
            raise BadRecordError(f"{type(error).__name__}: {error}") from error

        for name, kind in _KINDS.items():
            if type(getattr(record, name)) is not kind:
                raise BadRecordError(f"{name!r} is no {kind.__name__}")

        for name, most in _MOST.items():
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

#: What numbers are at most: attempts to come, and the last second of the calendar.
_MOST = {"attempts": 1_000_000, "first": 253_402_300_799_000, "last": 253_402_300_799_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What a service gave up: an entry of the stream ``...:dead:SERVICE``, readable as it is."""

    reason: str
    #: The id of the entry in the signal's stream.
    entry: str
    #: Its fields, as they came: for an event ``{b"event": ...}``.
    fields: Mapping[bytes, bytes]
    #: The event's id, its source and its payload as JSON; empty if they could not be read.
    event_id: str = ""
    source: str = ""
    payload: str = ""
    #: The receiver that failed; empty if none did.
    receiver: str = ""
    error: str = ""
    traceback: str = ""
    attempts: int = 0
    #: When the first and the last attempt failed, in milliseconds since 1970.
    first: int = 0
    last: int = 0

    def as_fields(self) -> list[str | bytes]:
        """Field names and values, one after the other, as ``XADD`` takes them."""
        words = {
            "reason": self.reason,
            "receiver": self.receiver,
            "error": self.error[:MOST_ERROR],
            "attempts": str(self.attempts),
            "first_failed": _moment(self.first),
            "last_failed": _moment(self.last),
            "entry": self.entry,
            "id": self.event_id,
            "source": self.source,
            "payload": self.payload,
            "traceback": self.traceback[-MOST_TRACEBACK:],
        }
        fields: list[str | bytes] = []

        for name, value in words.items():
            fields += (name, value.encode(errors="replace"))
        for field, content in self.fields.items():
            # Another's fields keep their names, behind a mark: they may be called as ours are.
            fields += (field if field == b"event" else b"entry." + field, content)

        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Self:
        """The dead letter that the fields of an entry are; what is missing is empty."""

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
            fields=_original(fields),
        )


def words_of(error: BaseException) -> str:
    """An error as it is kept: its type and its text, bounded."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as second:
        text = f"{type(error).__name__} (its text cannot be had: {type(second).__name__})"

    return travelling(text)[:MOST_ERROR]


def travelling(text: str) -> str:
    """A text without what is no Unicode: the rest of a file's name in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def _original(fields: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    found: dict[Any, bytes] = {}

    for field, content in fields.items():
        if field == b"event":
            found[field] = content
        elif field.startswith(b"entry."):
            found[field.removeprefix(b"entry.")] = content

    return found


def _moment(milliseconds: int) -> str:
    if not milliseconds:
        return ""

    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _milliseconds(moment: str) -> int:
    try:
        return round(datetime.fromisoformat(moment).timestamp() * 1000)
    except ValueError:
        return 0
