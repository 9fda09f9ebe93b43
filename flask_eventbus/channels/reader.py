"""Bytes over pub/sub: the names of channels, and a connection that listens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import redis

from ..logs import get_logger
from ..transport.connections import (
    OUTAGE,
    Connection,
    Connections,
    is_passing,
    read_reply,
    set_deadline,
)
from ..transport.role import NotMasterError

logger = get_logger(__name__)

#: Seconds one read waits for bytes: how often an idle reader looks around.
TICK = 1.0

#: Seconds that it may take to connect.
CONNECT = 2.0

#: Messages taken from the wire at once, so that one lock serves many of them.
BATCH = 256

#: Bytes of messages after which no more are taken at once.
BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """What a reader got: a body on a channel, or the server's answer to a command."""

    #: ``message``, ``pmessage``, or ``subscribe``, ``pong``, ...; ``refused`` for an error.
    kind: str
    #: The channel or pattern that was subscribed.
    subscribed: str | bytes
    channel: bytes = b""
    #: The event's bytes, or the error's text.
    body: bytes = b""


class ChannelReader:
    """Reads one pub/sub connection; any thread may subscribe, one thread reads."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        #: What was asked and not answered yet: the server answers in order.
        self._asked: deque[str] = deque()
        #: A second connection, to ask for the server's role: one that subscribed may not.
        self._aside: Connection | None = None

    def connect(self) -> None:
        """Connect anew.

        :raises redis.ConnectionError: Redis cannot be reached, or refuses.
        """
        self.close()
        self._asked.clear()
        self._connection = self._connections.open(timeout=TICK, within=CONNECT)

    def subscribe(self, keys: Iterable[str], *, patterns: bool) -> None:
        """Ask for channels, each by itself, so that one refusal does not refuse the others."""
        command = "PSUBSCRIBE" if patterns else "SUBSCRIBE"
        self._send([(command, key) for key in keys])

    def ping(self) -> None:
        """Ask for a sign of life, which also wakes the reading thread."""
        self._send([("PING",)])

    def check_role(self) -> None:
        """Find out whether the server is a master; only the reading thread may.

        That there is no answer says nothing: the PING finds a server that hangs.

        :raises NotMasterError: it is a replica by now.
        """
        if not self._connections.asks_role(0.0):
            return

        try:
            if self._aside is None:
                # This asks as well.
                self._aside = self._connections.open(timeout=TICK)
                return

            set_deadline(self._aside, time.monotonic() + TICK)
            self._aside.send_command("ROLE")
            self._connections.role.check(read_reply(self._aside))
        except NotMasterError:
            raise
        except OUTAGE as error:
            logger.debug("The server does not tell its role: %s", error)
            self._close_aside()

    def read(self) -> list[Frame]:
        """Wait up to :data:`TICK` seconds and return what came, in order; often nothing.

        What arrived of a message when the wait ended stays, and the next call goes on
        with it.

        :raises redis.ConnectionError: the connection is lost.
        """
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError("The reader is not connected.")

        frames: list[Frame] = []

        try:
            frames.append(self._frame(connection))
            size = len(frames[-1].body)

            while len(frames) < BATCH and size < BATCH_BYTES and connection.can_read(0):
                frames.append(self._frame(connection))
                size += len(frames[-1].body)
        except redis.TimeoutError:
            # Nothing more within the tick; an unfinished message waits in the parser.
            return frames

        return frames

    def close(self) -> None:
        """Close the connection. Only the reading thread may."""
        # Sending on a connection that was closed would open it again, and nobody would read it.
        with self._sending:
            connection, self._connection = self._connection, None

            if connection is not None:
                connection.disconnect()

        self._close_aside()

    def _close_aside(self) -> None:
        aside, self._aside = self._aside, None

        if aside is not None:
            aside.disconnect()

    def _send(self, commands: Sequence[tuple[str, ...]]) -> None:
        with self._sending:
            connection = self._connection

            if connection is None or not commands:
                return

            self._asked.extend(command[-1] for command in commands)
            packed = connection.pack_commands(commands)
            connection.send_packed_command(packed, check_health=False)

    def _frame(self, connection: Connection) -> Frame:
        try:
            reply: Any = connection.read_response(disconnect_on_error=False)
        except redis.ResponseError as error:
            if is_passing(error):
                raise redis.ConnectionError(str(error)) from error

            return Frame("refused", self._answered(), body=str(error).encode())

        try:
            return self._frame_of(reply)
        except (AttributeError, LookupError, TypeError) as error:
            raise redis.InvalidResponse(f"{short(reply)} is no answer to a listener.") from error

    def _frame_of(self, reply: Any) -> Frame:
        if isinstance(reply, bytes):
            return Frame("pong", self._answered())

        kind = reply[0].decode()

        if kind == "message":
            return Frame(kind, reply[1], reply[1], reply[2])

        if kind == "pmessage":
            return Frame(kind, reply[1], reply[2], reply[3])

        return Frame(kind, self._answered())

    def _answered(self) -> str:
        return self._asked.popleft() if self._asked else ""
