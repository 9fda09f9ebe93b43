"""Reads along what goes over a server in memory."""

from __future__ import annotations

import threading
from collections.abc import Container

import msgpack

from .codec import Codec
from .connections import Connections
from .event import Event
from .node import Node


class Recording:
    """Everything published on a ``memory://`` server from now on, as the events that it is.

    :param url: the server's.
    """

    def __init__(self, url: str) -> None:
        self.events: list[Event] = []
        self._reading = threading.Lock()
        self._codecs: list[tuple[Container[str], Codec]] = []
        self._connection = Connections(url, name="eventbus:testing").open(timeout=1.0)
        self._connection.send_command("PSUBSCRIBE", "*")
        self._connection.read_response()

    def learn(self, node: Node) -> None:
        """Remember the types that travel in a node's events; the node itself may go."""
        self._codecs.append((node.declarations.siblings, node.codec))

    def read(self) -> None:
        """Take up what was published since."""
        with self._reading:
            while self._connection.can_read(0):
                body = self._connection.read_response()[-1]
                self.events.append(self._codec_of(body).decode(body))

    def close(self) -> None:
        """Let go of the server."""
        self._connection.disconnect()

    def _codec_of(self, body: bytes) -> Codec:
        node = msgpack.unpackb(body, strict_map_key=False)["id"].rpartition("-")[0]
        return next((codec for names, codec in self._codecs if node in names), Codec())
