"""Check a server: its version, its settings, and the lag, retries and dead letters there.

``check`` runs all checks, those of the program included.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

import redis

from ..admin.overview import Overview, subscribed
from ..admin.server import PATIENCE, Server, processes_of
from ..admin.status import GroupStatus, StreamStatus, read_statuses
from ..admin.streams import StreamAccess
from ..config import TIMING, Config
from ..errors import ConfigError, OperationError
from ..node import Node
from ..publisher.writer import BATCH_BYTES
from ..routing.options import is_pattern
from ..streams.alarms import too_many_names
from ..text import counted, reason_of
from ..transport.connection import OUTAGE
from ..transport.connections import Connections
from ..transport.keys import StreamKeys, grant_the_user
from ..transport.urls import reason_and_remedy, without_secrets
from .acl import check_access, check_listening, check_publishing, check_stream_rights
from .findings import Finding, error, listed, note, ok, warning
from .program import check_database, check_program, check_retries

#: Name of the connection in ``CLIENT LIST``; it does not count as a listener.
CLIENT_NAME = "eventbus-check"

#: The oldest Redis that the bus works with.
OLDEST = (6, 2)

#: Seconds by which the clocks may differ.
MAX_SKEW = 5.0

#: Output buffer that a listener should have before the server disconnects it: a number of
#: events of the largest size, and at least so many bytes.
LEAST_BEHIND = 8
LEAST_BUFFER = 8 * 1024 * 1024


def check(node: Node, *, program: bool = True) -> list[Finding]:
    """Return the findings about a node's program, database and server.

    Nothing is published, no receiver runs, and the service does not start to listen.

    :param program: True if the node has routes and receivers to check. If False, only the server
        and the listeners of all services are checked.
    """
    if not program:
        return list(check_server(node, service=None))

    return [
        *check_program(node),
        *check_retries(node),
        *check_database(node),
        *check_server(node, service=node.config.service),
    ]


def check_server(node: Node, *, service: str | None) -> Iterator[Finding]:
    """Check the server of a node, and the rights of the node's user there.

    :param service: the service whose listeners are counted; ``None`` for all services.
    """
    config = node.config

    if config.url.startswith("memory://"):
        yield warning(
            "'EVENTBUS_URL' is 'memory://', which lives in one process: no other one gets events.",
            "Outside of tests, set it to a server, for example 'redis://localhost:6379/0'.",
        )
        return

    deadline = time.monotonic() + PATIENCE
    connections = Connections(config.url, name=CLIENT_NAME, deadline=deadline)

    try:
        with Server(connections) as server:
            yield ok(f"The server at {connections.shown} answers.")
            streams = _streams(server, node, service)
            yield from _check_role(connections)
            yield from check_access(config.url, deadline)
            yield from _check_facts(server, node, service, streams)

        yield from check_publishing(connections, node)
        yield from check_listening(connections, node)
        yield from _check_streams(connections, node, service, streams)
    except OUTAGE as failure:
        reason, remedy = reason_and_remedy(failure)
        yield error(f"The server at {connections.shown} cannot be used: {reason}.", remedy)
    except ConfigError as failure:
        yield error(str(failure), "Correct 'EVENTBUS_URL'.")


def _check_role(connections: Connections) -> Iterator[Finding]:
    refusal = connections.role_refusal

    if refusal is not None:
        yield warning(
            f"It does not answer ROLE: {reason_of(refusal)}. The bus notices that a master became "
            "a replica only when it refuses a write.",
            grant_the_user({"": "+role"}),
        )


def _streams(server: Server, node: Node, service: str | None) -> set[str]:
    """Return the signals whose streams the service uses, or all services if it is ``None``."""
    overview = Overview(node)

    if not node.config.has_streams:
        return set()

    if service is not None:
        read = {found.name for found in overview.subscriptions if overview.reads_stream(found)}
        return read | set(overview.published_names(via="stream"))

    try:
        return set(server.streams(StreamKeys(node.config.prefix)))
    except redis.ResponseError:
        # Without the names, a finding about streams is a warning.
        return set()


def _check_facts(
    server: Server, node: Node, service: str | None, streams: set[str]
) -> Iterator[Finding]:
    config = node.config
    checks: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
        ("its version", "+info", lambda: check_version(server)),
        ("eviction of keys", "+info", lambda: check_eviction(server, streams)),
        ("its clock", "+time", lambda: check_clock(server)),
        ("the buffer of a listener", "+config|get", lambda: check_buffer(server, config)),
        ("the largest event", "+config|get", lambda: check_argument(server, config)),
        ("the listeners", "+client|list", lambda: check_listeners(server, node, service)),
    ]

    if streams and not config.url.startswith("embedded://"):
        kept = ("persistence", "+info +config|get")
        checks.append((*kept, lambda: check_persistence(server, streams)))
        keys = StreamKeys(config.prefix)
        reads = ("loading of its append-only file", "+info +acl|dryrun")
        checks.append((*reads, lambda: check_log_reader(server, keys, streams)))

    if streams:
        checks.append(("cluster mode", "+info", lambda: check_cluster(server, streams)))

    refused: dict[str, list[tuple[str, str]]] = {}

    for what, grant, look in checks:
        try:
            yield from look()
        except redis.ResponseError as refusal:
            refused.setdefault(reason_of(refusal), []).append((what, grant))

    for reason, asked in refused.items():
        grants = dict.fromkeys(" ".join(grant for _, grant in asked).split())
        yield note(
            f"This user has no right to check {', '.join(what for what, _ in asked)}: {reason}.",
            f"To check it, grant '{' '.join(grants)}' in the ACL, or check as another user.",
        )


def check_version(server: Server) -> Iterator[Finding]:
    """Check that the server is Redis 6.2 or later, or Valkey.

    :raises redis.ResponseError: this user has no right to ask.
    """
    found = server.info("server")

    if "valkey_version" in found:
        yield ok(f"It is Valkey {found['valkey_version']}.")
        return

    version = found.get("redis_version", "")

    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())

    if numbers < OLDEST:
        yield error(
            f"It is Redis {version or 'of an unknown version'}, older than 6.2.",
            "Upgrade it to Redis 6.2 or later, or to Valkey.",
        )
    else:
        yield ok(f"It is Redis {version}.")


def check_clock(server: Server, *, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Check that the clock of the server agrees with this machine's, since events carry times.

    :raises redis.ResponseError: this user has no right to ask.
    """
    before = clock()
    seconds, microseconds = map(int, server.ask("TIME"))
    here = (before + clock()) / 2
    skew = here - (seconds + microseconds / 1_000_000)

    if abs(skew) <= MAX_SKEW:
        yield ok("Its clock agrees with this machine's.")
        return

    yield warning(
        f"This machine's clock is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} the "
        "server's: the times of events from different machines cannot be compared.",
        "Synchronize both clocks by NTP.",
    )


def check_buffer(server: Server, config: Config) -> Iterator[Finding]:
    """Check that a listener may be a few large events behind before it is disconnected.

    :raises redis.ResponseError: this user has no right to ask.
    """
    words = (server.setting("client-output-buffer-limit") or "").split()
    hard = int(words[words.index("pubsub") + 1]) if "pubsub" in words else 0
    wanted = max(LEAST_BUFFER, LEAST_BEHIND * config.max_event_bytes)

    if 0 < hard < wanted:
        yield note(
            f"It disconnects a listener that is {hard:,} bytes behind "
            "('client-output-buffer-limit pubsub').",
            f"Set it to {wanted:,} bytes or more: {LEAST_BEHIND} events of the largest size.",
        )


def check_argument(server: Server, config: Config) -> Iterator[Finding]:
    """Check that the server accepts an event of the largest size.

    :raises redis.ResponseError: this user has no right to ask.
    """
    most = int(server.setting("proto-max-bulk-len") or 0)
    wanted = config.max_event_bytes + BATCH_BYTES

    if 0 < most < wanted:
        yield error(
            f"It takes {most:,} bytes at once ('proto-max-bulk-len'), and an event may have "
            f"{config.max_event_bytes:,} ('EVENTBUS_MAX_EVENT_BYTES'): it disconnects the sender.",
            f"Set 'proto-max-bulk-len' to {wanted:,} or more, or lower 'EVENTBUS_MAX_EVENT_BYTES'.",
        )


def check_listeners(server: Server, node: Node, service: str | None) -> Iterator[Finding]:
    """Report services of which several processes listen to channels.

    :raises redis.ResponseError: this user has no right to ask.
    """
    if service is not None and all(found.via is not None for found in node.subscriptions.values()):
        return

    # This program does not know what the receivers of other services do.
    level = note if service is None else warning
    on_channels = [found for found in server.listening() if found.channels or found.patterns]

    for name, count in sorted(processes_of(on_channels).items()):
        if count > 1 and service in (None, name):
            yield level(
                f"{count} processes of {name!r} listen: each of them runs its receivers for "
                "every channel event.",
                "For a cache in each process this is right: set via='channel' in the subscription. "
                "For work that must be done once, set via='stream'.",
            )


def _check_streams(
    connections: Connections, node: Node, service: str | None, streams: set[str]
) -> Iterator[Finding]:
    """Check the rights of this user for streams, and their lag, retries and dead letters."""
    overview = Overview(node)

    if not node.config.has_streams:
        names = [found.name for found in overview.subscriptions if found.via is None]

        if names:
            yield note(
                f"In a Redis Cluster there are no streams yet: {listed(names)} "
                f"{'uses' if len(names) == 1 else 'use'} only channels."
            )

        return

    yield from check_stream_rights(connections, node)

    if streams:
        yield from _check_backlog(node, service, connections.deadline)

    if service is not None:
        written = set(overview.published_names(via="stream")) - subscribed(node, ())
        yield from _check_written(node.config, sorted(written), connections.deadline)


def _program(node: Node, service: str) -> str:
    """Return the start of a command for a service, with the options it needs without an app."""
    if node.has_app:
        return node.command

    config = node.config
    given = Config(service=config.service)
    is_plain = without_secrets(config.url) == config.url
    words = [node.command]

    if config.url != os.environ.get("EVENTBUS_URL", given.url):
        words += ["--url", shlex.quote(config.url) if is_plain else "URL"]
    if config.prefix != os.environ.get("EVENTBUS_PREFIX", given.prefix):
        words += ["--prefix", config.prefix]

    return " ".join([*words, "--service", service])


#: Names that a finding shows at most.
NAMES_SHOWN = 5


def check_eviction(server: Server, streams: Collection[str] = ()) -> Iterator[Finding]:
    """Check that the server evicts no keys, since streams are keys.

    :param streams: the signals whose streams are used here.
    :raises redis.ResponseError: this user has no right to ask.
    """
    policy = server.info("memory").get("maxmemory_policy", "noeviction")

    if policy == "noeviction":
        yield ok("It evicts no keys.")
        return

    text = f"It evicts keys when its memory is full ('maxmemory-policy {policy}')"

    if streams:
        yield error(
            f"{text}, and streams are keys: events of {shown(streams)}, their retries and dead "
            "letters would be lost without notice.",
            "Set 'maxmemory-policy noeviction', or use another Redis for the bus. Events that may "
            "be missed can go via 'channel'.",
        )
    else:
        yield warning(
            f"{text}. Channels hold no keys and are safe; streams are keys, and events in them "
            "would be lost.",
            "Set 'maxmemory-policy noeviction' before any route uses a stream.",
        )


def check_persistence(server: Server, streams: Collection[str]) -> Iterator[Finding]:
    """Check that streams survive a restart of the server.

    :raises redis.ResponseError: this user has no right to ask.
    """
    if server.info("persistence").get("aof_enabled") == "1":
        yield ok("It keeps streams in a log on disk.")
    elif server.setting("save"):
        yield note(
            "It saves streams in snapshots. If it crashes, it loses all events since the last "
            "snapshot, confirmed ones included.",
            "Set 'appendonly yes': then it loses one second at most.",
        )
    else:
        yield warning(
            f"It keeps nothing on disk: when it stops, the streams of {shown(streams)} are lost, "
            "with their events, retries, dead letters and the position of each service.",
            "Set 'appendonly yes', and give it a volume.",
        )


def check_log_reader(
    server: Server, keys: StreamKeys, streams: Collection[str]
) -> Iterator[Finding]:
    """Check that the user ``default`` may run the transactions in the append-only file.

    Redis checks the rights of that user for each command of a transaction while it loads the
    file (redis#14541).

    :raises redis.ResponseError: this user has no right to ask.
    """
    if server.info("persistence").get("aof_enabled") != "1":
        return

    refused = [command for command in _transactions(keys) if not _may_default(server, command)]

    if refused:
        yield error(
            f"Its user 'default' may not use {refused[0][0]} at {refused[0][1]!r}, and Redis loads "
            "its append-only file as that user: it skips every transaction. Retries, dead letters "
            f"and acknowledgements of {shown(streams)} are lost when it restarts.",
            "Give 'default' all rights, and disable it for logins: "
            "'user default off resetpass ~* &* +@all'.",
        )


def _transactions(keys: StreamKeys) -> list[tuple[str, ...]]:
    """Return the commands of transactions that record the outcome of an event."""
    name, service = "a", "b"
    return [
        ("XADD", keys.dead(name, service), "*", "a", "b"),
        ("ZADD", keys.retry(name, service), "1", "a"),
        ("ZREM", keys.retry(name, service), "a"),
        ("XACK", keys.stream(name), service, "1-1"),
    ]


def _may_default(server: Server, command: tuple[str, ...]) -> bool:
    try:
        return bool(server.ask("ACL", "DRYRUN", "default", *command) == b"OK")
    except redis.ResponseError as refusal:
        if isinstance(refusal, redis.exceptions.NoPermissionError):
            raise

    # Redis 6.2 has no ACL DRYRUN.
    found = server.ask("ACL", "GETUSER", "default")
    facts = dict(zip(found[::2], found[1::2], strict=True))
    return b"+@all" in facts[b"commands"].split() and b"*" in facts[b"keys"]


def check_cluster(server: Server, streams: Collection[str]) -> Iterator[Finding]:
    """Check that the server is not a node of a cluster, which streams do not support.

    :raises redis.ResponseError: this user has no right to ask.
    """
    if server.info("cluster").get("cluster_enabled") == "1":
        yield error(
            "It is a node of a Redis Cluster: streams on other nodes cannot be reached, perhaps "
            f"those of {shown(streams)}.",
            "For streams, use a single Redis ('redis://' or 'redis+sentinel://'). For channels "
            "only, use 'redis+cluster://'.",
        )


def _check_backlog(node: Node, service: str | None, deadline: float) -> Iterator[Finding]:
    """Report the events, retries and dead letters that wait for a service, or for all services."""
    needs_names = service is None or any(map(is_pattern, node.subscriptions))

    try:
        with StreamAccess(node.config, name=CLIENT_NAME, deadline=deadline) as access:
            names = access.names() if needs_names else []
            read = names[: TIMING.max_names] if service is None else subscribed(node, names)
            of = None if service is None else (service,)
            statuses = read_statuses(access, dict.fromkeys(sorted(read), of))
            flood = too_many_names(access.keys.names, len(names))
    except OperationError as refusal:
        yield note(f"Could not check the lag, retries and dead letters of streams. {refusal!s}")
        return

    if flood is not None:
        yield error(flood.text, flood.remedy)

    yield from _alarms(statuses)

    for status in statuses:
        for group in status.groups:
            yield from _check_group(status.name, group, _program(node, group.service))


def _check_written(config: Config, names: Collection[str], deadline: float) -> Iterator[Finding]:
    """Report damage to streams that the service publishes to and does not read.

    :param names: the signals of those streams.
    """
    # A publisher needs no right to inspect its streams.
    with (
        suppress(OperationError),
        StreamAccess(config, name=CLIENT_NAME, deadline=deadline) as access,
    ):
        yield from _alarms(read_statuses(access, dict.fromkeys(names, ())))


def _alarms(statuses: Iterable[StreamStatus]) -> Iterator[Finding]:
    for status in statuses:
        for alarm in (*status.unreadable.values(), *status.alarms):
            yield error(alarm.text, alarm.remedy)


def _check_group(name: str, group: GroupStatus, program: str) -> Iterator[Finding]:
    if group.dead:
        yield note(
            f"{group.service!r} has {counted(group.dead, 'dead letter')} of {name!r}.",
            f"To list them: {program} dead list --signal {name}",
        )

    if group.retries:
        yield note(
            f"{group.service!r} retries {counted(group.retries, 'failed receiver')} of {name!r}.",
            f"To follow them: {program} status",
        )

    if group.lag:
        yield note(
            f"{group.service!r} has yet to read {counted(group.lag, 'event')} of {name!r}.",
            f"To see whether the lag falls: {program} status --watch",
        )


def shown(names: Collection[str]) -> str:
    """Return the names, at most :data:`NAMES_SHOWN`, and the number of those left out."""
    more = len(names) - NAMES_SHOWN
    first = listed(sorted(names)[:NAMES_SHOWN])
    return f"{first} and {more} more" if more > 0 else first
