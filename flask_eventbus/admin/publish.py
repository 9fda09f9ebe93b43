"""Publish one event and return what Redis answered, for the command ``publish``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ..transport.rights import ADD, PUBLISH, grant_the_user, remedy
from ..transport.urls import trouble_of
from .server import TIMEOUT

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What Redis answered to an event."""

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
    outgoing = _take_down(node, name, payload, _route(node, name, stream=stream))
    answer = _exchange(node, outgoing)
    way = outgoing.route_state.destination

    if way.is_stream:
        return Receipt(event_id=outgoing.id, key=way.key, entry=answer.decode())

    return Receipt(event_id=outgoing.id, key=way.key, listeners=answer)


def _route(node: Node, name: str, *, stream: bool) -> Route:
    route = node.route_for(name)

    if stream and route.via != "stream":
        route = Route(name=name, via="stream")
        check_route(node.config, route)

    return route


def _take_down(node: Node, name: str, payload: Mapping[str, Any], route: Route) -> Message:
    builder = MessageBuilder(node.config, node.codec, trace=None)
    outgoing = builder.build(name, payload, route, confirm=False)
    outgoing.assign_id(secrets.token_hex(6), 1, time.time_ns())
    outgoing.assign_seq()
    return outgoing


def _exchange(node: Node, outgoing: Message) -> Any:
    connections = Connections(node.config.url, name=CLIENT_NAME)
    exchange = PublishConnection(connections, node.config, timeout=TIMEOUT)
    deadline = time.monotonic() + TIMEOUT

    try:
        with _publish_errors(
            f"{outgoing.route_state.name!r} was not published", outgoing, connections
        ):
            exchange.probe(deadline)

        unknown = f"It is not known whether {outgoing.id} was published"

        with _publish_errors(unknown, outgoing, connections, in_doubt=True):
            (error,) = exchange.publish(
                [(outgoing.route_state.destination, outgoing.encoded())], deadline
            )
    finally:
        exchange.close()

    if error is not None:
        raise _refusal(outgoing, error) from error

    return exchange.answers[0]


@contextmanager
def _publish_errors(
    what: str, outgoing: Message, connections: Connections, *, in_doubt: bool = False
) -> Iterator[None]:
    try:
        yield
    except OUTAGE as outage:
        raise PublishError(
            f"{what}: Redis at {connections.shown} cannot be used: {trouble_of(outage)}",
            event_id=outgoing.id,
            in_doubt=in_doubt,
        ) from outage


def _refusal(outgoing: Message, error: Exception) -> PublishError:
    name, way = outgoing.route_state.name, outgoing.route_state.destination

    if isinstance(error, TooFewReplicasError):
        text = f"{name!r} is stored as the event {outgoing.id}, but {error}."
    elif isinstance(error, NoWritesError):
        text = f"{name!r} was not published: Redis takes no writes now: {error}."
    else:
        advice = remedy(error, {way.key: ADD if way.is_stream else PUBLISH}, grant_the_user)
        text = f"{name!r} was not published: Redis refuses it: {reason_of(error)}. {advice}"

    in_doubt = isinstance(error, TooFewReplicasError)
    return PublishError(text, event_id=outgoing.id, in_doubt=in_doubt)
