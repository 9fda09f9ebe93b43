"""The event as receivers see it, and ``current_event``, the one being handled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from .typing import Via


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One emission of a signal, as it arrived from Redis."""

    #: The signal's name (``type`` on the wire).
    name: str
    #: The service that emitted it; receivers get it as ``sender``.
    source: str
    #: Unique id, ``NODE-N``. It stays the same if the event is delivered again.
    id: str
    #: Time of the emission, in UTC.
    time: datetime
    #: The keyword arguments the receivers get (``data`` on the wire).
    payload: Mapping[str, Any]
    #: The transport it came over: ``"channel"`` or ``"stream"``.
    via: Via = "channel"
    #: Sequence number among the publisher's events of this name; ``None`` on streams.
    seq: int | None = None
    #: The id of the first event of the chain that led to this one; ``None`` if unknown.
    correlation_id: str | None = None
    #: The id of the event that was being handled when this one was emitted, if any.
    causation_id: str | None = None
    #: Number of events in the chain before this one.
    hops: int = 0
    #: The W3C trace context in which the event was emitted, if any.
    traceparent: str | None = None
    #: Events with the same key are handled in order (``partitionkey`` on the wire).
    key: str | None = None
    #: Number of this attempt to handle the event, from 1.
    attempt: int = 1
    #: True if ``flask eventbus replay`` sent it again.
    replayed: bool = False

    @property
    def fields(self) -> dict[str, object]:
        """The fields that identify this event in log records."""
        return {"event_id": self.id, "signal": self.name, "attempt": self.attempt}

    @property
    def node(self) -> str:
        """The name of the node that emitted it: the id without its sequence number."""
        return self.id.rpartition("-")[0]


class PackedPayload(Mapping[str, Any]):
    """A payload kept as bytes, because the decoded values would take far more memory.

    Every access decodes the bytes again; call :func:`opened` first to decode them once.
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
    """Return the event with its payload decoded."""
    payload = event.payload
    return replace(event, payload=payload.unpack()) if type(payload) is PackedPayload else event


#: The event being handled in this thread or task; ``None`` outside receivers.
handling: ContextVar[Event | None] = ContextVar("flask_eventbus.handling", default=None)


if TYPE_CHECKING:

    class CurrentEvent(Event):
        """The type of :data:`current_event`: an :class:`Event` with :meth:`get`."""

        def get(self) -> Event:
            """Return the event itself, to keep it after the receiver or to pass it on."""

        def __bool__(self) -> bool:
            """Return True while an event is being handled."""


class _OutsideError(RuntimeError, AttributeError):
    """No event is being handled. An ``AttributeError`` too, so that ``hasattr()`` is False."""


class _CurrentEvent:
    """A proxy of the event being handled, like Flask's ``request``."""

    __slots__ = ()
    # dataclasses.replace() and fields() read it.
    __dataclass_fields__ = Event.__dataclass_fields__

    def get(self) -> Event:
        """Return the event itself, to keep it after the receiver or to pass it on."""
        return _handled("get()")

    @property  # type: ignore[misc]  # read by isinstance(), never set
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
        """Copy or pickle the event; outside of receivers, pickle a reference to this proxy."""
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
            "receiver, or test 'if current_event:' first. To use the event in another thread, pass "
            "'current_event.get()' to it."
        )

    return event


#: The :class:`Event` that the running receiver handles; ``bool(current_event)`` is false elsewhere.
#: ``current_event.get()`` returns the event itself, which stays valid after the receiver returns.
current_event: CurrentEvent = cast("CurrentEvent", _CurrentEvent())
