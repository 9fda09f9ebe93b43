"""Carries blinker signals between Flask services, and to plain scripts, over Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import signals
from .bus import Bus
from .errors import (
    ConfigError,
    DecodeError,
    EventBusError,
    HopLimitError,
    PayloadError,
    PublishError,
    ReceiverError,
)
from .event import Event, current_event
from .node import Health

if TYPE_CHECKING:
    from .extension import EventBus

__version__ = "0.1.0"

__all__ = [
    "Bus",
    "ConfigError",
    "DecodeError",
    "Event",
    "EventBus",
    "EventBusError",
    "Health",
    "HopLimitError",
    "PayloadError",
    "PublishError",
    "ReceiverError",
    "current_event",
    "signals",
]


def __getattr__(name: str) -> Any:
    """Import the Flask extension only where it is asked for: scripts need no Flask."""
    if name == "EventBus":
        from .extension import EventBus

        return EventBus

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
