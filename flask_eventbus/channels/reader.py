"""A pub/sub connection, and the subscriptions of a service that it carries."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from threading import Condition
from typing import Any

import redis

from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription
from ..transport.connection import (
    OUTAGE,
    Connection,
    read_reply,
    refusal_of,
)
from ..transport.connections import Connections, NotMasterError
from ..transport.keys import LISTEN, LISTEN_PATTERN, ChannelKeys, grant_its_user

logger = get_logger(__name__)

#: Maximum time to connect, in seconds.
CONNECT = 2.0

#: Maximum number of messages that one read returns, to lock the queue once for all of them.
BATCH = 256

#: Size of the messages in bytes above which a read returns.
BATCH_BYTES = 1024 * 1024


#: The command whose answer shows that the server is alive.
_PING = ("PING",)


@dataclass(frozen=True, slots=True)
class Frame:
    """A message from a channel, or the server's answer to a command."""

    #: ``message``, ``pmessage``, ``subscribe``, ``pong``, ...; ``refused`` for an error.
    kind: str
    #: The channel or pattern of the subscription, or the command ``PING``.
    subscribed: bytes
    channel: bytes = b""
    #: The encoded event, or the text of the error.
    body: bytes = b""


class ChannelReader:
    """Reads one pub/sub connection; any thread may subscribe, one thread reads."""

    def __init__(self, connections: Connections) -> None:
        self._timing = connections.timing
        self._connections = connections
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        #: Channels and patterns whose answer is outstanding. The server answers in order.
        self._asked: deque[bytes] = deque()
        #: A second connection for ``ROLE``, which a subscribed connection may not send.
        self._aside: Connection | None = None
        #: Monotonic time at which the last bytes arrived, or at which the connection was opened.
        self._heard = 0.0
        #: Monotonic time of a PING that the server has not answered yet.
        self._pinged: float | None = None
        #: The error after the messages of the last read; the next read raises it.
        self._failure: Exception | None = None

    def connect(self) -> None:
        """Close the connection and open a new one.

        :raises redis.ConnectionError: if Redis is unreachable or refuses the connection.
        """
        self.close()
        self._asked.clear()
        self._connection = self._connections.open(timeout=self._timing.tick, within=CONNECT)
        self._heard, self._pinged, self._failure = time.monotonic(), None, None

    def subscribe(self, keys: Iterable[str], *, patterns: bool) -> None:
        """Subscribe to channels, with one command for each, so that each may be refused alone."""
        command = "PSUBSCRIBE" if patterns else "SUBSCRIBE"
        self._send([(command, key) for key in keys])

    def wake(self) -> None:
        """End the current read soon, with the answer to a PING. Any thread may call this."""
        try:
            self._send([_PING])
        except OUTAGE as error:
            logger.debug("The reading thread ends its wait by itself: %s", error)

    def check_role(self) -> None:
        """Check that the server is still a master. Only the reading thread may call this.

        A missing answer is ignored: the PING detects a server that hangs.

        :raises NotMasterError: if the server is a replica now.
        """
        if not self._connections.asks_role:
            return

        try:
            if self._aside is None:
                # Opening a connection checks the role, too.
                self._aside = self._connections.open(timeout=self._timing.tick)
                return

            self._aside.set_deadline(time.monotonic() + self._timing.tick)
            self._aside.send_command("ROLE")
            self._connections.check_role(read_reply(self._aside))
        except NotMasterError:
            raise
        except OUTAGE as error:
            logger.debug("Could not get the role of the server: %s", error)
            self._close_aside()

    def read(self) -> list[Frame]:
        """Wait up to ``Timing.tick`` seconds for messages, and return them in order.

        The first part of a message that is still incomplete is kept for the next call. After
        ``Timing.ping_after`` seconds without one, check that the server answers, and is a master.

        :raises redis.ConnectionError: if the connection is lost, or the server is a replica now.
        :raises redis.TimeoutError: if the server has not answered a PING in time.
        """
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError("The reader is not connected.")

        if self._failure is not None:
            raise self._failure

        frames: list[Frame] = []
        size = 0

        try:
            while len(frames) < BATCH and size < BATCH_BYTES:
                # Without a system call: the events that are here already need not wait for it.
                if frames and not connection.has_buffered():
                    break

                frames.append(self._frame(connection))
                size += len(frames[-1].body)
        except redis.TimeoutError:
            # The parser keeps a message that is still incomplete.
            pass
        except OUTAGE as error:
            if not frames:
                raise

            self._failure = error

        if frames:
            self._heard, self._pinged = time.monotonic(), None
        else:
            self._check_alive(time.monotonic())

        return frames

    def close(self) -> None:
        """Close the connection. Only the reading thread may call this."""
        # redis-py reopens a closed connection when something is sent, and no thread would read it.
        with self._sending:
            connection, self._connection = self._connection, None

            if connection is not None:
                connection.disconnect()

        self._close_aside()

    def _check_alive(self, now: float) -> None:
        if self._pinged is None and now - self._heard >= self._timing.ping_after:
            self._pinged = now
            self._send([_PING])
            self.check_role()
        elif self._pinged is not None and now - self._pinged >= self._timing.ping_timeout:
            raise redis.TimeoutError(f"no answer to a PING within {self._timing.ping_timeout:g} s")

    def _close_aside(self) -> None:
        aside, self._aside = self._aside, None

        if aside is not None:
            aside.disconnect()

    def _send(self, commands: Sequence[tuple[str, ...]]) -> None:
        with self._sending:
            connection = self._connection

            if connection is None or not commands:
                return

            self._asked.extend(command[-1].encode() for command in commands)
            packed = connection.pack_commands(commands)
            connection.send_packed_command(packed, check_health=False)

    def _frame(self, connection: Connection) -> Frame:
        try:
            reply: Any = connection.read_response(disconnect_on_error=False)
        except redis.ResponseError as error:
            return Frame("refused", self._answered(), body=str(refusal_of(error)).encode())

        try:
            if isinstance(reply, bytes):
                return Frame("pong", self._answered())

            kind = reply[0].decode()

            if kind == "message":
                return Frame(kind, reply[1], reply[1], reply[2])

            if kind == "pmessage":
                return Frame(kind, reply[1], reply[2], reply[3])

            return Frame(kind, self._answered())
        except (AttributeError, LookupError, TypeError) as error:
            raise redis.InvalidResponse(
                f"{short(reply)} is not a pub/sub message or an answer to SUBSCRIBE or PING."
            ) from error

    def _answered(self) -> bytes:
        return self._asked.popleft() if self._asked else b""


class ChannelSubscriptions:
    """Subscribes one connection to the channels of a service, and records the answers of Redis.

    Any thread may subscribe. The reading thread calls :meth:`note` with the answers.

    :param changed: guards the attributes; notified when one of them changes.
    """

    def __init__(
        self, reader: ChannelReader, *, service: str, keys: ChannelKeys, changed: Condition
    ) -> None:
        self._reader = reader
        self._service = service
        self._keys = keys
        self._changed = changed
        #: The subscriptions of the service, by name or pattern.
        self.wanted: Mapping[str, Subscription] = {}
        #: The signals among them that were asked for, by channel.
        self.names: dict[bytes, str] = {}
        #: Subscriptions that Redis refuses, with the errors.
        self.refused: dict[str, str] = {}
        self._open = False
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._confirmed: set[str] = set()
        #: Confirmed patterns, in the order of the subscriptions.
        self._patterns: tuple[Subscription, ...] = ()

    @property
    def all_confirmed(self) -> bool:
        """True if Redis has confirmed every subscription."""
        return self._open and self.wanted.keys() <= self._confirmed

    @property
    def all_answered(self) -> bool:
        """True if Redis has confirmed or refused every subscription."""
        return self._open and self.wanted.keys() <= self._answered

    def open(self) -> None:
        """Subscribe to everything on a new connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            self._open = True

        self.ask()

    def close(self) -> None:
        """Forget all answers, after the connection was closed."""
        with self._changed:
            self._open = False
            self._asked.clear()
            self._answered.clear()
            self._confirmed.clear()
            self._patterns = ()
            self._changed.notify_all()

    def ask(self) -> None:
        """Subscribe to what was added; do nothing without a connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            if not self._open:
                return

            new = self.wanted.keys() - self._asked
            self._asked |= new
            self._request(sorted(new))

    def ask_again(self) -> None:
        """Subscribe again to what was refused, because the ACL may have changed.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            self._asked -= self.refused.keys()

        self.ask()

    def note(self, frame: Frame) -> None:
        """Record an answer of Redis."""
        if frame.kind not in ("subscribe", "psubscribe", "refused"):
            return

        name = self._keys.name(frame.subscribed)

        with self._changed:
            if name not in self._asked:
                return

            if frame.kind == "refused":
                self._refuse(name, frame.body.decode(errors="replace"))
            else:
                self._confirm(name)

            self._answered.add(name)
            self._changed.notify_all()

    def match_pattern(self, frame: Frame, name: str) -> Subscription | None:
        """Return the pattern that handles the event ``name`` in a frame, or ``None``.

        Redis delivers a message once for each matching subscription. Only one of these copies is
        handled: that of the name itself, or else that of the first confirmed pattern.
        """
        if name in self._confirmed:
            return None

        pattern = next((found for found in self._patterns if matches(found.name, name)), None)
        is_match = pattern and pattern.name == self._keys.name(frame.subscribed)
        return pattern if is_match else None

    def _request(self, names: Sequence[str]) -> None:
        channels = {self._keys.key(name): name for name in names if not is_pattern(name)}
        self.names.update({key.encode(): name for key, name in channels.items()})
        patterns = [self._keys.key(name) for name in names if is_pattern(name)]
        self._reader.subscribe(channels, patterns=False)
        self._reader.subscribe(patterns, patterns=True)

    def _confirm(self, name: str) -> None:
        self._confirmed.add(name)
        was_refused = self.refused.pop(name, None)

        if was_refused is not None:
            logger.warning(
                "Redis lets %r listen to %r again.",
                self._service,
                name,
                extra={"signal": name, "service": self._service},
            )

        if is_pattern(name):
            self._patterns = tuple(
                found
                for found in self.wanted.values()
                if is_pattern(found.name) and found.name in self._confirmed
            )

    def _refuse(self, name: str, reason: str) -> None:
        if name in self.refused:
            return

        self.refused[name] = reason
        logger.error(
            "Redis refuses to let %r listen to %r: %s. This service does not receive its events. "
            "%s",
            self._service,
            name,
            reason,
            grant_its_user({self._keys.key(name): LISTEN_PATTERN if is_pattern(name) else LISTEN}),
            extra={"signal": name, "service": self._service},
        )
