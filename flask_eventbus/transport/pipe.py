"""Commands and their answers: a batch in one round trip, on a connection of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, BinaryIO, cast

import redis
from hiredis import pack_command
from redis.connection import DefaultParser

from ..logs import get_logger
from .connections import (
    Connection,
    Connections,
    read_reply,
    refusal_of,
    set_deadline,
    shut_down,
    wire_of,
)

logger = get_logger(__name__)

#: Seconds that a server in this process is let wait at most: nothing can interrupt it.
WAIT_IN_MEMORY = 0.02

#: Bytes that are kept of a text which is too long, and bytes that are read of it at once.
SAMPLE = 64
CHUNK = 64 * 1024

#: How many of the longest texts one array may take, and the bytes that each item takes beside.
MOST_LONG = 4
ITEM = 64

#: A command as Redis takes it: ``("XACK", key, group, id)``.
Command = tuple[str | bytes | int | float, ...]

#: A command as bytes. Not redis-py's own packing, which looks at each argument a second time.
_packed = cast(Callable[[Command], bytes], pack_command)

_ROLE = _packed(("ROLE",))


class Large:
    """A text of an answer that is too long to be kept: its length, its SHA-256 and its beginning.

    ``len()`` and ``bytes()`` return the first and the last of these.
    """

    __slots__ = ("_length", "_sample", "sha256")

    def __init__(self, wire: BinaryIO, length: int) -> None:
        self._length, self._sample = length, b""
        digest, left = sha256(), length

        while left:
            chunk = _read_all(wire, min(left, CHUNK))
            digest.update(chunk)
            self._sample = self._sample or chunk[:SAMPLE]
            left -= len(chunk)

        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return self._sample


class Pipe:
    """Writes commands in batches, one round trip each; one thread at a time.

    :param timeout: seconds that each wait for Redis may take.
    """

    def __init__(self, connections: Connections, *, timeout: float) -> None:
        self._connections = connections
        self._timeout = timeout
        self._connection: Connection | None = None
        self._deadline = connections.deadline
        #: When the server last said that it is a master, by the monotonic clock.
        self._asked_role = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def deadline(self) -> float:
        """When all waits for Redis end, by the monotonic clock. Any thread may set it."""
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._deadline = deadline
        connection = self._connection

        if connection is not None:
            set_deadline(connection, deadline)

    def ask(self, *command: str | bytes | int | float, most: int | None = None) -> Any:
        """The answer to one command; see :meth:`run`.

        :raises redis.ConnectionError: Redis is away, or answers "not now".
        :raises redis.ResponseError: Redis refuses it.
        """
        answer = self.run([command], most=most)[0]

        if isinstance(answer, Exception):
            raise answer

        return answer

    def run(self, commands: Sequence[Command], *, most: int | None = None) -> list[Any]:
        """The answers to commands, in order; a refusal is a value among them.

        Nothing is sent a second time: after an error Redis may have done any part of it.

        :param most: bytes above which a text is read as :class:`Large`, so that entries of any
            size fit into memory. It takes longer.
        :raises redis.ConnectionError: Redis is away, or answers "not now" to some, or is no
            master any more.
        """
        if self._connection is None:
            left = self._deadline - time.monotonic()
            self._connection = self._connections.open(
                timeout=self._timeout, within=min(self._timeout, left)
            )
            self._asked_role = time.monotonic()

        connection = self._connection
        set_deadline(connection, self._deadline)
        asks_role = self._connections.asks_role(self._asked_role)

        try:
            packed = b"".join(map(_packed, commands))
            packed = _ROLE + packed if asks_role else packed
            connection.send_packed_command([packed], check_health=False)

            read = read_reply if most is None else _sparing_reader(connection, most)

            if asks_role:
                self._connections.role.check(read(connection))
                self._asked_role = time.monotonic()

            return [read(connection) for _ in commands]
        except BaseException:
            self.close()
            raise

    def wait_at_most(self, seconds: float) -> float:
        """How long Redis may hold back an answer, where ``seconds`` are wished for."""
        return min(seconds, WAIT_IN_MEMORY) if self._connections.in_memory else seconds

    def interrupt(self) -> None:
        """Let a wait for Redis end at once, in whatever thread: as if Redis were lost."""
        connection = self._connection

        if connection is not None:
            shut_down(connection)

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection = self._connection, None

        if connection is not None:
            connection.disconnect()


def _sparing_reader(connection: Connection, most: int) -> Callable[[Connection], Any]:
    """What reads replies as :func:`.read_reply` does, with :class:`Large` for longer texts."""
    wire = wire_of(connection)

    # fakeredis has none.
    if wire is None:
        return read_reply

    def read(_: Connection) -> Any:
        answer = _next_answer(wire, most)
        return refusal_of(answer) if isinstance(answer, redis.ResponseError) else answer

    return read


def _next_answer(wire: BinaryIO, most: int) -> Any:
    line = wire.readline()

    if not line.endswith(b"\r\n"):
        raise redis.ConnectionError("Redis closed the connection.")

    kind, rest = line[:1], line[1:-2]

    if kind == b"+":
        return rest

    if kind == b"-":
        return _error(rest)

    number = int(rest)

    if kind == b":":
        return number

    if number < 0:
        return None

    if kind == b"*":
        return _next_items(wire, number, most)

    text = Large(wire, number) if number > most else _read_all(wire, number)
    _read_all(wire, 2)
    return text


def _next_items(wire: BinaryIO, count: int, most: int) -> list[Any]:
    """An array; of more texts than fit into memory, the first ones, in pairs."""
    items: list[Any] = []
    left = MOST_LONG * (most + CHUNK)

    for _ in range(count):
        item = _next_answer(wire, most)

        if left > 0 or len(items) % 2:
            items.append(item)

        if isinstance(item, bytes):
            left -= len(item) + ITEM

    return items


def _error(text: bytes) -> Exception:
    parse: Callable[[str], Exception] = DefaultParser.parse_error
    error = parse(text.decode(errors="replace"))

    # "Not now": as redis-py has it, which raises it as well.
    if isinstance(error, redis.ConnectionError):
        raise error

    return error


def _read_all(wire: BinaryIO, length: int) -> bytes:
    found = wire.read(length)

    if len(found) < length:
        raise redis.ConnectionError("Redis closed the connection.")

    return found
