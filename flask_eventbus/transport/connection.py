"""One connection to Redis: its deadline, its replies, and what its errors mean."""

from __future__ import annotations

import functools
import inspect
import io
import math
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Protocol, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, DefaultParser
from redis.retry import Retry

from ..config import MAX_REPLICAS
from ..errors import ConfigError

#: Shortest socket timeout in seconds. A timeout of zero would make the socket non-blocking, and
#: it would raise another error.
LEAST = 0.001

#: Seconds that a wait may exceed its deadline. A socket timeout this close to the deadline is
#: kept, because setting it costs a system call.
SLACK = 0.02

#: Error message of a wait that reached its deadline.
TOO_LATE = "Timed out waiting for Redis."

#: Exceptions of a connection that mean an outage: Redis is unreachable, hangs, or temporarily
#: refuses commands, or a proxy in front of it sends an invalid reply.
OUTAGE = (redis.ConnectionError, redis.TimeoutError, redis.InvalidResponse, OSError)

#: Temporary error replies: the server is starting, failing over, or busy.
_PASSING = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)

#: Prefixes of temporary error replies. redis-py raises some as a plain ``ResponseError``; which
#: ones depends on its release and on the client class.
_PASSING_CODES = ("LOADING", "BUSY", "READONLY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")

#: Temporary error replies to writes, and their prefixes: the memory limit is reached, replicas are
#: missing, or the server cannot save to disk. Reads still succeed.
_NO_WRITES = (redis.exceptions.OutOfMemoryError,)
_NO_WRITES_CODES = ("OOM", "NOREPLICAS", "MISCONF")

_TCP_OPTIONS = ("socket_connect_timeout", "socket_keepalive")

#: Errors that an immediate retry would raise again: see :func:`is_refused`.
_REFUSALS = (
    ConnectionRefusedError,
    FileNotFoundError,
    socket.gaierror,
    ssl.SSLCertVerificationError,
    redis.AuthenticationError,
    redis.ResponseError,
)

#: Prefixes of the error that fakeredis returns for ``WAIT``.
_NO_WAIT = ("unknown command 'wait'", "unknown command `wait`")

#: The fakeredis servers of this process, keyed by ``memory://`` URL.
memory_servers: dict[str, Any] = {}


class Connection(Protocol):
    """The methods of a redis-py connection that the bus calls; redis-py ships no types for it."""

    def connect(self) -> None:
        """Open the socket and complete the handshake."""

    def disconnect(self) -> None:
        """Close the socket."""

    def pack_commands(
        self, commands: Sequence[tuple[str | bytes | int | float, ...]]
    ) -> list[bytes]:
        """Return commands as bytes of the Redis protocol."""

    def send_packed_command(self, command: list[bytes], check_health: bool = True) -> None:
        """Send packed commands."""

    def send_command(self, *args: str | bytes | int) -> None:
        """Send one command."""

    def read_response(self, *, disconnect_on_error: bool = True) -> Any:
        """Return the next reply, or raise it if it is an error."""

    def can_read(self, timeout: float = 0) -> bool:
        """Return True if data arrives within ``timeout`` seconds."""


def is_passing(error: Exception) -> bool:
    """Return True if an error reply is temporary, such as ``LOADING`` or ``READONLY``."""
    return isinstance(error, _PASSING) or str(error).partition(" ")[0] in _PASSING_CODES


def takes_no_writes(error: Exception) -> bool:
    """Return True if an error reply means that Redis accepts no writes at present."""
    return isinstance(error, _NO_WRITES) or str(error).partition(" ")[0] in _NO_WRITES_CODES


def why_no_writes(error: Exception) -> str:
    """Return why Redis accepts no writes at present, followed by the remedy."""
    text = str(error).rstrip(".")

    if text.startswith("NOREPLICAS"):
        return f"{text}: start its replicas, or lower 'min-replicas-to-write'"

    # The text of MISCONF already contains the remedy.
    return text if text.startswith("MISCONF") else f"{text}: raise it, or delete keys"


def is_refused(error: BaseException) -> bool:
    """Return True if an immediate retry would fail in the same way.

    Nothing listens on the port, the host does not exist, or the server rejects the user.
    """
    cause: BaseException | None = error

    while cause is not None and not isinstance(cause, _REFUSALS):
        cause = cause.__cause__ or cause.__context__

    return cause is not None


def read_reply(connection: Connection, *, disconnect_on_error: bool = True) -> Any:
    """Return the next reply; an error reply is returned as a value.

    :param disconnect_on_error: False to keep a reply that arrives in part before a timeout; the
        next call returns it whole.
    :raises redis.ConnectionError: the error reply is temporary, or Redis is unavailable.
    """
    try:
        return connection.read_response(disconnect_on_error=disconnect_on_error)
    except redis.ResponseError as error:
        return refusal_of(error)


def refusal_of(error: redis.ResponseError) -> Exception:
    """Return an error reply without the arguments it quotes.

    :raises redis.ConnectionError: the error reply is temporary.
    """
    if is_passing(error):
        raise redis.ConnectionError(str(error)) from error

    # The error for an unknown command quotes its arguments, which may hold payloads.
    text, quotes, _ = str(error).partition(", with args beginning with")
    return type(error)(text) if quotes else error


def has_buffered(connection: Any) -> bool:
    """Return True if the next reply, or a part of it, was already read from the socket.

    Without hiredis, ask the socket too.
    """
    reader = getattr(connection._parser, "_reader", None)
    return bool(connection.can_read(0) if reader is None else reader.has_data())


def milliseconds_of(answer: Sequence[bytes]) -> int:
    """Return a reply to ``TIME`` as milliseconds since 1970."""
    seconds, microseconds = answer
    return int(seconds) * 1000 + int(microseconds) // 1000


def wire_of(connection: Any) -> BinaryIO | None:
    """Return the bytes that a connection receives, as a file; ``None`` for fakeredis.

    Read every outstanding reply completely; the connection can then be used as before.
    """
    is_real = isinstance(connection._sock, socket.socket)
    return cast(BinaryIO, io.BufferedReader(_Wire(connection))) if is_real else None


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
        """Set the timeout of a socket to the time left; do nothing for fakeredis."""
        if isinstance(wire, socket.socket):
            seconds = max(LEAST, min(self.timeout, self.deadline - time.monotonic()))

            if not 0 <= (wire.gettimeout() or 0) - seconds < SLACK:
                wire.settimeout(seconds)


class _Wire(io.RawIOBase):
    """The bytes that a connection receives, read until its deadline."""

    def __init__(self, connection: Any) -> None:
        self._parser, self._sock = connection._parser, connection._sock

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


def timed_connection(url: str, timeout: float) -> Connection:
    """Return a connection to the server of a URL, not open yet.

    :param timeout: longest single wait, in seconds. :func:`set_deadline` limits all waits together.
    """
    options = _options(timeout)

    if url.startswith("memory://"):
        pool = fakeredis_module().FakeRedis(server=memory_server(url)).connection_pool
        pool.connection_class = _memory_class(pool.connection_class)
    else:
        pool = redis.ConnectionPool.from_url(url)

        if pool.connection_class is redis.UnixDomainSocketConnection:
            # A Unix socket does not accept TCP options.
            options = {key: options[key] for key in options if key not in _TCP_OPTIONS}

        pool.connection_class = _timed(pool.connection_class)

    pool.connection_kwargs.update(options)
    return cast(Connection, pool.make_connection())


def set_deadline(connection: Any, deadline: float) -> None:
    """Set the monotonic time at which every wait on a connection ends."""
    connection._parser.deadline = deadline
    connection._parser.limit(connection._sock)


@functools.cache
def _timed(connection_class: Any) -> Any:
    """Return a subclass of a connection class that completes the handshake by its deadline."""

    class TimedConnection(connection_class):  # type: ignore[misc]  # redis-py has no types
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._parser.timeout = self.socket_timeout

        def _connect(self) -> Any:
            # Divide the time between the addresses of the host: the first may hang.
            name = getattr(self, "host", None)
            found = name and socket.getaddrinfo(name, self.port, 0, socket.SOCK_STREAM)
            left = self._parser.deadline - time.monotonic()
            self.socket_connect_timeout = max(LEAST, left / len(found or " "))
            return super()._connect()

        def _wrap_socket_with_ssl(self, sock: Any) -> Any:
            self._parser.limit(sock)
            return super()._wrap_socket_with_ssl(sock)

    return TimedConnection


def shut_down(connection: Connection) -> None:
    """Shut a connection down from another thread than its own.

    The thread that reads or writes it gets an error and opens another connection.
    """
    wire = getattr(connection, "_sock", None)

    if isinstance(wire, socket.socket):
        # The server may have closed the socket already.
        with suppress(OSError):
            # Not SSLSocket.shutdown(), which drops the TLS state that the other thread uses.
            socket.socket.shutdown(wire, socket.SHUT_RDWR)


def end_with_socket(connection: Any) -> None:
    """Keep a connection from opening another socket after its first one closed.

    redis-py would reconnect silently, and a reader would wait forever on a connection without
    subscriptions.
    """
    connection.connect = connection.connect_check_health = _refuse_to_reconnect


def _refuse_to_reconnect(*args: Any, **kwargs: Any) -> None:
    raise redis.ConnectionError("The connection was closed.")


def _options(timeout: float) -> dict[str, Any]:
    """Return the connection options that the URL cannot change."""
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "parser_class": _Parser,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "health_check_interval": 0,
        # With RESP3, pub/sub readers are two to four times slower in redis-py 8.1.
        "protocol": 2,
        "decode_responses": False,
        **_no_library(),
    }


@functools.cache
def _no_library() -> dict[str, None]:
    """Return the options that stop redis-py from sending its name and version.

    Sending them needs the right to ``CLIENT SETINFO``.
    """
    known = inspect.signature(AbstractConnection.__init__).parameters
    names = ("driver_info",) if "driver_info" in known else ("lib_name", "lib_version")
    return dict.fromkeys(names)


def fakeredis_module() -> Any:
    """Import fakeredis.

    :raises ConfigError: fakeredis is not installed.
    """
    try:
        import fakeredis
    except ImportError as error:
        raise ConfigError(
            "'EVENTBUS_URL' begins with 'memory://', which needs fakeredis. Install it with: "
            "pip install 'flask-eventbus[testing]'"
        ) from error

    return fakeredis


def memory_server(url: str) -> Any:
    """Return the fakeredis server of a ``memory://`` URL; create it at the first call.

    :raises ConfigError: fakeredis is not installed.
    """
    server = memory_servers.get(url)
    return server or memory_servers.setdefault(url, fakeredis_module().FakeServer())


@functools.cache
def _memory_class(connection_class: Any) -> Any:
    """Return a subclass that adds what fakeredis lacks: a read timeout, and ``WAIT``.

    A server in memory has no replicas. ``WAIT`` reports enough of them, so that a service can be
    tested with its production settings.
    """

    class MemoryConnection(connection_class):  # type: ignore[misc]  # fakeredis has no types
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            # During the handshake there is no selector yet, and replies are there at once.
            connected = getattr(self, "_selector", None) is not None

            if connected and not self.can_read(self.socket_timeout):
                raise redis.TimeoutError(TOO_LATE)

            try:
                return super().read_response(*args, **kwargs)
            except redis.ResponseError as error:
                if str(error).lower().startswith(_NO_WAIT):
                    return MAX_REPLICAS

                raise

    return MemoryConnection
