"""Reports events that contradict others. All of them are delivered: nobody knows which is true."""

from __future__ import annotations

from ..config import Config
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..signals import emit, event_conflict

logger = get_logger(__name__)


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
            "number came with other bytes, or its node under another service. One of them is "
            "forged. Both are delivered. Find out who may publish %r.",
            event.id,
            event.name,
            event.source,
            event.name,
            extra={**event.fields, "service": self._config.service},
        )
        emit(event_conflict, self._config.service, name=event.name, event=event)
