"""Commands and their answers: a batch in one round trip, on a connection of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import redis
from hiredis import pack_command

from .connections import Connection, Connections, is_passing, set_timeout, shut_down
from .logs import get_logger

logger = get_logger(__name__)

#: Seconds that a server in this process is let wait at most: nothing can interrupt it.
WAIT_IN_MEMORY = 0.02

#: A command as Redis takes it: ``("XACK", key, group, id)``.
Command = tuple[str | bytes | int | float, ...]

#: A command as bytes. Not redis-py's own packing, which looks at each argument a second time.
_packed = cast(Callable[[Command], bytes], pack_command)

_ROLE = _packed(("ROLE",))


class Pipe:
    """Writes commands in batches, one round trip each; one thread at a time.

    :param timeout: seconds that each wait for Redis may take.
    """

    def __init__(self, connections: Connections, *, timeout: float) -> None:
        self._connections = connections
        self._timeout = timeout
        self._connection: Connection | None = None
        #: When all waits for Redis end, by the monotonic clock; ``None`` for never.
        self.deadline: float | None = None
        #: When the server last said that it is a master, by the monotonic clock.
        self._asked_role = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    def ask(self, *command: str | bytes | int | float) -> Any:
        """The answer to one command.

        :raises redis.ConnectionError: Redis is away, or answers "not now".
        :raises redis.ResponseError: Redis refuses it.
        """
        answer = self.run([command])[0]

        if isinstance(answer, Exception):
            raise answer

        return answer

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands, in order; a refusal is a value among them.

        Nothing is sent a second time: after an error Redis may have done any part of it.

        :raises redis.ConnectionError: Redis is away, or answers "not now" to some, or is no
            master any more.
        """
        if self._connection is None:
            self._connection = self._connections.open(timeout=self._left)
            self._asked_role = time.monotonic()

        connection = self._connection
        asks_role = self._connections.asks_role(self._asked_role)

        try:
            packed = b"".join(map(_packed, commands))
            packed = _ROLE + packed if asks_role else packed
            connection.send_packed_command([packed], check_health=False)

            if asks_role:
                self._connections.role.check(self._read(connection))
                self._asked_role = time.monotonic()

            return [self._read(connection) for _ in commands]
        except BaseException:
            self.close()
            raise

    def _read(self, connection: Connection) -> Any:
        if self.deadline is not None:
            set_timeout(connection, self._left)

        return read_answer(connection)

    @property
    def _left(self) -> float:
        """Seconds that the next wait may take.

        :raises redis.TimeoutError: the deadline is over.
        """
        if self.deadline is None:
            return self._timeout

        left = self.deadline - time.monotonic()

        if left <= 0:
            raise redis.TimeoutError("The time to wait for Redis is over.")

        return min(left, self._timeout)

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


def read_answer(connection: Connection) -> Any:
    """The next answer; a refusal as it is, one of "not now" raised.

    :raises redis.ConnectionError: Redis is away, or answers "not now".
    """
    try:
        answer = connection.read_response()
    except redis.ResponseError as error:
        if is_passing(error):
            raise redis.ConnectionError(str(error)) from error

        return error

    # What fails inside a transaction comes as a value.
    return answer
