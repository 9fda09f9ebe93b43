"""Commands and their answers: a batch in one round trip, on a connection of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from hiredis import pack_command

from .connections import Connection, Connections, read_reply, set_deadline, shut_down
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

            if asks_role:
                self._connections.role.check(read_reply(connection))
                self._asked_role = time.monotonic()

            return [read_reply(connection) for _ in commands]
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
