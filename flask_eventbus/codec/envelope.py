"""Writes events: one msgpack map each, with the attribute names of CloudEvents."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, Final, cast

from msgpack import packb

from ..errors import PayloadError

#: The version of the wire.
SPECVERSION: Final = "1.0"
#: An event's id: the node's name and its running number.
EVENT_ID = re.compile(r"[\w.-]{1,64}-\d{1,20}", re.ASCII)
#: How long an id may be, in bytes.
MAX_ID_BYTES = 64 + 1 + 20
#: How long a ``traceparent`` may be, in bytes.
MAX_TRACEPARENT_BYTES = 128
#: How long a ``partitionkey`` may be, in bytes.
MAX_KEY_BYTES = 256
#: The largest ``hops``.
MAX_HOPS = 65_535
#: The largest ``seq``.
MAX_SEQ = 2**64 - 1

#: The most bytes of an id as it is packed.
PACKED_ID_BYTES = 2 + MAX_ID_BYTES

_FIXSTR = tuple(bytes([0xA0 | length]) for length in range(32))
_TIMESTAMP_64 = struct.Struct(">7sQ").pack
_TIMESTAMP_96 = struct.Struct(">8sIq").pack
_COUNT = struct.Struct(">5sQ").pack


def _text(value: str) -> bytes:
    """Text as msgpack writes it, without the cost of a packer where it is short."""
    raw = value.encode()

    if len(raw) < 32:
        return _FIXSTR[len(raw)] + raw
    if len(raw) < 256:
        return b"\xd9%c%b" % (len(raw), raw)

    return cast(bytes, packb(value))


_ID = _text("id")
_DATA = _text("data")
_CORRELATIONID = _text("correlationid")
_CAUSATIONID = _text("causationid")
_HOPS = _text("hops")
_TRACEPARENT = _text("traceparent")
_PARTITIONKEY = _text("partitionkey")


class Seal:
    """Makes the events of one service and one signal: what they share is packed once."""

    __slots__ = ("_heads", "_least", "overhead")

    def __init__(self, source: str, name: str) -> None:
        shared = packb({"specversion": SPECVERSION, "source": source, "type": name})[1:] + _ID

        # The start of an event that has 0, 1, ... 6 optional attributes.
        self._heads = tuple(bytes([0x86 + optional]) + shared for optional in range(7))

        #: The most bytes that an event has beyond those of its payload.
        self.overhead: int = len(self._heads[0]) + _MOST_BYTES_AFTER_HEAD
        #: The bytes that each event has beyond those of its payload, and the most for its id.
        self._least = len(self._heads[0]) + PACKED_ID_BYTES + len(_time(0)) + len(_DATA)

    def __call__(
        self,
        data: bytes,
        *,
        id: str,
        time_ns: int,
        seq: int | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        hops: int = 0,
        traceparent: str | None = None,
        key: str | None = None,
    ) -> bytes:
        """The bytes of an event.

        :param data: the payload, from :meth:`.Codec.pack_payload`.
        :param time_ns: nanoseconds since 1970, as from :func:`time.time_ns`.
        :raises PayloadError: the key is too long.
        """
        optional: list[bytes] = []

        if seq is not None:
            optional.append(_COUNT(b"\xa3seq\xcf", seq))
        if correlation_id is not None:
            optional.append(_CORRELATIONID + _text(correlation_id))
        if causation_id is not None:
            optional.append(_CAUSATIONID + _text(causation_id))
        if hops:
            optional.append(_HOPS + packb(hops))
        if traceparent is not None:
            optional.append(_TRACEPARENT + _text(traceparent))
        if key:
            optional.append(_PARTITIONKEY + _key(key))

        head = self._heads[len(optional)]
        return b"".join((head, _text(id), _time(time_ns), _DATA, data, *optional))

    def most_bytes(self, data: bytes, attributes: Mapping[str, Any], *, numbered: bool) -> int:
        """The bytes of an event that has no id yet; only the id may turn out shorter.

        :param attributes: the optional ones.
        :param numbered: whether it will have a ``seq``.
        """
        size = self._least + len(data)

        if numbered:
            size += _SEQ_BYTES

        for name, value in attributes.items():
            if value:
                size += _NAME_BYTES[name] + packed_bytes(value)

        return size


def packed_bytes(value: str | int) -> int:
    """The bytes of a text, or of a small number, as msgpack writes it."""
    if isinstance(value, int):
        return len(packb(value))

    length = len(value) if value.isascii() else len(value.encode())
    return length + (1 if length < 32 else 2 if length < 256 else 3)


def _time(time_ns: int) -> bytes:
    """``time`` as a msgpack timestamp: of 64 bits, or of 96 before 1970 and from 2514."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)

    if seconds >> 34:
        return _TIMESTAMP_96(b"\xa4time\xc7\x0c\xff", nanoseconds, seconds)

    return _TIMESTAMP_64(b"\xa4time\xd7\xff", nanoseconds << 34 | seconds)


def _key(key: str) -> bytes:
    try:
        packed = _text(key)
    except UnicodeEncodeError as error:
        raise PayloadError(
            f"The key {short(key)} holds a lone surrogate, which no other program can read. "
            "Choose a key of plain text."
        ) from error

    if len(key.encode()) > MAX_KEY_BYTES:
        raise PayloadError(
            f"The key {short(key)} has {len(key.encode())} bytes, and {MAX_KEY_BYTES} can "
            "travel. Choose a shorter one, for example an id."
        )

    return packed


_SEQ_BYTES = len(_COUNT(b"\xa3seq\xcf", MAX_SEQ))

#: The bytes of the names of optional attributes.
_NAME_BYTES = {
    "correlation_id": len(_CORRELATIONID),
    "causation_id": len(_CAUSATIONID),
    "hops": len(_HOPS),
    "traceparent": len(_TRACEPARENT),
    "key": len(_PARTITIONKEY),
}

_MOST_BYTES_AFTER_HEAD = sum(
    (
        PACKED_ID_BYTES,
        len(_time(-1)),
        len(_DATA),
        _SEQ_BYTES,
        len(_CORRELATIONID) + 2 + MAX_ID_BYTES,
        len(_CAUSATIONID) + 2 + MAX_ID_BYTES,
        len(_HOPS) + len(packb(MAX_HOPS)),
        len(_TRACEPARENT) + 2 + MAX_TRACEPARENT_BYTES,
        len(_PARTITIONKEY) + 3 + MAX_KEY_BYTES,
    )
)
