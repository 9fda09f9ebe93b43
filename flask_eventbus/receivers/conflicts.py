"""Finds events that contradict each other. They are delivered, because either may be genuine."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from enum import Enum, auto

from ..event import Event
from ..logs import BoundedLog, get_logger
from ..signals import emit, event_conflict
from ..transport.connections import Context

logger = get_logger(__name__)

#: Prefix of each body before it is hashed, so that no publisher can construct equal hashes. It
#: differs in each process.
SECRET = secrets.token_bytes(16)


class Finding(Enum):
    """The result of comparing an event with the earlier ones."""

    #: An event with the same bytes came before.
    REPEATED = auto()
    #: The id, the node or the number contradicts another event: one of the two is forged.
    CONFLICT = auto()


def compare(known: OrderedDict[str, int], id: str, digest: int, most: int) -> Finding | None:
    """Compare an event with the one of the same id in ``known``, and store it there.

    Return ``None`` if ``known`` has no event with this id.

    :param digest: ``hash(SECRET + body)`` of the event's bytes.
    :param most: maximum number of ids in ``known``; the oldest is dropped first.
    """
    before = known.get(id)

    if before == digest:
        return Finding.REPEATED

    known[id] = digest

    if len(known) > most:
        known.popitem(last=False)

    return None if before is None else Finding.CONFLICT


class Conflicts:
    """Counts and logs conflicts, and sends the signal ``event_conflict``."""

    def __init__(self, context: Context) -> None:
        self._service = context.config.service
        self._counters = context.counters
        self._log = BoundedLog(logger)

    def report(self, event: Event) -> None:
        """Report an event that contradicts another one by its id, node or number."""
        self._counters.add("conflicts")
        self._log.error(
            f"conflict {event.name}",
            "The event %s of %r, which says it is from %r, contradicts another one. The same id or "
            "number came with other bytes, or its number is impossibly high, or its node belongs "
            "to another service. One of the two is forged. Both are delivered. Check in the ACL "
            "which users may publish %r.",
            event.id,
            event.name,
            event.source,
            event.name,
            extra={**event.fields, "service": self._service},
        )
        emit(event_conflict, self._service, name=event.name, event=event)
