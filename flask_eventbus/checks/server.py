"""What a server says of itself, and what it lets a service do."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import redis

from ..admin.overview import Overview, heard
from ..admin.server import PATIENCE, Server, processes_of, reason_of
from ..admin.status import GroupStatus, read_statuses
from ..admin.streams import StreamAccess
from ..channels.reader import ChannelReader
from ..config import Config
from ..errors import ConfigError, OperationError
from ..node import Node
from ..publisher.writer import BATCH_BYTES
from ..routing.options import is_pattern
from ..streams.alarms import MOST_NAMES, too_many_names
from ..text import counted
from ..transport.connections import OUTAGE, Connections
from ..transport.keys import ChannelKeys, StreamKeys
from ..transport.urls import AdvisedError, without_secrets
from .acl import check_access, check_stream_rights
from .findings import Finding, error, note, ok, warning

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

    deadline = time.monotonic() + PATIENCE
    connections = Connections(config.url, name=CLIENT_NAME, deadline=deadline)

    try:
        with Server(connections) as server:
            yield ok(f"The server at {connections.shown} answers.")
            streams = _streams(server, node, service)
            yield from _check_role(connections)
            yield from check_access(config.url, deadline)
            yield from _check_facts(server, node, service, streams)

        yield from _check_publishing(connections, node)
        yield from _check_subscribing(connections, node)
        yield from _check_streams(connections, node, service, streams)
    except OUTAGE as failure:
        yield _unreachable(connections, failure)
    except ConfigError as failure:
        yield error(str(failure), "Correct 'EVENTBUS_URL'.")


def _unreachable(connections: Connections, failure: Exception) -> Finding:
    told = f"The server at {connections.shown} cannot be used"
    text = f"{told}: {reason_of(failure)}."

    if isinstance(failure, AdvisedError):
        return error(f"{told}: {failure.reason}.", failure.advice)

    if isinstance(failure, redis.AuthenticationError):
        return error(text, "Correct the user and the password in 'EVENTBUS_URL'.")

    if isinstance(failure, redis.TimeoutError | TimeoutError):
        return error(text, "See whether it hangs, or whether a firewall keeps it from answering.")

    return error(text, "Start it there, or correct 'EVENTBUS_URL'.")


def _check_role(connections: Connections) -> Iterator[Finding]:
    refusal = connections.role.refusal

    if refusal is not None:
        yield warning(
            f"It does not answer ROLE: {reason_of(refusal)}. A master that becomes a replica is "
            "noticed only when it refuses a write.",
            "Grant the user in the ACL: '+role'.",
        )


def _streams(server: Server, node: Node, service: str | None) -> set[str]:
    """The signals whose streams are used: by the service, or by anybody."""
    overview = Overview(node)

    if not overview.has_streams:
        return set()

    if service is not None:
        read = {found.name for found in overview.subscriptions if overview.reads_stream(found)}
        return read | set(overview.published_names(via="stream"))

    try:
        return set(server.streams(StreamKeys(node.config.prefix)))
    except redis.ResponseError:
        # What is found then is no more than a warning.
        return set()


def _check_facts(
    server: Server, node: Node, service: str | None, streams: set[str]
) -> Iterator[Finding]:
    config = node.config
    checks: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
        ("its version", "+info", lambda: check_version(server)),
        ("whether it evicts keys", "+info", lambda: check_eviction(server, streams)),
        ("its clock", "+time", lambda: check_clock(server)),
        ("how far behind a listener may be", "+config|get", lambda: check_buffer(server, config)),
        ("how large an event may be", "+config|get", lambda: check_argument(server, config)),
        ("who listens", "+client|list", lambda: check_listeners(server, node, service)),
    ]

    if streams and not config.url.startswith("embedded://"):
        kept = ("what it keeps on disk", "+info +config|get")
        checks.append((*kept, lambda: check_persistence(server, streams)))
        keys = StreamKeys(config.prefix)
        reads = ("what it reads of that when it starts", "+info +acl|dryrun")
        checks.append((*reads, lambda: check_log_reader(server, keys, streams)))

    if streams:
        checks.append(("whether it is a cluster", "+info", lambda: check_cluster(server, streams)))

    refused: dict[str, list[tuple[str, str]]] = {}

    for what, grant, look in checks:
        try:
            yield from look()
        except redis.ResponseError as refusal:
            refused.setdefault(reason_of(refusal), []).append((what, grant))

    for reason, asked in refused.items():
        grants = dict.fromkeys(" ".join(grant for _, grant in asked).split())
        yield note(
            f"This user may not ask {', '.join(what for what, _ in asked)}: {reason}.",
            f"To have it checked, allow '{' '.join(grants)}' in the ACL, or check as another user.",
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


def check_argument(server: Server, config: Config) -> Iterator[Finding]:
    """Whether the server takes events of the largest size, a few of which may share a message.

    :raises redis.ResponseError: this user may not ask.
    """
    most = int(server.setting("proto-max-bulk-len") or 0)
    wanted = config.max_event_bytes + BATCH_BYTES

    if 0 < most < wanted:
        yield error(
            f"It takes {most:,} bytes at once ('proto-max-bulk-len'), and an event may have "
            f"{config.max_event_bytes:,} ('EVENTBUS_MAX_EVENT_BYTES'): it cuts off who sends one.",
            f"Set 'proto-max-bulk-len' to {wanted:,} or more, or 'EVENTBUS_MAX_EVENT_BYTES' lower.",
        )


def check_listeners(server: Server, node: Node, service: str | None) -> Iterator[Finding]:
    """How many processes of one service listen to channels.

    :raises redis.ResponseError: this user may not ask.
    """
    if service is not None and _wants_channels(node):
        return

    # Nobody knows here what the receivers of other services do.
    level = note if service is None else warning
    on_channels = [found for found in server.listening() if found.channels or found.patterns]

    for name, count in sorted(processes_of(on_channels).items()):
        if count > 1 and service in (None, name):
            yield level(
                f"{count} processes of {name!r} listen: each of them runs its receivers for "
                "every channel event.",
                "That is right for a cache in each process: say so with via='channel' in the "
                "subscription. Work to be done once travels by stream: via='stream'.",
            )


def _wants_channels(node: Node) -> bool:
    """Return True if every subscription heard over a channel says that it is to be."""
    return all(found.via is not None for found in node.subscriptions.values())


def _check_publishing(connections: Connections, node: Node) -> Iterator[Finding]:
    """Ask for each channel inside a transaction that never ends: nothing is published."""
    names = Overview(node).published_names(via="channel")

    if not names:
        return

    with Server(connections) as server:
        try:
            server.ask("MULTI")
        except redis.ResponseError as refusal:
            yield note(
                "Whether this user may publish cannot be known without publishing: "
                f"{reason_of(refusal)}.",
                "To have it checked, allow '+multi' in the ACL.",
            )
            return

        refusals = list(_try_channels(server, node, names))

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
    names = sorted(name for name, found in node.subscriptions.items() if found.via != "stream")

    if not names:
        return

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

    yield from refusals or [ok(f"It lets this user hear {_listed(names)}.")]


def _check_streams(
    connections: Connections, node: Node, service: str | None, streams: set[str]
) -> Iterator[Finding]:
    """Look at what this user may do with streams, and at what waits in them."""
    overview = Overview(node)

    if not overview.has_streams:
        yield from _note_cluster(overview)
        return

    yield from check_stream_rights(lambda: Server(connections), node)

    if streams:
        patterns = service is None or any(map(is_pattern, node.subscriptions))
        yield from check_backlog(
            node.config,
            lambda access: _services(access, node, service),
            patterns=patterns,
            deadline=connections.deadline,
            program=_program(node.config) if service is None else "flask eventbus",
        )

    if service is not None:
        written = set(overview.published_names(via="stream")) - heard(node, ())
        yield from check_written(node.config, sorted(written), connections.deadline)


def _program(config: Config) -> str:
    """Return how the command is called for a service, where no app says which server it means."""
    given = Config(service=config.service)
    is_plain = without_secrets(config.url) == config.url
    words = ["eventbus"]

    if config.url != os.environ.get("EVENTBUS_URL", given.url):
        words += ["--url", shlex.quote(config.url) if is_plain else "URL"]
    if config.prefix != os.environ.get("EVENTBUS_PREFIX", given.prefix):
        words += ["--prefix", config.prefix]

    return " ".join(words).replace("{", "{{").replace("}", "}}") + " --service {}"


def _note_cluster(overview: Overview) -> Iterator[Finding]:
    names = [found.name for found in overview.subscriptions if found.via is None]

    if names:
        yield note(
            f"In a Redis Cluster there are no streams yet: {_listed(names)} "
            f"{'is' if len(names) == 1 else 'are'} heard over channels alone."
        )


def _services(
    access: StreamAccess, node: Node, service: str | None
) -> dict[str, Sequence[str] | None]:
    """The streams to look at, each with the services to look at: this one, or all."""
    if service is None:
        return dict.fromkeys(access.names()[:MOST_NAMES])

    needs_names = any(is_pattern(name) for name in node.subscriptions)
    return dict.fromkeys(sorted(heard(node, access.names() if needs_names else ())), (service,))


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


#: Names that a finding lists.
NAMES_SHOWN = 5


def check_eviction(server: Server, streams: Collection[str] = ()) -> Iterator[Finding]:
    """Whether the server may throw keys away, which streams cannot bear.

    :param streams: the signals whose streams are used here.
    :raises redis.ResponseError: this user may not ask.
    """
    policy = server.info("memory").get("maxmemory_policy", "noeviction")

    if policy == "noeviction":
        yield ok("It evicts no keys.")
        return

    text = f"It evicts keys when its memory is full ('maxmemory-policy {policy}')"

    if streams:
        yield error(
            f"{text}, and streams are keys: events of {listed(streams)}, their retries and dead "
            "letters would be lost without a word.",
            "Set 'maxmemory-policy noeviction', or have another Redis for the bus. What may be "
            "missed can be heard via 'channel'.",
        )
    else:
        yield warning(
            f"{text}. Channels hold no keys and are safe; streams are keys, and events in them "
            "would be lost.",
            "Set 'maxmemory-policy noeviction' before any route uses a stream.",
        )


def check_persistence(server: Server, streams: Collection[str]) -> Iterator[Finding]:
    """Whether what streams hold outlives the server's process.

    :raises redis.ResponseError: this user may not ask.
    """
    if server.info("persistence").get("aof_enabled") == "1":
        yield ok("It keeps streams in a log on disk.")
    elif server.setting("save"):
        yield note(
            "It keeps streams in snapshots: what came after the last of them is lost when it ends "
            "without a warning, confirmed events of streams included.",
            "Set 'appendonly yes': then it loses a second at most.",
        )
    else:
        yield warning(
            f"It keeps nothing on disk: when it ends, events of {listed(streams)} that wait in "
            "their streams are lost, with retries, dead letters and how far each service was.",
            "Set 'appendonly yes' and give it a volume.",
        )


def check_log_reader(
    server: Server, keys: StreamKeys, streams: Collection[str]
) -> Iterator[Finding]:
    """Whether Redis may run again, as its user ``default``, the transactions of its log.

    That user is asked for each command of a transaction while the log is read (redis#14541).

    :raises redis.ResponseError: this user may not ask.
    """
    if server.info("persistence").get("aof_enabled") != "1":
        return

    refused = [command for command in _transactions(keys) if not _may_default(server, command)]

    if refused:
        yield error(
            f"Its user 'default' may not use {refused[0][0]} at {refused[0][1]!r}, and Redis reads "
            "its log on disk as that user: it leaves out every transaction. Retries, dead letters "
            f"and acknowledgements of {listed(streams)} are lost when it restarts.",
            "Give 'default' all rights and let nobody in as it: "
            "'user default off resetpass ~* &* +@all'.",
        )


def _transactions(keys: StreamKeys) -> list[tuple[str, ...]]:
    """Commands of the transactions that note what became of an event."""
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

    # Redis 6.2 has no DRYRUN.
    found = server.ask("ACL", "GETUSER", "default")
    facts = dict(zip(found[::2], found[1::2], strict=True))
    return b"+@all" in facts[b"commands"].split() and b"*" in facts[b"keys"]


def check_cluster(server: Server, streams: Collection[str]) -> Iterator[Finding]:
    """Whether it is one server, as streams need, and no node of a cluster.

    :raises redis.ResponseError: this user may not ask.
    """
    if server.info("cluster").get("cluster_enabled") == "1":
        yield error(
            "It is a node of a Redis Cluster: the streams of other nodes cannot be reached, such "
            f"as perhaps those of {listed(streams)}.",
            "Use one Redis for streams, 'redis://' or 'redis+sentinel://', or channels with "
            "'redis+cluster://'.",
        )


def check_backlog(
    config: Config,
    services: Callable[[StreamAccess], Mapping[str, Sequence[str] | None]],
    *,
    patterns: bool,
    deadline: float,
    program: str,
) -> Iterator[Finding]:
    """What waits for services: events, retries and dead letters.

    :param services: for each signal the services to look at; ``None`` for all of them.
    :param program: how a command begins for whoever reads this; ``{}`` stands for the service.
    :param patterns: True if streams are found by their names, as those of patterns are.
    """
    try:
        with StreamAccess(config, name="eventbus-check", deadline=deadline) as access:
            statuses = read_statuses(access, services(access))
            flood = too_many_names(access.keys.names, len(access.names())) if patterns else None
    except OperationError as refusal:
        yield note(f"What waits in streams cannot be told. {refusal!s}")
        return

    for alarm in (flood, *(alarm for status in statuses for alarm in status.alarms)):
        if alarm is not None:
            yield error(alarm.text, alarm.remedy)

    for status in statuses:
        for group in status.groups:
            yield from _check_group(status.name, group, program.format(group.service))


def check_written(config: Config, names: Collection[str], deadline: float) -> Iterator[Finding]:
    """Whether somebody damaged streams that the service writes and does not read.

    :param names: the signals of those streams.
    """
    try:
        with StreamAccess(config, name="eventbus-check", deadline=deadline) as access:
            statuses = read_statuses(access, dict.fromkeys(names, ()))
    except OperationError:
        # Whoever writes a stream need not have the right to ask about it.
        return

    for status in statuses:
        for alarm in status.alarms:
            yield error(alarm.text, alarm.remedy)


def _check_group(name: str, group: GroupStatus, program: str) -> Iterator[Finding]:
    if group.dead:
        yield note(
            f"{group.service!r} has {counted(group.dead, 'dead letter')} of {name!r}.",
            f"Look at them: {program} dead list --signal {name}",
        )

    if group.retries:
        yield note(
            f"{group.service!r} is to try {counted(group.retries, 'failed receiver')} of {name!r} "
            "again.",
            f"See how that goes: {program} status",
        )

    if group.lag:
        yield note(
            f"{group.service!r} has yet to read {counted(group.lag, 'event')} of {name!r}.",
            f"See whether that becomes less: {program} status --watch",
        )


def listed(names: Collection[str]) -> str:
    """The names, or the first of them and how many there are."""
    shown = ", ".join(map(repr, sorted(names)[:NAMES_SHOWN]))
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
