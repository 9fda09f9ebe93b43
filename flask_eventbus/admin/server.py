"""Asks a server about itself, for commands that look at it from outside."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import redis

from ..config import SIGNAL_NAME, Config
from ..errors import OperationError
from ..node import Node
from ..streams.alarms import MOST_NAMES
from ..transport.connections import OUTAGE, Connections, read_reply
from ..transport.keys import ChannelKeys, StreamKeys
from ..transport.urls import trouble_of

#: Seconds a server has to answer each question.
TIMEOUT = 3.0

#: Seconds that a command which only looks waits for a server, all questions together.
PATIENCE = 30.0


#: The last command of a connection that reads streams, as ``CLIENT LIST`` shows it; of those that
#: write none has one of these.
_READS = ("xreadgroup", "xread", "smembers")


@dataclass(frozen=True, slots=True)
class Listening:
    """A connection that listens, as ``CLIENT LIST`` shows it."""

    service: str
    #: The process.
    node: str
    #: How many channels and how many patterns it listens to.
    channels: int
    patterns: int
    #: Whether it reads streams.
    streams: bool = False


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What a server has of a signal's stream."""

    #: Events that it holds.
    events: int
    #: The services that have a group there.
    groups: Sequence[str]


class Server:
    """One connection to a server, open while it is used in a ``with`` block.

    :raises redis.ConnectionError: the server cannot be reached, or does not let this user in.
    """

    def __init__(self, connections: Connections, *, timeout: float = TIMEOUT) -> None:
        self._connection = connections.open(timeout=timeout)

    def ask(self, *command: str | bytes) -> Any:
        """The answer to one command.

        :raises redis.ResponseError: the server refuses it, to this user for example.
        """
        self._connection.send_command(*command)
        return self._connection.read_response()

    def ask_all(self, commands: Sequence[tuple[str, ...]]) -> list[Any]:
        """The answers to commands, in one round trip; a refusal is a value among them."""
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        return [read_reply(self._connection) for _ in commands]

    def info(self, section: str) -> Mapping[str, str]:
        """The fields of one section of ``INFO``.

        :raises redis.ResponseError: this user may not ask.
        """
        lines = _text(self.ask("INFO", section)).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def setting(self, name: str) -> str | None:
        """A setting of the server, if it has it.

        :raises redis.ResponseError: this user may not ask.
        """
        answer = self.ask("CONFIG", "GET", name)
        return _text(answer[1]) if answer else None

    def listening(self) -> list[Listening]:
        """The listeners of services that are connected now.

        :raises redis.ResponseError: this user may not ask.
        """
        lines = _text(self.ask("CLIENT", "LIST")).splitlines()
        clients = [dict(field.partition("=")[::2] for field in line.split()) for line in lines]
        return [found for client in clients if (found := _listening(client))]

    def channels(self, keys: ChannelKeys) -> dict[str, int]:
        """How many listen to the channel of each signal; those that nobody hears are left out.

        :raises redis.ResponseError: this user may not ask.
        """
        found: Sequence[bytes] = self.ask("PUBSUB", "CHANNELS", keys.key("*"))
        counts = self.ask("PUBSUB", "NUMSUB", *sorted(found)) if found else []
        return {
            keys.name(key): int(count)
            for key, count in zip(counts[::2], counts[1::2], strict=True)
            if int(count)
        }

    def streams(self, keys: StreamKeys) -> dict[str, StreamFacts]:
        """The streams of the signals that have one, by the signal's name.

        :raises redis.ResponseError: this user may not ask.
        """
        found = sorted(name.decode(errors="replace") for name in self.ask("SMEMBERS", keys.names))
        names = [name for name in found[:MOST_NAMES] if SIGNAL_NAME.fullmatch(name)]
        lengths = self.ask_all([("XLEN", keys.stream(name)) for name in names])
        groups = self.ask_all([("XINFO", "GROUPS", keys.stream(name)) for name in names])
        return {
            name: StreamFacts(events=_checked(length), groups=_groups(answer))
            for name, length, answer in zip(names, lengths, groups, strict=True)
        }

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def processes_of(listening: Sequence[Listening]) -> Counter[str]:
    """How many processes of each service listen."""
    return Counter(service for service, _ in {(found.service, found.node) for found in listening})


def reason_of(error: Exception) -> str:
    """What a server or a socket says, as the end of a sentence of ours."""
    text, _, _ = str(error).partition(", with args beginning with")
    return " ".join(text.split()).rstrip(".")


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
    # The stream was deleted, and its name is still there.
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
    """Who listens to the channels of the node's prefix and reads its streams, by name and service.

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
            f"This user may not ask for channels: {reason_of(error)}. Allow '+pubsub' in the ACL."
        ) from error


def _streams(server: Server, config: Config) -> dict[str, Any] | None:
    """The streams and their groups; ``None`` where this user may not ask."""
    if config.url.startswith("redis+cluster://"):
        return {}

    try:
        found = server.streams(StreamKeys(config.prefix))
    except redis.ResponseError:
        return None

    return {name: asdict(facts) for name, facts in found.items()}


def _services(server: Server) -> dict[str, int] | None:
    """How many processes of each service listen; ``None`` where this user may not ask."""
    try:
        return dict(sorted(processes_of(server.listening()).items()))
    except redis.ResponseError:
        return None
