"""A plug-in for processes without HTTP: a file is there while the process hears its events.

``EVENTBUS_RECEIVERS`` names this folder. A health check then asks: ``test -f /tmp/healthy``.
"""

from __future__ import annotations

import os
from pathlib import Path

from flask_eventbus.signals import listener_connected, listener_lost

FILE = Path(os.environ.get("HEALTH_FILE", "/tmp/healthy"))  # noqa: S108 - of one container alone

FILE.unlink(missing_ok=True)


@listener_connected.connect
def hears(sender: str, **extra: object) -> None:
    FILE.touch()


@listener_lost.connect
def hears_nothing(sender: str, **extra: object) -> None:
    FILE.unlink(missing_ok=True)
