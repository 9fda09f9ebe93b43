"""Whether a server keeps what streams hold, and what waits in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import click

from .config import Config
from .findings import Finding, error, note, ok, warning
from .server import Server
from .stream_access import StreamAccess
from .stream_status import GroupStatus, read_statuses
from .tables import counted

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
    config: Config, services: Callable[[StreamAccess], Mapping[str, Sequence[str] | None]]
) -> Iterator[Finding]:
    """What waits for services: events, retries and dead letters.

    :param services: for each signal the services to look at; ``None`` for all of them.
    """
    try:
        with StreamAccess(config, name="eventbus-check") as access:
            statuses = read_statuses(access, services(access))
    except click.ClickException as refusal:
        yield note(f"What waits in streams cannot be told. {refusal.message}")
        return

    for status in statuses:
        for group in status.groups:
            yield from _check_group(status.name, group)


def _check_group(name: str, group: GroupStatus) -> Iterator[Finding]:
    if group.dead:
        yield note(
            f"{group.service!r} has {counted(group.dead, 'dead letter')} of {name!r}.",
            f"Look at them: flask eventbus dead list --signal {name}",
        )

    if group.retries:
        yield note(
            f"{group.service!r} is to try {counted(group.retries, 'failed receiver')} of {name!r} "
            "again.",
            "See how that goes: flask eventbus status",
        )

    if group.lag:
        yield note(
            f"{group.service!r} has yet to read {counted(group.lag, 'event')} of {name!r}.",
            "See whether that becomes less: flask eventbus status --watch",
        )


def listed(names: Collection[str]) -> str:
    """The names, or the first of them and how many there are."""
    shown = ", ".join(map(repr, sorted(names)[:MOST_NAMES]))
    more = len(names) - MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
