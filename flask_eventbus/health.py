"""``Health``: the state of a node at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of a node at one moment."""

    #: The name of the service.
    service: str
    #: The unique name of this node.
    node: str
    #: True if the node was started and has a subscription.
    listening: bool
    #: True if Redis has confirmed every subscription on a live connection.
    connected: bool
    #: False while an outage is known: Redis is unreachable or refuses writes.
    publishing: bool
    #: Seconds since Redis last sent bytes; ``None`` if it never did.
    last_heard: float | None
    #: Number of events that arrived and are not handled yet.
    lag: int
    #: Number of events in the buffer, waiting to be published.
    buffered: int
    #: Number of channel events of other nodes that never arrived.
    missed: int
    #: The subscriptions that Redis refuses, each with the reason.
    refused: Mapping[str, str]
    #: Subscribed streams that this process does not read, because it has no receiver for them.
    #: Their events wait for a process that has one.
    without_receiver: frozenset[str]
    #: Faults that keep this service from the events of a stream, by name of the stream or
    #: pattern. The text says how to correct the fault.
    alarms: Mapping[str, str]
    #: All counters: ``published``, ``received``, ``handled``, ``failed``, ``rejected``, ...
    counts: Mapping[str, int]
