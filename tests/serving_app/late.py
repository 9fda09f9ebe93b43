"""Receivers in a module that the factory imports last."""

from __future__ import annotations

from typing import Any

from .app import bus
from .reports import report


@bus.on("called")
def hear_late(sender: str, number: int, **extra: Any) -> None:
    """Report that this receiver was there, too."""
    report("called late", number=number)
