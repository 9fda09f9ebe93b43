"""The least Python that carries a blinker signal from one process to another.

A deque, one writer thread, pipelines of 512 commands, msgpack; a read by redis-py's connection
and a direct call. There is no envelope, no limit, no reconnecting, and no guarantee.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import hiredis
import msgpack
import redis
from _program import Send, run
from blinker import Signal

#: Commands in one pipeline, and entries in one read.
BATCH = 512

CHANNEL = b"floor"
GROUP = "floor"


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Writer:
    """Packs and sends what senders put into a deque, in a thread of its own."""

    def __init__(self, url: str, *head: bytes) -> None:
        self._connection = connect(url)
        self._head = b"*%d\r\n" % (len(head) + 1) + b"".join(
            b"$%d\r\n%b\r\n" % (len(word), word) for word in head
        )
        self.queue: deque[dict[str, Any]] = deque()
        self.wakeup = threading.Event()
        self.idle = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, payload: dict[str, Any]) -> None:
        self.queue.append(payload)

        if not self.wakeup.is_set():
            self.wakeup.set()

    def flush(self) -> None:
        while self.queue or not self.idle.is_set():
            time.sleep(0.002)

    def _run(self) -> None:
        queue, head, reader = self.queue, self._head, hiredis.Reader()

        while True:
            if not queue:
                self.idle.set()
                self.wakeup.wait()
                self.wakeup.clear()

            self.idle.clear()
            commands: list[bytes] = []

            while queue and len(commands) < BATCH:
                body = msgpack.packb(queue.popleft())
                commands.append(b"%b$%d\r\n%b\r\n" % (head, len(body), body))

            self._connection.sendall(b"".join(commands))
            left = len(commands)

            while left:
                if reader.gets() is not False:
                    left -= 1
                else:
                    reader.feed(self._connection.recv(65536))


def publish(url: str, *head: bytes) -> tuple[Send, Callable[[], None]]:
    signal = Signal()
    writer = Writer(url, *head)

    @signal.connect
    def bridge(sender: Any, **payload: Any) -> None:
        writer.put(payload)

    # blinker holds receivers weakly.
    writer.bridge = bridge  # type: ignore[attr-defined]
    return lambda **payload: signal.send("publisher", **payload), writer.flush


def publish_channel(url: str) -> tuple[Send, Callable[[], None]]:
    return publish(url, b"PUBLISH", CHANNEL)


def publish_stream(url: str) -> tuple[Send, Callable[[], None]]:
    return publish(url, b"XADD", CHANNEL, b"MAXLEN", b"~", b"100000", b"*", b"event")


def reading(url: str) -> Any:
    """Return a connection of redis-py, with the protocol that is faster there."""
    connection = redis.ConnectionPool.from_url(
        url, protocol=2, socket_timeout=None
    ).make_connection()
    connection.connect()
    return connection


def receive_channel(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    connection = reading(url)
    connection.send_command("SUBSCRIBE", CHANNEL)
    connection.read_response()
    ready()

    while True:
        receive(**msgpack.unpackb(connection.read_response()[2]))


def receive_stream(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    connection = reading(url)

    def ask(*words: bytes | str) -> Any:
        connection.send_command(*words)
        return connection.read_response()

    ask("XGROUP", "CREATE", CHANNEL, GROUP, "0", "MKSTREAM")
    ready()
    read = ("XREADGROUP", "GROUP", GROUP, "one", "COUNT", str(BATCH), "BLOCK", "2000", "STREAMS")

    while True:
        reply = ask(*read, CHANNEL, ">")

        if reply:
            entries = reply[0][1]

            for _, fields in entries:
                receive(**msgpack.unpackb(fields[1]))

            ask("XACK", CHANNEL, GROUP, *(entry for entry, _ in entries))


if __name__ == "__main__":
    run(
        {"channel": publish_channel, "stream": publish_stream},
        {"channel": receive_channel, "stream": receive_stream},
    )
