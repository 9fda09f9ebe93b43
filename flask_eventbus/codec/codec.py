"""Events as bytes, and bytes as events, within the limits of the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from reprlib import repr as short
from typing import Any, TypeVar

from ..errors import ConfigError, DecodeError, PayloadError
from ..event import Event, PackedPayload
from ..names import SERVICE_NAME, SIGNAL_NAME
from .envelope import (
    EVENT_ID,
    MAX_HOPS,
    MAX_KEY_BYTES,
    MAX_SEQ,
    MAX_TRACEPARENT_BYTES,
    SPECVERSION,
    Seal,
)
from .faults import find_fault
from .forms import UnfitError
from .values import Values, memory_of

__all__ = ["Codec", "Seal"]

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
        """The bytes of a payload, for a :class:`Seal` to make an event of.

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

    def seal(self, source: str, name: str) -> Seal:
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

        return Seal(source, name)

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


class _Draft:
    """An event that is not frozen yet: filled in a sixth of the time that ``Event()`` takes."""

    __slots__ = Event.__slots__


def _read(attributes: Any, via: str) -> Event:
    if type(attributes) is not dict:
        raise DecodeError(f"It is not a map: {short(attributes)}.", reason="not_a_map")
    if attributes.get("specversion") != SPECVERSION:
        raise _wrong_version(attributes)

    draft: Any = _Draft()
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
