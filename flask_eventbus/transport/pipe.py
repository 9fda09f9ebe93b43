"""Send commands to Redis in batches, one round trip each, and ask Redis for its time."""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from hashlib import sha256
from typing import Any, BinaryIO, cast

import redis
from hiredis import pack_command

from ..config import Config, Timing
from ..logs import BoundedLog, get_logger
from .connection import (
    OUTAGE,
    Connection,
    read_reply,
    refusal_of,
)
from .connections import Connections
from .timed_connection import CLOSED, parse_error

logger = get_logger(__name__)

#: Longest blocking command in seconds for a fakeredis server, whose wait cannot be interrupted.
WAIT_IN_MEMORY = 0.02

#: Bytes kept of a value that is too long to be read whole.
SAMPLE = 64

#: Bytes read at once of a value that is too long.
CHUNK = 64 * 1024

#: Number of values of the longest length for which one array has room.
MAX_LONG = 4

#: Bytes of overhead counted for each item of an array.
ITEM = 64

#: Difference in seconds between the clocks of this machine and of Redis above which a warning is
#: logged.
MAX_APART = 5.0

#: A command and its arguments: ``("XACK", key, group, id)``.
Command = tuple[str | bytes | int | float, ...]

#: Packs a command into bytes. redis-py's own packing is slower: it inspects each argument twice.
_packed = cast(Callable[[Command], bytes], pack_command)

_ROLE = _packed(("ROLE",))

#: Waits for any of a few sockets. select() cannot wait for descriptors above 1023.
_Selector: type[selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)


class Large:
    """Stands for a value of a reply that is too long to be kept in memory.

    ``len()`` returns its full length in bytes, ``bytes()`` its first :data:`SAMPLE` bytes, and
    ``sha256`` is the hexadecimal hash of the whole value.
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


class OwnConnection:
    """A connection of its own, used by one thread at a time, and opened again after an error.

    :param timeout: longest wait for Redis, in seconds.
    """

    def __init__(self, connections: Connections, *, timeout: float) -> None:
        self._connections = connections
        self.timeout = timeout
        self._connection: Connection | None = None
        #: Monotonic time at which to send ROLE again, to confirm that the server is a master.
        self._ask_role_at = 0.0

    @property
    def is_open(self) -> bool:
        """Return True if a connection is open; the server may have closed it unnoticed."""
        return self._connection is not None

    def interrupt(self) -> None:
        """Abort the current wait for Redis with a connection error; call it from any thread."""
        connection = self._connection

        if connection is not None:
            connection.shut_down()

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection = self._connection, None

        if connection is not None:
            connection.disconnect()

    def _open(self, within: float) -> Connection:
        """Open a connection within some seconds."""
        connection = self._connections.open(timeout=self.timeout, within=within)
        self._ask_role_at = self._connections.next_role_check()
        self._connection = connection
        return connection


class Pipe(OwnConnection):
    """Sends batches of commands over its own connection."""

    def __init__(self, connections: Connections, *, timeout: float) -> None:
        super().__init__(connections, timeout=timeout)
        self._deadline = connections.deadline

    @property
    def deadline(self) -> float:
        """Monotonic time at which every wait for Redis ends. Any thread may set it."""
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._deadline = deadline
        connection = self._connection

        if connection is not None:
            connection.set_deadline(deadline)

    def ask(self, *command: str | bytes | int | float, most: int | None = None) -> Any:
        """Return the reply to one command; see :meth:`run`.

        :raises redis.ConnectionError: Redis is unavailable, or sends a temporary error.
        :raises redis.ResponseError: Redis refuses the command.
        """
        answer = self.run([command], most=most)[0]

        if isinstance(answer, Exception):
            raise answer

        return answer

    def run(self, commands: Sequence[Command], *, most: int | None = None) -> list[Any]:
        """Return the replies to commands, in order; an error reply is one of the values.

        Commands are never sent twice. After an exception, Redis may have run any part of the
        batch.

        :param most: length in bytes above which a value is read as :class:`Large`, so that
            entries of any size fit into memory. Reading is slower with it.
        :raises redis.ConnectionError: Redis is unavailable, sends a temporary error to one of the
            commands, or is no longer a master.
        """
        connection = self._connection

        if connection is None:
            connection = self._open(min(self.timeout, self._deadline - time.monotonic()))
            # Another thread may have set the deadline meanwhile.
            connection.set_deadline(self._deadline)

        asks_role = time.monotonic() >= self._ask_role_at and self._connections.asks_role
        answers: list[Any] = []

        # Without one, the timeout of the connection holds from its first command on.
        if self._deadline < math.inf:
            connection.set_deadline(self._deadline)

        try:
            packed = b"".join(map(_packed, commands))
            packed = _ROLE + packed if asks_role else packed
            connection.send_packed_command([packed], check_health=False)
            read: Callable[[], Any] = partial(read_reply, connection)

            if most is not None and (wire := connection.received_bytes()):
                read = partial(_read, wire, most)

            if asks_role:
                self._connections.check_role(read())
                self._ask_role_at = self._connections.next_role_check()

            if most is not None:
                return [read() for _ in commands]

            for _ in commands:
                try:
                    answers.append(connection.read_response())
                except redis.ResponseError as error:
                    answers.append(refusal_of(error))

            return answers
        except BaseException:
            self.close()
            raise

    def send(self, command: Command) -> None:
        """Send a command whose reply may take long; :meth:`receive` returns the reply.

        :raises redis.ConnectionError: Redis is unavailable, or is no longer a master.
        """
        # Alone: ROLE and the command may be answered together, and then no byte follows for which
        # wait_for_replies() could wait.
        if not self.is_open or time.monotonic() >= self._ask_role_at:
            self.run([])

        try:
            self._connected().send_packed_command([_packed(command)], check_health=False)
        except BaseException:
            self.close()
            raise

    def receive(self) -> Any:
        """Return the reply to the command of :meth:`send`; an error reply is a value.

        :raises redis.ConnectionError: Redis is unavailable, or sends a temporary error.
        """
        try:
            return read_reply(self._connected())
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor of the connection's socket.

        :raises redis.ConnectionError: the connection is closed.
        """
        return self._connected().fileno()

    def _connected(self) -> Connection:
        if self._connection is None:
            raise redis.ConnectionError(CLOSED)

        return self._connection

    def wait_at_most(self, seconds: float) -> float:
        """Return the seconds that a blocking command may take, ``seconds`` at most."""
        return min(seconds, WAIT_IN_MEMORY) if self._connections.in_memory else seconds


def wait_for_replies(pipes: Sequence[Pipe], timeout: float) -> list[Pipe]:
    """Wait until a reply to a command of :meth:`Pipe.send` arrives, or a connection is lost.

    :param timeout: seconds after which the result is empty.
    :return: the pipes whose :meth:`Pipe.receive` does not wait.
    """
    with _Selector() as selector:
        for pipe in pipes:
            selector.register(pipe.fileno(), selectors.EVENT_READ, pipe)

        return [key.data for key, _ in selector.select(timeout)]


class RedisClock:
    """The time of the Redis server, extrapolated with the monotonic clock between two queries.

    Redis measures the idle time of an entry with its own clock. If that clock is set forward, all
    entries look abandoned at once. Check :attr:`is_steady` before you trust an idle time.

    :param lock: the lock that guards ``pipe``; held while the clock sends ``TIME``.
    """

    def __init__(
        self, pipe: Pipe, *, config: Config, timing: Timing, lock: AbstractContextManager[object]
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._timing = timing
        self._lock = lock
        self._log = BoundedLog(logger)
        #: Lower and upper bound, in seconds, of Redis's time minus the monotonic clock; ``None``
        #: until Redis has answered.
        self._offset: tuple[float, float] | None = None
        #: Monotonic time from which the idle times of Redis are trusted.
        self._steady_from = float("inf")
        #: Monotonic time before which ``TIME`` is not sent again.
        self._ask_at = 0.0
        self._is_apart = False

    def now(self) -> float:
        """Return Redis's time in seconds since 1970.

        Return the time of this machine if Redis does not answer ``TIME``.
        """
        if self._offset is None:
            self._try_to_ask()

        if self._offset is None:
            return time.time()

        least, most = self._offset
        return time.monotonic() + (least + most) / 2

    @property
    def is_steady(self) -> bool:
        """Return True if live workers have had time to renew their leases since the last step.

        Also return True if Redis does not answer ``TIME``, because no step can be detected then.
        """
        return self._offset is None or time.monotonic() >= self._steady_from

    def ask(self) -> None:
        """Send ``TIME`` to Redis and store the answer.

        :raises redis.ConnectionError: Redis is unavailable.
        """
        if time.monotonic() < self._ask_at:
            return

        with self._lock:
            begin = time.monotonic()

            try:
                seconds, microseconds = self._pipe.ask("TIME")
            except redis.ResponseError as error:
                self._refused(error)
                return

            end = time.monotonic()
            answer = int(seconds) + int(microseconds) / 1e6
            self._store(answer - end, answer - begin, end)
            self._log.over("refused", "Redis answers TIME again; retries use its clock.")

        self._compare(answer)

    def _try_to_ask(self) -> None:
        try:
            self.ask()
        except OUTAGE as error:
            logger.debug("Redis is unavailable (%s); using the clock of this machine.", error)
            self._ask_at = time.monotonic() + 1.0

    def _store(self, least: float, most: float, now: float) -> None:
        before, self._offset = self._offset, (least, most)
        claim_after = self._config.claim_after

        if before is None:
            # The clock may have been set just before this process started. Live workers renew
            # their leases within a third of ``claim_after``.
            self._steady_from = now + claim_after / 2
            return

        step = max(least - before[1], 0.0) or min(most - before[0], 0.0)

        # Leases are renewed long before they expire, so a small step does no harm.
        if abs(step) > claim_after / 6:
            self._steady_from = now + claim_after
            self._log.warning(
                "step",
                "The clock of Redis was set by %+.1f s. Entries of silent workers are not "
                "reclaimed for the next %g s, so that live workers can renew their leases.",
                step,
                claim_after,
            )

    def _compare(self, answer: float) -> None:
        apart = time.time() - answer
        was_apart, self._is_apart = self._is_apart, abs(apart) > MAX_APART

        if self._is_apart and not was_apart:
            self._log.warning(
                "apart",
                "The clock of this machine is %.1f s %s that of Redis. Retries use the clock of "
                "Redis. Synchronize both clocks with NTP.",
                abs(apart),
                "ahead of" if apart > 0 else "behind",
            )
        elif was_apart and not self._is_apart:
            self._log.over("apart", "The clocks of this machine and of Redis agree again.")

    def _refused(self, error: redis.ResponseError) -> None:
        self._ask_at = time.monotonic() + self._timing.ask_command_again_after
        self._offset = None
        self._log.once(
            "refused",
            "Redis refused TIME (%s). Retries use the clock of this machine, and if the clock of "
            "Redis is set forward, an event in flight may run twice. Grant '+time' to the user "
            "of %r in the ACL.",
            error,
            self._config.service,
        )


def _read(wire: BinaryIO, most: int) -> Any:
    """Return the next reply as :func:`.read_reply` does, but longer values as :class:`Large`."""
    answer = _next_answer(wire, most)
    return refusal_of(answer) if isinstance(answer, redis.ResponseError) else answer


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
    """Read an array; return only its first items if all of them would not fit into memory.

    The number of items is even, since field names and values alternate.
    """
    items: list[Any] = []
    left = MAX_LONG * (most + CHUNK)

    for _ in range(count):
        item = _next_answer(wire, most)

        if left > 0 or len(items) % 2:
            items.append(item)

        if isinstance(item, bytes):
            left -= len(item) + ITEM

    return items


def _error(text: bytes) -> Exception:
    error = parse_error(text.decode(errors="replace"))

    # redis-py maps temporary errors to ConnectionError, and raises them too.
    if isinstance(error, redis.ConnectionError):
        raise error

    return error


def _read_all(wire: BinaryIO, length: int) -> bytes:
    found = wire.read(length)

    if len(found) < length:
        raise redis.ConnectionError("Redis closed the connection.")

    return found
