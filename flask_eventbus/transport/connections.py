"""The only module that makes Redis clients: one unpooled connection at a time.

Each reader and each writer owns its connection: no retry, no reconnect and no timeout
happens that its owner did not ask for.
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

#: Seconds between two questions to the Sentinels where the master is, while connections are open.
FOLLOW = 1.0

#: Seconds that a socket waits at least: with none it would not wait at all, and say so differently.
LEAST = 0.001

#: Seconds that a wait may end late: less need not be told to the system, which takes a while.
SLACK = 0.02

#: What is raised when a deadline is over.
TOO_LATE = "The time to wait for Redis is over."

#: What a connection raises when Redis is away, hung, or not to be used now; or when what
#: answers in its place does not speak its language, as a proxy that has lost it.
OUTAGE = (redis.ConnectionError, redis.TimeoutError, redis.InvalidResponse, OSError)

#: Error replies that pass: a server that starts, that is being replaced, or that is busy.
_PASSING = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)

#: How those replies begin where redis-py leaves them as they came: which errors it knows
#: depends on its release, and on the kind of client.
_PASSING_CODES = ("LOADING", "BUSY", "READONLY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")

#: Error replies to writes that pass, and how they begin: a server that is full, whose replicas are
#: not there yet, or whose disk is. It is read from all the same.
_NO_WRITES = (redis.exceptions.OutOfMemoryError,)
_NO_WRITES_CODES = ("OOM", "NOREPLICAS", "MISCONF")

_TCP_OPTIONS = ("socket_connect_timeout", "socket_keepalive")

#: What another attempt would meet as well: see :func:`is_refused`.
_REFUSALS = (
    ConnectionRefusedError,
    FileNotFoundError,
    socket.gaierror,
    ssl.SSLCertVerificationError,
    redis.AuthenticationError,
    redis.ResponseError,
)

#: How fakeredis refuses ``WAIT``.
_NO_WAIT = ("unknown command 'wait'", "unknown command `wait`")

#: The fakeredis servers of this process, by their ``memory://`` URLs.
memory_servers: dict[str, Any] = {}

#: While a test is isolated: the URL that every connection goes to, whatever it was made for.
diversion: str | None = None


class Connection(Protocol):
    """What the bus uses of a redis-py connection, which has no types of its own."""

    def connect(self) -> None:
        """Open the socket and shake hands."""

    def disconnect(self) -> None:
        """Close the socket."""

    def pack_commands(
        self, commands: Sequence[tuple[str | bytes | int | float, ...]]
    ) -> list[bytes]:
        """Commands as bytes."""

    def send_packed_command(self, command: list[bytes], check_health: bool = True) -> None:
        """Send what was packed."""

    def send_command(self, *args: str | bytes | int) -> None:
        """Send one command."""

    def read_response(self, *, disconnect_on_error: bool = True) -> Any:
        """The next reply; an error reply is raised."""

    def can_read(self, timeout: float = 0) -> bool:
        """Whether bytes are there."""


def is_passing(error: Exception) -> bool:
    """Whether an error reply means "not now" rather than "not ever"."""
    return isinstance(error, _PASSING) or str(error).partition(" ")[0] in _PASSING_CODES


def takes_no_writes(error: Exception) -> bool:
    """Whether an error reply means that nothing is written now, by nobody."""
    return isinstance(error, _NO_WRITES) or str(error).partition(" ")[0] in _NO_WRITES_CODES


def why_no_writes(error: Exception) -> str:
    """Why Redis takes no writes now, with what to do about it."""
    text = str(error).rstrip(".")

    if text.startswith("NOREPLICAS"):
        return f"{text}: start its replicas, or lower 'min-replicas-to-write'"

    # What Redis says where it cannot save has a remedy.
    return text if text.startswith("MISCONF") else f"{text}: raise it, or delete keys"


def is_refused(error: BaseException) -> bool:
    """Return True if another attempt right away would end as this one did.

    Nothing listens there, there is no such host, or the server does not let this user in.
    """
    cause: BaseException | None = error

    while cause is not None and not isinstance(cause, _REFUSALS):
        cause = cause.__cause__ or cause.__context__

    return cause is not None


class Connections:
    """Opens connections to the Redis that a URL names.

    :param url: one of the forms of ``docs/configuration.md``.
    :param name: what ``CLIENT LIST`` shows for the connections.
    :param deadline: when all waits on all of them end, by the monotonic clock.
    """

    def __init__(self, url: str, *, name: str, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self._url = url
        self._name = name
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        #: Shared by all connections: what one of them may not ask, the others may not.
        self.role = Role()
        self._disowned = False
        #: True once a server has refused to name a connection: it is not asked again.
        self._nameless = False
        self._naming = threading.Lock()
        self._has_connected = False
        #: True while a thread follows the master that Sentinels name.
        self._is_following = False
        self._following = threading.Lock()
        self._check()

    def open(self, *, timeout: float, within: float | None = None) -> Connection:
        """Return a connection to the master; each wait on it ends after ``timeout`` seconds.

        :param within: seconds for all that it takes to connect; the timeout unless given.
        :raises redis.ConnectionError: Redis cannot be reached, or refuses, or is no master.
        """
        error: Exception | None = None
        within = min(timeout if within is None else within, self.deadline - time.monotonic())
        deadline = time.monotonic() + within

        if within <= 0:
            raise redis.TimeoutError(TOO_LATE)

        if self._disowned:
            raise redis.ConnectionError("What was inherited over a fork connects no more.")

        candidates = self._candidates(within)

        for number, url in enumerate(candidates):
            # One that hangs leaves its share of the time to each of the others.
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
                # A user who may not so much as name its connection or choose its database;
                # a host that cannot be one.
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
        """In a forked child: close its copies of what its parent opened, unseen by Redis.

        Otherwise a parent that is killed would seem to live on, as long as the child does.
        """
        self._disowned = True

        for connection in list(self._opened):
            connection.disconnect()

    def asks_role(self, asked: float) -> bool:
        """Return True if a connection should ask the server for its role with its next command.

        :param asked: when it last asked, by the monotonic clock.
        """
        return self.role.is_due(asked) and self._has_master

    @property
    def in_memory(self) -> bool:
        """Whether the server is in this process now, where a wait cannot be interrupted."""
        return (diversion or self._url).startswith("memory://")

    @property
    def shown(self) -> str:
        """Scheme, user, host and path of the URL, for logs and reports; never a password."""
        return without_secrets(self._url)

    @property
    def _has_master(self) -> bool:
        """True unless every server will do: fakeredis, and the nodes of a cluster for pub/sub."""
        return not (diversion or self._url).startswith(("memory://", "redis+cluster://"))

    def _connect(self, connection: Connection) -> None:
        try:
            connection.connect()
            self._show_name(connection)

            if self._has_master and self.role.can_ask:
                connection.send_command("ROLE")
                self.role.check(read_reply(connection))
        except BaseException:
            # redis-py leaves a socket open where a handshake ends in an unusual way.
            connection.disconnect()
            raise

    def _show_name(self, connection: Connection) -> None:
        """Name a connection for ``CLIENT LIST``, where the user may do so."""
        if self._nameless:
            return

        # Not by redis-py, for which a refusal is the end of the connection.
        connection.send_command("CLIENT", "SETNAME", self._name)
        answer = read_reply(connection)

        # A server without CLIENT names it in its refusal; another program does not.
        if isinstance(answer, redis.ResponseError) and "client" in str(answer).lower():
            with self._naming:
                first, self._nameless = not self._nameless, True

            # Nobody looks for the connection of a command, such as "eventbus-status".
            if first and self._name.startswith("eventbus:"):
                is_unknown = str(answer).startswith("unknown command")
                logger.warning(
                    "Redis does not let %r name its connections (%s): 'routes' and 'check' do not "
                    "see that it listens. %s",
                    self._name,
                    str(answer).rstrip("."),
                    "Take it out of 'rename-command' in the server's configuration."
                    if is_unknown
                    else "Grant this user '+client|setname' in the ACL.",
                )
        elif answer != b"OK":
            raise redis.ConnectionError(f"What answers is no Redis: {str(answer)[:100]}")

    def _check(self) -> None:
        """Make what the URL asks for, without connecting: what is wrong with it shows now."""
        try:
            examples = self._examples(urlsplit(self._url))

            for url in examples:
                timed_connection(without_options(url), 1.0)
        except (ValueError, TypeError, redis.RedisError) as error:
            # Not from the error, which may quote a part of a password.
            raise self._unreadable(error) from None

        if examples:
            check_database(self._url)
            self._check_options(without_options(examples[0]))

    def _check_options(self, example: str) -> None:
        """Try each option alone, so that the wrong one is named and its text is not shown.

        :param example: the URL of a server, without options.
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
            # Both raise an error for what is missing.
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
        # What the error says may quote a part of the password, or an option that holds one.
        reason = str(error) if self.shown == self._url else "it does not read"
        return ConfigError(
            f"'EVENTBUS_URL' is {self.shown!r}: {reason}. Write it as "
            "'redis://user:password@host:6379/0', and '#', '/', '?', '@' and '%' of a password "
            "as '%23', '%2F', '%3F', '%40' and '%25'."
        )

    def _follow_master(self) -> None:
        """With Sentinels, close connections to a server as soon as another one is the master."""
        if diversion is not None or not urlsplit(self._url).scheme.endswith("+sentinel"):
            return

        with self._following:
            if self._is_following:
                return

            self._is_following = True

        threading.Thread(
            target=_follow, args=(weakref.ref(self),), name="eventbus-sentinel", daemon=True
        ).start()

    def leave_old_master(self, sentinels: list[Connection]) -> bool:
        """Close connections to a server that is no master any more, as the Sentinels say.

        Return False once nothing is open, and nothing is followed any more.
        """
        with self._following:
            opened = [item for item in list(self._opened) if getattr(item, "_sock", None)]

            if not opened or self._disowned:
                self._is_following = False
                return False

        try:
            address = self._ask_for_master(sentinels, FOLLOW)
        except redis.ConnectionError as error:
            logger.debug("The Sentinels do not tell where the master is: %s", error)
            return True

        for connection in opened:
            if (getattr(connection, "host", None), getattr(connection, "port", None)) != address:
                shut_down(connection)

        return True

    def sentinels(self) -> list[Connection]:
        """Return connections, not open yet, to the Sentinels that the URL names."""
        parts = urlsplit(self._url)
        hosts = hosts_of(parts, 26379)
        return [timed_connection(sentinel_url(parts, *each), FOLLOW) for each in hosts]

    def _master(self, timeout: float) -> str:
        sentinels = self.sentinels()

        try:
            # Each has its share of the time: the first that is asked may hang.
            return self._server(*self._ask_for_master(sentinels, timeout / (len(sentinels) + 1)))
        finally:
            for each in sentinels:
                each.disconnect()

    def _ask_for_master(self, sentinels: list[Connection], seconds: float) -> tuple[str, int]:
        """Ask one Sentinel after the other where the master is.

        :param sentinels: the first that knows becomes the first of them.
        :param seconds: how long each of them may take.
        :raises redis.ConnectionError: none of them knows; each is named with what it said.
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
        """Return the URL of a master that Sentinels named."""
        parts = urlsplit(self._url)
        database = parts.path.lstrip("/").partition("/")[2]
        return node_url(parts, host, port, f"/{database or 0}")


def read_reply(connection: Connection) -> Any:
    """Read one reply; an error reply is returned, "not now" raised."""
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return refusal_of(error)


def refusal_of(error: redis.ResponseError) -> Exception:
    """Return an error reply without what it quotes; raise it if it says "not now"."""
    if is_passing(error):
        raise redis.ConnectionError(str(error)) from error

    # Of an unknown command it quotes what was to be written, events among it.
    text, quotes, _ = str(error).partition(", with args beginning with")
    return type(error)(text) if quotes else error


def wire_of(connection: Any) -> BinaryIO | None:
    """Return what a connection reads, byte by byte; ``None`` of one of fakeredis.

    Whoever reads it reads whole replies, all that were asked for: the connection goes on after.
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
    """Reads answers by a deadline, in however many pieces they come."""

    #: When all waits end, by the monotonic clock.
    deadline = math.inf
    #: Seconds that each wait may take.
    timeout = math.inf

    def read_from_socket(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_wait()
        return super().read_from_socket(*args, **kwargs)

    def begin_wait(self) -> None:
        """Let the next wait end by the deadline; after it there is none.

        :raises redis.TimeoutError: the deadline is over.
        """
        if self.deadline == -math.inf:
            raise redis.TimeoutError(TOO_LATE)

        if time.monotonic() >= self.deadline:
            # What has come by now is read, and nothing after it.
            self.deadline = -math.inf

        self.limit(self._sock)

    def limit(self, wire: Any) -> None:
        """Let the next wait on a socket end by the deadline. fakeredis has no such socket."""
        if isinstance(wire, socket.socket):
            seconds = max(LEAST, min(self.timeout, self.deadline - time.monotonic()))

            if not 0 <= (wire.gettimeout() or 0) - seconds < SLACK:
                wire.settimeout(seconds)


class _Wire(io.RawIOBase):
    """The bytes that come over a connection, by its deadline."""

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
    """Return a connection to the server of a URL, not open yet, whose waits have a limit each.

    :func:`set_deadline` limits all of them.
    """
    options = _options(timeout)

    if url.startswith("memory://"):
        return _memory_connection(url, options)

    pool = redis.ConnectionPool.from_url(url)

    if pool.connection_class is redis.UnixDomainSocketConnection:
        # Options of TCP, which a socket of this machine does not take.
        options = {key: options[key] for key in options if key not in _TCP_OPTIONS}

    pool.connection_kwargs.update(options)
    pool.connection_class = _timed(pool.connection_class)
    return cast(Connection, pool.make_connection())


def set_deadline(connection: Any, deadline: float) -> None:
    """Let all waits on a connection end by a deadline, by the monotonic clock."""
    connection._parser.deadline = deadline
    connection._parser.limit(connection._sock)


@functools.cache
def _timed(connection_class: Any) -> Any:
    """Return a class of connections that connect by their deadline, with all that belongs to it."""

    class TimedConnection(connection_class):  # type: ignore[misc]  # redis-py has no types
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._parser.timeout = self.socket_timeout

        def _connect(self) -> Any:
            # A name may have several addresses, the first of which may hang.
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
    """End a connection under the thread that reads or writes it, which then opens another."""
    wire = getattr(connection, "_sock", None)

    if isinstance(wire, socket.socket):
        # The other side may have closed it by now.
        with suppress(OSError):
            # Not what TLS makes of it, which would pull the rug from under the other thread.
            socket.socket.shutdown(wire, socket.SHUT_RDWR)


def _end_with_socket(connection: Any) -> None:
    """Let a connection end with its socket.

    redis-py would open another one where it finds none, unseen, and a reader would listen for
    ever on a connection that subscribed to nothing.
    """
    connection.connect = connection.connect_check_health = _refuse_to_reconnect


def _refuse_to_reconnect(*args: Any, **kwargs: Any) -> None:
    raise redis.ConnectionError("The connection was closed.")


def _options(timeout: float) -> dict[str, Any]:
    """What every connection has, whatever the URL says."""
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "parser_class": _Parser,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "health_check_interval": 0,
        # RESP3 costs pub/sub readers two to four times more in redis-py 8.1.
        "protocol": 2,
        "decode_responses": False,
        **_no_library(),
    }


@functools.cache
def _no_library() -> dict[str, None]:
    """What keeps redis-py from naming itself to the server, for which users need a right."""
    known = inspect.signature(AbstractConnection.__init__).parameters
    names = ("driver_info",) if "driver_info" in known else ("lib_name", "lib_version")
    return dict.fromkeys(names)


def _join_embedded(parts: SplitResult) -> str:
    """The socket of the embedded server; that it cannot start is an outage like another."""
    try:
        return embedded.join(parts.netloc or "default")
    except ConfigError as error:
        raise redis.ConnectionError(str(error)) from error


def _cluster_nodes(parts: SplitResult) -> list[str]:
    """Plain pub/sub reaches every node of a cluster through any of them."""
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
    """The fakeredis server behind a ``memory://`` URL, made at the first call.

    :raises ConfigError: fakeredis is not installed.
    """
    server = memory_servers.get(url)
    return server or memory_servers.setdefault(url, _fakeredis().FakeServer())


def _memory_connection(url: str, options: dict[str, Any]) -> Connection:
    pool = _fakeredis().FakeRedis(server=memory_server(url)).connection_pool
    pool.connection_kwargs.update(options)
    pool.connection_class = _made_alike(pool.connection_class)
    return cast(Connection, pool.make_connection())


@functools.cache
def _made_alike(connection_class: Any) -> Any:
    """What fakeredis lacks of what the bus uses: a timeout of its waits, and ``WAIT``.

    A server in memory has no replicas. That none is missing is the answer that lets a service
    be tested with the settings that it runs with.
    """

    class MemoryConnection(connection_class):  # type: ignore[misc]  # fakeredis has no types
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            # The selector comes after the handshake, whose answers are there at once.
            connected = getattr(self, "_selector", None) is not None

            if connected and not self.can_read(self.socket_timeout):
                raise redis.TimeoutError("Nothing came in time.")

            try:
                return super().read_response(*args, **kwargs)
            except redis.ResponseError as error:
                if str(error).lower().startswith(_NO_WAIT):
                    return MOST_REPLICAS

                raise

    return MemoryConnection
