"""Events as bytes, and bytes as events, within the limits of the wire."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from reprlib import repr as short
from typing import Any, Final, TypeVar, cast

from msgpack import packb

from ..config import SERVICE_NAME, SIGNAL_NAME
from ..errors import ConfigError, DecodeError, PayloadError
from ..event import Event, PackedPayload
from .faults import find_fault
from .values import UnfitError, Values, memory_of

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


class Envelope:
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


__all__ = ["Codec", "Envelope"]

T = TypeVar("T")

#: Bytes of memory that an event takes beside its payload and its bytes.
EVENT_MEMORY = 800

#: Bytes of memory from which on a payload waits as it came, and is read again for a receiver.
MOST_WAITING = 256 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Codec:
    """Turns events into bytes and bytes into events. One serves all threads.

    :param max_bytes: the size of the largest event, both ways (``EVENTBUS_MAX_EVENT_BYTES``).
    """

    def __init__(self, *, max_bytes: int = 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._values = Values()

    def register_type(
        self, code: int, type_: type[T], *, pack: Callable[[T], bytes], unpack: Callable[[bytes], T]
    ) -> None:
        """Let values of a type travel, and come back as that type where it is registered too.

        :param code: the ext code on the wire, 32 to 127, the same in every service.
        :raises ConfigError: the code is out of range or taken, or the type travels already.
        """
        self._values.register(code, type_, pack, unpack)

    def limited(self, max_bytes: int) -> Codec:
        """A codec with another limit that shares this one's types, present and future."""
        codec = Codec(max_bytes=max_bytes)
        codec._values = self._values
        return codec

    def pack_payload(self, payload: Mapping[str, Any], *, overhead: int = 0) -> bytes:
        """The bytes of a payload, for a :class:`Envelope` to make an event of.

        :param overhead: the bytes that come on top of it, so that the event keeps its limit.
        :raises PayloadError: a value cannot travel; the error names its path and its type.
        """
        plain = payload if type(payload) is dict else _as_dict(payload)

        if "sender" in plain:
            raise PayloadError(
                "payload.sender: it would clash with the sender every receiver gets. "
                "Give the value another name."
            )

        data = self._pack(plain)

        if len(data) + overhead > self._max_bytes:
            raise PayloadError(self._too_large(len(data), overhead))

        return data

    def seal(self, source: str, name: str) -> Envelope:
        """What writes the events of a service and a signal; made once for a route.

        :raises ConfigError: the name of the service or of the signal is not legal.
        """
        if not SERVICE_NAME.fullmatch(source):
            raise ConfigError(
                f"The service name {source!r} is not legal. Use 1 to 64 ASCII letters, digits, "
                "'_', '.' and '-'."
            )
        if not SIGNAL_NAME.fullmatch(name):
            raise ConfigError(
                f"The signal name {name!r} is not legal. Use 1 to 128 ASCII letters, digits, "
                "'_', '.', '/' and '-', beginning with a letter, a digit or '_'."
            )

        return Envelope(source, name)

    def encode(self, event: Event) -> bytes:
        """The bytes of any event.

        :raises PayloadError: its payload cannot travel.
        :raises ConfigError: its source or its name is not legal.
        """
        seal = self.seal(event.source, event.name)

        return seal(
            self.pack_payload(event.payload, overhead=seal.overhead),
            id=event.id,
            time_ns=(event.time - _EPOCH) // _MICROSECOND * 1000,
            seq=event.seq,
            correlation_id=event.correlation_id,
            causation_id=event.causation_id,
            hops=event.hops,
            traceparent=event.traceparent,
            key=event.key,
        )

    def check_size(self, size: int) -> None:
        """Refuse an event of so many bytes if that is above the limit.

        :raises DecodeError: it is too large.
        """
        if size > self._max_bytes:
            raise DecodeError(
                f"It has {size} bytes, more than the {self._max_bytes} of "
                "EVENTBUS_MAX_EVENT_BYTES.",
                reason="too_large",
            )

    def decode(self, body: bytes, *, via: str = "channel") -> Event:
        """The event that some bytes are. They may come from anyone.

        :raises DecodeError: they are no event, whatever they are. Its ``reason`` is
            ``too_large``, ``not_msgpack``, ``not_a_map``, ``version``, ``missing_attribute``,
            ``bad_attribute`` or ``bad_payload``.
        """
        return self._decode(body, via)[0]

    def _decode(self, body: bytes, via: str) -> tuple[Event, set[type]]:
        """The event that some bytes are, with what :func:`survey` found in its payload."""
        self.check_size(len(body))
        event = _read(self._unpack(body), via)
        return event, self._check(event.payload)

    def decode_to_wait(self, body: bytes, *, via: str = "channel") -> tuple[Event, int]:
        """Decode an event that waits for a receiver; return it with the memory it takes, in bytes.

        A payload that takes much memory, or may do so, is left as bytes: :func:`.opened` reads it.

        :raises DecodeError: as :meth:`decode` does.
        """
        event, found = self._decode(body, via)
        size = memory_of(event.payload, found=found, packed=len(body))  # type: ignore[arg-type]  # it is a dict

        if size > MOST_WAITING:
            packed = PackedPayload(partial(self._payload, body))
            return replace(event, payload=packed), EVENT_MEMORY + len(body)

        # What waits in a stream keeps its bytes as well: they are stored where it fails.
        return event, EVENT_MEMORY + size + (len(body) if via == "stream" else 0)

    def _payload(self, body: bytes) -> Mapping[str, Any]:
        return self.decode(body).payload

    def _pack(self, payload: dict[str, Any]) -> bytes:
        try:
            return self._packed(payload)
        except Exception as error:
            first = error

        # A signal handler may raise anywhere, a time limit for example. That is no fault of the
        # payload: it packs at the second try, and the error is passed on as it is.
        try:
            self._packed(payload)
        except Exception as error:
            if type(error) is not type(first):
                raise

            raise PayloadError(find_fault(self._values, payload, first)) from first

        raise _cause_of(first)

    def _packed(self, payload: dict[str, Any]) -> bytes:
        data = self._values.pack(payload)
        self._values.check_packed(payload, data)
        return data

    def _too_large(self, size: int, overhead: int) -> str:
        return (
            f"payload: {size} bytes, and up to {overhead} for the rest of the event, are more "
            f"than the {self._max_bytes} of EVENTBUS_MAX_EVENT_BYTES. Send a reference to the "
            "data, or raise that setting in every service."
        )

    def _unpack(self, body: bytes) -> Any:
        try:
            return self._values.unpack(body)
        except UnfitError as error:
            raise DecodeError(f"It does not read: {error}", reason="bad_payload") from error
        except Exception as error:
            message = f"It is not msgpack: {type(error).__name__}: {error}"
            raise DecodeError(message, reason="not_msgpack") from error

    def _check(self, payload: Any) -> set[type]:
        if type(payload) is not dict:
            raise DecodeError(f"'data' is not a map: {short(payload)}.", reason="bad_payload")
        if "sender" in payload:
            raise DecodeError("The payload has a key 'sender'.", reason="bad_payload")

        try:
            return self._values.check(payload)
        except UnfitError as error:
            raise DecodeError(
                f"The payload does not read: {error}", reason="bad_payload"
            ) from error


class _PendingEvent:
    """An event that is not frozen yet: filled in a sixth of the time that ``Event()`` takes."""

    __slots__ = Event.__slots__


def _read(attributes: Any, via: str) -> Event:
    if type(attributes) is not dict:
        raise DecodeError(f"It is not a map: {short(attributes)}.", reason="not_a_map")
    if attributes.get("specversion") != SPECVERSION:
        raise _wrong_version(attributes)

    draft: Any = _PendingEvent()
    _read_required(attributes, draft)
    _read_optional(attributes, draft)
    draft.via = via
    draft.attempt = 1
    draft.replayed = False
    draft.__class__ = Event
    event: Event = draft
    return event


def _wrong_version(attributes: dict[Any, Any]) -> DecodeError:
    if "specversion" not in attributes:
        return DecodeError("It has no 'specversion'.", reason="missing_attribute")

    version = short(attributes["specversion"])
    return DecodeError(f"Its specversion is {version}, not {SPECVERSION!r}.", reason="version")


def _read_required(attributes: dict[Any, Any], draft: Any) -> None:
    try:
        draft.source = source = attributes["source"]
        draft.name = name = attributes["type"]
        draft.id = id = attributes["id"]
        draft.time = time = attributes["time"]
        draft.payload = attributes["data"]
    except KeyError as error:
        raise DecodeError(f"It has no {error}.", reason="missing_attribute") from error

    if type(source) is not str or not SERVICE_NAME.fullmatch(source):
        raise _bad("source", source)
    if type(name) is not str or not SIGNAL_NAME.fullmatch(name):
        raise _bad("type", name)
    if type(id) is not str or not EVENT_ID.fullmatch(id):
        raise _bad("id", id)
    if type(time) is not datetime or time.tzinfo is not UTC:
        raise _bad("time", time)


def _read_optional(attributes: dict[Any, Any], draft: Any) -> None:
    draft.seq = seq = attributes.get("seq")
    draft.correlation_id = correlation_id = attributes.get("correlationid")
    draft.causation_id = causation_id = attributes.get("causationid")
    hops = attributes.get("hops")
    draft.hops = 0 if hops is None else hops
    draft.traceparent = traceparent = attributes.get("traceparent")
    draft.key = key = attributes.get("partitionkey")

    if seq is not None and not _is_count(seq, 1, MAX_SEQ):
        raise _bad("seq", seq)
    if correlation_id is not None and not _is_id(correlation_id):
        raise _bad("correlationid", correlation_id)
    if causation_id is not None and not _is_id(causation_id):
        raise _bad("causationid", causation_id)
    if hops is not None and not _is_count(hops, 0, MAX_HOPS):
        raise _bad("hops", hops)
    if traceparent is not None and not _is_text(traceparent, MAX_TRACEPARENT_BYTES):
        raise _bad("traceparent", traceparent)
    if key is not None and not _is_text(key, MAX_KEY_BYTES):
        raise _bad("partitionkey", key)


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_id(value: Any) -> bool:
    return type(value) is str and EVENT_ID.fullmatch(value) is not None


def _is_text(value: Any, most_bytes: int) -> bool:
    return type(value) is str and 0 < len(value.encode()) <= most_bytes


def _bad(attribute: str, value: Any) -> DecodeError:
    return DecodeError(f"Its {attribute!r} is not legal: {short(value)}.", reason="bad_attribute")


def _cause_of(error: Exception) -> Exception:
    """What made a value unfit, if the error says no more than that it is."""
    cause = error.__cause__
    return (
        _cause_of(cause)
        if isinstance(error, UnfitError) and isinstance(cause, Exception)
        else error
    )


def _as_dict(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, Mapping):
        raise PayloadError(
            f"payload: {type(payload).__name__} is not a mapping. Let the route's payload= "
            "function return a dict of the keyword arguments that receivers get."
        )

    return dict(payload)
