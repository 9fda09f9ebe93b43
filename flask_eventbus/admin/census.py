"""Who listens now, as the server knows it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import redis

from ..config import Config
from ..errors import OperationError
from ..node import Node
from ..transport.connections import OUTAGE, Connections
from ..transport.keys import ChannelKeys, StreamKeys
from ..transport.urls import trouble_of
from .server import PATIENCE, Server, processes_of, reason_of

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
