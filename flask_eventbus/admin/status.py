"""Read the status of streams and their groups from Redis."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..codec.records import EntryId, entry_id
from ..streams.alarms import Alarm, far_ahead, foreign_consumers, past_the_end, worker_of
from ..streams.group import RELEASED
from ..text import printable
from ..transport.pipe import CHUNK, Command
from .streams import StreamAccess, as_texts, by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStatus:
    """One consumer of a group: a process that reads, or that did."""

    name: str
    #: Parts of the name; ``None`` if it is no worker of the bus.
    host: str | None
    pid: int | None
    node: str | None
    #: Seconds since it last asked for events.
    idle_seconds: float
    #: Entries that it has read and not acknowledged.
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """The status of a service at a stream."""

    service: str
    #: False if the service never listened, or the stream was deleted.
    exists: bool
    #: Events that no worker has read yet; ``None`` if Redis does not know.
    lag: int | None
    #: Events that were trimmed before any worker read them, as far as Redis knows.
    lost: int
    #: Events that workers have read and not acknowledged, and the age of the oldest in seconds.
    pending: int
    oldest_pending_seconds: float | None
    #: Retries that are scheduled, each of one receiver for one event.
    retries: int
    #: Dead letters.
    dead: int
    #: Dead letters that were dropped, because there were more than ``EVENTBUS_DEAD_MAXLEN``.
    dead_dropped: int
    consumers: Sequence[ConsumerStatus] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatus:
    """A signal's stream, with the services that are looked at."""

    name: str
    #: Events that it holds.
    length: int
    groups: Sequence[GroupStatus]
    #: What somebody did to it, or to these services' places in it.
    alarms: Sequence[Alarm] = ()
    #: Its keys that hold a value of another type, which another program has stored.
    unreadable: Mapping[str, Alarm] = field(default_factory=dict)


def read_statuses(
    access: StreamAccess, services: Mapping[str, Sequence[str] | None]
) -> list[StreamStatus]:
    """Return the status of streams, without those that do not exist.

    :param services: the services to read for each signal; ``None`` for all that have a group.
    :raises OperationError: Redis is not available.
    """
    foreign: dict[str, Alarm] = {}
    streams = _streams(access, services, foreign)
    groups = _groups(access, streams, services, foreign)
    noted = _noted(access, groups)
    return [
        StreamStatus(
            name=name,
            length=stream.length,
            groups=groups[name],
            alarms=[*_alarms(name, stream, groups[name]), *noted.get(name, ())],
            unreadable=unreadable,
        )
        for name, stream in streams.items()
        for unreadable in [_of_signal(access, name, foreign)]
        if stream.exists or groups[name] or unreadable
    ]


def excess_of(
    statuses: Sequence[StreamStatus], *, lag: int | None, dead: int | None
) -> Iterator[str]:
    """Yield a sentence for each limit, ``lag`` or ``dead``, that a service exceeds."""
    for status in statuses:
        if lag is not None or dead is not None:
            yield from (printable(str(alarm)) for alarm in status.unreadable.values())

        if lag is not None:
            yield from (printable(str(alarm)) for alarm in status.alarms)

        for group in status.groups:
            if lag is not None:
                yield from _excess_of_lag(status, group, lag)

            if dead is not None and group.dead > dead:
                place = _place(status, group)
                yield f"The dead letters {place} are {group.dead}, more than {dead}."

            if dead is not None and group.dead_dropped:
                yield dropped_of(status.name, group)


def loss_of(name: str, group: GroupStatus) -> str:
    """Return the sentence that a service lost events by trimming."""
    service = printable(group.service)
    return f"{group.lost} events of {name!r} were trimmed before '{service}' got them."


def dropped_of(name: str, group: GroupStatus) -> str:
    """Return the sentence that dead letters of a service were dropped."""
    return (
        f"{group.dead_dropped} dead letters of '{printable(group.service)}' at {name!r} were "
        "dropped: there were more than EVENTBUS_DEAD_MAXLEN allows."
    )


def _excess_of_lag(status: StreamStatus, group: GroupStatus, most: int) -> Iterator[str]:
    if group.lost:
        yield loss_of(status.name, group)

    if not group.exists:
        yield (
            f"'{printable(group.service)}' has no group at {status.name!r}, so its lag is "
            "unknown. Start the service; if it runs, check whether Redis lost its data."
        )
    elif group.lag is not None and group.lag > most:
        yield f"The lag {_place(status, group)} is {group.lag}, more than {most}."
    elif group.lag is None and status.length > most + 1:
        # The group has read at least one entry, or its lag would be known.
        yield (
            f"Redis does not know the lag {_place(status, group)}; it may be up to "
            f"{status.length - 1}, more than {most}."
        )


def _place(status: StreamStatus, group: GroupStatus) -> str:
    return f"of '{printable(group.service)}' at {status.name!r}"


@dataclass(frozen=True, slots=True)
class _Stream:
    length: int
    #: The ids of its first entry and of its last.
    first: EntryId | None
    last: EntryId | None
    #: The last id that it gave to an entry.
    given: EntryId
    groups: Mapping[str, Mapping[str, Any]]
    exists: bool


def _streams(
    access: StreamAccess, names: Iterable[str], foreign: dict[str, Alarm]
) -> dict[str, _Stream]:
    commands = [
        ("XINFO", part, access.keys.stream(name)) for name in names for part in ("STREAM", "GROUPS")
    ]
    answers = iter(access.run(commands, most=CHUNK, foreign=foreign))
    return {
        name: _Stream(
            found.get("length", 0),
            _id_in(found.get("first-entry")),
            _id_in(found.get("last-entry")),
            entry_id(found.get("last-generated-id", b"0-0")),
            by_name(groups),
            groups is not None,
        )
        for name, stream, groups in zip(names, answers, answers, strict=True)
        for found in [as_texts(stream or ())]
    }


def _of_signal(access: StreamAccess, name: str, foreign: Mapping[str, Alarm]) -> dict[str, Alarm]:
    start = access.keys.stream(name).removesuffix("stream")
    return {key: alarm for key, alarm in foreign.items() if key.startswith(start)}


def _noted(
    access: StreamAccess, groups: Mapping[str, Sequence[GroupStatus]]
) -> dict[str, list[Alarm]]:
    """Return the alarms that workers raised in the last day, as far as this user may read them."""
    wanted = [(name, group.service) for name, found in groups.items() for group in found]
    answers = access.try_to_run(
        [("HMGET", access.keys.tampered(name, service), "alarm") for name, service in wanted]
    )
    found: dict[str, list[Alarm]] = {}

    for (name, _), answer in zip(wanted, answers, strict=True):
        if answer and answer[0]:
            found.setdefault(name, []).append(Alarm(answer[0].decode(errors="replace"), ""))

    return found


def _alarms(name: str, stream: _Stream, groups: Sequence[GroupStatus]) -> Iterator[Alarm]:
    now = time.time()

    if (ahead := far_ahead(name, stream.given, now)) is not None:
        yield ahead

    for status in groups:
        service = status.service
        consumers = [found.name for found in status.consumers if found.name != RELEASED]

        if (foreign := foreign_consumers(name, service, consumers)) is not None:
            yield foreign

        if (group := stream.groups.get(service)) is None:
            continue

        delivered = entry_id(group["last-delivered-id"])

        if (alarm := past_the_end(name, service, delivered, stream.given, now)) is not None:
            yield alarm


def _groups(
    access: StreamAccess,
    streams: Mapping[str, _Stream],
    services: Mapping[str, Sequence[str] | None],
    foreign: dict[str, Alarm],
) -> dict[str, list[GroupStatus]]:
    """Return the services with a group, retries or dead letters, by the name of the stream."""
    wanted = [
        (name, service)
        for name, stream in streams.items()
        for service in (sorted(stream.groups) if services[name] is None else services[name] or ())
    ]
    commands = [command for each in wanted for command in _questions(access, *each)]
    answers = iter(access.run(commands, foreign=foreign))
    found: dict[str, list[GroupStatus]] = {name: [] for name in streams}

    for (name, service), (retries, dead, dropped, pending, consumers) in zip(
        wanted, zip(*[answers] * 5, strict=True), strict=True
    ):
        stream = streams[name]
        group = stream.groups.get(service)
        status = GroupStatus(
            service=service,
            exists=group is not None,
            lag=lag_of(group, stream.length, stream.first, stream.last) if group else None,
            lost=lost_of(group, stream.length, stream.first) if group else 0,
            pending=group["pending"] if group else 0,
            oldest_pending_seconds=_age(pending),
            retries=retries or 0,
            dead=dead or 0,
            dead_dropped=_number_in(dropped),
            consumers=[consumer_of(*each) for each in sorted(by_name(consumers).items())],
        )
        is_foreign = access.keys.dead_dropped(name, service) in foreign

        # A key of another type has no number of retries or dead letters.
        if status.exists or retries != 0 or dead != 0 or status.dead_dropped or is_foreign:
            found[name].append(status)

    return found


def _questions(access: StreamAccess, name: str, service: str) -> list[Command]:
    keys = access.keys
    return [
        ("ZCARD", keys.retry(name, service)),
        ("XLEN", keys.dead(name, service)),
        ("GET", keys.dead_dropped(name, service)),
        ("XPENDING", keys.stream(name), service, "-", "+", 1),
        ("XINFO", "CONSUMERS", keys.stream(name), service),
    ]


def lag_of(
    group: Mapping[str, Any], length: int, first: EntryId | None, last: EntryId | None
) -> int | None:
    """Return the number of entries that a group has not read; ``None`` if it is unknown.

    Redis counts since 7.0 only, loses the count when an entry is deleted, and counts trimmed
    entries in some versions. At both ends of the stream the number is certain.

    :param group: what ``XINFO GROUPS`` says.
    :param first: the id of the first entry of the stream, if it has one.
    :param last: that of the last one.
    """
    position = entry_id(group["last-delivered-id"])

    if first is None or last is None or position >= last:
        return 0

    if position < first:
        return length

    counted: int | None = group.get("lag")
    # The group has read the first entry and not the last, so other numbers are wrong.
    return counted if counted is not None and 0 < counted < length else None


def lost_of(group: Mapping[str, Any], length: int, first: EntryId | None) -> int:
    """Return how many entries were trimmed before a group read them, as far as Redis knows.

    :param group: what ``XINFO GROUPS`` says.
    :param first: the id of the first entry of the stream, if it has one.
    """
    if first is not None and entry_id(group["last-delivered-id"]) >= first:
        return 0

    counted: int | None = group.get("lag")
    return max(0, (counted or 0) - length)


def consumer_of(name: str, facts: Mapping[str, Any]) -> ConsumerStatus:
    """Return a consumer from ``XINFO CONSUMERS``; workers are named ``HOST-PID-NODE``."""
    host, pid, node = worker_of(name) or (None, None, None)
    return ConsumerStatus(
        name=name,
        host=host,
        pid=pid,
        node=node,
        idle_seconds=facts["idle"] / 1000,
        pending=facts["pending"],
    )


def _number_in(text: bytes | None) -> int:
    # Another program may have written another value.
    return int(text) if text and text.isdigit() else 0


def _id_in(entry: Sequence[Any] | None) -> EntryId | None:
    return entry_id(entry[0]) if entry else None


def _age(pending: Sequence[Any] | None) -> float | None:
    """Return the age in seconds of the entry in the answer to ``XPENDING``."""
    # A clock that is ahead may have chosen the id.
    return max(0.0, time.time() - entry_id(pending[0][0])[0] / 1000) if pending else None
