"""Record what services publish, compare it with a test's expectations, and explain differences."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from heapq import merge
from reprlib import Repr
from typing import Any

import msgpack

from ..codec.codec import Codec, split_message
from ..codec.records import DeadLetter
from ..event import Event
from ..node import Node
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription, subscription_for
from ..text import did_you_mean
from ..transport.connections import Connections
from ..transport.pipe import Pipe

#: Key patterns of channels, streams and dead letters with any prefix. The pattern of channels
#: does not match the keyspace notifications of fakeredis.
CHANNELS = "*}:channel"
STREAMS = "*}:stream"
DEAD = "*}:dead:*"

#: Most events to list in a failure message.
SHOWN = 10

_short = Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """A dead letter, as ``eventbus.dead_letters`` returns it."""

    #: The service whose receiver did not handle the event.
    service: str
    #: ``"retries"``, ``"rejected"`` or another reason of :data:`.event_dead_lettered`.
    reason: str
    #: The name of the receiver that failed, ``module.qualname``; empty if none failed.
    receiver: str
    #: The event; ``None`` if the stream entry was not an event.
    event: Event | None
    #: The last error of the receiver: ``"ValueError: no such user"``.
    error: str
    #: Number of attempts.
    attempts: int


class Recording:
    """Records what is published on a ``memory://`` server from now on.

    :param url: the URL of the server.
    """

    def __init__(self, url: str) -> None:
        self.events: list[Event] = []
        #: Dead letters of the services that listen to the server.
        self.given_up: list[GivenUp] = []
        self._reading = threading.Lock()
        self._codecs: list[tuple[Container[str], Codec]] = []
        connections = Connections(url, name="eventbus:testing")
        self._pipe = Pipe(connections, timeout=1.0)
        #: Id of the last entry read from each stream, by key.
        self._positions: dict[str, str] = {}
        self._connection = connections.open(timeout=1.0)
        self._connection.send_command("PSUBSCRIBE", CHANNELS)
        self._connection.read_response()

    def learn(self, node: Node) -> None:
        """Remember the codec of a node, which has its registered types, but not the node."""
        self._codecs.append((node.registry.siblings, node.codec))

    def read(self) -> None:
        """Record the events and dead letters since the last call.

        Events of one channel or stream keep their order. Events of several are ordered by their
        times.
        """
        with self._reading:
            streams = [self._stream(key) for key in self._keys(STREAMS)]
            self.events += merge(self._channels(), *streams, key=lambda event: event.time)

            for key in self._keys(DEAD):
                self.given_up += [self._read_letter(key, fields) for fields in self._entries(key)]

    def clear(self) -> None:
        """Forget the recorded events and dead letters."""
        self.events.clear()
        self.given_up.clear()

    def close(self) -> None:
        """Close the connections to the server."""
        self._connection.disconnect()
        self._pipe.close()

    def _channels(self) -> list[Event]:
        found: list[Event] = []

        while self._connection.can_read(0):
            message = self._connection.read_response()[-1]
            found += [self._event(body, via="channel") for body in split_message(message)]

        return found

    def _stream(self, key: str) -> list[Event]:
        return [self._event(fields[b"event"], via="stream") for fields in self._entries(key)]

    def _event(self, body: bytes, *, via: str) -> Event:
        id = msgpack.unpackb(body, strict_map_key=False)["id"]
        return self._codec_of(id).decode(body, via=via)

    def _read_letter(self, key: str, fields: dict[bytes, bytes]) -> GivenUp:
        letter = DeadLetter.from_fields(fields)
        codec = self._codec_of(letter.event_id)
        # The dead letter of an entry that is not an event has no event id.
        event = codec.decode(fields[b"event"], via="stream") if letter.event_id else None
        return given_up(key.rpartition("}:dead:")[2], letter, event)

    def _keys(self, pattern: str) -> list[str]:
        return sorted(key.decode() for key in self._pipe.ask("KEYS", pattern))

    def _entries(self, key: str) -> Iterator[dict[bytes, bytes]]:
        """Yield the fields of the entries that were added to a stream since the last call."""
        begin = self._positions.get(key)

        for id, flat in self._pipe.ask("XRANGE", key, f"({begin}" if begin else "-", "+"):
            self._positions[key] = id.decode()
            yield dict(zip(flat[::2], flat[1::2], strict=True))

    def _codec_of(self, id: str) -> Codec:
        node = id.rpartition("-")[0]
        return next((codec for names, codec in self._codecs if node in names), Codec())


def given_up(service: str, letter: DeadLetter, event: Event | None) -> GivenUp:
    """Return a dead letter in the form that tests get."""
    return GivenUp(
        service=service,
        reason=letter.reason,
        receiver=letter.receiver,
        event=event,
        error=letter.error,
        attempts=letter.attempts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """An event that a test looks for, by its name and some of its payload."""

    #: A signal's name, or a pattern of names.
    name: str
    #: Values, matchers such as ``unittest.mock.ANY``, or functions that take the value.
    payload: Mapping[str, Any]
    #: True if the payload must have no other keys.
    exact: bool = False
    #: ``"channel"`` or ``"stream"``; ``None`` for either.
    via: str | None = None

    def is_met_by(self, event: Event) -> bool:
        """Return True if ``event`` has the name, the payload and the transport."""
        return matches(self.name, event.name) and not self.misfits(event)

    def misfits(self, event: Event) -> list[str]:
        """Describe each difference between an event and this expectation."""
        found = [] if self.via in (None, event.via) else [f"it went via {event.via!r}"]
        found += [
            _misfit(key, value, event.payload)
            for key, value in self.payload.items()
            if key not in event.payload or not _fits(value, event.payload[key])
        ]

        if self.exact:
            more = [key for key in event.payload if key not in self.payload]
            found += [f"it has {key!r} as well" for key in more]

        return found

    def __str__(self) -> str:
        shown = repr(self.name) + (f" via {self.via!r}" if self.via else "")

        if not self.payload:
            return shown + (" with nothing in it" if self.exact else "")

        return f"{shown} with {'exactly ' if self.exact else ''}{_shown(self.payload)}"


def why_unpublished(
    expectation: Expectation, times: int | None, events: Sequence[Event], nodes: Sequence[Node]
) -> str:
    """Return the failure message of an assertion, with the published events, nearest first."""
    found = sum(expectation.is_met_by(event) for event in events)
    sentences = [f"{expectation} was {_how_often(found, times)}."]

    if not any(matches(expectation.name, event.name) for event in events):
        sentences += _why_nothing(expectation.name, nodes)

    sentences.append("Published events, nearest first:" if events else "Nothing was published.")
    return "\n  ".join([" ".join(sentences), *_nearest(expectation, events)])


def why_not_received(event: Event, nodes: Sequence[Node]) -> str:
    """Return the failure message of a delivery that no receiver gets."""
    reasons = [reason for node in nodes if (reason := _why_not_delivered(node, event)) is not None]

    if not reasons:
        known = {name for node in nodes for name in node.subscriptions}
        reasons = [
            _suggest(event.name, known, f"Decorate a receiver with @bus.on({event.name!r}).")
        ]

    return " ".join([f"Nothing here receives {event.name!r} from {event.source!r}.", *reasons])


def receives(node: Node, event: Event) -> bool:
    """Return True if the settings and receivers of a node let the event run a receiver."""
    subscription = subscription_for(event.name, node.subscriptions)
    return (
        subscription is not None
        and node.config.enabled
        and subscription.accepts(event.source)
        and _is_reached(node, subscription, event)
        and bool(node.receivers_of(event))
    )


def _is_reached(node: Node, subscription: Subscription, event: Event) -> bool:
    """Return True if a node listens to the channel or the stream of the event."""
    if event.via == "channel":
        return subscription.via != "stream"

    return subscription.via != "channel" and node.config.has_streams


def _fits(expected: Any, actual: Any) -> bool:
    return bool(expected(actual) if inspect.isroutine(expected) else expected == actual)


def _misfit(key: str, expected: Any, payload: Mapping[str, Any]) -> str:
    if key not in payload:
        return f"it has no {key!r}"

    return f"{key} is {_short.repr(payload[key])}, not {_short.repr(expected)}"


def _how_often(found: int, times: int | None) -> str:
    count = "once" if found == 1 else f"{found} times"

    if not found:
        return "not published"

    return f"published {count}" + (f", not {times} times" if times else ", and should not be")


def _why_nothing(name: str, nodes: Sequence[Node]) -> list[str]:
    if not nodes:
        return ["There is no bus in this process: create the app or the bus first."]

    silent = sorted({node.config.service for node in nodes if not node.config.enabled})
    known = {name for node in nodes if node.config.enabled for name in _published_by(node)}
    sentences = [f"'EVENTBUS_ENABLED' is False for {service!r}." for service in silent]
    sentences += _why_waiting(name, nodes)

    if not any(matches(name, found) for found in known):
        remedy = "Name it in 'EVENTBUS_PUBLISH'."
        sentences += [f"No bus here publishes {name!r}.", _suggest(name, known, remedy)]

    return sentences


def _why_waiting(name: str, nodes: Sequence[Node]) -> list[str]:
    found = [route for node in nodes for route in node.routes.values() if matches(route.name, name)]

    stored = {
        node.context.relay
        for node in nodes
        for route in node.routes.values()
        if route.outbox and matches(route.name, name)
    }

    if stored:
        relay = min(stored)
        return [f"{name!r} is stored in the outbox: run '{relay} --once' first."]

    if any(route.after_commit for route in found):
        return [f"{name!r} is published after the commit of its transaction: commit first."]

    return []


def _published_by(node: Node) -> set[str]:
    """Return the names that a node publishes; for patterns, the signals that exist so far."""
    routes = node.routes.values()
    signals = {name for name in node.registry.namespace if any(r.covers(name) for r in routes)}
    return signals | {route.name for route in routes if not is_pattern(route.name)}


def _why_not_delivered(node: Node, event: Event) -> str | None:
    """Explain why a node does not get the event; ``None`` if it has nothing for that signal."""
    subscription = subscription_for(event.name, node.subscriptions)
    service = node.config.service

    if subscription is None and not node.receivers_of(event):
        return None

    if subscription is None:
        return (
            f"{service!r} has receivers for it, but does not subscribe: connect them with "
            f"@bus.on({event.name!r}), or name it in 'EVENTBUS_SUBSCRIBE'."
        )

    if not node.config.enabled:
        return f"{service!r} subscribes to it, but its 'EVENTBUS_ENABLED' is False."

    if not subscription.accepts(event.source):
        sources = ", ".join(sorted(subscription.sources or ()))
        return f"{service!r} subscribes to it only from {sources}: pass source=."

    if not node.receivers_of(event):
        return (
            f"{service!r} subscribes to it, but has no receiver for this source: connect one, "
            "or pass the source= of its receivers."
        )

    if event.via == "stream" and not node.config.has_streams:
        return f"{service!r} reads no streams: its 'EVENTBUS_URL' names a Redis Cluster."

    if not _is_reached(node, subscription, event):
        other = "stream" if event.via == "channel" else "channel"
        return f"{service!r} subscribes to it only via {other!r}: pass via={other!r}."

    return (
        f"{service!r} ignores its own events: pass the source= of another service, or "
        "subscribe with 'echo': True."
    )


def _suggest(name: str, known: Iterable[str], remedy: str) -> str:
    names = sorted(known)
    return did_you_mean(name, names) if names else remedy


def _nearest(expectation: Expectation, events: Sequence[Event]) -> list[str]:
    ranked = sorted(events, key=lambda event: _distance(expectation, event))
    lines = [_line(expectation, event) for event in ranked[:SHOWN]]

    if len(events) > SHOWN:
        lines.append(f"and {len(events) - SHOWN} more")

    return lines


def _distance(expectation: Expectation, event: Event) -> tuple[float, int]:
    if matches(expectation.name, event.name):
        return -1.0, len(expectation.misfits(event))

    likeness = SequenceMatcher(None, expectation.name, event.name).ratio()
    return -likeness, len(expectation.misfits(event))


def _line(expectation: Expectation, event: Event) -> str:
    line = f"{event.name}({_shown(event.payload)}) from {event.source!r}"
    misfits = expectation.misfits(event) if matches(expectation.name, event.name) else []
    return f"{line}: {', '.join(misfits)}" if misfits else line


def _shown(payload: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short.repr(value)}" for key, value in payload.items())
