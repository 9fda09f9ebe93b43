"""What a server says of itself, and what it lets a service do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import redis

from .channels import ChannelKeys, ChannelReader
from .config import Config
from .connections import OUTAGE, Connections
from .errors import ConfigError
from .findings import Finding, error, note, ok, warning
from .node import Node
from .overview import Overview
from .routes import is_pattern
from .server import Server, processes_of, reason_of

#: What ``CLIENT LIST`` shows: never one of a service's listeners.
CLIENT_NAME = "eventbus-check"

#: The oldest Redis that the bus works with.
OLDEST = (6, 2)

#: Seconds that the clocks may differ.
MOST_SKEW = 5.0

#: Events of the largest size, and bytes, that a listener should be allowed to be behind
#: before the server cuts it off.
LEAST_BEHIND = 8
LEAST_BUFFER = 8 * 1024 * 1024


def check_server(node: Node, *, service: str | None) -> Iterator[Finding]:
    """Look at the server of a node, and at what the node's user may do there.

    :param service: whose listeners are counted; those of all services by default.
    """
    config = node.config

    if config.url.startswith("memory://"):
        yield warning(
            "'EVENTBUS_URL' is 'memory://', which lives inside one process: no other one hears.",
            "Set it to a server, for example 'redis://localhost:6379/0', outside of tests.",
        )
        return

    connections = Connections(config.url, name=CLIENT_NAME)

    try:
        with Server(connections) as server:
            yield ok(f"The server at {connections.shown} answers.")
            yield from _check_facts(server, config, service)
            yield from _check_publishing(server, node)

        yield from _check_subscribing(connections, node)
    except OUTAGE as failure:
        yield _unreachable(connections, failure)
    except ConfigError as failure:
        yield error(str(failure), "Correct 'EVENTBUS_URL'.")


def _unreachable(connections: Connections, failure: Exception) -> Finding:
    text = f"The server at {connections.shown} cannot be used: {reason_of(failure)}."

    if isinstance(failure, redis.AuthenticationError):
        return error(text, "Correct the user and the password in 'EVENTBUS_URL'.")

    if isinstance(failure, redis.TimeoutError | TimeoutError):
        return error(text, "See whether it hangs, or whether a firewall keeps it from answering.")

    return error(text, "Start it there, or correct 'EVENTBUS_URL'.")


def _check_facts(server: Server, config: Config, service: str | None) -> Iterator[Finding]:
    checks: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
        ("its version", "+info", lambda: check_version(server)),
        ("whether it evicts keys", "+info", lambda: check_eviction(server)),
        ("its clock", "+time", lambda: check_clock(server)),
        ("how far behind a listener may be", "+config|get", lambda: check_buffer(server, config)),
        ("who listens", "+client|list", lambda: check_listeners(server, service)),
    ]

    for what, grant, look in checks:
        try:
            yield from look()
        except redis.ResponseError as refusal:
            yield note(
                f"This user may not ask {what}: {reason_of(refusal)}.",
                f"To have it checked, allow '{grant}' in the ACL, or check as another user.",
            )


def check_version(server: Server) -> Iterator[Finding]:
    """Redis 6.2 or later, or any Valkey.

    :raises redis.ResponseError: this user may not ask.
    """
    found = server.info("server")

    if "valkey_version" in found:
        yield ok(f"It is Valkey {found['valkey_version']}.")
        return

    version = found.get("redis_version", "")

    if _numbers(version) < OLDEST:
        yield error(
            f"It is Redis {version or 'of an unknown version'}, older than 6.2.",
            "Upgrade it to Redis 6.2 or later, or to Valkey.",
        )
    else:
        yield ok(f"It is Redis {version}.")


def check_eviction(server: Server) -> Iterator[Finding]:
    """Whether the server may throw keys away, which streams could not bear.

    :raises redis.ResponseError: this user may not ask.
    """
    policy = server.info("memory").get("maxmemory_policy", "noeviction")

    if policy == "noeviction":
        yield ok("It evicts no keys.")
        return

    yield warning(
        f"It evicts keys when its memory is full ('maxmemory-policy {policy}'). Channels hold no "
        "keys and are safe; streams are keys, and events in them would be lost.",
        "Set 'maxmemory-policy noeviction' before any route uses a stream.",
    )


def check_clock(server: Server, *, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether the server and this machine agree on the time, which events carry.

    :raises redis.ResponseError: this user may not ask.
    """
    before = clock()
    seconds, microseconds = map(int, server.ask("TIME"))
    here = (before + clock()) / 2
    skew = here - (seconds + microseconds / 1_000_000)

    if abs(skew) <= MOST_SKEW:
        yield ok("Its clock agrees with this machine's.")
        return

    yield warning(
        f"This machine's clock is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} the "
        "server's: the times of events from different machines cannot be compared.",
        "Set both clocks by NTP.",
    )


def check_buffer(server: Server, config: Config) -> Iterator[Finding]:
    """Whether a listener may be a few large events behind before it is cut off.

    :raises redis.ResponseError: this user may not ask.
    """
    words = (server.setting("client-output-buffer-limit") or "").split()
    hard = int(words[words.index("pubsub") + 1]) if "pubsub" in words else 0
    wanted = max(LEAST_BUFFER, LEAST_BEHIND * config.max_event_bytes)

    if 0 < hard < wanted:
        yield note(
            f"It cuts a listener off that is {hard:,} bytes behind "
            "('client-output-buffer-limit pubsub').",
            f"Allow {wanted:,} bytes or more: {LEAST_BEHIND} events of the largest size.",
        )


def check_listeners(server: Server, service: str | None) -> Iterator[Finding]:
    """How many processes of one service listen.

    :raises redis.ResponseError: this user may not ask.
    """
    for name, count in sorted(processes_of(server.listening()).items()):
        if count > 1 and service in (None, name):
            yield warning(
                f"{count} processes of {name!r} listen: each of them runs its receivers for "
                "every channel event.",
                "That is right for a cache in each process. For work to be done once, listen in "
                "one process: set 'EVENTBUS_LISTEN' to False and run 'flask eventbus run'.",
            )


def _check_publishing(server: Server, node: Node) -> Iterator[Finding]:
    """Ask for each channel inside a transaction that is then discarded: nothing is published."""
    names = Overview(node).published_names()

    if not names:
        return

    try:
        server.ask("MULTI")
    except redis.ResponseError as refusal:
        yield note(
            "Whether this user may publish cannot be known without publishing: "
            f"{reason_of(refusal)}.",
            "To have it checked, allow '+multi +discard' in the ACL.",
        )
        return

    refusals = list(_try_channels(server, node, names))
    server.ask("DISCARD")
    yield from refusals or [ok(f"It lets this user publish {_listed(names)}.")]


def _try_channels(server: Server, node: Node, names: list[str]) -> Iterator[Finding]:
    keys = ChannelKeys(node.config.prefix)

    for name in names:
        try:
            server.ask("PUBLISH", keys.key(name), b"")
        except redis.ResponseError as refusal:
            yield _refused("publish", name, keys, refusal)


def _check_subscribing(connections: Connections, node: Node) -> Iterator[Finding]:
    """Subscribe to all of it for a moment, on a connection that no service owns."""
    keys = ChannelKeys(node.config.prefix)
    names = sorted(node.subscriptions)
    reader = ChannelReader(connections)
    reader.connect()

    try:
        refusals = [
            _refused("hear", name, keys, refusal)
            for name in names
            if (refusal := _refusal(reader, keys.key(name), is_pattern(name)))
        ]
    finally:
        reader.close()

    if names:
        yield from refusals or [ok(f"It lets this user hear {_listed(names)}.")]


def _refusal(reader: ChannelReader, key: str, is_pattern: bool) -> str | None:
    """Why a subscription is refused; ``None`` if it is not.

    :raises redis.TimeoutError: no answer came.
    """
    reader.subscribe([key], patterns=is_pattern)

    # Events may come before the answer.
    while frames := reader.read():
        for frame in frames:
            if frame.kind == "refused":
                return frame.body.decode(errors="replace")

            if frame.kind in ("subscribe", "psubscribe"):
                return None

    raise redis.TimeoutError("no answer to SUBSCRIBE")


def _refused(verb: str, name: str, keys: ChannelKeys, refusal: Any) -> Finding:
    return error(
        f"It does not let this user {verb} {name!r}: {reason_of(refusal)}.",
        f"Grant the user the channel in the ACL: '&{keys.key(name)}'.",
    )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
