"""An event that waits to be written, its destination, and the state of its route."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

from ..codec.codec import MAX_ID_BYTES, SEQ_BYTES, Codec, Envelope, attributes_bytes
from ..config import Age, Config
from ..errors import ConfigError, HopLimitError, PayloadError
from ..event import Event, handling
from ..routing.routes import Route
from ..transport.keys import ChannelKeys, StreamKeys


class TooFewReplicasError(Exception):
    """Redis stored the event, but too few replicas have confirmed it."""


class NoWritesError(Exception):
    """Redis answers but accepts no writes: it is full, lacks replicas, or cannot save."""


class ChannelDestination:
    """A channel: Redis delivers the event to the current listeners and does not store it.

    :param name: name of the signal.
    :param key: Redis key of the channel or the stream.
    """

    is_stream = False
    #: Number of replicas that must have an event before it counts as confirmed.
    replicas = 0

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self.key = key
        self._head = pack_start(3, "PUBLISH", key)

    def command(self, body: bytes) -> bytes:
        """Return ``PUBLISH key body``."""
        return b"%b$%d\r\n%b\r\n" % (self._head, len(body), body)


class StreamDestination:
    """A stream, which Redis trims by length or by age whenever it adds an event.

    :param maxlen: approximate number of entries that the stream keeps, or their age. The clock of
        Redis measures the age: the clock of this machine may be wrong, and could trim entries that
        are not read yet.
    :param replicas: number of replicas that must confirm an event.
    """

    is_stream = True

    def __init__(self, name: str, key: str, *, maxlen: int | Age, replicas: int = 0) -> None:
        self.name = name
        self.key = key
        self.replicas = replicas
        #: Milliseconds for which the stream keeps an entry; ``None`` if its length is limited.
        self.age_ms: int | None = None
        #: Time of Redis in milliseconds since 1970, from ``TIME`` or the newest entry id. ``None``
        #: before it was asked for, 0 if Redis refused to tell it; then nothing is trimmed.
        self.newest: int | None = None

        if isinstance(maxlen, Age):
            self.age_ms = maxlen.seconds * 1_000
            self._head = pack_start(8, "XADD", key, "MINID", "~")
        else:
            self._head = pack_start(8, "XADD", key, "MAXLEN", "~", str(maxlen)) + _FIELD

    def command(self, body: bytes) -> bytes:
        """Return ``XADD key MAXLEN ~ n * event body``, or ``MINID ~ ms`` for an age."""
        head = self._head

        if self.age_ms is not None:
            oldest = b"%d" % max(0, (self.newest or 0) - self.age_ms)
            head = b"%b$%d\r\n%b\r\n%b" % (head, len(oldest), oldest, _FIELD)

        return b"%b$%d\r\n%b\r\n" % (head, len(body), body)


#: Where an event is published to; it builds the Redis command for it.
Destination = ChannelDestination | StreamDestination


def pack_start(count: int, *words: str) -> bytes:
    """Return the start of a command that has ``count`` arguments in total."""
    return b"*%d\r\n" % count + b"".join(map(_word, words))


def pack(*words: str) -> bytes:
    """Return a complete command, as bytes of the Redis protocol."""
    return pack_start(len(words), *words)


def _word(word: str) -> bytes:
    raw = word.encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


#: ``*`` lets Redis choose the entry id. ``event`` is the entry's only field; its value follows.
_FIELD = _word("*") + _word("event")


#: The optional attributes of most events.
_NO_ATTRIBUTES: Mapping[str, Any] = {}


class RouteState:
    """Data shared by all events of one signal and route from one node, and their counter."""

    __slots__ = ("destination", "envelope", "is_stream", "name", "numbers", "overhead", "route")

    def __init__(self, *, route: Route, destination: Destination, envelope: Envelope) -> None:
        self.name = destination.name
        self.route = route
        self.destination = destination
        self.envelope = envelope
        self.is_stream = destination.is_stream
        #: Size in bytes of an event without payload and optional attributes, with the longest id.
        self.overhead = envelope.least + (0 if destination.is_stream else SEQ_BYTES)
        #: Values of ``seq``, from 1; used for channel events only.
        self.numbers = itertools.count(1)


class Message:
    """An event that waits to be written; the thread that writes it also encodes it.

    :param data: the packed payload.
    :param attributes: optional attributes of the event, such as ``key`` and ``traceparent``.
    :param confirm: True if the sender waits for the result.
    """

    __slots__ = (
        "attributes",
        "body",
        "data",
        "error",
        "id",
        "is_finished",
        "may_write",
        "number",
        "promised",
        "route_state",
        "seq",
        "size",
        "time_ns",
        "unanswered",
        "wakeup",
        "withdrawn",
    )

    def __init__(
        self, route_state: RouteState, data: bytes, attributes: Mapping[str, Any], confirm: bool
    ) -> None:
        self.route_state = route_state
        self.data = data
        self.attributes = attributes
        #: Upper bound of the encoded size in bytes; refined once the event has an id.
        self.size = route_state.overhead + len(data)
        #: Position among all events of the node, from 1; 0 until it is assigned.
        self.number = 0
        self.id = ""
        #: Time of the event in nanoseconds since 1970; 0 until it is assigned.
        self.time_ns = 0
        #: Position among the channel events of its route, from 1; ``None`` until it is assigned.
        self.seq: int | None = None
        self.body: bytes | None = None
        #: True once the event has left the buffer, successfully or with :attr:`error`.
        self.is_finished = False
        self.error: Exception | None = None
        #: True once ``send()`` has raised for this event, so that it must not be written.
        self.withdrawn = False
        #: Number of times the event was sent without a reply; if not 0, Redis may have it.
        self.unanswered = 0
        #: True if ``send()`` has returned, so that an outage must not raise for this event.
        self.promised = False
        #: True if the blocked sender may be woken to write the next batch.
        self.may_write = False
        #: Wakes the sender; ``None`` if it does not wait. A lock is ten times faster than
        #: :class:`threading.Event`.
        self.wakeup: threading.Lock | None = None

        if attributes:
            self.size += attributes_bytes(attributes)

        if confirm:
            self.wakeup = threading.Lock()
            self.wakeup.acquire()

    def copy(self) -> Message:
        """Return a copy that the sender can send again, with the same id and encoded bytes."""
        confirm = self.route_state.route.confirm
        copy = Message(self.route_state, self.data, self.attributes, confirm)
        copy.id, copy.body = self.id, self.body
        copy.time_ns, copy.seq = self.time_ns, self.seq
        copy.size, copy.unanswered = self.size, self.unanswered
        return copy

    def assign_id(self, node: str, number: int, time_ns: int) -> None:
        """Set the number, and the id ``NODE-NUMBER`` unless the event is sent again.

        :param time_ns: nanoseconds since 1970, unless the event has a time already.
        """
        self.number = number

        if self.id:
            return

        self.id = id = f"{node}-{number}"
        # The length of a string is encoded in two bytes, or in one if it is below 32.
        self.size -= MAX_ID_BYTES - len(id) + (len(id) < 32)
        self.time_ns = self.time_ns or time_ns

    def promise(self, time_ns: int) -> None:
        """Set the time of the event, and mark it as accepted from its sender.

        :param time_ns: nanoseconds since 1970.
        """
        self.time_ns = time_ns
        self.promised = True

    def assign_seq(self) -> None:
        """Set ``seq``, the position among the channel events of its route, unless it is set."""
        if self.seq is None and not self.route_state.is_stream:
            self.seq = next(self.route_state.numbers)

    def encoded(self) -> bytes:
        """Return the encoded event; encode it at the first call only."""
        if self.body is None:
            self.body = self.route_state.envelope.encode(
                self.data, self.id, self.time_ns, self.seq, self.attributes
            )

        return self.body

    def wait_for_wakeup(self, deadline: float) -> bool:
        """Return True if the sender is woken by ``deadline``.

        It is woken when its event is finished, or when it must write the next batch.
        """
        return self.wakeup is None or self.wakeup.acquire(
            timeout=max(0.0, deadline - time.monotonic())
        )

    def wake(self) -> None:
        """Wake the sender if it waits."""
        if self.wakeup is not None:
            try:
                self.wakeup.release()
            except RuntimeError:
                return  # it was woken before, and has not run yet

    def finish(self, error: Exception | None = None) -> None:
        """Store the result and wake the sender.

        :param error: why the event was not published; ``None`` if it was.
        """
        self.error = error
        self.may_write = False
        self.is_finished = True

        if self.wakeup is not None:
            self.wake()


class Destinations:
    """Creates the destination of a signal from its route and the settings."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channels = ChannelKeys(config.prefix)
        self._streams = StreamKeys(config.prefix)

    def find(self, name: str, route: Route) -> Destination:
        """Return the destination; the settings are used for options that the route leaves out."""
        if route.via == "channel":
            return ChannelDestination(name, self._channels.key(name))

        key = self._streams.stream(name)
        kept = self._config.maxlen if route.maxlen is None else route.maxlen
        replicas = self._config.replicas if route.replicas is None else route.replicas

        return StreamDestination(name, key, maxlen=kept, replicas=replicas)


class MessageBuilder:
    """Creates a :class:`Message` from a signal and its payload, in the thread that sends.

    It keeps one :class:`RouteState` for each signal and ``via``.

    :param trace: returns the W3C trace context of the current request; ``None`` without requests.
        The current span of OpenTelemetry and the event being handled take precedence over it.
    """

    def __init__(
        self, config: Config, codec: Codec, *, trace: Callable[[], str | None] | None
    ) -> None:
        self._config = config
        self._codec = codec
        self._trace = trace
        self._max_bytes = config.max_event_bytes
        self._destinations = Destinations(config)
        self._route_states: dict[tuple[str, str], RouteState] = {}

    def build(
        self, name: str, payload: Mapping[str, Any], route: Route, *, confirm: bool
    ) -> Message:
        """Return a message with a copy of the payload as it is now.

        :param confirm: True if the sender waits for the result.
        :raises PayloadError: a value cannot be encoded, the key is missing, or the event is too
            large.
        :raises HopLimitError: the chain of causes is too long.
        """
        route_state = self._route_states.get((name, route.via))

        if route_state is None or route_state.route is not route:
            route_state = self.route_state(name, route)

        attributes = _NO_ATTRIBUTES

        if (
            self._trace is not None
            or handling.get() is not None
            or "opentelemetry.trace" in sys.modules
        ):
            attributes = self._causes(name)

        data = self._codec.pack_payload(payload)

        if route.key is not None:
            key = _partition(route_state, route.key, payload)
            attributes = {**attributes, "key": key}

        message = Message(route_state, data, attributes, confirm)

        if message.size > self._max_bytes:
            raise PayloadError(
                f"An event of {name!r} would have up to {message.size:,} bytes, more than the "
                f"{self._max_bytes:,} of 'EVENTBUS_MAX_EVENT_BYTES'. Send less, for "
                "example a reference to where the data is, or raise the limit in every service."
            )

        return message

    def route_state(self, name: str, route: Route) -> RouteState:
        """Return the state of a signal's route; create it at the first call."""
        key = (name, route.via)
        route_state = self._route_states.get(key)

        if route_state is None:
            return self._route_states.setdefault(key, self._make(name, route))

        if route_state.route is not route and route_state.route != route:
            changed = self._make(name, route)
            # Listeners expect ``seq`` to continue.
            changed.numbers = route_state.numbers
            route_state = self._route_states[key] = changed

        return route_state

    def _make(self, name: str, route: Route) -> RouteState:
        return RouteState(
            route=route,
            destination=self._destinations.find(name, route),
            envelope=self._codec.envelope(self._config.service, name),
        )

    def _causes(self, name: str) -> Mapping[str, Any]:
        """Return the attributes that say what an event was sent in: a trace, another event."""
        span = _current_span() if "opentelemetry.trace" in sys.modules else None
        cause = handling.get()
        traceparent = span or (cause.traceparent if cause else None)

        if traceparent is None and self._trace is not None:
            traceparent = self._trace()

        if cause is None:
            return _NO_ATTRIBUTES if traceparent is None else {"traceparent": traceparent}

        hops = cause.hops + 1

        if hops > self._config.max_hops:
            raise HopLimitError(_chain(name, cause, self._config.max_hops))

        return {
            "hops": hops,
            "causation_id": cause.id,
            "correlation_id": cause.correlation_id or cause.id,
            "traceparent": traceparent,
        }


def _partition(route_state: RouteState, name: str, payload: Mapping[str, Any]) -> str:
    """Return the value of the route's ordering key in a payload, as text.

    :raises PayloadError: the key is missing, its value is empty, or it cannot be encoded.
    """
    if name not in payload:
        raise PayloadError(
            f"payload.{name}: the route of {route_state.name!r} keeps events in order by this key, "
            "and the key is missing. Send it, or remove 'key' from the route."
        )

    value = payload[name]
    key = "" if value is None else str(value)

    if not key:
        raise PayloadError(
            f"payload.{name}: the route of {route_state.name!r} keeps events in order by this key, "
            f"and {short(value)} is not a usable value. Send another value, or remove 'key' "
            "from the route."
        )

    # Raise an encoding error now, in the sender's thread, and not later in the writer thread.
    route_state.envelope(b"", id="", time_ns=0, key=key)
    return key


def _current_span() -> str | None:
    """Return the trace context of OpenTelemetry's current span; ``None`` if there is none.

    OpenTelemetry is not imported here: a program with a span has already loaded it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    find_span = getattr(trace, "get_current_span", None)

    if find_span is None:
        return None

    context = find_span().get_span_context()

    if not context.is_valid:
        return None

    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _chain(name: str, cause: Event, limit: int) -> str:
    return (
        f"An event of {name!r} would be number {cause.hops + 2} of a chain: "
        f"{cause.correlation_id or cause.id} started it, ... -> {cause.name!r} from "
        f"{cause.source!r} ({cause.id}) -> {name!r}. 'EVENTBUS_MAX_HOPS' allows {limit} hops. "
        "Find the receivers that answer each other's signals, and break the loop."
    )


def check_route(config: Config, route: Route) -> None:
    """Check that the server of ``EVENTBUS_URL`` supports a route.

    :raises ConfigError: the route uses a stream, and the server is a cluster.
    """
    if route.via == "stream" and not config.has_streams:
        raise ConfigError(
            f"The route of {route.name!r} asks for via 'stream', and 'EVENTBUS_URL' is a cluster, "
            "which does not support streams yet. Use via 'channel', or a single Redis: "
            "'redis://' or 'redis+sentinel://'."
        )
