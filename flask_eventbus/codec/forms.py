"""The form that each type takes on the wire, and back: one small function each way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import fields
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from types import NoneType
from typing import Any
from uuid import UUID

from msgpack import ExtType

#: How long an integer may be, in bytes. Python writes none past 1,785 bytes as text, so a
#: longer one would raise wherever it is logged.
MAX_INTEGER_BYTES = 1024

#: The types beyond msgpack's own and the ext code of each.
EXTENSIONS: dict[type, int] = {
    datetime: 1,
    date: 2,
    time: 3,
    timedelta: 4,
    Decimal: 5,
    UUID: 6,
    set: 7,
    frozenset: 8,
    int: 9,
}

_MSGPACK_INTEGERS = range(-(2**63), 2**64)
_DURATION = struct.Struct(">iII")


class UnfitError(Exception):
    """A value that cannot travel, or came as it should not; the text says why."""


def ext(code: int, data: bytes) -> ExtType:
    """An ext value."""
    # ExtType(...) checks its arguments in Python, for half a microsecond.
    return tuple.__new__(ExtType, (code, data))


def _pack_integer(value: int) -> int | ExtType:
    plain = int.__int__(value)

    if plain in _MSGPACK_INTEGERS:
        return plain

    size = (plain if plain >= 0 else ~plain).bit_length() // 8 + 1
    if size > MAX_INTEGER_BYTES:
        raise UnfitError(
            f"An integer of {size} bytes is too long, {MAX_INTEGER_BYTES} can travel. "
            "Send it as bytes."
        )

    return ext(EXTENSIONS[int], plain.to_bytes(size, "big", signed=True))


def _unpack_integer(data: bytes) -> int:
    if not 0 < len(data) <= MAX_INTEGER_BYTES:
        raise ValueError(f"{len(data)} bytes, not 1 to {MAX_INTEGER_BYTES}")

    return int.from_bytes(data, "big", signed=True)


def _pack_duration(value: timedelta) -> ExtType:
    if getattr(value, "nanoseconds", 0):
        raise UnfitError(
            f"{value!r} has nanoseconds, and a timedelta has microseconds. Round it, for example "
            "with .round('us'), or send it as a number."
        )

    packed = _DURATION.pack(value.days, value.seconds, value.microseconds)
    return ext(EXTENSIONS[timedelta], packed)


def _unpack_duration(data: bytes) -> timedelta:
    days, seconds, microseconds = _DURATION.unpack(data)
    return timedelta(days, seconds, microseconds)


def _pack_text(code: int, to_text: Callable[[Any], str], value: Any) -> ExtType:
    return ext(code, to_text(value).encode())


def _unpack_text(from_text: Callable[[str], Any], data: bytes) -> Any:
    return from_text(data.decode())


def _pack_uuid(value: UUID) -> ExtType:
    return ext(EXTENSIONS[UUID], value.bytes)


def _unpack_uuid(data: bytes) -> UUID:
    return UUID(bytes=bytes(data))


def dataclass_fields(value: Any) -> dict[str, Any]:
    """A dataclass as a map of its fields.

    :raises UnfitError: it hides a field from its ``repr()``, as one does with a password.
    """
    shows = value.__dataclass_params__.repr
    hidden = [field.name for field in fields(value) if not (shows and field.repr)]

    if hidden:
        raise UnfitError(
            f"{name_of_type(type(value))} hides {', '.join(map(repr, hidden))} from its repr(), so "
            "it does not travel as a whole. Give the route a payload= function that picks what "
            "may leave, or teach the bus the type with bus.register_type()."
        )

    return {field.name: getattr(value, field.name) for field in fields(value)}


def name_of_type(kind: type) -> str:
    """The name of a type as a reader would import it: ``numpy.int64``."""
    is_plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def _pack_moment(value: datetime) -> ExtType:
    # Not a time and nanoseconds are pandas's: NaT is a datetime, of the year 1.
    if value != value:
        raise UnfitError(f"{value!r} is no moment. Send None.")
    if getattr(value, "nanosecond", 0):
        raise UnfitError(
            f"{value!r} has nanoseconds, and a datetime has microseconds. Round it, for example "
            "with .round('us'), or send it as text."
        )

    return _pack_zoned(EXTENSIONS[datetime], datetime.isoformat, value)


def _pack_zoned(code: int, to_text: Callable[[Any], str], value: Any) -> ExtType:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise UnfitError(
            f"{value!r} has a zone whose offset from UTC is not known, and would lose it. Send an "
            "aware datetime, or the time without a zone and the zone's name."
        )

    return _pack_text(code, to_text, value)


def _pack_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    if hasattr(value, "getlist"):
        raise UnfitError(
            f"{name_of_type(type(value))} has several values for a key, and a map has one. Send "
            ".to_dict(flat=False) of it, or .to_dict() for the first of each."
        )

    return dict(value)


def _same(value: Any) -> Any:
    return value


#: What msgpack is given in place of a value of each type.
STAND_INS: dict[type, Callable[[Any], Any]] = {
    NoneType: _same,
    bool: _same,
    int: _pack_integer,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes,
    bytearray: bytes,
    memoryview: _same,
    list: list,
    tuple: list,
    dict: _pack_dict,
    datetime: _pack_moment,
    date: partial(_pack_text, EXTENSIONS[date], date.isoformat),
    time: partial(_pack_zoned, EXTENSIONS[time], time.isoformat),
    timedelta: _pack_duration,
    Decimal: partial(_pack_text, EXTENSIONS[Decimal], Decimal.__str__),
    UUID: _pack_uuid,
}

#: What makes the value of each ext code.
UNPACKERS: dict[int, Callable[[bytes], Any]] = {
    EXTENSIONS[datetime]: partial(_unpack_text, datetime.fromisoformat),
    EXTENSIONS[date]: partial(_unpack_text, date.fromisoformat),
    EXTENSIONS[time]: partial(_unpack_text, time.fromisoformat),
    EXTENSIONS[timedelta]: _unpack_duration,
    EXTENSIONS[Decimal]: partial(_unpack_text, Decimal),
    EXTENSIONS[UUID]: _unpack_uuid,
    EXTENSIONS[int]: _unpack_integer,
}
