"""Sends the lifecycle signals so that their receivers cannot disturb the bus."""

from __future__ import annotations

import threading
from typing import Any

from blinker import NamedSignal

from .logs import get_logger

logger = get_logger(__name__)


def tell(signal: NamedSignal, service: str, **values: Any) -> None:
    """Send ``signal`` from ``service``; a receiver that raises is logged, even ``SystemExit``."""
    try:
        signal.send(service, **values)
    except BaseException as error:
        if is_interrupt(error):
            raise

        logger.exception("A receiver of the lifecycle signal %r raised.", signal.name)


def is_interrupt(error: BaseException) -> bool:
    """Whether it is somebody's Ctrl-C, which only the main thread gets."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(error, KeyboardInterrupt)
