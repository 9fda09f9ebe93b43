"""One emission of a signal, on its way; and the one that is being handled now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from .typing import Via


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
    via: Via = "channel"
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


class PackedPayload(Mapping[str, Any]):
    """A payload that waits as bytes, because it takes far more memory once it is read.

    Each look at it reads the bytes anew: call :func:`opened` first.
    """

    __slots__ = ("unpack",)

    def __init__(self, unpack: Callable[[], Mapping[str, Any]]) -> None:
        self.unpack = unpack

    def __getitem__(self, key: str) -> Any:
        return self.unpack()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.unpack())

    def __len__(self) -> int:
        return len(self.unpack())


def opened(event: Event) -> Event:
    """Return the event with its payload read, for receivers."""
    payload = event.payload
    return replace(event, payload=payload.unpack()) if type(payload) is PackedPayload else event


#: The event being handled in this thread or task; ``None`` outside receivers.
handling: ContextVar[Event | None] = ContextVar("flask_eventbus.handling", default=None)


if TYPE_CHECKING:

    class CurrentEvent(Event):
        """The event being handled, to a type checker: an :class:`Event` that can be kept."""

        def get(self) -> Event:
            """Return the event itself, to keep it after the receiver or to hand it on."""

        def __bool__(self) -> bool:
            """Return False where no event is being handled."""


class _OutsideError(RuntimeError, AttributeError):
    """There is no event here. For ``hasattr()`` and its like an attribute is missing then."""


class _CurrentEvent:
    """Stands for the event being handled, as Flask's ``request`` does for a request."""

    __slots__ = ()
    # What dataclasses.replace() and fields() look for.
    __dataclass_fields__ = Event.__dataclass_fields__

    def get(self) -> Event:
        """Return the event itself, to keep it after the receiver or to hand it on."""
        return _handled("get()")

    @property  # type: ignore[misc]  # isinstance() asks for it, and nobody sets it
    def __class__(self) -> type[Any]:
        return _CurrentEvent if handling.get() is None else Event

    def __getattr__(self, name: str) -> Any:
        return getattr(_handled(name), name)

    def __bool__(self) -> bool:
        return handling.get() is not None

    def __eq__(self, other: object) -> bool:
        return self is other or (bool(self) and handling.get() == other)

    __hash__ = object.__hash__

    def __dir__(self) -> list[str]:
        return [*dir(handling.get()), "get"] if self else []

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copy and pickle the event; outside of receivers, this name of the module."""
        event = handling.get()
        return "current_event" if event is None else event.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        event = handling.get()
        return "<current_event outside of receivers>" if event is None else repr(event)


def _handled(name: str) -> Event:
    event = handling.get()

    if event is None:
        raise _OutsideError(
            f"current_event.{name} was read where no event is being handled. Read it inside a "
            "receiver, or test 'if current_event:' first. A receiver that hands work to another "
            "thread gives it 'current_event.get()'."
        )

    return event


#: The :class:`Event` that the running receiver handles; ``bool(current_event)`` is false elsewhere.
#: ``current_event.get()`` is the event itself, which outlives the receiver.
current_event: CurrentEvent = cast("CurrentEvent", _CurrentEvent())
