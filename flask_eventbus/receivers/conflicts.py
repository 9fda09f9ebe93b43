"""Finds events that contradict others. All are delivered: nobody knows which of them is true."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from enum import Enum, auto

from ..config import Config
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..signals import emit, event_conflict

logger = get_logger(__name__)

#: Ids of events that are remembered with a hash of their bytes; the oldest is forgotten first.
REMEMBERED = 10_000

#: Goes in front of a body before it is hashed, so that nobody can make bytes with the same hash.
_SECRET = secrets.token_bytes(16)


class Finding(Enum):
    """What is wrong with an event beside those heard before it."""

    #: The same bytes came before.
    REPEATED = auto()
    #: Its id, its node or its number contradicts another event: one of the two is forged.
    CONFLICT = auto()


def digest_of(body: bytes) -> int:
    """Return a hash of an event's bytes, of use in this process alone."""
    return hash(_SECRET + body)


def compare(known: OrderedDict[str, int], id: str, digest: int) -> Finding | None:
    """Compare an event with the one of the same id in ``known``, and note it there."""
    before = known.get(id)

    if before == digest:
        return Finding.REPEATED

    known[id] = digest

    if len(known) > REMEMBERED:
        known.popitem(last=False)

    return None if before is None else Finding.CONFLICT


class Conflicts:
    """Counts, logs and signals conflicts, for channels and for streams."""

    def __init__(self, *, config: Config, counters: Counters) -> None:
        self._config = config
        self._counters = counters
        self._log = BoundedLog(logger)

    def report(self, event: Event) -> None:
        """Report an event with the id, the node or the number of another one."""
        self._counters.add("conflicts")
        self._log.error(
            f"conflict {event.name}",
            "The event %s of %r, which says it is from %r, contradicts another one: the same id or "
            "number came with other bytes, its number is further ahead than a node can come, or "
            "its node was another service's. One of them is forged. Both are delivered. Find out "
            "who may publish %r.",
            event.id,
            event.name,
            event.source,
            event.name,
            extra={**event.fields, "service": self._config.service},
        )
        emit(event_conflict, self._config.service, name=event.name, event=event)
