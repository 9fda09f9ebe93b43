"""One connection to Redis: how it is made, its replies, and what its errors mean."""

from __future__ import annotations

import functools
import inspect
import socket
import ssl
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from ..errors import ConfigError
from .timed_connection import CLOSED, class_for, memory_class_for

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

#: The fakeredis servers of this process, keyed by ``memory://`` URL.
memory_servers: dict[str, Any] = {}


class Connection(Protocol):
    """The methods of a connection that the bus calls; redis-py ships no types for its own.

    ``timed_connection`` adds the last six.
    """

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

    @property
    def is_open(self) -> bool:
        """Return True if the connection was opened; the server may have closed it unnoticed."""

    def set_deadline(self, deadline: float) -> None:
        """Set the monotonic time at which every wait ends. Any thread may call this."""

    def has_buffered(self) -> bool:
        """Return True if the next reply, or a part of it, was already read from the socket."""

    def received_bytes(self) -> BinaryIO | None:
        """Return the bytes that the connection receives, as a file, or ``None``."""

    def shut_down(self) -> None:
        """End the use of the connection from another thread than its own."""

    def fileno(self) -> int:
        """Return the descriptor of the socket; see :attr:`.Connections.has_descriptors`."""


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


def milliseconds_of(answer: Sequence[bytes]) -> int:
    """Return a reply to ``TIME`` as milliseconds since 1970."""
    seconds, microseconds = answer
    return int(seconds) * 1000 + int(microseconds) // 1000


def make_connection(url: str, timeout: float) -> Connection:
    """Return a connection to the server of a URL, not open yet.

    :param timeout: longest single wait, in seconds; see :meth:`Connection.set_deadline`.
    """
    options = _options(timeout)

    if url.startswith("memory://"):
        pool = fakeredis_module().FakeRedis(server=memory_server(url)).connection_pool
        pool.connection_class = memory_class_for(pool.connection_class)
    else:
        pool = redis.ConnectionPool.from_url(url)

        if pool.connection_class is redis.UnixDomainSocketConnection:
            # A Unix socket does not accept TCP options.
            options = {key: options[key] for key in options if key not in _TCP_OPTIONS}

        pool.connection_class = class_for(pool.connection_class)

    pool.connection_kwargs.update(options)
    return cast(Connection, pool.make_connection())


def end_with_socket(connection: Any) -> None:
    """Keep a connection from opening another socket after its first one closed.

    redis-py would reconnect silently, and a reader would wait forever on a connection without
    subscriptions.
    """
    connection.connect = connection.connect_check_health = _refuse_to_reconnect


def _refuse_to_reconnect(*args: Any, **kwargs: Any) -> None:
    raise redis.ConnectionError(CLOSED)


def _options(timeout: float) -> dict[str, Any]:
    """Return the connection options that the URL cannot change."""
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
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
