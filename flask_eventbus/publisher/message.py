"""An event on its way out, and what is the same for all of its name."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..codec.codec import PACKED_ID_BYTES, Codec, Envelope, packed_bytes
from ..config import Age, Config
from ..errors import ConfigError
from ..routing.routes import Route
from ..transport.keys import ChannelKeys, StreamKeys


class TooFewReplicasError(Exception):
    """Redis has an event, and not enough of its replicas do."""


class NoWritesError(Exception):
    """Redis is there, and takes no writes now: it is full, lacks replicas, or cannot save."""


class Destination(Protocol):
    """Makes commands of events, for a connection to send as they are."""

    #: The signal's name.
    name: str
    #: The Redis key: a channel or a stream.
    key: str
    #: Whether Redis keeps the events: nothing of it is dropped unseen.
    is_stream: bool
    #: How many replicas are to have an event before it counts as confirmed.
    replicas: int
    #: True if the stream keeps events by their age.
    by_age: bool

    def command(self, body: bytes) -> bytes:
        """The command that publishes an event's bytes, as Redis reads it."""


class ChannelDestination:
    """Over a channel: whoever listens now hears it."""

    is_stream = False
    by_age = False
    replicas = 0

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self.key = key
        self._head = head(3, "PUBLISH", key)

    def command(self, body: bytes) -> bytes:
        """``PUBLISH key body``."""
        return b"%b$%d\r\n%b\r\n" % (self._head, len(body), body)


class StreamDestination:
    """Into a stream: kept for those who read it later.

    :param maxlen: about how many entries the stream keeps.
    """

    is_stream = True
    by_age = False

    def __init__(self, name: str, key: str, *, maxlen: int, replicas: int = 0) -> None:
        self.name = name
        self.key = key
        self.replicas = replicas
        self._head = head(8, "XADD", key, "MAXLEN", "~", str(maxlen)) + _FIELD

    def command(self, body: bytes) -> bytes:
        """``XADD key MAXLEN ~ n * event body``."""
        return b"%b$%d\r\n%b\r\n" % (self._head, len(body), body)


class AgingStreamDestination:
    """Into a stream that keeps what is younger than an age, by Redis's clock.

    The clock of this machine may be wrong, and would remove what others have yet to read.

    :param age: seconds.
    """

    is_stream = True
    by_age = True

    def __init__(self, name: str, key: str, *, age: int, replicas: int = 0) -> None:
        self.name = name
        self.key = key
        self.replicas = replicas
        self._age_ms = age * 1_000
        #: The time of Redis, in milliseconds since 1970, or of the last id that it gave;
        #: ``None`` until something is known, and nothing is trimmed.
        self.newest: int | None = None
        self._head = head(8, "XADD", key, "MINID", "~")

    def command(self, body: bytes) -> bytes:
        """``XADD key MINID ~ ms * event body``."""
        oldest = b"%d" % max(0, (self.newest or 0) - self._age_ms)
        start = b"%b$%d\r\n%b\r\n" % (self._head, len(oldest), oldest)
        return b"%b%b$%d\r\n%b\r\n" % (start, _FIELD, len(body), body)


def head(count: int, *words: str) -> bytes:
    """The first words of a command of ``count`` words."""
    return b"*%d\r\n" % count + b"".join(map(_word, words))


def whole(*words: str) -> bytes:
    """A command."""
    return head(len(words), *words)


def _word(word: str) -> bytes:
    raw = word.encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


#: The id is Redis's to give, and what follows is the value of the only field.
_FIELD = _word("*") + _word("event")


class RouteState:
    """The events of one name from one node: what is the same for each, and their count."""

    __slots__ = ("destination", "envelope", "is_stream", "name", "numbers", "route")

    def __init__(self, *, route: Route, destination: Destination, envelope: Envelope) -> None:
        self.name = destination.name
        self.route = route
        self.destination = destination
        self.envelope = envelope
        self.is_stream = destination.is_stream
        #: The running numbers, from 1; an entry of a stream has none, since Redis numbers it.
        self.numbers = itertools.count(1)


class Message:
    """An event that waits to be written; its envelope is made by the thread that writes it."""

    __slots__ = (
        "_wakeup",
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
        "size",
        "unanswered",
        "withdrawn",
    )

    def __init__(
        self, route_state: RouteState, data: bytes, attributes: dict[str, Any], *, confirm: bool
    ) -> None:
        self.route_state = route_state
        self.data = data
        self.attributes = attributes
        #: The bytes that the event has; the most that it may have as long as it has no id.
        self.size = route_state.envelope.most_bytes(
            data, attributes, numbered=not route_state.is_stream
        )
        #: The running number of the node's events, from 1; none yet.
        self.number = 0
        self.id = ""
        self.body: bytes | None = None
        #: Whether it has left the buffer, with :attr:`error` or without.
        self.is_finished = False
        self.error: Exception | None = None
        #: Whether its sender was told that it is not published.
        self.withdrawn = False
        #: How often it was sent without an answer: Redis may have it.
        self.unanswered = 0
        #: Whether its sender went on in the belief that it will be published.
        self.promised = False
        #: Whether its sender waits, and writes what waits when it is called.
        self.may_write = False
        #: Wakes its sender, if one is to wait: a lock costs a tenth of a :class:`threading.Event`.
        self._wakeup = threading.Lock() if confirm else None

        if self._wakeup is not None:
            self._wakeup.acquire()

    def again(self) -> Message:
        """The same event for another try of its sender: with its id, and its bytes if it has."""
        confirm = self._wakeup is not None
        same = Message(self.route_state, self.data, {}, confirm=confirm)
        same.attributes, same.id, same.body = self.attributes, self.id, self.body
        same.size, same.unanswered = self.size, self.unanswered
        return same

    def assign_id(self, node: str, number: int, time_ns: int) -> None:
        """Give it the id that it keeps however often it is sent."""
        self.number = number
        self.id = self.attributes["id"] = f"{node}-{number}"
        self.size -= PACKED_ID_BYTES - packed_bytes(self.id)
        self.attributes.setdefault("time_ns", time_ns)

    def promise(self, time_ns: int) -> None:
        """Keep the time at which it was sent: it leaves later, whatever Redis does then."""
        self.attributes["time_ns"] = time_ns
        self.promised = True

    def assign_seq(self) -> None:
        """Count it among the events of its name, once."""
        if not self.route_state.is_stream and "seq" not in self.attributes:
            self.attributes["seq"] = next(self.route_state.numbers)

    def encoded(self) -> bytes:
        """The event's bytes, made once: a second try sends the same."""
        if self.body is None:
            self.body = self.route_state.envelope(self.data, **self.attributes)

        return self.body

    def wait_until_finished(self, deadline: float, *, unless: Callable[[], bool]) -> bool:
        """Wait until it is settled, if somebody wants to know, or until ``deadline``.

        :param unless: asked when its sender is called; True if it is not worth waiting.
        """
        while self._wakeup is not None and not self.is_finished:
            if not self.wait_for_wakeup(deadline) or unless():
                return self.is_finished

        return True

    def wait_for_wakeup(self, deadline: float) -> bool:
        """Whether its sender is called by ``deadline``: it is settled, or to be written by it."""
        return self._wakeup is None or self._wakeup.acquire(
            timeout=max(0.0, deadline - time.monotonic())
        )

    def wake(self) -> None:
        """Wake its sender."""
        if self._wakeup is not None:
            try:
                self._wakeup.release()
            except RuntimeError:
                return  # it was called already, and did not come yet

    def finish(self, error: Exception | None = None) -> None:
        """Tell whoever waits for it how it ended."""
        self.error = error
        # Its sender goes on.
        self.may_write = False
        self.is_finished = True
        self.wake()


class Destinations:
    """Finds the way that the events of a name go, by their route and the settings."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channels = ChannelKeys(config.prefix)
        self._streams = StreamKeys(config.prefix)

    def find(self, name: str, route: Route) -> Destination:
        """The way that ``route`` asks for; settings of the service stand in for its options."""
        if route.via == "channel":
            return ChannelDestination(name, self._channels.key(name))

        key = self._streams.stream(name)
        kept = self._config.maxlen if route.maxlen is None else route.maxlen
        replicas = self._config.replicas if route.replicas is None else route.replicas

        if isinstance(kept, Age):
            return AgingStreamDestination(name, key, age=kept.seconds, replicas=replicas)

        return StreamDestination(name, key, maxlen=kept, replicas=replicas)


class RouteStates:
    """Makes the state of each route, one for each name and way to travel, with the first event."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self._service = config.service
        self._codec = codec
        self._destinations = Destinations(config)
        self._route_states: dict[tuple[str, str], RouteState] = {}

    def find(self, name: str, route: Route) -> RouteState:
        """The lane of a name, as ``route`` has it."""
        key = (name, route.via)
        route_state = self._route_states.get(key)

        if route_state is None:
            return self._route_states.setdefault(key, self._make(name, route))

        if route_state.route is not route and route_state.route != route:
            route_state = self._route_states[key] = self._make(name, route, route_state)

        return route_state

    def _make(self, name: str, route: Route, before: RouteState | None = None) -> RouteState:
        envelope = self._codec.seal(self._service, name)
        route_state = RouteState(
            route=route, destination=self._destinations.find(name, route), envelope=envelope
        )

        if before is not None:
            # Those who listen count on.
            route_state.numbers = before.numbers

        return route_state


def check_route(config: Config, route: Route) -> None:
    """Refuse what the server of the settings cannot do.

    :raises ConfigError: the route asks for a stream in a cluster.
    """
    if route.via == "stream" and config.url.startswith("redis+cluster://"):
        raise ConfigError(
            f"The route of {route.name!r} asks for via 'stream', and 'EVENTBUS_URL' is a cluster, "
            "for which there are no streams yet. Use 'channel' there, or one Redis: 'redis://' or 'redis+sentinel://'."
        )
