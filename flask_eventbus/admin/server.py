"""Ask a server about itself, such as its settings and listeners, and publish one event to it."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import redis

from ..config import SIGNAL_NAME, TIMING
from ..errors import OperationError, PublishError
from ..node import Node
from ..publisher.connection import PublishConnection
from ..publisher.message import (
    Message,
    MessageBuilder,
    NoWritesError,
    TooFewReplicasError,
    check_route,
)
from ..routing.routes import Route
from ..text import reason_of
from ..transport.connection import OUTAGE, read_reply
from ..transport.connections import Connections
from ..transport.keys import ADD, PUBLISH, ChannelKeys, StreamKeys, grant_the_user, remedy
from ..transport.urls import trouble_of

#: Seconds a server has to answer each question.
TIMEOUT = 3.0

#: Seconds that a command which only reads waits for a server in total.
PATIENCE = 30.0


#: Last commands in ``CLIENT LIST`` of connections that read streams; publishers use none of them.
_READS = ("xreadgroup", "xread", "smembers")


@dataclass(frozen=True, slots=True)
class Listening:
    """A connection of a listener, from ``CLIENT LIST``."""

    service: str
    #: Id of the process's node.
    node: str
    #: Numbers of channels and of patterns that it listens to.
    channels: int
    patterns: int
    #: True if it reads streams.
    streams: bool = False


class Server:
    """One connection to a server, open while it is used in a ``with`` block.

    :raises redis.ConnectionError: the server cannot be reached, or does not let this user in.
    """

    def __init__(self, connections: Connections, *, timeout: float = TIMEOUT) -> None:
        self._connection = connections.open(timeout=timeout)

    def ask(self, *command: str | bytes) -> Any:
        """Return the answer to one command.

        :raises redis.ResponseError: the server refuses the command.
        """
        self._connection.send_command(*command)
        return self._connection.read_response()

    def ask_all(self, commands: Sequence[tuple[str, ...]]) -> list[Any]:
        """Return the answers to commands, in one round trip; refusals are exceptions."""
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        return [read_reply(self._connection) for _ in commands]

    def info(self, section: str) -> Mapping[str, str]:
        """Return the fields of one section of ``INFO``.

        :raises redis.ResponseError: this user has no right to ask.
        """
        lines = _text(self.ask("INFO", section)).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def setting(self, name: str) -> str | None:
        """Return a setting of the server; ``None`` if it has no such setting.

        :raises redis.ResponseError: this user has no right to ask.
        """
        answer = self.ask("CONFIG", "GET", name)
        return _text(answer[1]) if answer else None

    def listening(self) -> list[Listening]:
        """Return the connected listeners of all services.

        :raises redis.ResponseError: this user has no right to ask.
        """
        lines = _text(self.ask("CLIENT", "LIST")).splitlines()
        clients = [dict(field.partition("=")[::2] for field in line.split()) for line in lines]
        return [found for client in clients if (found := _listening(client))]

    def channels(self, keys: ChannelKeys) -> dict[str, int]:
        """Return the number of listeners of each channel, without channels that have none.

        :raises redis.ResponseError: this user has no right to ask.
        """
        found: Sequence[bytes] = self.ask("PUBSUB", "CHANNELS", keys.key("*"))
        counts = self.ask("PUBSUB", "NUMSUB", *sorted(found)) if found else []
        return {
            keys.name(key): int(count)
            for key, count in zip(counts[::2], counts[1::2], strict=True)
            if int(count)
        }

    def streams(self, keys: StreamKeys) -> dict[str, dict[str, Any]]:
        """Return the number of events and the groups of each stream, by the names of the signals.

        :raises redis.ResponseError: this user has no right to ask.
        """
        found = sorted(name.decode(errors="replace") for name in self.ask("SMEMBERS", keys.names))
        names = [name for name in found[: TIMING.max_names] if SIGNAL_NAME.fullmatch(name)]
        lengths = self.ask_all([("XLEN", keys.stream(name)) for name in names])
        groups = self.ask_all([("XINFO", "GROUPS", keys.stream(name)) for name in names])
        return {
            name: {"events": _checked(length), "groups": _groups(answer)}
            for name, length, answer in zip(names, lengths, groups, strict=True)
            # Another program may have written to the key.
            if "WRONGTYPE" not in str(length)
        }

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def processes_of(listening: Sequence[Listening]) -> Counter[str]:
    """Return the number of listening processes of each service."""
    return Counter(service for service, _ in {(found.service, found.node) for found in listening})


def _listening(client: Mapping[str, str]) -> Listening | None:
    owner, _, rest = client.get("name", "").partition(":")
    service, _, node = rest.partition(":")
    found = Listening(
        service=service,
        node=node,
        channels=int(client.get("sub", 0)),
        patterns=int(client.get("psub", 0)),
        streams=client.get("cmd") in _READS,
    )
    listens = found.channels or found.patterns or found.streams
    return found if owner == "eventbus" and node and listens else None


def _groups(answer: Any) -> list[str]:
    # The stream was deleted, but not its entry in the set of names.
    if isinstance(answer, Exception) and "no such key" in str(answer):
        return []

    return sorted(_text(group[group.index(b"name") + 1]) for group in _checked(answer))


def _checked(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer

    return answer


def _text(answer: bytes) -> str:
    return answer.decode(errors="replace")


def census(node: Node) -> dict[str, Any]:
    """Return the channels, streams and services of the node's prefix, for `routes`.

    :raises OperationError: Redis cannot be asked.
    """
    deadline = time.monotonic() + PATIENCE
    connections = Connections(node.config.url, name="eventbus-routes", deadline=deadline)

    try:
        with Server(connections) as server:
            keys, has_streams = StreamKeys(node.config.prefix), node.config.has_streams
            return {
                "channels": server.channels(ChannelKeys(node.config.prefix)),
                "streams": _granted(lambda: server.streams(keys)) if has_streams else {},
                "services": _granted(lambda: processes_of(server.listening())),
            }
    except OUTAGE as error:
        raise OperationError(
            f"Redis at {connections.shown} cannot be used: {trouble_of(error)}"
        ) from error
    except redis.ResponseError as error:
        raise OperationError(
            f"This user has no right to list channels: {reason_of(error)}. Grant '+pubsub' in the "
            "ACL."
        ) from error


def _granted(ask: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return an answer, ordered by name; ``None`` if this user has no right to ask."""
    try:
        return dict(sorted(ask().items()))
    except redis.ResponseError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The reply of Redis to an event."""

    event_id: str
    #: The channel or the stream.
    key: str
    #: Number of listeners of a channel that got it; in a cluster, those of one node.
    listeners: int = 0
    #: The id of its entry in a stream.
    entry: str | None = None


def publish_one(
    node: Node, name: str, payload: Mapping[str, Any], *, stream: bool = False
) -> Receipt:
    """Publish an event as the node's service, from a node id of its own, and wait for the answer.

    The event takes the node's route for the name.

    :param stream: True to publish to the stream, even if the route says otherwise.
    :raises ConfigError: the event cannot go to a stream at this URL.
    :raises PayloadError: a value cannot be encoded.
    :raises PublishError: Redis did not take it, or did not say so within 3 seconds.
    """
    route = node.route_for(name)

    if stream and route.via != "stream":
        route = Route(name=name, via="stream")
        check_route(node.config, route)

    builder = MessageBuilder(node.config, node.codec, trace=None)
    message = builder.build(name, payload, route, confirm=False)
    message.assign_id(secrets.token_hex(6), 1, time.time_ns())
    message.assign_seq()
    answer = _send(node, message)
    destination = message.route_state.destination

    if destination.is_stream:
        return Receipt(event_id=message.id, key=destination.key, entry=answer.decode())

    return Receipt(event_id=message.id, key=destination.key, listeners=answer)


def _send(node: Node, message: Message) -> Any:
    """Write a message over a connection of its own, and return the answer of Redis."""
    connections = Connections(node.config.url, name="eventbus-publish")
    connection = PublishConnection(connections, node.config, timeout=TIMEOUT)
    deadline = time.monotonic() + TIMEOUT
    state, in_doubt = f"{message.route_state.name!r} was not published", False

    try:
        connection.probe(deadline)
        state, in_doubt = f"It is not known whether {message.id} was published", True
        encoded = (message.route_state.destination, message.encoded())
        (error,) = connection.publish([encoded], deadline)
    except OUTAGE as outage:
        raise PublishError(
            f"{state}: Redis at {connections.shown} cannot be used: {trouble_of(outage)}",
            event_id=message.id,
            in_doubt=in_doubt,
        ) from outage
    finally:
        connection.close()

    if error is not None:
        raise _refusal(message, error) from error

    return connection.answers[0]


def _refusal(message: Message, error: Exception) -> PublishError:
    name, destination = message.route_state.name, message.route_state.destination

    if isinstance(error, TooFewReplicasError):
        text = f"{name!r} is stored as the event {message.id}, but {error}."
    elif isinstance(error, NoWritesError):
        text = f"{name!r} was not published: Redis takes no writes now: {error}."
    else:
        right = ADD if destination.is_stream else PUBLISH
        advice = remedy(error, {destination.key: right}, grant_the_user)
        text = f"{name!r} was not published: Redis refuses it: {reason_of(error)}. {advice}"

    in_doubt = isinstance(error, TooFewReplicasError)
    return PublishError(text, event_id=message.id, in_doubt=in_doubt)
