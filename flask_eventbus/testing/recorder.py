"""Reads along what goes over a server in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import merge

import msgpack

from ..codec.codec import Codec
from ..codec.records import DeadLetter
from ..event import Event
from ..node import Node, nodes
from ..signals import wait_until_sent
from ..transport import connections
from ..transport.connections import Connections
from ..transport.pipe import Pipe

#: The channels and the streams of events, whatever the prefix. Channels are told from what
#: fakeredis publishes about its keys.
CHANNELS = "*}:channel"
STREAMS = "*}:stream"
DEAD = "*}:dead:*"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """An event that a service gave up: what ``eventbus.dead_letters`` has."""

    #: The service that gave it up.
    service: str
    #: ``"retries"``, ``"rejected"`` or another word of :data:`.event_dead_lettered`.
    reason: str
    #: The name of the receiver that failed, ``module.qualname``; empty if none did.
    receiver: str
    #: The event; ``None`` where the entry was none.
    event: Event | None
    #: What the receiver raised at last: ``"ValueError: no such user"``.
    error: str
    #: How many attempts were made.
    attempts: int


class Recording:
    """Everything published on a ``memory://`` server from now on, as the events that it is.

    :param url: the server's.
    """

    def __init__(self, url: str) -> None:
        self.events: list[Event] = []
        #: What services that listen gave up.
        self.given_up: list[GivenUp] = []
        self._reading = threading.Lock()
        self._codecs: list[tuple[Container[str], Codec]] = []
        connections = Connections(url, name="eventbus:testing")
        self._pipe = Pipe(connections, timeout=1.0)
        #: The last entry that was read of each stream.
        self._positions: dict[str, str] = {}
        self._connection = connections.open(timeout=1.0)
        self._connection.send_command("PSUBSCRIBE", CHANNELS)
        self._connection.read_response()

    def learn(self, node: Node) -> None:
        """Remember the types that travel in a node's events; the node itself may go."""
        self._codecs.append((node.registry.siblings, node.codec))

    def read(self) -> None:
        """Take up what was published since, and what was given up.

        Each channel and each stream keeps its order; among each other, events come in the
        order of their times.
        """
        with self._reading:
            streams = [self._stream(key) for key in self._keys(STREAMS)]
            self.events += merge(self._channels(), *streams, key=lambda event: event.time)

            for key in self._keys(DEAD):
                self.given_up += [self._read_letter(key, fields) for fields in self._entries(key)]

    def clear(self) -> None:
        """Forget all of it."""
        self.events.clear()
        self.given_up.clear()

    def close(self) -> None:
        """Let go of the server."""
        self._connection.disconnect()
        self._pipe.close()

    def _channels(self) -> list[Event]:
        found = []

        while self._connection.can_read(0):
            found.append(self._event(self._connection.read_response()[-1], via="channel"))

        return found

    def _stream(self, key: str) -> list[Event]:
        return [self._event(fields[b"event"], via="stream") for fields in self._entries(key)]

    def _event(self, body: bytes, *, via: str) -> Event:
        id = msgpack.unpackb(body, strict_map_key=False)["id"]
        return self._codec_of(id).decode(body, via=via)

    def _read_letter(self, key: str, fields: dict[bytes, bytes]) -> GivenUp:
        letter = DeadLetter.from_fields(fields)
        codec = self._codec_of(letter.event_id)
        # What is no event is given up without an id.
        event = codec.decode(fields[b"event"], via="stream") if letter.event_id else None
        return given_up(key.rpartition("}:dead:")[2], letter, event)

    def _keys(self, pattern: str) -> list[str]:
        return sorted(key.decode() for key in self._pipe.ask("KEYS", pattern))

    def _entries(self, key: str) -> Iterator[dict[bytes, bytes]]:
        """The entries that are new in a stream."""
        begin = self._positions.get(key)

        for id, flat in self._pipe.ask("XRANGE", key, f"({begin}" if begin else "-", "+"):
            self._positions[key] = id.decode()
            yield dict(zip(flat[::2], flat[1::2], strict=True))

    def _codec_of(self, id: str) -> Codec:
        node = id.rpartition("-")[0]
        return next((codec for names, codec in self._codecs if node in names), Codec())


def given_up(service: str, letter: DeadLetter, event: Event | None) -> GivenUp:
    """A dead letter of a service, as a test sees it."""
    return GivenUp(
        service=service,
        reason=letter.reason,
        receiver=letter.receiver,
        event=event,
        error=letter.error,
        attempts=letter.attempts,
    )


#: Seconds that events sent before get to reach the server they were sent to.
LEAVE = 1.0

#: Seconds that nodes may take to find out what takes them a millisecond.
PATIENCE = 5.0


@contextmanager
def diverted(url: str) -> Iterator[None]:
    """Let all nodes, present and future, use the server at ``url`` until the end of the block.

    Nodes that listen go on listening there, and afterwards on their own server again.
    """
    before = connections.diversion
    listening = [node for node in nodes if node.listening]
    _divert(url, listening)

    try:
        yield
    finally:
        _divert(before, listening)
        connections.memory_servers.pop(url, None)


def _divert(url: str | None, listening: Iterable[Node]) -> None:
    # What was sent so far goes where it was meant to go.
    _stop_all()
    connections.diversion = url
    # What another thread began between the two begins anew.
    _stop_all()

    for node in listening:
        node.start()


def _stop_all() -> None:
    for node in list(nodes):
        node.stop(flush=LEAVE)


def find_out(found: Sequence[Node], *, there: bool) -> None:
    """Let nodes find out whether Redis is there, and wait until they have."""
    for node in found:
        node.ask()

    _wait_until(lambda: all(node.health().publishing is there for node in found))
    wait_until_sent()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE

    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"The buses did not take note of Redis within {PATIENCE:g} s.")

        time.sleep(0.001)
