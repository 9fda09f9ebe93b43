"""One emission of a signal, on its way; and the one that is being handled now."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One emission of a signal, as it arrived: what was sent, by whom, when, and why."""

    #: The signal's name (``type`` on the wire).
    name: str
    #: The service that emitted it: what receivers get as ``sender``.
    source: str
    #: ``NODE-N``: unique, the same however often the event is delivered.
    id: str
    #: When it was emitted, in UTC.
    time: datetime
    #: The keyword arguments the receivers get (``data`` on the wire).
    payload: Mapping[str, Any]
    #: How it came: ``"channel"`` or ``"stream"``.
    via: str = "channel"
    #: The running number of the publisher's events of this name; channels only.
    seq: int | None = None
    #: The id of the first event of the chain that led to this one.
    correlation_id: str | None = None
    #: The id of the event that was being handled when this one was emitted.
    causation_id: str | None = None
    #: How many events of the chain came before this one.
    hops: int = 0
    #: The W3C trace context the event was emitted in.
    traceparent: str | None = None
    #: The value that keeps events in order among each other (``partitionkey`` on the wire).
    key: str | None = None
    #: Which attempt at handling it this is, from 1.
    attempt: int = 1
    #: Whether ``flask eventbus replay`` brought it again.
    replayed: bool = False

    @property
    def fields(self) -> dict[str, object]:
        """The fields of log records that tell of this event."""
        return {"event_id": self.id, "signal": self.name, "attempt": self.attempt}

    @property
    def node(self) -> str:
        """The process that emitted it: its id without the running number."""
        return self.id.rpartition("-")[0]


#: The event being handled in this thread or task; ``None`` outside receivers.
handling: ContextVar[Event | None] = ContextVar("flask_eventbus.handling", default=None)


class _CurrentEvent:
    """Stands for the event being handled; false where none is."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        event = handling.get()

        if event is None:
            raise RuntimeError(
                f"current_event.{name} was read where no event is being handled. "
                "Read it inside a receiver, or test 'if current_event:' first."
            )

        return getattr(event, name)

    def __bool__(self) -> bool:
        return handling.get() is not None

    def __repr__(self) -> str:
        return repr(handling.get())


#: The :class:`Event` that the running receiver handles; ``bool(current_event)`` is false elsewhere.
current_event: Event = cast(Event, _CurrentEvent())
