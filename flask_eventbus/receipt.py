"""Publishes one event at a time and tells who got it: what a command does, not a service."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from .channels import ChannelKeys
from .connections import OUTAGE, Connections
from .errors import PublishError
from .event import Event
from .node import Node
from .server import TIMEOUT, Server, reason_of

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What Redis answered to an event."""

    event_id: str
    #: How many listeners got it; in a cluster, those of one of its nodes.
    listeners: int


def publish_one(node: Node, name: str, payload: Mapping[str, Any]) -> Receipt:
    """Publish an event as the node's service, from a node of its own, and wait for the answer.

    :raises PayloadError: a value cannot travel.
    :raises PublishError: Redis did not take it, or did not say so within 3 seconds.
    """
    config = node.config
    event = Event(
        name=name,
        source=config.service,
        id=f"{secrets.token_hex(6)}-1",
        time=datetime.now(UTC),
        payload=payload,
        seq=1,
    )
    body = node.declarations.codec.limited(config.max_event_bytes).encode(event)
    connections = Connections(config.url, name=CLIENT_NAME)

    try:
        with Server(connections, timeout=TIMEOUT) as server:
            count: int = server.ask("PUBLISH", ChannelKeys(config.prefix).key(name), body)
    except OUTAGE as error:
        raise PublishError(
            f"{name!r} was not published: Redis at {connections.shown} cannot be used: "
            f"{reason_of(error)}. Start it there, or correct 'EVENTBUS_URL'.",
            event_id=event.id,
        ) from error
    except redis.ResponseError as error:
        key = ChannelKeys(config.prefix).key(name)
        raise PublishError(
            f"{name!r} was not published: Redis refuses it: {reason_of(error)}. Grant the user "
            f"the channel in the ACL: '&{key}'.",
            event_id=event.id,
        ) from error

    return Receipt(event_id=event.id, listeners=count)
