"""Sends the lifecycle signals so that their receivers cannot disturb the bus."""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal

logger = logging.getLogger(__name__)


def tell(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service``; a receiver that raises is logged."""
    try:
        signal.send(service, **values)
    except Exception:
        logger.exception("A receiver of the lifecycle signal %r raised.", signal.name)
