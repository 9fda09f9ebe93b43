"""Check who may connect to a server, and the rights of a user for channels and streams."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis

from ..admin.overview import Overview
from ..admin.server import TIMEOUT, Server
from ..channels.reader import ChannelReader
from ..config import Config
from ..node import Node
from ..routing.options import is_pattern
from ..routing.subscriptions import Subscription
from ..text import reason_of
from ..transport import keys as rights
from ..transport.connection import make_connection
from ..transport.connections import Connections
from ..transport.keys import ChannelKeys, StreamKeys, is_missing_right, repair, right_of
from .findings import Finding, error, listed, note, ok, warning

#: Commands without which a worker still reads, and does not maintain the group.
_SPARED = ("+xinfo", "+xpending")

#: The needs that Redis refuses, each with its error.
Refusals = dict["Need", redis.ResponseError]

#: Words of errors that show that the user has the right: the ACL let the command pass, and an
#: argument that is invalid on purpose was refused.
_HARMLESS = (
    *("not an integer", "Invalid stream ID", "requires the key to exist"),
    *("without MULTI", "inside MULTI", "inside a transaction"),
)

#: A command to try for each right; an argument is invalid on purpose, or a transaction around it
#: is never executed.
_TRIALS = {
    right_of(tuple(command.split())): command
    for command in (
        *("XADD KEY MAXLEN ~ none * event -", "WAIT none 1", "SADD KEY x", "SMEMBERS KEY", "TIME"),
        *("HSETNX KEY x 0", "HGET KEY x", "HMGET KEY x", "HSET KEY x x", "EXPIRE KEY 1"),
        *("XREAD STREAMS KEY $", "XREVRANGE KEY + - COUNT 1", "XRANGE KEY 0-1 0-1"),
        *("XGROUP CREATE KEY SERVICE none", "XGROUP CREATECONSUMER KEY SERVICE nobody"),
        *("XGROUP DELCONSUMER KEY SERVICE nobody", "XACK KEY SERVICE 0-1"),
        *("XREADGROUP GROUP SERVICE nobody COUNT 1 STREAMS KEY >", "XPENDING KEY SERVICE - + 1"),
        *("XCLAIM KEY SERVICE nobody 0 0-1 JUSTID", "XINFO CONSUMERS KEY SERVICE"),
        *("XINFO STREAM KEY", "XINFO GROUPS KEY", "XTRIM KEY MAXLEN ~ none", "INCRBY KEY none"),
        *("ZRANGEBYSCORE KEY 0 0", "ZSCORE KEY x", "ZADD KEY 0 x", "ZREM KEY x"),
        *("MULTI", "EXEC"),
    )
}


@dataclass(frozen=True, slots=True)
class Need:
    """A right that a service needs."""

    #: As the ACL writes it: ``+xadd``, ``+xinfo|stream``.
    right: str
    #: The keys that the ACL must grant for it, as a pattern; empty for none.
    keys: str = ""
    service: str = ""

    @property
    def trial(self) -> tuple[str, ...]:
        """The command that shows whether the user has the right."""
        key = f"{self.keys[:-1]}0" if self.keys.endswith("*") else self.keys
        words = {"KEY": key, "SERVICE": self.service}
        return tuple(words.get(word, word) for word in _TRIALS[self.right].split())

    @property
    def shown(self) -> str:
        """The command as shown to users: ``XADD``, ``XINFO STREAM``."""
        return self.right[1:].replace("|", " ").upper()


def check_stream_rights(connections: Connections, node: Node) -> Iterator[Finding]:
    """Check the rights that the routes and subscriptions of a node need, without any effect."""
    overview = Overview(node)
    published = overview.published_names(via="stream")
    read = [found for found in overview.subscriptions if overview.reads_stream(found)]

    # Each connection is closed in the middle of a transaction.
    if published:
        with Server(connections) as server:
            yield from _check_published(server, node, published)

    if read:
        with Server(connections) as server:
            yield from _check_read(server, node.config, read)


def _check_published(server: Server, node: Node, names: Iterable[str]) -> Iterator[Finding]:
    keys = StreamKeys(node.config.prefix)
    refused = []

    for name in names:
        replicas = node.route_for(name).replicas
        waits = node.config.replicas if replicas is None else replicas
        needs = [Need(rights.ADD, keys.stream(name)), *([Need(rights.WAIT)] if waits else [])]

        if found := _refusals(server, needs):
            text = f"It does not let this user add to the stream of {name!r}"
            refused.append(_finding(text, found))

    yield from refused or [ok(f"It lets this user add to the streams of {listed(names)}.")]

    if _refusals(server, [Need("+multi")]):
        return

    if found := _refusals(server, [Need(rights.REGISTER, keys.names)]):
        yield warning(
            f"It does not let this user register its streams: {_why(found)}. Patterns, 'tail' and "
            "'status' do not find them until another publisher has registered them.",
            _remedy(found),
        )


def _check_read(
    server: Server, config: Config, subscriptions: list[Subscription]
) -> Iterator[Finding]:
    keys = StreamKeys(config.prefix)
    left = []

    for subscription in subscriptions:
        name = subscription.name
        create = Need("+xgroup|create", keys.stream(name), config.service)
        uses_both = subscription.via is None and subscription.group

        # A service that may not create the group listens to the channel only.
        if uses_both and any(map(is_missing_right, _refusals(server, [create]).values())):
            needs = [*_needs_of(subscription, keys, config), *map(Need, rights.TRANSACTION.split())]
            grant = rights.grant_the_user(_by_keys(needs))
            yield warning(
                f"It does not let this user read the stream of {name!r}, so the service receives "
                "only the events of its channel.",
                f"Set via='channel' in the subscription, or {grant[0].lower()}{grant[1:]}",
            )
        else:
            left.append(subscription)

    if left:
        yield from _check_inside(server, config, left)


def _check_inside(
    server: Server, config: Config, subscriptions: list[Subscription]
) -> Iterator[Finding]:
    """Try the commands in a transaction, where Redis checks them and does not run them."""
    # Before MULTI: inside, EXEC would run the transaction.
    found = _refusals(server, [Need("+exec")])
    begins = _refusals(server, [Need("+multi")])

    if any(each.group for each in subscriptions) and (found or begins):
        yield _finding("It does not let this user acknowledge events of streams", found | begins)

    if begins:
        yield note(
            "The right to read streams was not checked, since that takes a transaction.",
            "To check it, grant '+multi' in the ACL.",
        )
        return

    refused = []

    for subscription in subscriptions:
        reader = f"as the group {config.service!r}" if subscription.group else "in each process"
        what = f"read the stream of {subscription.name!r} {reader}"
        refusals = _refusals(server, _needs_of(subscription, StreamKeys(config.prefix), config))

        if refusals and all(need.right.startswith(_SPARED) for need in refusals):
            refused.append(
                warning(
                    f"It lets this user {what}, and not maintain its group: {_why(refusals)}. The "
                    "service does not notice events that dead workers left, or that were trimmed.",
                    _remedy(refusals),
                )
            )
        elif refusals:
            refused.append(_finding(f"It does not let this user {what}", refusals))

    names = listed(found.name for found in subscriptions)
    yield from refused or [ok(f"It lets this user read the streams of {names}.")]


def _needs_of(subscription: Subscription, keys: StreamKeys, config: Config) -> list[Need]:
    """Return the rights that a service needs to read a stream, all but those to transactions."""
    name, service = subscription.name, config.service
    search = [(rights.SEARCH, keys.names), (rights.TIME, "")]
    needed = [*search, (rights.SINCE, keys.since(service))] if is_pattern(name) else []

    if not subscription.group:
        needed.append((rights.FOLLOW, keys.stream(name)))
    else:
        needed += [(rights.GROUP, keys.stream(name)), (rights.REGISTER, keys.names)]
        # Finds retries of signals that the service no longer subscribes to.
        needed += search

        if config.duplicate_window:
            needed.append((rights.SEEN, keys.seen(name, service, 0)[:-1] + "*"))

        needed += [
            (rights.RETRIES, keys.retry(name, service)),
            (rights.DEAD, keys.dead(name, service)),
            (rights.DROPPED, keys.dead_dropped(name, service)),
        ]

    return [Need(right, key, service) for each, key in needed for right in each.split()]


def _refusals(server: Server, needs: Sequence[Need]) -> Refusals:
    """Try the command of each need in one round trip, and return those that Redis refuses."""
    answers = server.ask_all([need.trial for need in needs])
    return {
        need: answer
        for need, answer in zip(needs, answers, strict=True)
        if isinstance(answer, redis.ResponseError)
        and not any(words in str(answer) for words in _HARMLESS)
    }


def _finding(text: str, found: Refusals) -> Finding:
    return error(f"{text}: {_why(found)}.", _remedy(found))


def _remedy(found: Refusals) -> str:
    missing = [need for need, reason in found.items() if is_missing_right(reason)]
    unknown = [need for need, reason in found.items() if "unknown command" in str(reason)]

    if missing and not unknown:
        return rights.grant_the_user(_by_keys(missing))

    first = next(iter(unknown or found))
    return repair(found[first], [first.keys])


def _why(found: Refusals) -> str:
    """Return the first error that is not a missing right; otherwise the missing rights."""
    for need, reason in found.items():
        if not is_missing_right(reason):
            return f"{need.shown}: {reason_of(reason)}"

    return "no right to " + ", ".join(dict.fromkeys(need.shown for need in found))


def _by_keys(needs: Iterable[Need]) -> dict[str, str]:
    """Return the rights for each pattern of keys."""
    found: dict[str, list[str]] = {}

    for need in dict.fromkeys(needs):
        found.setdefault(need.keys, []).append(need.right)

    return {keys: " ".join(found[keys]) for keys in found}


def check_publishing(connections: Connections, node: Node) -> Iterator[Finding]:
    """Check the right to publish, in a transaction that is never executed."""
    names = Overview(node).published_names(via="channel")

    if not names:
        return

    with Server(connections) as server:
        try:
            server.ask("MULTI")
        except redis.ResponseError as refusal:
            yield note(
                "The right to publish was not checked, since that takes a transaction: "
                f"{reason_of(refusal)}.",
                "To check it, grant '+multi' in the ACL.",
            )
            return

        keys = [ChannelKeys(node.config.prefix).key(name) for name in names]
        answers = server.ask_all([("PUBLISH", key, "") for key in keys])
        refusals = [
            _refused("publish", name, {key: rights.PUBLISH}, answer)
            for name, key, answer in zip(names, keys, answers, strict=True)
            if isinstance(answer, redis.ResponseError)
        ]

    yield from refusals or [ok(f"It lets this user publish {listed(names)}.")]


def check_listening(connections: Connections, node: Node) -> Iterator[Finding]:
    """Check the right to subscribe, by doing so for a moment on a connection of its own."""
    keys = ChannelKeys(node.config.prefix)
    names = sorted(name for name, found in node.subscriptions.items() if found.via != "stream")

    if not names:
        return

    refusals = []
    reader = ChannelReader(connections)
    reader.connect()

    with closing(reader):
        for name in names:
            right = rights.LISTEN_PATTERN if is_pattern(name) else rights.LISTEN

            if refusal := _refusal(reader, keys.key(name), patterns=is_pattern(name)):
                refusals.append(_refused("listen to", name, {keys.key(name): right}, refusal))

    yield from refusals or [ok(f"It lets this user listen to {listed(names)}.")]


def _refusal(reader: ChannelReader, key: str, *, patterns: bool) -> str | None:
    """Return why Redis refuses a subscription; ``None`` if it does not.

    :raises redis.TimeoutError: Redis does not answer.
    """
    reader.subscribe([key], patterns=patterns)

    # Events may arrive before the answer.
    while frames := reader.read():
        for frame in frames:
            if frame.kind == "refused":
                return frame.body.decode(errors="replace")

            if frame.kind in ("subscribe", "psubscribe"):
                return None

    raise redis.TimeoutError("no answer to SUBSCRIBE")


def _refused(verb: str, name: str, needed: Mapping[str, str], refusal: Any) -> Finding:
    text = f"It does not let this user {verb} {name!r}: {reason_of(refusal)}."
    return error(text, rights.remedy(refusal, needed, rights.grant_the_user))


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
    options = parts.query.split("&")
    query = "&".join(each for each in options if not each.startswith(("username=", "password=")))
    nobody = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
    connection = make_connection(nobody, TIMEOUT)
    connection.set_deadline(min(deadline, time.monotonic() + TIMEOUT))

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
