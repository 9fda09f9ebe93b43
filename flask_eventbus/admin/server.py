"""Query a server about itself: settings, listeners, channels and streams."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import redis

from ..config import SIGNAL_NAME, TIMING, Config
from ..errors import OperationError
from ..node import Node
from ..text import reason_of
from ..transport.connection import OUTAGE, read_reply
from ..transport.connections import Connections
from ..transport.keys import ChannelKeys, StreamKeys
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


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """The length and the groups of a signal's stream."""

    #: Number of events in it.
    events: int
    #: Services that have a group there.
    groups: Sequence[str]


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

    def streams(self, keys: StreamKeys) -> dict[str, StreamFacts]:
        """Return the streams by the names of their signals.

        :raises redis.ResponseError: this user has no right to ask.
        """
        found = sorted(name.decode(errors="replace") for name in self.ask("SMEMBERS", keys.names))
        names = [name for name in found[: TIMING.max_names] if SIGNAL_NAME.fullmatch(name)]
        lengths = self.ask_all([("XLEN", keys.stream(name)) for name in names])
        groups = self.ask_all([("XINFO", "GROUPS", keys.stream(name)) for name in names])
        return {
            name: StreamFacts(events=_checked(length), groups=_groups(answer))
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


#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-routes"


def census(node: Node) -> dict[str, Any]:
    """Return the channels, streams and services of the node's prefix, for `routes`.

    :raises OperationError: Redis cannot be asked.
    """
    deadline = time.monotonic() + PATIENCE
    connections = Connections(node.config.url, name=CLIENT_NAME, deadline=deadline)

    try:
        with Server(connections) as server:
            return {
                "channels": server.channels(ChannelKeys(node.config.prefix)),
                "streams": _streams(server, node.config),
                "services": _services(server),
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


def _streams(server: Server, config: Config) -> dict[str, Any] | None:
    """Return the streams and their groups; ``None`` if this user has no right to."""
    if not config.has_streams:
        return {}

    try:
        found = server.streams(StreamKeys(config.prefix))
    except redis.ResponseError:
        return None

    return {name: asdict(facts) for name, facts in found.items()}


def _services(server: Server) -> dict[str, int] | None:
    """Return the number of processes of each service; ``None`` if this user has no right to."""
    try:
        return dict(sorted(processes_of(server.listening()).items()))
    except redis.ResponseError:
        return None
