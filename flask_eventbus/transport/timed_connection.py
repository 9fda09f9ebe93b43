"""Connections of redis-py that keep a deadline, and all that this needs below its public API.

redis-py limits each wait for bytes, but not a whole reply, and it has no public way to see which
bytes it has read already, to end the wait of another thread, or to read a long reply in pieces.
:class:`TimedConnection` does so with names that redis-py keeps private. No other module uses them.

A later redis-py may rename them, or read replies without hiredis. :func:`reason_for_public_api`
tries them once in each process. If they do not work, :class:`PublicConnection` takes over, which
uses the public API alone. It delivers the same events, and differs in this:

- The deadline holds until the first bytes of a reply arrive. If the rest trickles in, each part may
  take as long as the timeout of the connection, and so may TLS and each part that is sent.
- A thread notices after up to :data:`SLICE` seconds that its wait was ended or its deadline moved.
- To see if bytes have arrived takes a system call after each message.
- Values of any length are read into memory whole.
- A thread cannot wait for several connections, so busy streams are read together with silent ones.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from traceback import walk_tb
from typing import Any, BinaryIO, cast

import redis
from redis.connection import AbstractConnection, DefaultParser

from ..config import MAX_REPLICAS
from ..logs import get_logger

logger = get_logger(__name__)

#: Shortest socket timeout in seconds. A timeout of zero would make the socket non-blocking, and
#: it would raise another error.
LEAST = 0.001

#: Seconds that a wait may exceed its deadline. A socket timeout this close to the deadline is
#: kept, because setting it costs a system call.
SLACK = 0.02

#: Seconds after which a wait with the public API looks whether another thread has ended it.
SLICE = 0.1

#: Error message of a wait that reached its deadline.
TOO_LATE = "Timed out waiting for Redis."

#: Error message of a connection that must not be used any longer.
CLOSED = "The connection was closed."

_Base: Any = AbstractConnection

#: Prefixes of the error that fakeredis returns for ``WAIT``.
_NO_WAIT = ("unknown command 'wait'", "unknown command `wait`")


def class_for(connection_class: Any) -> Any:
    """Return a subclass of a connection class of redis-py that keeps a deadline."""
    base = PublicConnection if reason_for_public_api() else TimedConnection
    return _subclass(base, connection_class)


def memory_class_for(connection_class: Any) -> Any:
    """Return a subclass of fakeredis's connection class that has a timeout and ``WAIT``."""
    return _subclass(MemoryConnection, connection_class)


@functools.cache
def _subclass(base: Any, connection_class: Any) -> Any:
    return type(base.__name__, (base, connection_class), {})


@functools.cache
def reason_for_public_api() -> str | None:
    """Return why the private names of redis-py cannot be used; ``None`` if they can.

    Log a reason once.
    """
    try:
        _try_private_names()
    except OSError as error:
        logger.debug("Cannot try the private names of redis-py, and use them untried: %s", error)
        return None
    except Exception as error:  # another redis-py may raise anything
        reason = f"{type(error).__name__}: {error}"
    else:
        return None

    logger.info(
        "redis-py %s with the parser %s lacks what the bus uses to limit whole replies (%s). "
        "The bus uses the public API instead: events arrive as before, but a reply that comes in "
        "parts may exceed its time limit. Install a newer flask-eventbus, or the newest hiredis if "
        "the parser is not that of hiredis.",
        redis.__version__,
        DefaultParser.__name__,
        reason,
    )
    return reason


def parse_error(text: str) -> Exception:
    """Return an error reply that was read from :meth:`TimedConnection.received_bytes`."""
    parse: Callable[[str], Exception] = DefaultParser.parse_error
    return parse(text)


class _Parser(DefaultParser):  # type: ignore[misc,valid-type]  # redis-py has no types
    """Reads replies until a deadline, which holds for all parts of a reply together."""

    #: Monotonic time at which every wait ends.
    deadline = math.inf
    #: Longest single wait, in seconds.
    timeout = math.inf

    def read_from_socket(self, *args: Any, **kwargs: Any) -> Any:
        # Far from its deadline, a socket has the longest timeout already.
        if self.deadline - time.monotonic() < self.timeout - SLACK:
            self.begin_wait()

        return super().read_from_socket(*args, **kwargs)

    def begin_wait(self) -> None:
        """Limit the next wait to the deadline.

        :raises redis.TimeoutError: the deadline has passed.
        """
        if self.deadline == -math.inf:
            raise redis.TimeoutError(TOO_LATE)

        if time.monotonic() >= self.deadline:
            # Allow one last read, of the data that has already arrived.
            self.deadline = -math.inf

        self.limit(self._sock)

    def limit(self, wire: Any) -> None:
        """Set the timeout of a socket to the time left; do nothing without a socket."""
        if isinstance(wire, socket.socket):
            seconds = max(LEAST, min(self.timeout, self.deadline - time.monotonic()))

            if not 0 <= (wire.gettimeout() or 0) - seconds < SLACK:
                wire.settimeout(seconds)


class TimedConnection(_Base):  # type: ignore[misc]  # redis-py has no types
    """A connection whose deadline holds for the handshake, and for all parts of each reply."""

    def __init__(self, **options: Any) -> None:
        super().__init__(parser_class=_Parser, **options)
        self._parser.timeout = self.socket_timeout

    @property
    def is_open(self) -> bool:
        """Return True if the connection has a socket; the server may have closed it unnoticed."""
        return self._sock is not None

    def set_deadline(self, deadline: float) -> None:
        """Set the monotonic time at which every wait ends. Any thread may call this."""
        parser = self._parser
        parser.deadline = deadline
        parser.limit(self._sock)

    def has_buffered(self) -> bool:
        """Return True if the next reply, or a part of it, was already read from the socket."""
        reader = self._parser._reader
        return bool(self.can_read(0) if reader is None else reader.has_data())

    def received_bytes(self) -> BinaryIO | None:
        """Return the bytes that the connection receives, as a file.

        Read every outstanding reply completely; the connection can then be used as before.
        """
        return cast(BinaryIO, io.BufferedReader(_Wire(self._parser, self._sock)))

    def shut_down(self) -> None:
        """End the use of the connection from another thread than its own.

        The thread that reads or writes it gets an error and opens another connection.
        """
        wire = self._sock

        if isinstance(wire, socket.socket):
            # The server may have closed the socket already.
            with suppress(OSError):
                # Not SSLSocket.shutdown(), which drops the TLS state that the other thread uses.
                socket.socket.shutdown(wire, socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the descriptor of the socket.

        :raises redis.ConnectionError: the connection is closed.
        """
        wire = self._sock

        if wire is None:
            raise redis.ConnectionError(CLOSED)

        return int(wire.fileno())

    def _connect(self) -> Any:
        self.socket_connect_timeout = _time_for_each_address(self, self._parser.deadline)
        return super()._connect()

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        self._parser.limit(sock)

        try:
            return super()._wrap_socket_with_ssl(sock)
        except OSError as error:
            # Python leaves the socket open if the server resets the connection before the
            # handshake. Only the frames of the error still have that socket.
            for frame, _ in walk_tb(error.__traceback__):
                if isinstance(wrapped := frame.f_locals.get("self"), ssl.SSLSocket):
                    wrapped.close()

            raise


class _Wire(io.RawIOBase):
    """The bytes that a connection receives, read until its deadline."""

    def __init__(self, parser: _Parser, sock: socket.socket) -> None:
        self._parser, self._sock = parser, sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._parser.begin_wait()

        try:
            return int(self._sock.recv_into(buffer))
        except TimeoutError as error:
            raise redis.TimeoutError("Timeout reading from socket") from error
        except OSError as error:
            raise redis.ConnectionError(f"Error while reading from Redis: {error}") from error


class PublicConnection(_Base):  # type: ignore[misc]  # redis-py has no types
    """A connection that keeps its deadline as well as the public API of redis-py can."""

    #: Monotonic time at which every wait for the first bytes of a reply ends.
    deadline = math.inf
    is_open = False
    _is_shut_down = False

    def connect(self) -> None:
        # An unknown host is an error of redis-py's own.
        with suppress(OSError):
            self.socket_connect_timeout = _time_for_each_address(self, self.deadline)

        super().connect()
        self.is_open = True

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self.is_open = False
        super().disconnect(*args, **kwargs)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._wait()
        except redis.RedisError:
            if kwargs.get("disconnect_on_error", True):
                self.disconnect()

            raise

        return super().read_response(*args, **kwargs)

    def set_deadline(self, deadline: float) -> None:
        """Set the monotonic time at which every wait for a reply ends. Any thread may call this."""
        self.deadline = deadline

    def has_buffered(self) -> bool:
        """Return True if the next reply, or a part of it, has arrived."""
        return bool(self.can_read(0))

    def received_bytes(self) -> BinaryIO | None:
        """Return ``None``: the public API reads whole replies only."""
        return None

    def shut_down(self) -> None:
        """End the wait of another thread; it gets an error and opens another connection."""
        self._is_shut_down = True

    def fileno(self) -> int:
        """Raise an error: the public API has no descriptor.

        :raises io.UnsupportedOperation: always.
        """
        raise io.UnsupportedOperation("fileno")

    def _wait(self) -> None:
        """Wait for the first bytes of a reply.

        :raises redis.TimeoutError: the deadline has passed.
        :raises redis.ConnectionError: another thread has ended the use of the connection.
        """
        end = time.monotonic() + self.socket_timeout

        while not self._is_shut_down:
            left = min(end, self.deadline) - time.monotonic()

            # At the deadline, look a last time for data that has already arrived.
            if self.can_read(max(0.0, min(left, SLICE))):
                return

            if left <= 0:
                raise redis.TimeoutError(TOO_LATE)

        raise redis.ConnectionError(CLOSED)


class MemoryConnection(PublicConnection):
    """A connection of fakeredis, with what that lacks: a read timeout, and ``WAIT``.

    A server in memory has no replicas. ``WAIT`` reports enough of them, so that a service can be
    tested with its production settings.
    """

    def connect(self) -> None:
        super(PublicConnection, self).connect()
        self.is_open = True

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if str(error).lower().startswith(_NO_WAIT):
                return MAX_REPLICAS

            raise

    def _wait(self) -> None:
        # The replies of the handshake are there at once. Afterwards, wait once and without slices,
        # because a test may have stopped the clock.
        if self.is_open and not self.can_read(self.socket_timeout):
            raise redis.TimeoutError(TOO_LATE)


def _time_for_each_address(connection: Any, deadline: float) -> float:
    """Return the seconds in which to connect to each address of the host: the first may hang."""
    name = getattr(connection, "host", None)
    found = name and socket.getaddrinfo(name, connection.port, 0, socket.SOCK_STREAM)
    return max(LEAST, (deadline - time.monotonic()) / len(found or " "))


def _try_private_names() -> None:
    """Use every private name of redis-py, over a pair of sockets.

    :raises Exception: one of them does not exist, or does something else.
    """
    inspect.signature(redis.Connection._connect).bind("self")
    inspect.signature(redis.SSLConnection._wrap_socket_with_ssl).bind("self", "sock")
    here, there = socket.socketpair()

    class Trial(TimedConnection, redis.UnixDomainSocketConnection):  # type: ignore[misc]  # the same
        def _connect(self) -> Any:
            return here

    with here, there:
        connection: Any = Trial(socket_timeout=1.0, protocol=2, redis_connect_func=_begin_parsing)
        connection.connect()
        connection.set_deadline(time.monotonic() + 1.0)
        there.sendall(b"+first\r\n+sec")
        _expect(connection.read_response(), b"first", "a reply")
        _expect(connection.has_buffered(), True, "a part of a reply")
        there.sendall(b"ond\r\n")
        _expect(connection.read_response(), b"second", "a reply in parts")
        _expect(connection.has_buffered(), False, "no reply")

        # The time is over, so the parser must not read what has arrived.
        connection.set_deadline(-math.inf)
        there.sendall(b"+late\r\n")

        with suppress(redis.TimeoutError):
            _expect(connection.read_response(disconnect_on_error=False), None, "a deadline")

        connection.set_deadline(time.monotonic() + 1.0)
        _expect(connection.received_bytes().readline(), b"+late\r\n", "bytes")
        _expect(type(parse_error("OOM full")), redis.exceptions.OutOfMemoryError, "an error")
        _expect(connection.fileno(), here.fileno(), "a descriptor")
        connection.shut_down()
        _expect(there.recv(1), b"", "the end of a connection")
        connection.disconnect()
        _expect(connection.is_open, False, "a closed connection")


def _begin_parsing(connection: Any) -> None:
    """Replace the handshake with the server."""
    connection._parser.on_connect(connection)


def _expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise RuntimeError(f"{what}: {found!r} instead of {wanted!r}")
