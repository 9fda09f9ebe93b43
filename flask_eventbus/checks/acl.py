"""Check who may connect to a server, and the rights of a user for streams."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis

from ..admin.overview import Overview
from ..admin.server import TIMEOUT, Server, reason_of
from ..config import Config
from ..node import Node
from ..routing.options import is_pattern
from ..routing.subscriptions import Subscription
from ..transport.connection import set_deadline, timed_connection
from ..transport.keys import StreamKeys
from ..transport.pipe import Command
from .findings import Finding, error, note, ok, warning

#: Commands whose rights name their subcommand as well.
_CONTAINERS = ("XINFO", "XGROUP")

#: Commands without which a worker still reads, and does not maintain the group.
_SPARED = frozenset({"XINFO", "XPENDING"})

#: Words of errors that show that the user has the right: the ACL let the command pass, and an
#: argument that is invalid on purpose was refused.
_HARMLESS = (
    *("not an integer", "Invalid stream ID", "requires the key to exist"),
    *("without MULTI", "inside MULTI", "inside a transaction"),
)

#: An id, and an invalid number, in commands that are never executed.
_ID = "0-1"
_NO_NUMBER = "none"


@dataclass(frozen=True, slots=True)
class Need:
    """A command that a service uses, and the keys that the ACL must grant for it."""

    command: Command
    #: The keys, as a pattern; empty for a command that has none.
    keys: str = ""

    @property
    def right(self) -> str:
        """The right as the ACL writes it: ``+xadd``, ``+xinfo|stream``."""
        words = self.command[: 1 + (self.command[0] in _CONTAINERS)]
        return "+" + "|".join(map(str, words)).lower()

    @property
    def shown(self) -> str:
        """The command as shown to users: ``XADD``, ``XINFO STREAM``."""
        return self.right[1:].replace("|", " ").upper()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command that a service needs, and the error with which Redis refuses it."""

    need: Need
    reason: redis.ResponseError

    @property
    def is_unknown(self) -> bool:
        """True if the server does not know the command."""
        return "unknown command" in str(self.reason)

    @property
    def is_right(self) -> bool:
        """True if the user lacks a right in the ACL."""
        # For EXEC the error only mentions it: the transaction was discarded because of NOPERM.
        return (
            isinstance(self.reason, redis.exceptions.NoPermissionError)
            or "NOPERM" in f"{self.reason}"
        )


def check_stream_rights(open_server: Callable[[], Server], node: Node) -> Iterator[Finding]:
    """Check the rights that the routes and subscriptions of a node need, without any effect.

    :param open_server: opens a connection; each is closed in the middle of a transaction.
    """
    overview = Overview(node)
    published = overview.published_names(via="stream")
    read = [found for found in overview.subscriptions if overview.reads_stream(found)]

    if published:
        with open_server() as server:
            yield from _check_published(server, node, published)

    if read:
        with open_server() as server:
            yield from _check_read(server, node.config, read)


def _check_published(server: Server, node: Node, names: Iterable[str]) -> Iterator[Finding]:
    keys = StreamKeys(node.config.prefix)
    refused = [
        _finding(f"It does not let this user add to the stream of {name!r}", found)
        for name in names
        if (found := _refusals(server, _needs_of_publisher(node, keys, name)))
    ]
    yield from refused or [ok(f"It lets this user add to the streams of {_listed(names)}.")]
    announced = [Need(("SADD", keys.names, name), keys.names) for name in names]

    if _begins(server) and (found := _refusals(server, announced)):
        yield _unannounced(found)


def _needs_of_publisher(node: Node, keys: StreamKeys, name: str) -> Iterator[Need]:
    key = keys.stream(name)
    replicas = node.route_for(name).replicas
    # The command refuses an invalid limit itself, after the ACL has let it pass.
    yield Need(("XADD", key, "MAXLEN", "~", _NO_NUMBER, "*", "event", ""), key)

    if node.config.replicas if replicas is None else replicas:
        yield Need(("WAIT", _NO_NUMBER, 1))


def _unannounced(found: list[Refusal]) -> Finding:
    return warning(
        f"It does not let this user register its streams: {_why(found)}. Patterns, 'tail' and "
        "'status' do not find them until another publisher has registered them.",
        _remedy(found),
    )


def _check_read(
    server: Server, config: Config, subscriptions: list[Subscription]
) -> Iterator[Finding]:
    keys = StreamKeys(config.prefix)
    left = [found for found in subscriptions if not _is_kept_out(server, found, keys, config)]

    for subscription in subscriptions:
        if subscription not in left:
            yield _kept_out(subscription, keys, config)

    if left:
        yield from _check_inside(server, config, left)


def _is_kept_out(
    server: Server, subscription: Subscription, keys: StreamKeys, config: Config
) -> bool:
    """Return True if the service hears only the channel, since it may not create a group."""
    if subscription.via is not None or not subscription.group:
        return False

    key = keys.stream(subscription.name)
    # The start is invalid on purpose, so that no group is created.
    made = Need(("XGROUP", "CREATE", key, config.service, _NO_NUMBER), key)
    return any(refusal.is_right for refusal in _refusals(server, [made]))


def _kept_out(subscription: Subscription, keys: StreamKeys, config: Config) -> Finding:
    name = subscription.name
    needs = [
        *_needs_of(subscription, keys, config),
        *(Need(("MULTI",)), Need(("EXEC",))),
    ]
    return warning(
        f"It does not let this user read the stream of {name!r}, so the service hears only its "
        "channel.",
        "Set via='channel' in the subscription, or grant the user in the ACL: "
        f"{_listed_grants(needs)}.",
    )


def _check_inside(
    server: Server, config: Config, subscriptions: list[Subscription]
) -> Iterator[Finding]:
    """Try the commands in a transaction, where Redis checks them and does not run them."""
    # Before MULTI: inside, EXEC would run the transaction.
    found = _refusals(server, [Need(("EXEC",))])
    begins = _refusals(server, [Need(("MULTI",))])

    if any(each.group for each in subscriptions) and (found or begins):
        yield _finding("It does not let this user acknowledge events of streams", found + begins)

    if begins:
        yield note(
            "The right to read streams was not checked, since that takes a transaction.",
            "To check it, grant '+multi' in the ACL.",
        )
        return

    names = [found.name for found in subscriptions]
    refused = list(_check_each(server, config, subscriptions))
    yield from refused or [ok(f"It lets this user read the streams of {_listed(names)}.")]


def _check_each(
    server: Server, config: Config, subscriptions: list[Subscription]
) -> Iterator[Finding]:
    keys = StreamKeys(config.prefix)

    for subscription in subscriptions:
        found = _refusals(server, _needs_of(subscription, keys, config))
        reader = f"as the group {config.service!r}" if subscription.group else "in each process"

        if found and all(refusal.need.command[0] in _SPARED for refusal in found):
            yield warning(
                f"It lets this user read the stream of {subscription.name!r} {reader}, and not "
                f"maintain its group: {_why(found)}. The service does not notice events that dead "
                "workers left, or that were trimmed.",
                _remedy(found),
            )
        elif found:
            text = f"It does not let this user read the stream of {subscription.name!r} {reader}"
            yield _finding(text, found)


def _needs_of(subscription: Subscription, keys: StreamKeys, config: Config) -> Iterator[Need]:
    name, service = subscription.name, config.service

    if is_pattern(name):
        yield from _needs_of_pattern(keys, service, name)

    if not subscription.group:
        yield from _needs_of_follower(keys.stream(name))
        return

    yield from _needs_of_group(keys.stream(name), service)
    yield Need(("SADD", keys.names, name), keys.names)
    # Finds retries of signals that the service no longer subscribes to.
    yield Need(("SMEMBERS", keys.names), keys.names)
    yield Need(("TIME",))

    if config.duplicate_window:
        yield from _needs_of_duplicates(keys.seen(name, service, 0)[:-1])

    yield from _needs_of_retries(keys.retry(name, service))
    dead = keys.dead(name, service)
    yield Need(("XADD", dead, "*", "reason", ""), dead)
    yield Need(("XTRIM", dead, "MAXLEN", "~", _NO_NUMBER), dead)
    dropped = keys.dead_dropped(name, service)
    yield Need(("INCRBY", dropped, _NO_NUMBER), dropped)


def _needs_of_pattern(keys: StreamKeys, service: str, pattern: str) -> Iterator[Need]:
    since = keys.since(service)
    yield Need(("SMEMBERS", keys.names), keys.names)
    yield Need(("TIME",))
    yield Need(("HSETNX", since, pattern, 0), since)
    yield Need(("HGET", since, pattern), since)


def _needs_of_follower(key: str) -> Iterator[Need]:
    yield Need(("XREAD", "STREAMS", key, "$"), key)
    yield Need(("XREVRANGE", key, "+", "-", "COUNT", 1), key)
    yield Need(("XINFO", "STREAM", key), key)


def _needs_of_group(key: str, service: str) -> Iterator[Need]:
    commands: list[Command] = [
        ("XGROUP", "CREATE", key, service, "$", "MKSTREAM"),
        ("XGROUP", "CREATECONSUMER", key, service, "nobody"),
        ("XGROUP", "DELCONSUMER", key, service, "nobody"),
        ("XREADGROUP", "GROUP", service, "nobody", "COUNT", 1, "STREAMS", key, ">"),
        ("XACK", key, service, _ID),
        ("XCLAIM", key, service, "nobody", 0, _ID, "JUSTID"),
        ("XPENDING", key, service, "-", "+", 1),
        ("XRANGE", key, _ID, _ID),
        ("XINFO", "STREAM", key),
        ("XINFO", "GROUPS", key),
        ("XINFO", "CONSUMERS", key, service),
    ]
    return (Need(command, key) for command in commands)


def _needs_of_duplicates(start: str) -> Iterator[Need]:
    key = f"{start}0"
    commands: list[Command] = [("HMGET", key, ""), ("HSET", key, "", ""), ("EXPIRE", key, 1)]
    return (Need(command, f"{start}*") for command in commands)


def _needs_of_retries(key: str) -> Iterator[Need]:
    commands: list[Command] = [
        ("ZRANGEBYSCORE", key, 0, 0),
        ("ZSCORE", key, ""),
        ("ZADD", key, 0, ""),
        ("ZREM", key, ""),
    ]
    return (Need(command, key) for command in commands)


def _begins(server: Server) -> bool:
    """Start a transaction, in which commands are only checked; return True if Redis allows it."""
    return not _refusals(server, [Need(("MULTI",))])


def _refusals(server: Server, needs: Iterable[Need]) -> list[Refusal]:
    needs = list(needs)
    answers = server.ask_all([tuple(map(str, need.command)) for need in needs])
    return [
        Refusal(need, answer)
        for need, answer in zip(needs, answers, strict=True)
        if isinstance(answer, redis.ResponseError)
        and not any(words in str(answer) for words in _HARMLESS)
    ]


def _finding(text: str, found: list[Refusal]) -> Finding:
    return error(f"{text}: {_why(found)}.", _remedy(found))


def _remedy(found: list[Refusal]) -> str:
    if unknown := [refusal for refusal in found if refusal.is_unknown]:
        if all(refusal.need.command[0] in _SPARED for refusal in unknown):
            return "Remove the command from 'rename-command' in the server's configuration."

        return "Use Redis 6.2 or later, or Valkey: this server does not know the command."

    if grants := _grants(found):
        return f"Grant the user in the ACL: {grants}."

    reasons = " ".join(str(refusal.reason) for refusal in found)

    if "WRONGTYPE" in reasons:
        return "Set another 'EVENTBUS_PREFIX', or delete the key that another program has written."

    if "OOM" in reasons:
        return "Raise 'maxmemory' of the server, or delete what fills it."

    return "Fix what the error names; the log of the Redis server may say more. Then check again."


def _why(found: list[Refusal]) -> str:
    """Return the first error that is not a missing right; otherwise the missing rights."""
    first = next((refusal for refusal in found if not refusal.is_right), None)

    if first is not None:
        return f"{first.need.shown}: {reason_of(first.reason)}"

    return "no right to " + ", ".join(
        dict.fromkeys(refusal.need.right[1:].replace("|", " ").upper() for refusal in found)
    )


def _grants(found: list[Refusal]) -> str:
    return _listed_grants(refusal.need for refusal in found if refusal.is_right)


def _listed_grants(needs: Iterable[Need]) -> str:
    """Return the rights for each pattern of keys, as the ACL takes them."""
    by_keys: dict[str, dict[str, None]] = {}

    for need in needs:
        by_keys.setdefault(need.keys, {})[need.right] = None

    return ", ".join(
        repr(" ".join([*rights, *([f"~{keys}"] if keys else [])]))
        for keys, rights in by_keys.items()
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


#: Text of the finding that a server has no password.
_ALL_RIGHTS = (
    "Anyone who can connect to it becomes 'default', without a password, and may do everything: "
    "read, change and delete every stream."
)

_CLOSE = (
    "Give each service a user of its own, and disable 'default': 'user default off resetpass ~* &* "
    "+@all'. See docs/redis.md."
)


def check_access(url: str, deadline: float = math.inf) -> Iterator[Finding]:
    """Check the encryption of a connection, and whether the server needs a password.

    :param deadline: monotonic time at which waiting for the server ends.
    """
    scheme = urlsplit(url).scheme

    if scheme in ("embedded", "memory"):
        return

    is_here = scheme == "unix" or all(map(is_loopback, hosts_of(url)))
    yield from check_transport(url, is_here=is_here)

    if scheme in ("redis", "rediss", "unix") and is_open(url, deadline):
        # On this machine only local programs can connect, which is usual in development.
        yield note(_ALL_RIGHTS, _CLOSE) if is_here else warning(_ALL_RIGHTS, _CLOSE)


def check_transport(url: str, *, is_here: bool) -> Iterator[Finding]:
    """Check the TLS options of a URL.

    :param is_here: True if the server is on this machine.
    """
    parts = urlsplit(url)

    if parts.scheme.startswith("rediss"):
        options = {name: values[-1].lower() for name, values in parse_qs(parts.query).items()}

        if options.get("ssl_cert_reqs", "required") not in ("required", "2", "cert_required"):
            yield warning(
                "The server's certificate is not verified ('ssl_cert_reqs' in 'EVENTBUS_URL'): "
                "an attacker in the network can impersonate the server and read the password.",
                "Remove 'ssl_cert_reqs', and name the certificate authority: "
                "'ssl_ca_certs=/etc/eventbus/ca.crt'.",
            )
        elif options.get("ssl_check_hostname", "true") in ("false", "0", "no", "off"):
            yield warning(
                "The name in the server's certificate is not compared with the host "
                "('ssl_check_hostname' in 'EVENTBUS_URL'): any certificate of the authority is "
                "accepted.",
                "Set 'ssl_check_hostname=true'.",
            )
    elif not is_here:
        yield warning(
            f"'EVENTBUS_URL' begins with '{parts.scheme}://', and its server is not on this "
            "machine: passwords and events travel unencrypted.",
            f"Use '{parts.scheme.replace('redis', 'rediss')}://', or a private network."
            if parts.scheme != "redis+cluster"
            else "'redis+cluster' has no TLS in this version: use a private network.",
        )


def hosts_of(url: str) -> list[str]:
    """Return the hosts that a URL names, one or several."""
    _, _, hosts = urlsplit(url).netloc.rpartition("@")
    return [urlsplit(f"//{host}").hostname or "localhost" for host in hosts.split(",")]


def is_loopback(host: str) -> bool:
    """Return True if a host is a loopback address, or the name 'localhost'."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_open(url: str, deadline: float) -> bool:
    """Return True if the server gives all rights to users without a password."""
    parts = urlsplit(url)
    query = "&".join(
        option
        for option in parts.query.split("&")
        if option.partition("=")[0] not in ("username", "password")
    )
    nobody = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
    connection = timed_connection(nobody, TIMEOUT)
    set_deadline(connection, min(deadline, time.monotonic() + TIMEOUT))

    try:
        connection.connect()
        connection.send_command("ACL", "GETUSER", "default")
        answer = connection.read_response()
    except (redis.RedisError, OSError):
        return False
    finally:
        connection.disconnect()

    facts = dict(zip(answer[::2], answer[1::2], strict=True))
    keys = facts[b"keys"]
    # A list of keys before Redis 7, a string since.
    is_everywhere = b"*" in (key.strip(b"~") for key in getattr(keys, "split", lambda: keys)())
    return facts[b"commands"].split() == [b"+@all"] and is_everywhere
