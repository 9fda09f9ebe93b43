"""python-socketio's Redis manager, which carries emits between servers.

Source: python-socketio.readthedocs.io, "The Socket.IO Server", "Emitting from external
processes". A server passes what it hears to its browsers; here it is counted instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import socketio
from _program import Send, run


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    manager = socketio.RedisManager(url, write_only=True)
    return lambda **payload: manager.emit("tick", payload), lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    class Counting(socketio.RedisManager):  # type: ignore[misc]
        def _handle_emit(self, message: Any) -> None:
            data = message["data"]
            receive(**(data[0] if isinstance(data, list) else data))

    server = socketio.Server(client_manager=Counting(url), async_mode="threading")
    server.manager.initialize()
    threading.Event().wait(0.5)
    ready()
    threading.Event().wait()


if __name__ == "__main__":
    run({"channel": publish}, {"channel": receive})
