"""Publish one event and return what Redis answered, for the command ``publish``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PublishError
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
from ..transport.connection import OUTAGE
from ..transport.connections import Connections
from ..transport.keys import ADD, PUBLISH, grant_the_user, remedy
from ..transport.urls import trouble_of
from .server import TIMEOUT

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-publish"


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
    connections = Connections(node.config.url, name=CLIENT_NAME)
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
