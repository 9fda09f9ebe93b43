"""A plug-in: puts new users on the list of those who get the newsletter.

The mailer does not know it. What makes it one is its folder, which ``EVENTBUS_RECEIVERS``
names, and its function ``register``.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from flask import current_app

from flask_eventbus import EventBus

TABLE = "CREATE TABLE IF NOT EXISTS reader (email TEXT PRIMARY KEY, name TEXT NOT NULL)"


def register(bus: EventBus) -> None:
    bus.on("user_registered")(add_reader)


def add_reader(sender: str, email: str, name: str, **extra: Any) -> None:
    with closing(sqlite3.connect(list_file())) as readers, readers:
        readers.execute(TABLE)
        readers.execute("INSERT OR IGNORE INTO reader VALUES (?, ?)", (email, name))


def list_file() -> Path:
    default = Path(current_app.instance_path, "newsletter.db")
    path = Path(current_app.config.get("NEWSLETTER_FILE", default))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
