"""Who listens now, as the server knows it."""

from __future__ import annotations

from typing import Any

import click
import redis

from .channels import ChannelKeys
from .connections import OUTAGE, Connections
from .node import Node
from .server import Server, processes_of, reason_of

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-routes"


def census(node: Node) -> dict[str, Any]:
    """How many listen to each channel of the node's prefix, and how many processes of each service.

    :raises click.ClickException: Redis cannot be asked.
    """
    connections = Connections(node.config.url, name=CLIENT_NAME)

    try:
        with Server(connections) as server:
            return {
                "channels": server.channels(ChannelKeys(node.config.prefix)),
                "services": _services(server),
            }
    except OUTAGE as error:
        raise click.ClickException(
            f"Redis at {connections.shown} cannot be used: {reason_of(error)}. Start it there, or "
            "correct the URL."
        ) from error
    except redis.ResponseError as error:
        raise click.ClickException(
            f"This user may not ask for channels: {reason_of(error)}. Allow '+pubsub' in the ACL."
        ) from error


def _services(server: Server) -> dict[str, int] | None:
    """How many processes of each service listen; ``None`` where this user may not ask."""
    try:
        return dict(sorted(processes_of(server.listening()).items()))
    except redis.ResponseError:
        return None
