"""Whether a server keeps what streams hold, and what waits in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import redis

from ..admin.server import Server
from ..admin.status import GroupStatus, read_statuses
from ..admin.streams import StreamAccess
from ..config import Config
from ..errors import OperationError
from ..streams.alarms import too_many_names
from ..text import counted
from ..transport.keys import StreamKeys
from .findings import Finding, error, note, ok, warning

#: Names that a finding lists.
MOST_NAMES = 5


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
    shown = ", ".join(map(repr, sorted(names)[:MOST_NAMES]))
    more = len(names) - MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
