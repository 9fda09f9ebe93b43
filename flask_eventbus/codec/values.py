"""Encode the values of a payload as msgpack, and decode them to the same values.

Besides msgpack's own types (strings, bytes, numbers, ``None``, lists, maps), it supports those of
:data:`EXTENSIONS` and those that a program registers. ``docs/wire-format.md`` describes the
bytes. Decoding never executes code from the bytes.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, TypeVar, cast
from uuid import UUID

from msgpack import ExtType, Packer, StackError, Unpacker, unpackb

from ..errors import ConfigError

#: Largest size of an integer, in bytes. Python refuses to format integers of more than 1,785 bytes,
#: so a longer one would raise in every log line.
MAX_INTEGER_BYTES = 1024

#: The ext codes of types that msgpack lacks.
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
    """A value cannot be encoded, or decoded bytes break a rule; the text gives the reason."""


def ext(code: int, data: bytes) -> ExtType:
    """Return a msgpack ext value."""
    # ExtType(...) checks its arguments in Python, which takes half a microsecond.
    return tuple.__new__(ExtType, (code, data))


def _pack_integer(value: int) -> int | ExtType:
    plain = int.__int__(value)

    if plain in _MSGPACK_INTEGERS:
        return plain

    size = (plain if plain >= 0 else ~plain).bit_length() // 8 + 1
    if size > MAX_INTEGER_BYTES:
        raise UnfitError(
            f"An integer of {size} bytes is too long, the limit is {MAX_INTEGER_BYTES}. "
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


def _pack_text(code: int, to_text: Callable[[Any], str], value: Any) -> ExtType:
    return ext(code, to_text(value).encode())


def dataclass_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as a dict.

    :raises UnfitError: a field is hidden from ``repr()``, as passwords are.
    """
    shows = value.__dataclass_params__.repr
    hidden = [field.name for field in fields(value) if not (shows and field.repr)]

    if hidden:
        raise UnfitError(
            f"{name_of_type(type(value))} hides {', '.join(map(repr, hidden))} from its repr(), so "
            "it is not sent as a whole. Give the route a payload= function that selects the "
            "fields to send, or register the type with bus.register_type()."
        )

    return {field.name: getattr(value, field.name) for field in fields(value)}


def name_of_type(kind: type) -> str:
    """Return the import path of a type, for example ``numpy.int64``."""
    is_plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def _pack_moment(value: datetime) -> ExtType:
    # pandas has NaT, a datetime that is not equal to itself, and timestamps with nanoseconds.
    if value != value:
        raise UnfitError(f"{value!r} is not a time. Send None.")
    if getattr(value, "nanosecond", 0):
        raise UnfitError(
            f"{value!r} has nanoseconds, and a datetime has microseconds. Round it, for example "
            "with .round('us'), or send it as text."
        )

    return _pack_zoned(EXTENSIONS[datetime], datetime.isoformat, value)


def _pack_zoned(code: int, to_text: Callable[[Any], str], value: Any) -> ExtType:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise UnfitError(
            f"{value!r} has a time zone whose offset from UTC is unknown, so the zone would be "
            "lost. Send an aware datetime, or the time without a zone and the name of the zone."
        )

    return _pack_text(code, to_text, value)


def _pack_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    if hasattr(value, "getlist"):
        raise UnfitError(
            f"{name_of_type(type(value))} can have several values for a key, and a map has one. "
            "Send .to_dict(flat=False), or .to_dict() for the first value of each key."
        )

    return dict(value)


def _same(value: Any) -> Any:
    return value


#: Functions that convert a value of each type to one that msgpack can encode.
CONVERTERS: dict[type, Callable[[Any], Any]] = {
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
    UUID: lambda value: ext(EXTENSIONS[UUID], value.bytes),
}

#: Functions that decode the value of each ext code.
UNPACKERS: dict[int, Callable[[bytes], Any]] = {
    EXTENSIONS[datetime]: lambda data: datetime.fromisoformat(data.decode()),
    EXTENSIONS[date]: lambda data: date.fromisoformat(data.decode()),
    EXTENSIONS[time]: lambda data: time.fromisoformat(data.decode()),
    EXTENSIONS[timedelta]: lambda data: timedelta(*_DURATION.unpack(data)),
    EXTENSIONS[Decimal]: lambda data: Decimal(data.decode()),
    EXTENSIONS[UUID]: lambda data: UUID(bytes=bytes(data)),
    EXTENSIONS[int]: _unpack_integer,
}


T = TypeVar("T")

#: Largest nesting of lists, maps and sets; the payload itself is the first level.
MAX_DEPTH = 32
#: Largest number of items in a list, map or set.
MAX_ITEMS = 100_000
#: Largest number of lists, maps, sets and values of registered types in a payload.
MAX_CONTAINERS = 100_000
#: Largest nesting of sets within sets.
MAX_SET_NESTING = 2
#: Largest number of members of a set with the same hash. Python compares those with each other, so
#: a malicious set of thousands of them would take minutes to build.
MAX_COLLISIONS = 8

#: The ext codes for :meth:`Values.register`.
REGISTERED_CODES = range(32, 128)

_KEPT_BUFFER = 256 * 1024
_SETS: dict[int, type] = {EXTENSIONS[set]: set, EXTENSIONS[frozenset]: frozenset}
#: The types whose values are checked one by one.
CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_SCALARS = frozenset(
    {NoneType, bool, int, float, str, bytes, datetime, date, time, timedelta, Decimal, UUID}
)
#: The types that need no conversion.
PLAIN = CONTAINERS | _SCALARS | {bytearray, memoryview}


class Values:
    """Encodes and decodes values, and holds the registered types."""

    def __init__(self) -> None:
        self._registered: dict[type, Callable[[Any], ExtType]] = {}
        self._converters = CONVERTERS | {
            set: partial(self._pack_set, set),
            frozenset: partial(self._pack_set, frozenset),
        }
        self._unpackers = dict(UNPACKERS)
        self._idle_packers: list[Packer] = []
        # The hooks that decode ext types, by the number of enclosing sets.
        self._hooks = [partial(self._unpack_ext, n) for n in range(MAX_SET_NESTING + 1)]

    def register(
        self, code: int, type_: type[T], pack: Callable[[T], bytes], unpack: Callable[[bytes], T]
    ) -> None:
        """Encode values of a type as ext type ``code`` (32 to 127).

        :raises ConfigError: the code is out of range or taken, or the type is supported already.
        """
        if code not in REGISTERED_CODES:
            raise ConfigError(f"register_type({code!r}, ...): choose a code from 32 to 127.")
        if code in self._unpackers:
            raise ConfigError(f"register_type({code}, ...): the code is taken. Choose another.")
        if type_ in self._registered or type_ in self._converters:
            raise ConfigError(
                f"register_type({code}, {type_.__name__}, ...): {type_.__name__} is supported "
                "already. Register each type once, and no built-in types."
            )

        self._registered[type_] = partial(_pack_registered, code, pack)
        self._unpackers[code] = partial(_unpack_registered, type_, unpack)

    def pack(self, value: Any) -> bytes:
        """Encode a value.

        :raises Exception: the error of msgpack or of a registered ``pack=``.
        """
        # A packer serves one caller at a time. Popping it from the list is safe with threads, and
        # if the garbage collector runs a __del__ that sends an event here.
        try:
            packer = self._idle_packers.pop()
        except IndexError:
            packer = Packer(default=self._to_plain, strict_types=True)

        data: bytes = packer.pack(value)

        if len(data) <= _KEPT_BUFFER:
            self._idle_packers.append(packer)

        return data

    def unpack(self, data: bytes) -> Any:
        """Decode a value; call :func:`check` with it afterwards.

        :raises UnfitError: the bytes are msgpack, but break a rule of the wire format.
        :raises Exception: the error of msgpack, if the bytes are not msgpack.
        """
        most = min(len(data), MAX_ITEMS)

        try:
            return unpackb(
                data,
                ext_hook=self._hooks[0],
                timestamp=3,
                max_array_len=most,
                max_map_len=most,
            )
        except (ValueError, OverflowError) as error:
            if _is_refused_value(error):
                raise UnfitError(str(error) or "It is nested too deeply.") from error
            raise

    def unpacker(self, data: bytes) -> Unpacker:
        """Return an unpacker that decodes one value of ``data`` after the other.

        Its errors have another text than those of :meth:`unpack`.
        """
        unpacker = Unpacker(ext_hook=self._hooks[0], timestamp=3, max_buffer_size=len(data))
        unpacker.feed(data)
        return unpacker

    def to_plain(self, value: Any) -> Any:
        """Return a value that msgpack can encode; a plain value is returned unchanged."""
        return value if type(value) in PLAIN else self._to_plain(value)

    def _to_plain(self, value: Any) -> Any:
        kind = type(value)
        convert = self._registered.get(kind) or self._converters.get(kind) or self._find(kind)

        if convert is None:
            raise UnfitError(_cannot_encode(kind))

        return convert(value)

    def _find(self, kind: type) -> Callable[[Any], Any] | None:
        """Return the converter of a class without one: that of its nearest base class."""
        for base in kind.__mro__:
            if base in self._registered:
                return self._registered[base]

        if issubclass(kind, Enum):
            return self._enum_value
        if is_dataclass(kind):
            return dataclass_fields

        return next((self._converters[b] for b in kind.__mro__ if b in self._converters), None)

    def _enum_value(self, member: Enum) -> Any:
        return self._to_plain(member.value)

    def _pack_set(self, kind: type, members: set[Any] | frozenset[Any]) -> ExtType:
        # Decode it at once: an encoded member may become a value that a set cannot hold.
        data = self.pack(list(members))
        decoded = self._unpack_set(kind, 0, data)

        if len(decoded) != len(members):
            raise UnfitError(
                f"{len(members)} members of a set become {len(decoded)}: two of them are equal if "
                "encoded, like a member of an Enum and its value. Send a list."
            )

        return ext(EXTENSIONS[kind], data)

    def _unpack_ext(self, nesting: int, code: int, data: bytes) -> Any:
        if code in _SETS:
            return self._unpack_set(_SETS[code], nesting, data)
        if code not in self._unpackers:
            return ExtType(code, data)

        try:
            return self._unpackers[code](data)
        except Exception as error:
            raise UnfitError(f"Ext type {code} cannot be decoded: {error}") from error

    def _unpack_set(self, kind: type, nesting: int, data: bytes) -> Any:
        if nesting == MAX_SET_NESTING:
            raise UnfitError(f"More than {MAX_SET_NESTING} sets are nested. Send lists.")

        most = min(len(data), MAX_ITEMS)

        try:
            members = unpackb(
                data,
                ext_hook=self._hooks[nesting + 1],
                timestamp=3,
                use_list=False,
                max_array_len=most,
                max_map_len=most,
            )
        except (ValueError, OverflowError) as error:
            raise UnfitError(f"A set cannot be decoded: {error}") from error

        if type(members) is not tuple:
            raise UnfitError("A set is not encoded as an array.")

        try:
            # Short sets have too few members for many to share a hash.
            is_long = len(members) > MAX_COLLISIONS

            if is_long and max(Counter(map(hash, members)).values()) > MAX_COLLISIONS:
                raise UnfitError(
                    f"More than {MAX_COLLISIONS} members of a set share one hash. Send a list."
                )

            return kind(members)
        except TypeError as error:
            raise UnfitError(
                f"A set has a member that is not hashable: {error}. Send a list."
            ) from error


def is_flat(payload: Mapping[str, Any]) -> bool:
    """Return True if all values of a payload are scalars; most payloads are flat."""
    for key, value in payload.items():
        if type(value) not in _SCALARS or type(key) is not str:
            return False

    return len(payload) <= MAX_ITEMS


def survey(payload: Mapping[str, Any]) -> set[type]:
    """Return the non-scalar types in a decoded payload, as :func:`types_in` does.

    :raises UnfitError: it breaks a rule of :func:`types_in`, or it holds an ext type that no type
        is registered for.
    """
    types = types_in(payload)

    if ExtType in types:
        raise UnfitError(
            f"It holds ext type {min(_unknown_codes(payload))}, unknown here. "
            "Register the type with bus.register_type() in this service too."
        )

    return types


def types_in(payload: Mapping[str, Any]) -> set[type]:
    """Return the non-scalar types in a payload; the set is empty for a flat payload.

    :raises UnfitError: it is nested too deeply, a map has a key that is not a string, or it has
        too many items.
    """
    if is_flat(payload):
        return set()

    found: list[type] = []
    _survey(payload, MAX_DEPTH, found)
    return set(found)


def _survey(container: Any, levels: int, found: list[type]) -> None:
    if not levels:
        raise UnfitError(f"It is nested deeper than {MAX_DEPTH} levels.")
    if len(found) > MAX_CONTAINERS:
        raise UnfitError(
            f"It holds more than {MAX_CONTAINERS} lists, maps and sets. "
            "Send them in several events."
        )

    for value in _values_in(container, found):
        kind = type(value)

        if kind not in _SCALARS:
            found.append(kind)

            if kind in CONTAINERS:
                _survey(value, levels - 1, found)


def _values_in(container: Any, found: list[type]) -> Iterable[Any]:
    if len(container) > MAX_ITEMS:
        raise UnfitError(f"{len(container)} items are more than {MAX_ITEMS}.")
    if type(container) is not dict:
        return cast(Iterable[Any], container)

    for key in container:
        if not isinstance(key, str):
            raise UnfitError(f"A key is of type {type(key).__name__}, not text.")
        if type(key) is not str:
            found.append(type(key))

    return container.values()


#: Events up to this size in bytes are not measured value by value if their payload is flat.
SMALL = 1024

#: Bytes of memory that a key and its value take in a dict, without the characters of strings; and
#: the most that an encoded byte of a string takes: four, if one character needs four.
ITEM_MEMORY = 200
MAX_TEXT_MEMORY = 4

#: Stands for an unknown amount; larger than any memory.
UNKNOWN = 2**62


def memory_of(payload: Mapping[str, Any], *, found: Set[type], packed: int) -> int:
    """Return the approximate memory of a payload in bytes.

    It is :data:`UNKNOWN` with a value of a registered type, which may refer to anything.

    :param found: the result of :func:`survey`.
    :param packed: size of the encoded event in bytes.
    """
    if packed <= SMALL and not found:
        return len(payload) * ITEM_MEMORY + packed * MAX_TEXT_MEMORY

    total = 0
    containers: list[Any] = [payload]

    while containers:
        container = containers.pop()
        total += sys.getsizeof(container)
        values = container

        if type(container) is dict:
            total += sum(map(sys.getsizeof, container))
            values = container.values()

        # Most containers are flat: add up their values without a loop.
        if _SCALARS.issuperset(map(type, values)):
            total += sum(map(sys.getsizeof, values))
            continue

        for value in values:
            kind = type(value)

            if kind in CONTAINERS:
                containers.append(value)
            elif kind in _SCALARS:
                total += sys.getsizeof(value)
            else:
                return UNKNOWN

    return total


def _unknown_codes(container: Any) -> Iterator[int]:
    for value in container.values() if type(container) is dict else container:
        if type(value) is ExtType:
            yield value.code
        elif type(value) in CONTAINERS:
            yield from _unknown_codes(value)


def _is_refused_value(error: Exception) -> bool:
    """Return True if msgpack read the bytes but refused a value; only its text shows it."""
    words = str(error)

    if "max_array_len" in words or "max_map_len" in words:
        # "4294967295 exceeds max_map_len(5)". A size within MAX_ITEMS means truncated bytes.
        return int(words.split()[0]) > MAX_ITEMS

    return isinstance(error, StackError | OverflowError) or "strict_map_key" in words


def _cannot_encode(kind: type) -> str:
    name = name_of_type(kind)

    # Scalars and arrays of numpy, and of libraries like it.
    if callable(getattr(kind, "item", None)):
        plain = ".tolist()" if hasattr(kind, "__len__") else ".item()"
        return f"{name} cannot be encoded. Send a plain value, which {plain} returns."

    return (
        f"{name} cannot be encoded. Give the route a payload= function that returns plain values, "
        "or register the type with bus.register_type()."
    )


def _pack_registered(code: int, pack: Callable[[Any], bytes], value: Any) -> ExtType:
    data = pack(value)

    if type(data) is not bytes:
        kind = type(value).__name__
        raise UnfitError(
            f"The pack= of {kind} returned {type(data).__name__}. Let it return bytes."
        )

    return ext(code, data)


def _unpack_registered(type_: type, unpack: Callable[[bytes], Any], data: bytes) -> Any:
    value = unpack(data)

    if not isinstance(value, type_):
        raise TypeError(f"its unpack= returned {type(value).__name__}, not {type_.__name__}")

    return value
