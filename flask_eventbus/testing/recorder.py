"""Record events and dead letters from a Redis server in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import merge

import msgpack

from ..codec.codec import Codec
from ..codec.records import DeadLetter
from ..event import Event
from ..node import Node, nodes
from ..signals import wait_until_sent
from ..transport import connection, connections
from ..transport.connections import Connections
from ..transport.pipe import Pipe

#: Key patterns of channels, streams and dead letters with any prefix. The pattern of channels
#: does not match the keyspace notifications of fakeredis.
CHANNELS = "*}:channel"
STREAMS = "*}:stream"
DEAD = "*}:dead:*"


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


#: Seconds to wait for events sent earlier, which go to the node's own server.
LEAVE = 1.0

#: Seconds to wait for the threads of nodes, which usually take a millisecond.
PATIENCE = 5.0


@contextmanager
def diverted(url: str) -> Iterator[None]:
    """Connect all nodes, present and future, to the server at ``url`` until the block ends.

    Nodes that listen continue to listen there, and on their own server after the block.
    """
    before = connections.diversion
    listening = [node for node in nodes if node.listening]
    _divert(url, listening)

    try:
        yield
    finally:
        _divert(before, listening)
        connection.memory_servers.pop(url, None)


def _divert(url: str | None, listening: Iterable[Node]) -> None:
    # Events sent so far still go to the earlier server.
    _stop_all()
    connections.diversion = url
    # Another thread may have started a node with the earlier URL in between.
    _stop_all()

    for node in listening:
        node.start()


def _stop_all() -> None:
    for node in list(nodes):
        node.stop(flush=LEAVE)


def await_health(watched: Sequence[Node], *, available: bool) -> None:
    """Make nodes probe Redis, and wait until their health shows whether it is available."""
    for node in watched:
        node.ask()

    deadline = time.monotonic() + PATIENCE

    while any(node.health().publishing is not available for node in watched):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"The buses did not notice the state of Redis within {PATIENCE:g} s."
            )

        time.sleep(0.001)

    wait_until_sent()
