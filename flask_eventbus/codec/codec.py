"""Encode events as bytes, and decode bytes as events, within the limits of the wire format."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from reprlib import repr as short
from typing import Any, Final, NoReturn, TypeVar, cast

from msgpack import Unpacker, packb
from msgpack.exceptions import UnpackException

from ..config import SERVICE_NAME, SIGNAL_NAME
from ..errors import ConfigError, DecodeError, PayloadError
from ..event import Event, PackedPayload
from .values import (
    CONTAINERS,
    MAX_DEPTH,
    MAX_ITEMS,
    PLAIN,
    UnfitError,
    Values,
    is_flat,
    memory_of,
    survey,
    types_in,
)

#: The version of the wire format.
SPECVERSION: Final = "1.0"
#: Largest size in bytes of a channel's message with several events, and their largest number.
MESSAGE_BYTES = 64 * 1024
MESSAGE_EVENTS = 256
#: A valid id of an event: the name of its node and a sequence number.
EVENT_ID = re.compile(r"[\w.-]{1,64}-\d{1,20}", re.ASCII)
#: Largest number of digits at the end of an id.
MAX_DIGITS = 20
#: Largest size of an id, in bytes.
MAX_ID_BYTES = 64 + 1 + MAX_DIGITS
#: Largest size of a ``traceparent``, in bytes.
MAX_TRACEPARENT_BYTES = 128
#: Largest size of a ``partitionkey``, in bytes.
MAX_KEY_BYTES = 256
#: The largest ``hops``.
MAX_HOPS = 65_535
#: The largest ``seq``.
MAX_SEQ = 2**64 - 1

#: Largest size of an encoded id, in bytes.
PACKED_ID_BYTES = 2 + MAX_ID_BYTES

_FIXSTR = tuple(bytes([0xA0 | length]) for length in range(32))
#: The attribute ``time`` and the name of the next one, ``data``.
_TIMESTAMP_64 = struct.Struct(">7sQ5s")
_TIMESTAMP_96 = struct.Struct(">8sIq5s")
_COUNT = struct.Struct(">5sQ").pack


def _text(value: str) -> bytes:
    """Encode a string as msgpack, without the cost of a packer if it is short."""
    raw = value.encode()

    if len(raw) < 32:
        return _FIXSTR[len(raw)] + raw
    if len(raw) < 256:
        return b"\xd9%c%b" % (len(raw), raw)

    return cast(bytes, packb(value))


def attributes_bytes(attributes: Mapping[str, Any]) -> int:
    """Return the encoded size of optional attributes besides ``seq``, in bytes."""
    return sum(
        len(_OPTIONAL[name][0]) + _packed_bytes(value)
        for name, value in attributes.items()
        if value
    )


def _packed_bytes(value: str | int) -> int:
    """Return the encoded size of a string or a small number, in bytes."""
    if isinstance(value, int):
        return len(packb(value))

    length = len(value) if value.isascii() else len(value.encode())
    return length + (1 if length < 32 else 2 if length < 256 else 3)


def _key(key: str) -> bytes:
    try:
        packed = _text(key)
    except UnicodeEncodeError as error:
        raise PayloadError(
            f"The key {short(key)} holds a lone surrogate, which no other program can read. "
            "Choose a key without it."
        ) from error

    if len(key.encode()) > MAX_KEY_BYTES:
        raise PayloadError(
            f"The key {short(key)} has {len(key.encode())} bytes, and the limit is "
            f"{MAX_KEY_BYTES}. Choose a shorter key, for example an id."
        )

    return packed


_ID = _text("id")
_DATA = _text("data")
#: Size of an encoded ``seq``, in bytes.
SEQ_BYTES = len(_COUNT(b"\xa3seq\xcf", MAX_SEQ))

#: The optional attributes besides ``seq``, in the order in which they are written. Each has its
#: encoded name, the function that encodes its value, and the largest size of that in bytes.
_OPTIONAL: dict[str, tuple[bytes, Callable[[Any], bytes], int]] = {
    "correlation_id": (_text("correlationid"), _text, 2 + MAX_ID_BYTES),
    "causation_id": (_text("causationid"), _text, 2 + MAX_ID_BYTES),
    "hops": (_text("hops"), packb, len(packb(MAX_HOPS))),
    "traceparent": (_text("traceparent"), _text, 2 + MAX_TRACEPARENT_BYTES),
    "key": (_text("partitionkey"), _key, 3 + MAX_KEY_BYTES),
}

_MAX_BYTES_AFTER_HEAD = (
    PACKED_ID_BYTES
    + _TIMESTAMP_96.size
    + SEQ_BYTES
    + sum(len(name) + most for name, _, most in _OPTIONAL.values())
)


class Envelope:
    """Encodes the events of one service and signal; the attributes they share are encoded once."""

    __slots__ = ("_heads", "least", "overhead")

    def __init__(self, source: str, name: str) -> None:
        shared = packb({"specversion": SPECVERSION, "source": source, "type": name})[1:] + _ID

        # The first bytes of an event with 0, 1, ... 6 optional attributes.
        self._heads = tuple(bytes([0x86 + optional]) + shared for optional in range(7))

        #: Largest size of an event without its payload, in bytes.
        self.overhead: int = len(self._heads[0]) + _MAX_BYTES_AFTER_HEAD
        #: Smallest size of an event without its payload, but with the longest id, in bytes.
        self.least: int = len(self._heads[0]) + PACKED_ID_BYTES + _TIMESTAMP_64.size

    def __call__(
        self,
        data: bytes,
        *,
        id: str,
        time_ns: int,
        seq: int | None = None,
        **attributes: Any,
    ) -> bytes:
        """Encode an event; see :meth:`encode`."""
        return self.encode(data, id, time_ns, seq, attributes)

    def encode(
        self, data: bytes, id: str, time_ns: int, seq: int | None, attributes: Mapping[str, Any]
    ) -> bytes:
        """Encode an event.

        :param data: the encoded payload, from :meth:`.Codec.pack_payload`.
        :param time_ns: nanoseconds since 1970, as from :func:`time.time_ns`.
        :param attributes: the optional attributes; 0 and ``None`` stand for none.
        :raises PayloadError: the key is too long.
        """
        seconds, nanoseconds = divmod(time_ns, 1_000_000_000)

        # A msgpack timestamp has 64 bits, or 96 bits before 1970 and from 2514.
        if seconds >> 34:
            time = _TIMESTAMP_96.pack(b"\xa4time\xc7\x0c\xff", nanoseconds, seconds, _DATA)
        else:
            time = _TIMESTAMP_64.pack(b"\xa4time\xd7\xff", nanoseconds << 34 | seconds, _DATA)

        raw = id.encode()
        packed_id = _FIXSTR[len(raw)] + raw if len(raw) < 32 else _text(id)
        number = b"" if seq is None else _COUNT(b"\xa3seq\xcf", seq)

        if not attributes:
            return b"".join((self._heads[seq is not None], packed_id, time, data, number))

        optional = [number] if number else []

        for name, (packed_name, pack, _) in _OPTIONAL.items():
            if value := attributes.get(name):
                optional.append(packed_name + pack(value))

        return b"".join((self._heads[len(optional)], packed_id, time, data, *optional))


T = TypeVar("T")

#: Bytes of memory that an event takes besides its payload.
EVENT_MEMORY = 800

#: Number of pairs of source and name that are known to be valid.
MAX_KNOWN = 1024

#: Payloads that take more bytes of memory than this are kept encoded until a receiver runs.
MAX_DECODED = 256 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Codec:
    """Encodes and decodes events. It may be used by several threads.

    :param max_bytes: largest size of an event in bytes (``EVENTBUS_MAX_EVENT_BYTES``).
    """

    def __init__(self, *, max_bytes: int = 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._values = Values()

    def register_type(
        self, code: int, type_: type[T], *, pack: Callable[[T], bytes], unpack: Callable[[bytes], T]
    ) -> None:
        """Encode values of a type, and decode them in services that register it too.

        :param code: the msgpack ext code, 32 to 127, the same in every service.
        :raises ConfigError: the code is out of range or taken, or the type is supported already.
        """
        self._values.register(code, type_, pack, unpack)

    def limited(self, max_bytes: int) -> Codec:
        """Return a codec with another limit that shares this one's registered types."""
        codec = Codec(max_bytes=max_bytes)
        codec._values = self._values
        return codec

    def pack_payload(self, payload: Mapping[str, Any], *, overhead: int = 0) -> bytes:
        """Encode a payload, for an :class:`Envelope`.

        :param overhead: size in bytes of the rest of the event, which counts towards its limit.
        :raises PayloadError: a value cannot be encoded; the error names its path and its type.
        """
        plain = payload if type(payload) is dict else _as_dict(payload)

        if "sender" in plain:
            raise PayloadError(
                "payload.sender: every receiver already gets the sender as its first argument. "
                "Give the value another name."
            )

        try:
            data = self._values.pack(plain)

            if not is_flat(plain):
                self._check(plain, data)
        except Exception as error:
            failure = error
        else:
            if len(data) + overhead > self._max_bytes:
                raise PayloadError(
                    f"payload: {len(data)} bytes, and up to {overhead} for the rest of the event, "
                    f"are more than the {self._max_bytes} of EVENTBUS_MAX_EVENT_BYTES. Send a "
                    "reference to the data, or raise that setting in every service."
                )

            return data

        self._raise_fault(plain, failure)

    def envelope(self, source: str, name: str) -> Envelope:
        """Return the envelope of a service and a signal; create it once per route.

        :raises ConfigError: the name of the service or of the signal is not valid.
        """
        if not SERVICE_NAME.fullmatch(source):
            raise ConfigError(
                f"The service name {source!r} is not valid. Use 1 to 64 ASCII letters, digits, "
                "'_', '.' and '-'."
            )
        if not SIGNAL_NAME.fullmatch(name):
            raise ConfigError(
                f"The signal name {name!r} is not valid. Use 1 to 128 ASCII letters, digits, "
                "'_', '.', '/' and '-', beginning with a letter, a digit or '_'."
            )

        return Envelope(source, name)

    def encode(self, event: Event) -> bytes:
        """Encode an event.

        :raises PayloadError: its payload cannot be encoded.
        :raises ConfigError: its source or its name is not valid.
        """
        envelope = self.envelope(event.source, event.name)

        return envelope(
            self.pack_payload(event.payload, overhead=envelope.overhead),
            id=event.id,
            time_ns=(event.time - _EPOCH) // _MICROSECOND * 1000,
            seq=event.seq,
            **{name: getattr(event, name) for name in _OPTIONAL},
        )

    def check_size(self, size: int) -> None:
        """Check the size of an event in bytes.

        :raises DecodeError: it is above the limit.
        """
        if size > self._max_bytes:
            raise DecodeError(
                f"It has {size} bytes, more than the {self._max_bytes} of "
                "EVENTBUS_MAX_EVENT_BYTES.",
                reason="too_large",
            )

    def decode(self, body: bytes, *, via: str = "channel") -> Event:
        """Decode an event from untrusted bytes.

        :raises DecodeError: the bytes are not an event. Its ``reason`` is
            ``too_large``, ``not_msgpack``, ``not_a_map``, ``version``, ``missing_attribute``,
            ``bad_attribute`` or ``bad_payload``.
        """
        return _read(self._unpack(body), via)[0]

    def _unpack(self, body: bytes) -> Any:
        if len(body) > self._max_bytes:
            self.check_size(len(body))

        try:
            return self._values.unpack(body)
        except UnfitError as error:
            raise DecodeError(f"It cannot be decoded: {error}", reason="bad_payload") from error
        except Exception as error:
            message = f"It is not msgpack: {type(error).__name__}: {error}"
            raise DecodeError(message, reason="not_msgpack") from error

    def decode_for_queue(self, body: bytes, *, via: str = "channel") -> tuple[Event, int]:
        """Decode an event that waits in a queue; return it with its memory in bytes.

        A payload above :data:`MAX_DECODED` stays encoded; :func:`.opened` decodes it.

        :raises DecodeError: the bytes are not an event.
        """
        return self._for_queue(self._unpack(body), body, via)

    def decode_next(self, body: bytes, last: Event | None, prefix: str) -> tuple[Event, int, bool]:
        """Decode a stream event as :meth:`decode_for_queue` does; faster if it is like ``last``.

        The last item of the result is True if both have the same node, source and name.

        :param last: a stream event, if any.
        :param prefix: the id of that event without its number.
        :raises DecodeError: the bytes are not an event.
        """
        attributes = self._unpack(body)

        if last is not None and (event := _read_like(last, prefix, attributes)):
            size = memory_of(event.payload, found=_NO_TYPES, packed=len(body))

            if size <= MAX_DECODED:
                return event, EVENT_MEMORY + size + len(body), True

        return *self._for_queue(attributes, body, "stream"), False

    def decode_message(
        self, message: bytes
    ) -> Iterator[tuple[bytes, Event | DecodeError, int, bool]]:
        """Yield each event in a channel's message: its bytes, the event, its memory in bytes.

        The last item is True if the last valid event has the same node, source and name. For
        bytes that are not an event, yield the error instead of the event.
        """
        start = number = 0
        last: Event | None = None
        prefix = ""

        # One unpacker decodes the events and finds their ends, so that no byte is read twice.
        if len(message) <= MESSAGE_BYTES:
            unpacker = self._values.unpacker(message)

            while (
                start < len(message)
                and message[start] in _MAP_STARTS
                and number < MESSAGE_EVENTS - 1
            ):
                try:
                    attributes = unpacker.unpack()
                except Exception:
                    # The events from here on are decoded one by one below, which names the fault.
                    break

                end = unpacker.tell()
                body = message[start:end]
                start = end
                number += 1

                try:
                    if len(body) > self._max_bytes:
                        self.check_size(len(body))

                    if last is not None and (event := _read_like(last, prefix, attributes)):
                        size = memory_of(event.payload, found=_NO_TYPES, packed=len(body))

                        if size <= MAX_DECODED:
                            yield body, event, EVENT_MEMORY + size, True
                            continue

                    event, size = self._for_queue(attributes, body, "channel")
                except DecodeError as error:
                    yield body, error, 0, False
                else:
                    last, prefix = event, event.id[: event.id.rfind("-") + 1]
                    yield body, event, size, False

        if start and start == len(message):
            return

        for body in split_message(message[start:], most=MESSAGE_EVENTS - number):
            try:
                event, size = self.decode_for_queue(body)
            except DecodeError as error:
                yield body, error, 0, False
            else:
                yield body, event, size, False

    def _for_queue(self, attributes: Any, body: bytes, via: str) -> tuple[Event, int]:
        """Return the event with these attributes, and its memory in bytes."""
        event, found = _read(attributes, via)
        size = memory_of(event.payload, found=found, packed=len(body))

        if size > MAX_DECODED:
            packed = PackedPayload(partial(self._payload_of, body))
            return replace(event, payload=packed), EVENT_MEMORY + len(body)

        # A stream event keeps its bytes too: a retry or a dead letter stores them.
        return event, EVENT_MEMORY + size + (len(body) if via == "stream" else 0)

    def _payload_of(self, body: bytes) -> Mapping[str, Any]:
        return self.decode(body).payload

    def _check(self, payload: dict[str, Any], data: bytes) -> None:
        """Check a payload and its encoded form.

        :raises UnfitError: it breaks a rule of the wire format.
        """
        if not types_in(payload) <= PLAIN:
            # Check it as its readers will: a converted value may break a rule.
            survey(self._values.unpack(data))

    def _raise_fault(self, payload: dict[str, Any], first: Exception) -> NoReturn:
        """Raise the error of a payload that cannot be encoded.

        A signal handler may raise anywhere, for example a time limit. Then the payload is not at
        fault: encoding succeeds at the second try, and the error is raised unchanged.
        """
        try:
            self._check(payload, self._values.pack(payload))
        except Exception as error:
            if type(error) is not type(first):
                raise

            fault = _find_fault(self._values, "payload", payload, ())
            raise PayloadError(fault or f"payload: {_describe(payload, first)}") from first

        while isinstance(first, UnfitError) and isinstance(first.__cause__, Exception):
            first = first.__cause__

        raise first


def split_message(message: bytes, *, most: int = MESSAGE_EVENTS) -> Sequence[bytes]:
    """Return the bytes of each event in a message of a channel.

    The last item is the rest of the message if no event can be found in it: it is not msgpack, or
    does not begin with a map. A message above :data:`MESSAGE_BYTES` has one event.

    :param most: maximum number of items; the last one has all bytes after the others.
    """
    if len(message) > MESSAGE_BYTES:
        return (message,)

    unpacker = Unpacker(max_buffer_size=len(message))
    unpacker.feed(message)
    bodies: list[bytes] = []
    start = 0

    try:
        while start < len(message) and message[start] in _MAP_STARTS and len(bodies) < most - 1:
            unpacker.skip()
            end = unpacker.tell()
            bodies.append(message[start:end])
            start = end
    except (UnpackException, ValueError):
        # The codec names the fault when it decodes the rest.
        bodies.append(message[start:])
    else:
        if start < len(message) or not bodies:
            bodies.append(message[start:])

    return bodies


#: The first bytes of a msgpack map.
_MAP_STARTS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))


_NO_TYPES: frozenset[type] = frozenset()


class _PendingEvent:
    """An event that is not frozen yet. Filling it takes a sixth of the time of ``Event()``."""

    __slots__ = Event.__slots__


def _read(attributes: Any, via: str) -> tuple[Event, Set[type]]:
    """Return the event with these attributes, and the result of :func:`survey` for its payload."""
    if type(attributes) is not dict:
        raise DecodeError(f"It is not a map: {short(attributes)}.", reason="not_a_map")
    if attributes.get("specversion") != SPECVERSION:
        raise _wrong_version(attributes)

    pending: Any = _PendingEvent()

    try:
        source = attributes["source"]
        name = attributes["type"]
        pending.id = id = attributes["id"]
        pending.time = time = attributes["time"]
        pending.payload = payload = attributes["data"]
    except KeyError as error:
        raise DecodeError(f"It has no {error}.", reason="missing_attribute") from error

    pending.seq = seq = attributes.get("seq")
    pending.correlation_id = correlation_id = attributes.get("correlationid")
    pending.causation_id = causation_id = attributes.get("causationid")
    hops = attributes.get("hops")
    pending.hops = 0 if hops is None else hops
    pending.traceparent = traceparent = attributes.get("traceparent")
    pending.key = key = attributes.get("partitionkey")
    pending.via = via
    pending.attempt = 1
    pending.replayed = False

    if type(source) is not str:
        raise _bad("source", source)
    if type(name) is not str:
        raise _bad("type", name)

    pending.source, pending.name = _check_names(source, name)

    if type(id) is not str or not EVENT_ID.fullmatch(id):
        raise _bad("id", id)
    if type(time) is not datetime or time.tzinfo is not UTC:
        raise _bad("time", time)
    if seq is not None and (type(seq) is not int or not 1 <= seq <= MAX_SEQ):
        raise _bad("seq", seq)
    if correlation_id is not None and not _is_id(correlation_id):
        raise _bad("correlationid", correlation_id)
    if causation_id is not None and not _is_id(causation_id):
        raise _bad("causationid", causation_id)
    if hops is not None and (type(hops) is not int or not 0 <= hops <= MAX_HOPS):
        raise _bad("hops", hops)
    if traceparent is not None and not _is_text(traceparent, MAX_TRACEPARENT_BYTES):
        raise _bad("traceparent", traceparent)
    if key is not None and not _is_text(key, MAX_KEY_BYTES):
        raise _bad("partitionkey", key)
    if type(payload) is not dict:
        raise DecodeError(f"'data' is not a map: {short(payload)}.", reason="bad_payload")
    if "sender" in payload:
        raise DecodeError("The payload has a key 'sender'.", reason="bad_payload")

    found = _NO_TYPES if is_flat(payload) else _survey(payload)
    pending.__class__ = Event
    return pending, found


def _read_like(last: Event, prefix: str, attributes: Any) -> Event | None:
    """Return the event with these attributes if only its id, time, seq and payload are its own.

    Such an event needs a third of the checks of :func:`_read`, because it repeats what was checked
    in ``last``. Return ``None`` for any other event, also for an invalid one.

    :param last: an event of the same transport.
    :param prefix: the id of that event without its number.
    """
    is_numbered = last.seq is not None

    # Six attributes, and a ``seq`` on a channel: it has none of the optional ones.
    if type(attributes) is not dict or len(attributes) != 6 + is_numbered:
        return None

    pending: Any = _PendingEvent()

    try:
        if (
            attributes["source"] != last.source
            or attributes["type"] != last.name
            or attributes["specversion"] != SPECVERSION
        ):
            return None

        pending.id = id = attributes["id"]
        pending.time = time = attributes["time"]
        pending.payload = payload = attributes["data"]
        pending.seq = seq = attributes["seq"] if is_numbered else None
    except KeyError:
        return None

    if (
        type(id) is not str
        or not id.startswith(prefix)
        or not id[len(prefix) :].isdecimal()
        or not id.isascii()
        or len(id) > len(prefix) + MAX_DIGITS
        or type(time) is not datetime
        or time.tzinfo is not UTC
        or (is_numbered and (type(seq) is not int or not 1 <= seq <= MAX_SEQ))
        or type(payload) is not dict
        or "sender" in payload
        or not is_flat(payload)
    ):
        return None

    pending.name, pending.source = last.name, last.source
    pending.via = last.via
    pending.correlation_id = pending.causation_id = pending.traceparent = pending.key = None
    pending.hops = 0
    pending.attempt = 1
    pending.replayed = False
    pending.__class__ = Event
    return cast(Event, pending)


def _survey(payload: dict[str, Any]) -> Set[type]:
    """Return the result of :func:`survey` for a payload.

    :raises DecodeError: it breaks a rule of the wire format.
    """
    try:
        return survey(payload)
    except UnfitError as error:
        raise DecodeError(
            f"The payload cannot be decoded: {error}", reason="bad_payload"
        ) from error


@lru_cache(maxsize=MAX_KNOWN)
def _check_names(source: str, name: str) -> tuple[str, str]:
    """Check the source and the name of an event.

    The result for the last ones is known, because most events repeat them. Their events then share
    two strings, too.

    :raises DecodeError: one of them is not valid.
    """
    if not SERVICE_NAME.fullmatch(source):
        raise _bad("source", source)
    if not SIGNAL_NAME.fullmatch(name):
        raise _bad("type", name)

    return source, name


def _wrong_version(attributes: dict[Any, Any]) -> DecodeError:
    if "specversion" not in attributes:
        return DecodeError("It has no 'specversion'.", reason="missing_attribute")

    version = short(attributes["specversion"])
    return DecodeError(f"Its specversion is {version}, not {SPECVERSION!r}.", reason="version")


def _is_id(value: Any) -> bool:
    return type(value) is str and EVENT_ID.fullmatch(value) is not None


def _is_text(value: Any, most_bytes: int) -> bool:
    return type(value) is str and 0 < len(value.encode()) <= most_bytes


def _bad(attribute: str, value: Any) -> DecodeError:
    return DecodeError(f"Its {attribute!r} is not valid: {short(value)}.", reason="bad_attribute")


def _as_dict(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, Mapping):
        raise PayloadError(
            f"payload: {type(payload).__name__} is not a mapping. Let the route's payload= "
            "function return a dict of the keyword arguments that receivers get."
        )

    return dict(payload)


def _find_fault(values: Values, path: str, value: Any, above: tuple[int, ...]) -> str | None:
    """Return the path of the first value that cannot be encoded, the reason and the remedy.

    Return ``None`` if no single value is at fault.

    :param above: the ids of the containers that hold the value.
    """
    if id(value) in above:
        return f"{path}: {_kind(value)} contains itself. Send an id instead of the reference."

    try:
        plain = values.to_plain(value)
    except Exception as error:
        return f"{path}: {_describe(value, error)}"

    if type(plain) in CONTAINERS:
        above = (*above, id(value))
        fault = _container_fault(plain, len(above))

        if fault:
            return f"{path}{fault}"

        for step, inner in _steps(plain):
            if found := _find_fault(values, path + step, inner, above):
                return found

        if not isinstance(plain, set | frozenset):
            return None

    try:
        survey({"value": values.unpack(values.pack(plain))})
    except Exception as error:
        return f"{path}: {_describe(plain, error)}"

    return None


def _container_fault(container: Any, depth: int) -> str | None:
    """Return what is wrong with a container itself, or with one of its keys."""
    if depth > MAX_DEPTH:
        return f": nested deeper than {MAX_DEPTH} levels. Send a flatter payload."

    if len(container) > MAX_ITEMS:
        return (
            f": {len(container)} items, and a {_kind(container)} can have {MAX_ITEMS}. "
            "Send them in several events, or a reference to them."
        )

    for key in container if isinstance(container, dict) else ():
        if not isinstance(key, str):
            return (
                f": the key {short(key)} is of type {_kind(key)}, and keys must be strings. "
                "Convert it with str()."
            )

        if not _is_unicode(key):
            return f": the key {short(key)} {_SURROGATE}"

    return None


def _steps(container: Any) -> Iterator[tuple[str, Any]]:
    """Yield each value in a container, with the step from the container to it."""
    if isinstance(container, dict):
        for key, value in container.items():
            yield f".{key}" if key.isidentifier() else f"[{short(key)}]", value
    elif isinstance(container, set | frozenset):
        yield from (("[member]", value) for value in container)
    else:
        yield from ((f"[{index}]", value) for index, value in enumerate(container))


_SURROGATE = (
    "holds a lone surrogate, which no other program can read. "
    "Decode the text without 'surrogateescape', or send bytes."
)


def _describe(value: Any, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"the text {short(value)} {_SURROGATE}"
    if isinstance(error, UnfitError):
        return str(error)

    return f"{_kind(value)} cannot be encoded: {type(error).__name__}: {error}"


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    return type(value).__name__
