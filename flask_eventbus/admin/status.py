"""Read the status of streams and their groups from Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..codec.records import EntryId, entry_id
from ..streams.alarms import Alarm, far_ahead, foreign_consumers, past_the_end, worker_of
from ..streams.group import RELEASED
from ..text import printable
from ..transport.pipe import CHUNK
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


def read_statuses(
    access: StreamAccess, services: Mapping[str, Sequence[str] | None]
) -> list[StreamStatus]:
    """Return the status of streams, without those that do not exist.

    :param services: the services to read for each signal; ``None`` for all that have a group.
    :raises OperationError: Redis is not available.
    """
    found = _streams(access, services)
    wanted = [
        (name, service)
        for name, stream in found.items()
        for service in (sorted(stream.groups) if services[name] is None else services[name] or ())
    ]
    groups: dict[str, list[GroupStatus]] = {name: [] for name in found}

    for name, group in _groups(access, found, wanted):
        if group.exists or group.retries or group.dead or group.dead_dropped:
            groups[name].append(group)

    noted = _noted(access, groups)
    return [
        StreamStatus(
            name=name,
            length=stream.length,
            groups=groups[name],
            alarms=[*_alarms(name, stream, groups[name]), *noted.get(name, ())],
        )
        for name, stream in found.items()
        if stream.exists or groups[name]
    ]


def excess_of(
    statuses: Sequence[StreamStatus], *, lag: int | None, dead: int | None
) -> Iterator[str]:
    """Yield a sentence for each limit, ``lag`` or ``dead``, that a service exceeds."""
    for status in statuses:
        if lag is not None:
            yield from (printable(str(alarm)) for alarm in status.alarms)

        for group in status.groups:
            place = f"of '{printable(group.service)}' at {status.name!r}"

            if lag is not None and group.lost:
                yield loss_of(status.name, group)

            if lag is not None and not group.exists:
                yield (
                    f"'{printable(group.service)}' has no group at {status.name!r}, so its lag is "
                    "unknown. Start the service; if it runs, check whether Redis lost its data."
                )

            if lag is not None and group.exists:
                yield from _excess_of_lag(group.lag, status.length, place, lag)

            if dead is not None and group.dead > dead:
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


def _excess_of_lag(lag: int | None, length: int, place: str, most: int) -> Iterator[str]:
    if lag is not None and lag > most:
        yield f"The lag {place} is {lag}, more than {most}."
    elif lag is None and length > most + 1:
        # The group has read at least one entry, or its lag would be known.
        yield (
            f"Redis does not know the lag {place}; it may be up to {length - 1}, more than {most}."
        )


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


def _streams(access: StreamAccess, names: Mapping[str, Any]) -> dict[str, _Stream]:
    keys = [access.keys.stream(name) for name in names]
    answers = iter(
        access.run(
            [
                command
                for key in keys
                for command in (
                    ("XLEN", key),
                    ("XRANGE", key, "-", "+", "COUNT", 1),
                    ("XREVRANGE", key, "+", "-", "COUNT", 1),
                    ("XINFO", "STREAM", key),
                    ("XINFO", "GROUPS", key),
                )
            ],
            most=CHUNK,
        )
    )
    return {
        name: _Stream(
            length,
            _id_in(first),
            _id_in(last),
            entry_id(as_texts(stream or ()).get("last-generated-id", b"0-0")),
            by_name(groups),
            groups is not None,
        )
        for name, (length, first, last, stream, groups) in zip(
            names, zip(*[answers] * 5, strict=True), strict=True
        )
    }


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
    access: StreamAccess, streams: Mapping[str, _Stream], wanted: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, GroupStatus]]:
    answers = iter(
        access.run([command for each in wanted for command in _questions(access, streams, *each)])
    )

    for name, service in wanted:
        stream = streams[name]
        group = stream.groups.get(service)
        status = GroupStatus(
            service=service,
            exists=group is not None,
            lag=None,
            lost=0,
            pending=0,
            oldest_pending_seconds=None,
            retries=next(answers),
            dead=next(answers),
            dead_dropped=_number_in(next(answers)),
        )

        if group is not None:
            status = replace(
                status,
                lag=lag_of(group, stream.length, stream.first, stream.last),
                lost=lost_of(group, stream.length, stream.first),
                pending=group["pending"],
                oldest_pending_seconds=_age(next(answers)),
                consumers=[
                    consumer_of(consumer, facts)
                    for consumer, facts in sorted(by_name(next(answers)).items())
                ],
            )

        yield name, status


def _questions(
    access: StreamAccess, streams: Mapping[str, _Stream], name: str, service: str
) -> Iterator[tuple[str | int, ...]]:
    key = access.keys.stream(name)
    yield "ZCARD", access.keys.retry(name, service)
    yield "XLEN", access.keys.dead(name, service)
    yield "GET", access.keys.dead_dropped(name, service)

    if service in streams[name].groups:
        yield "XPENDING", key, service, "-", "+", 1
        yield "XINFO", "CONSUMERS", key, service


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


def _id_in(entries: Sequence[Any]) -> EntryId | None:
    return entry_id(entries[0][0]) if entries else None


def _age(pending: Sequence[Any], *, clock: Callable[[], float] = time.time) -> float | None:
    oldest = _id_in(pending)
    # A clock that is ahead may have chosen the id.
    return None if oldest is None else max(0.0, clock() - oldest[0] / 1000)
