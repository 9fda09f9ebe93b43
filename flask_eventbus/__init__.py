"""Blinker signals between Flask services and plain scripts, carried by Redis."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        Reject,
        Retry,
    )
    from .event import Event, current_event
    from .extension import EventBus
    from .node import Health

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
    "Reject",
    "Retry",
    "current_event",
    "signals",
]

_MODULES = {
    "Bus": "bus",
    "Event": "event",
    "EventBus": "extension",
    "Health": "node",
    "current_event": "event",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that a script without Flask loads no Flask."""
    if name == "signals":
        return import_module(f"{__name__}.signals")

    if name in __all__:
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, including those not imported yet."""
    return [*globals(), *__all__]
