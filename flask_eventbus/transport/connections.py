"""Open connections to the master of a URL, and check that it still is one.

Connections are not pooled. Each reader and each writer owns one, and a connection never retries,
reconnects or times out unless its owner asks for it.
"""

from __future__ import annotations

import math
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

import redis

from ..config import TIMING, Config, Timing
from ..errors import ConfigError
from ..logs import BoundedLog, Counters, get_logger
from .connection import (
    OUTAGE,
    Connection,
    end_with_socket,
    fakeredis_module,
    make_connection,
    read_reply,
)
from .keys import StreamKeys
from .timed_connection import TOO_LATE, reason_for_public_api
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

if TYPE_CHECKING:
    from ..codec.codec import Codec
    from ..routing.registry import Registry

logger = get_logger(__name__)

#: Seconds between two queries to the Sentinels for the master, while connections are open.
FOLLOW = 1.0

#: URL that replaces the URL of every connection while a test is isolated; ``None`` otherwise.
diversion: str | None = None


class NotMasterError(redis.ConnectionError):
    """The server is a replica or a Sentinel, so events must not be written or read there."""


class Connections:
    """Opens connections to the Redis server of a URL.

    :param url: one of the forms described in ``docs/configuration.md``.
    :param name: name of the connections in ``CLIENT LIST``.
    :param deadline: monotonic time at which every wait on every connection ends.
    :raises ConfigError: the URL or one of its options is invalid.
    """

    def __init__(
        self, url: str, *, name: str, deadline: float = math.inf, timing: Timing = TIMING
    ) -> None:
        self.deadline = deadline
        self._url = url
        self._name = name
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        #: The error reply to ROLE; ``None`` if no server refused it. None of the connections sends
        #: it again.
        self.role_refusal: redis.ResponseError | None = None
        #: The times of these connections.
        self.timing = timing
        self._log = BoundedLog(logger)
        self._disowned = False
        #: True once a server has refused ``CLIENT SETNAME``; it is not sent again.
        self._naming_refused = False
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
        within = min(timeout if within is None else within, self.deadline - time.monotonic())
        deadline = time.monotonic() + within

        if within <= 0:
            raise redis.TimeoutError(TOO_LATE)

        if self._disowned:
            raise redis.ConnectionError("The connections of the parent process cannot be reused.")

        candidates = self._candidates(within)
        error: Exception

        for number, url in enumerate(candidates):
            # Divide the time, so that one server that hangs does not use it all.
            share = max(0.0, deadline - time.monotonic()) / (len(candidates) - number)
            connection = make_connection(url, timeout)

            if not url.startswith("memory://"):
                self._opened.add(connection)

            try:
                connection.set_deadline(time.monotonic() + share)
                self._connect(connection)
            except OUTAGE as failure:
                error = explain(failure, self._url, is_first=not self._has_connected)
            except (redis.ResponseError, UnicodeError) as refusal:
                # Redis refuses AUTH or SELECT, or the host name cannot be encoded.
                error = redis.ConnectionError(str(refusal))
                error.__cause__ = refusal
            else:
                self._has_connected = True
                connection.set_deadline(self.deadline)
                end_with_socket(connection)
                self._follow_master()
                return connection

        raise error

    def disown(self) -> None:
        """Close the child's copies of the parent's sockets; call it in a forked child.

        Redis does not notice. Without this, the connections of a killed parent would stay open
        for as long as the child lives.
        """
        self._disowned = True

        for connection in list(self._opened):
            connection.disconnect()

    @property
    def asks_role(self) -> bool:
        """Return True if the server must be a master, and answers ROLE."""
        # A cluster has no single master: any of its nodes accepts PUBLISH and SUBSCRIBE.
        has_master = not self._target.startswith(("memory://", "redis+cluster://"))
        return self.role_refusal is None and has_master

    def next_role_check(self) -> float:
        """Return the monotonic time at which a connection that asks now must send ROLE again."""
        return time.monotonic() + self.timing.ask_role_every if self.asks_role else math.inf

    def check_role(self, answer: Any) -> None:
        """Check a reply to ROLE; an error reply turns later checks off.

        The check is needed because a replica accepts PUBLISH without an error, but delivers the
        event to its own subscribers only.

        :raises NotMasterError: the server is a replica or a Sentinel.
        """
        if isinstance(answer, redis.ResponseError):
            self.role_refusal = answer
            self._log.once(
                "role",
                "Redis does not answer ROLE (%s). A master that becomes a replica is detected only "
                "when it refuses a write. Grant '+role' to this user in the ACL.",
                str(answer).rstrip("."),
            )
            return

        kind = answer[0].decode(errors="replace")

        if kind == "sentinel":
            raise NotMasterError(
                "The server is a Sentinel, not a master. Start 'EVENTBUS_URL' with "
                "'redis+sentinel://', and end it with the name of the master: "
                "'redis+sentinel://host:26379/mymaster/0'"
            )

        if kind != "master":
            host, port = answer[1].decode(errors="replace"), answer[2]
            raise NotMasterError(f"The server is a replica of {host}:{port}, not a master")

    @property
    def in_memory(self) -> bool:
        """Return True if the server is a fakeredis of this process.

        A wait for it cannot be interrupted.
        """
        return self._target.startswith("memory://")

    @property
    def has_descriptors(self) -> bool:
        """Return True if a thread can wait for several connections at once."""
        return not self.in_memory and reason_for_public_api() is None

    @property
    def shown(self) -> str:
        """The URL without password and options, for logs and reports."""
        return without_secrets(self._url)

    @property
    def _target(self) -> str:
        return diversion or self._url

    def _connect(self, connection: Connection) -> None:
        try:
            connection.connect()
            self._show_name(connection)

            if self.asks_role:
                connection.send_command("ROLE")
                self.check_role(read_reply(connection))
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
            self._naming_refused = True

            # Only nodes are looked up by name, not commands such as "eventbus-status".
            if self._name.startswith("eventbus:"):
                is_unknown = str(answer).startswith("unknown command")
                self._log.once(
                    "name",
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
                make_connection(without_options(url), 1.0)
        except (ValueError, TypeError, redis.RedisError) as error:
            # The error may quote a part of the password, or an option that holds one.
            reason = str(error) if self.shown == self._url else "it is not a valid URL"
            raise ConfigError(
                f"'EVENTBUS_URL' is {self.shown!r}: {reason}. Write it as "
                "'redis://user:password@host:6379/0', and '#', '/', '?', '@' and '%' of a password "
                "as '%23', '%2F', '%3F', '%40' and '%25'."
            ) from None

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
                make_connection(f"{example}?{urlencode({name: text})}", 1.0)
            except (ValueError, TypeError, redis.RedisError):
                if name not in SENTINEL_OPTIONS:
                    raise ConfigError(
                        f"'EVENTBUS_URL' is {self.shown!r}, and the value of its option {name!r} "
                        "is not valid. Correct it, or remove the option."
                    ) from None

    def _examples(self, parts: SplitResult) -> list[str]:
        if parts.scheme == "memory":
            fakeredis_module()
            return []

        if parts.scheme == "embedded":
            from . import embedded  # it loads ctypes, which no other URL needs

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
        parts = urlsplit(self._target)

        if parts.scheme == "embedded":
            return [_join_embedded(parts)]

        if parts.scheme.endswith("+sentinel"):
            return [self._master(timeout)]

        if parts.scheme == "redis+cluster":
            return _cluster_nodes(parts)

        return [self._target]

    def _follow_master(self) -> None:
        """With Sentinels, start a thread that closes connections to a former master."""
        if not urlsplit(self._target).scheme.endswith("+sentinel"):
            return

        with self._follow_lock:
            if self._is_following:
                return

            self._is_following = True

        threading.Thread(
            target=_follow,
            args=(weakref.ref(self), self.sentinels()),
            name="eventbus-sentinel",
            daemon=True,
        ).start()

    def leave_old_master(self, sentinels: list[Connection]) -> bool:
        """Close the connections to any server other than the Sentinels' current master.

        Return False if no connection is open; the caller then stops.
        """
        with self._follow_lock:
            opened = [item for item in list(self._opened) if item.is_open]

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
                connection.shut_down()

        return True

    def sentinels(self) -> list[Connection]:
        """Return a connection, not open yet, to each Sentinel of the URL."""
        parts = urlsplit(self._url)
        hosts = hosts_of(parts, 26379)
        return [make_connection(sentinel_url(parts, *each), FOLLOW) for each in hosts]

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
                sentinel.set_deadline(min(self.deadline, time.monotonic() + seconds))
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


def _follow(reference: weakref.ref[Connections], sentinels: list[Connection]) -> None:
    while True:
        time.sleep(FOLLOW)
        connections = reference()

        if connections is None or not connections.leave_old_master(sentinels):
            break

        del connections

    for each in sentinels:
        each.disconnect()


def _join_embedded(parts: SplitResult) -> str:
    """Return the URL of the embedded server's socket; start the server if it does not run.

    :raises redis.ConnectionError: the server cannot start.
    """
    from . import embedded  # loaded already, when the URL was checked

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The settings, connections and counters of a node, handed to each of its parts."""

    config: Config
    #: The signals, routes, subscriptions and receivers declared in code.
    registry: Registry
    connections: Connections
    codec: Codec
    counters: Counters
    timing: Timing
    #: The unique name of the node.
    node: str
    #: Returns False once the app is gone; the threads of the node then end.
    app_exists: Callable[[], bool] | None

    @property
    def command(self) -> str:
        """What a command line for this program starts with, for hints."""
        return "python -m flask_eventbus" if self.app_exists is None else "flask eventbus"

    @property
    def relay(self) -> str:
        """The command that publishes the outbox; only an app's knows the database."""
        return f"{self.command} relay" + (" --database URL" if self.app_exists is None else "")

    @property
    def keys(self) -> StreamKeys:
        """The Redis keys of streams under the node's prefix."""
        return StreamKeys(self.config.prefix)
