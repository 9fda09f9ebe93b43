"""Open connections to Redis; the only module that creates redis-py connections.

Connections are not pooled. Each reader and each writer owns one, and a connection never retries,
reconnects or times out unless its owner asks for it.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import random
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, DefaultParser
from redis.retry import Retry

from ..config import MOST_REPLICAS
from ..errors import ConfigError
from ..logs import get_logger
from . import embedded
from .role import Role
from .urls import (
    SENTINEL_OPTIONS,
    AdvisedError,
    check_database,
    explain,
    explain_sentinel,
    hosts_of,
    node_url,
    options_of,
    sentinel_url,
    unknown_master,
    without_options,
    without_secrets,
)

logger = get_logger(__name__)

#: Seconds between two queries to the Sentinels for the master, while connections are open.
FOLLOW = 1.0

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

#: URL that replaces the URL of every connection while a test is isolated; ``None`` otherwise.
diversion: str | None = None


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


class Connections:
    """Opens connections to the Redis server of a URL.

    :param url: one of the forms described in ``docs/configuration.md``.
    :param name: name of the connections in ``CLIENT LIST``.
    :param deadline: monotonic time at which every wait on every connection ends.
    :raises ConfigError: the URL or one of its options is invalid.
    """

    def __init__(self, url: str, *, name: str, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self._url = url
        self._name = name
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        #: Shared by all connections: if Redis refuses ROLE to one of them, none sends it again.
        self.role = Role()
        self._disowned = False
        #: True once a server has refused ``CLIENT SETNAME``; it is not sent again.
        self._naming_refused = False
        self._naming_lock = threading.Lock()
        self._has_connected = False
        #: True while a thread asks the Sentinels for the current master.
        self._is_following = False
        self._follow_lock = threading.Lock()
        self._check()

    def open(self, *, timeout: float, within: float | None = None) -> Connection:
        """Return an open connection to the master.

        :param timeout: longest wait for Redis on the connection, in seconds.
        :param within: seconds allowed to connect; ``timeout`` if not given.
        :raises redis.ConnectionError: Redis is unreachable, rejects the user, or is a replica.
        :raises redis.TimeoutError: the deadline of the connections has passed.
        """
        error: Exception | None = None
        within = min(timeout if within is None else within, self.deadline - time.monotonic())
        deadline = time.monotonic() + within

        if within <= 0:
            raise redis.TimeoutError(TOO_LATE)

        if self._disowned:
            raise redis.ConnectionError("The connections of the parent process cannot be reused.")

        candidates = self._candidates(within)

        for number, url in enumerate(candidates):
            # Divide the time, so that one server that hangs does not use it all.
            share = max(0.0, deadline - time.monotonic()) / (len(candidates) - number)
            connection = timed_connection(url, timeout)

            if not url.startswith("memory://"):
                self._opened.add(connection)

            try:
                set_deadline(connection, time.monotonic() + share)
                self._connect(connection)
            except OUTAGE as failure:
                error = explain(failure, self._url, is_first=not self._has_connected)
            except (redis.ResponseError, UnicodeError) as refusal:
                # Redis refuses AUTH or SELECT, or the host name cannot be encoded.
                error = redis.ConnectionError(str(refusal))
                error.__cause__ = refusal
            else:
                self._has_connected = True
                set_deadline(connection, self.deadline)
                _end_with_socket(connection)
                self._follow_master()
                return connection

        raise error or redis.ConnectionError(f"{self.shown} names no host.")

    def disown(self) -> None:
        """Close the child's copies of the parent's sockets; call it in a forked child.

        Redis does not notice. Without this, the connections of a killed parent would stay open
        for as long as the child lives.
        """
        self._disowned = True

        for connection in list(self._opened):
            connection.disconnect()

    def asks_role(self, asked: float) -> bool:
        """Return True if a connection must send ROLE before its next command.

        :param asked: monotonic time at which the connection last sent ROLE.
        """
        return self.role.is_due(asked) and self._has_master

    @property
    def in_memory(self) -> bool:
        """Return True if the server is a fakeredis of this process.

        A wait for it cannot be interrupted.
        """
        return (diversion or self._url).startswith("memory://")

    @property
    def shown(self) -> str:
        """The URL without password and options, for logs and reports."""
        return without_secrets(self._url)

    @property
    def _has_master(self) -> bool:
        """True if the server must be a master; False for fakeredis and for a cluster.

        Any node of a cluster accepts PUBLISH and SUBSCRIBE.
        """
        return not (diversion or self._url).startswith(("memory://", "redis+cluster://"))

    def _connect(self, connection: Connection) -> None:
        try:
            connection.connect()
            self._show_name(connection)

            if self._has_master and self.role.can_ask:
                connection.send_command("ROLE")
                self.role.check(read_reply(connection))
        except BaseException:
            # redis-py leaves the socket open if the handshake ends with an unusual error.
            connection.disconnect()
            raise

    def _show_name(self, connection: Connection) -> None:
        """Set the name that ``CLIENT LIST`` shows, if the user has the right to."""
        if self._naming_refused:
            return

        # redis-py can send it as well, but it closes the connection if Redis refuses.
        connection.send_command("CLIENT", "SETNAME", self._name)
        answer = read_reply(connection)

        # Redis quotes CLIENT when it refuses the command; a program that is not Redis does not.
        if isinstance(answer, redis.ResponseError) and "client" in str(answer).lower():
            with self._naming_lock:
                first, self._naming_refused = not self._naming_refused, True

            # Only nodes are looked up by name, not commands such as "eventbus-status".
            if first and self._name.startswith("eventbus:"):
                is_unknown = str(answer).startswith("unknown command")
                logger.warning(
                    "Redis does not let %r name its connections (%s), so 'routes' and 'check' "
                    "cannot see that this process listens. %s",
                    self._name,
                    str(answer).rstrip("."),
                    "Remove CLIENT from 'rename-command' in the server's configuration."
                    if is_unknown
                    else "Grant this user '+client|setname' in the ACL.",
                )
        elif answer != b"OK":
            raise redis.ConnectionError(f"The server is not Redis; it sent: {str(answer)[:100]}")

    def _check(self) -> None:
        """Build the connections of the URL without connecting, to find mistakes in it early."""
        try:
            examples = self._examples(urlsplit(self._url))

            for url in examples:
                timed_connection(without_options(url), 1.0)
        except (ValueError, TypeError, redis.RedisError) as error:
            # Drop the cause: it may quote a part of a password.
            raise self._unreadable(error) from None

        if examples:
            check_database(self._url)
            self._check_options(without_options(examples[0]))

    def _check_options(self, example: str) -> None:
        """Try each option by itself, so that the error can name it without showing its value.

        :param example: the URL of a server, without options.
        :raises ConfigError: an option is unknown, or its value is invalid.
        """
        for name, text in options_of(self._url):
            try:
                timed_connection(f"{example}?{urlencode({name: text})}", 1.0)
            except (ValueError, TypeError, redis.RedisError):
                if name not in SENTINEL_OPTIONS:
                    raise ConfigError(
                        f"'EVENTBUS_URL' is {self.shown!r}, and the value of its option {name!r} "
                        "is not valid. Correct it, or remove the option."
                    ) from None

    def _examples(self, parts: SplitResult) -> list[str]:
        if parts.scheme == "memory":
            _fakeredis()
            return []

        if parts.scheme == "embedded":
            embedded.directory_of(parts.netloc or "default")
            return []

        if parts.scheme.endswith("+sentinel"):
            # Both raise ConfigError if a part is missing.
            self._master_name()
            hosts_of(parts, 26379)
            return [self._server("host", 6379)]

        if parts.scheme == "redis+cluster":
            return _cluster_nodes(parts)

        return [self._url]

    def _candidates(self, timeout: float) -> list[str]:
        if diversion is not None:
            return [diversion]

        parts = urlsplit(self._url)

        if parts.scheme == "embedded":
            return [_join_embedded(parts)]

        if parts.scheme.endswith("+sentinel"):
            return [self._master(timeout)]

        if parts.scheme == "redis+cluster":
            return _cluster_nodes(parts)

        return [self._url]

    def _unreadable(self, error: Exception) -> ConfigError:
        # The text of the error may quote a part of the password, or an option that holds one.
        reason = str(error) if self.shown == self._url else "it is not a valid URL"
        return ConfigError(
            f"'EVENTBUS_URL' is {self.shown!r}: {reason}. Write it as "
            "'redis://user:password@host:6379/0', and '#', '/', '?', '@' and '%' of a password "
            "as '%23', '%2F', '%3F', '%40' and '%25'."
        )

    def _follow_master(self) -> None:
        """With Sentinels, start a thread that closes connections to a former master."""
        if diversion is not None or not urlsplit(self._url).scheme.endswith("+sentinel"):
            return

        with self._follow_lock:
            if self._is_following:
                return

            self._is_following = True

        threading.Thread(
            target=_follow, args=(weakref.ref(self),), name="eventbus-sentinel", daemon=True
        ).start()

    def leave_old_master(self, sentinels: list[Connection]) -> bool:
        """Close the connections to any server other than the Sentinels' current master.

        Return False if no connection is open; the caller then stops.
        """
        with self._follow_lock:
            opened = [item for item in list(self._opened) if getattr(item, "_sock", None)]

            if not opened or self._disowned:
                self._is_following = False
                return False

        try:
            address = self._ask_for_master(sentinels, FOLLOW)
        except redis.ConnectionError as error:
            logger.debug("No Sentinel returned the address of the master: %s", error)
            return True

        for connection in opened:
            if (getattr(connection, "host", None), getattr(connection, "port", None)) != address:
                shut_down(connection)

        return True

    def sentinels(self) -> list[Connection]:
        """Return a connection, not open yet, to each Sentinel of the URL."""
        parts = urlsplit(self._url)
        hosts = hosts_of(parts, 26379)
        return [timed_connection(sentinel_url(parts, *each), FOLLOW) for each in hosts]

    def _master(self, timeout: float) -> str:
        sentinels = self.sentinels()

        try:
            # Divide the time, so that one Sentinel that hangs does not use it all.
            return self._server(*self._ask_for_master(sentinels, timeout / (len(sentinels) + 1)))
        finally:
            for each in sentinels:
                each.disconnect()

    def _ask_for_master(self, sentinels: list[Connection], seconds: float) -> tuple[str, int]:
        """Return host and port of the master, from the first Sentinel that knows them.

        :param sentinels: asked in order; the Sentinel that answers moves to the front.
        :param seconds: longest time for each Sentinel, in seconds.
        :raises redis.ConnectionError: no Sentinel knows the master; the message has the answer
            of each.
        """
        name = self._master_name()
        said: list[AdvisedError] = []

        for sentinel in list(sentinels):
            try:
                set_deadline(sentinel, min(self.deadline, time.monotonic() + seconds))
                sentinel.connect()
                sentinel.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
                address = sentinel.read_response()
            except (redis.RedisError, OSError) as error:
                explained = explain(error, self._url, is_first=not self._has_connected)
                said.append(explain_sentinel(explained, _address_of(sentinel)))
                said[-1].__cause__ = error
                sentinel.disconnect()
                continue

            if address is not None:
                sentinels.remove(sentinel)
                sentinels.insert(0, sentinel)
                return address[0].decode(), int(address[1])

            said.append(unknown_master(name, _address_of(sentinel)))

        reasons = "; ".join(dict.fromkeys(error.reason for error in said))
        advice = " ".join(dict.fromkeys(error.advice for error in said))
        raise AdvisedError(reasons, advice) from said[-1]

    def _master_name(self) -> str:
        name = urlsplit(self._url).path.lstrip("/").partition("/")[0]

        if not name:
            raise ConfigError(
                f"'EVENTBUS_URL' is {self.shown!r}, which names no master. Write it as "
                "'redis+sentinel://host1:26379,host2:26379/mymaster/0'."
            )

        return unquote(name)

    def _server(self, host: str, port: int) -> str:
        """Return the URL of the master at ``host`` and ``port``."""
        parts = urlsplit(self._url)
        database = parts.path.lstrip("/").partition("/")[2]
        return node_url(parts, host, port, f"/{database or 0}")


def read_reply(connection: Connection) -> Any:
    """Return the next reply; an error reply is returned as a value.

    :raises redis.ConnectionError: the error reply is temporary, or Redis is unavailable.
    """
    try:
        return connection.read_response()
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


def wire_of(connection: Any) -> BinaryIO | None:
    """Return the bytes that a connection receives, as a file; ``None`` for fakeredis.

    Read every outstanding reply completely; the connection can then be used as before.
    """
    is_real = isinstance(connection._sock, socket.socket)
    return cast(BinaryIO, io.BufferedReader(_Wire(connection))) if is_real else None


def _follow(reference: weakref.ref[Connections]) -> None:
    connections = reference()
    sentinels = [] if connections is None else connections.sentinels()
    del connections

    while True:
        time.sleep(FOLLOW)
        connections = reference()

        if connections is None or not connections.leave_old_master(sentinels):
            break

        del connections

    for each in sentinels:
        each.disconnect()


class _Parser(DefaultParser):  # type: ignore[misc,valid-type]  # redis-py has no types
    """Reads replies until a deadline, which holds for all parts of a reply together."""

    #: Monotonic time at which every wait ends.
    deadline = math.inf
    #: Longest single wait, in seconds.
    timeout = math.inf

    def read_from_socket(self, *args: Any, **kwargs: Any) -> Any:
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
        return _memory_connection(url, options)

    pool = redis.ConnectionPool.from_url(url)

    if pool.connection_class is redis.UnixDomainSocketConnection:
        # A Unix socket does not accept TCP options.
        options = {key: options[key] for key in options if key not in _TCP_OPTIONS}

    pool.connection_kwargs.update(options)
    pool.connection_class = _timed(pool.connection_class)
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


def _end_with_socket(connection: Any) -> None:
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


def _join_embedded(parts: SplitResult) -> str:
    """Return the URL of the embedded server's socket; start the server if it does not run.

    :raises redis.ConnectionError: the server cannot start.
    """
    try:
        return embedded.join(parts.netloc or "default")
    except ConfigError as error:
        raise redis.ConnectionError(str(error)) from error


def _cluster_nodes(parts: SplitResult) -> list[str]:
    """Return the URLs of the nodes in random order; pub/sub works through any node."""
    urls = [node_url(parts, host, port) for host, port in hosts_of(parts, 6379)]
    random.shuffle(urls)
    return urls


def _address_of(connection: Any) -> str:
    return f"{connection.host}:{connection.port}"


def _fakeredis() -> Any:
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
    return server or memory_servers.setdefault(url, _fakeredis().FakeServer())


def _memory_connection(url: str, options: dict[str, Any]) -> Connection:
    pool = _fakeredis().FakeRedis(server=memory_server(url)).connection_pool
    pool.connection_kwargs.update(options)
    pool.connection_class = _memory_class(pool.connection_class)
    return cast(Connection, pool.make_connection())


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
                    return MOST_REPLICAS

                raise

    return MemoryConnection
