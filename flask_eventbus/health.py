"""How a node does, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a node does, at one moment."""

    service: str
    node: str
    #: Whether this node is to listen now, and to something.
    listening: bool
    #: Whether everything subscribed is confirmed on a live connection.
    connected: bool
    #: Whether nothing says that Redis does not take events.
    publishing: bool
    #: Seconds since bytes last came; ``None`` if none ever did.
    last_heard: float | None
    #: Events that arrived and are not handled yet.
    lag: int
    #: Events that wait to be published.
    buffered: int
    #: Channel events of others that never arrived.
    missed: int
    #: Subscriptions that Redis refuses, with its reasons.
    refused: Mapping[str, str]
    #: Streams that are subscribed and that this process does not read: it has no receiver for
    #: them. Their events wait for a process that has one.
    without_receiver: frozenset[str]
    #: What somebody did to streams, so that this service does not get their events: by the name of
    #: the stream, or of the pattern, a sentence that says what to do.
    alarms: Mapping[str, str]
    #: Everything else that is counted: published, received, handled, failed, rejected, ...
    counts: Mapping[str, int]
