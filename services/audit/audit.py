"""Audit: writes every event that any service publishes to a file, one line of JSON each.

A plain script: it joins the bus as the Flask services do, and needs no Flask.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import threading
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from flask_eventbus import Bus, current_event
from flask_eventbus.signals import (
    event_rejected,
    events_dropped,
    events_missed,
    events_trimmed,
    listener_connected,
    listener_lost,
)

FILE = Path(os.environ.get("AUDIT_FILE", "audit.jsonl"))

bus = Bus.from_env({"EVENTBUS_SERVICE": "audit"} | os.environ)
#: The bus tells what happens to itself in other threads than it hands out events in.
writing = threading.Lock()


@bus.on("*")
def write_event(sender: str, **payload: Any) -> None:
    write(
        "event",
        id=current_event.id,
        name=current_event.name,
        source=sender,
        via=current_event.via,
        time=current_event.time,
        payload=payload,
    )


@listener_connected.connect
def write_connected(sender: str, reconnected: bool, seconds: float) -> None:
    write("reconnected" if reconnected else "connected", seconds_away=round(seconds, 3))


@listener_lost.connect
def write_lost(sender: str, error: Exception) -> None:
    write("lost", error=str(error))


@events_missed.connect
def write_missed(sender: str, name: str, source: str, node: str, count: int) -> None:
    write("missed", name=name, source=source, node=node, count=count)


@events_trimmed.connect
def write_trimmed(sender: str, name: str, count: int | None) -> None:
    write("trimmed", name=name, count=count)


@events_dropped.connect
def write_dropped(sender: str, where: str, count: int) -> None:
    write("dropped", where=where, count=count)


@event_rejected.connect
def write_rejected(sender: str, name: str, reason: str, error: Exception) -> None:
    write("rejected", name=name, reason=reason, error=str(error))


def write(what: str, **values: Any) -> None:
    """Add a line; it is with the operating system when this returns."""
    values = {"what": what, "written": datetime.now(UTC), **values}
    line = json.dumps(plain(values), ensure_ascii=False)

    with writing, FILE.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def plain(value: Any) -> Any:
    """``value`` in the types of JSON; what has no type there becomes text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=repr)
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            return str(value)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    write("started")
    bus.run()
    write("stopped")


if __name__ == "__main__":
    main()
