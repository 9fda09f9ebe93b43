"""What `status` shows to people, and what of it is more than was allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..admin.status import ConsumerStatus, GroupStatus, StreamStatus
from ..text import printable
from .tables import fitted_table, span

_GROUPS = ("Stream", "Events", "Service", "Lag", "Pending", "Oldest", "Retries", "Dead")
_CONSUMERS = ("Service", "Stream", "Host", "Pid", "Node", "Pending", "Idle")


def status_report(statuses: Sequence[StreamStatus]) -> Iterator[str]:
    """The lines of `status`: one for each service at a stream, then one for each consumer."""
    rows = [row for status in statuses for row in _group_rows(status)]
    yield from fitted_table(_GROUPS, rows, names=(0, 2))

    for status in statuses:
        for alarm in status.alarms:
            yield ""
            yield printable(str(alarm))

        for group in status.groups:
            if group.lost:
                yield ""
                yield _loss_of(status.name, group)

            if group.dead_dropped:
                yield ""
                yield _dropped_of(status.name, group)

    rows = [
        _consumer_row(status.name, group.service, consumer)
        for status in statuses
        for group in status.groups
        for consumer in group.consumers
    ]

    if rows:
        yield ""
        yield from fitted_table(_CONSUMERS, rows, names=(0, 1, 2, 4))


def as_json(statuses: Sequence[StreamStatus], excess: Sequence[str]) -> dict[str, Any]:
    """All of it, of plain values; what cannot be known is ``None``."""
    return {
        "streams": [
            {
                "name": status.name,
                "length": status.length,
                "groups": [_group_as_json(group) for group in status.groups],
                "alarms": list(map(str, status.alarms)),
            }
            for status in statuses
        ],
        "exceeded": list(excess),
    }


def excess_of(
    statuses: Sequence[StreamStatus], *, lag: int | None, dead: int | None
) -> Iterator[str]:
    """A sentence for each thing that there is more of than ``lag`` and ``dead`` allow."""
    for status in statuses:
        if lag is not None:
            yield from (printable(str(alarm)) for alarm in status.alarms)

        for group in status.groups:
            place = f"of '{printable(group.service)}' at {status.name!r}"

            if lag is not None and group.lost:
                yield _loss_of(status.name, group)

            if lag is not None and not group.exists:
                yield (
                    f"'{printable(group.service)}' has no group at {status.name!r}, so its lag is "
                    "not known: start it, or see what happened to Redis."
                )

            if lag is not None and group.exists:
                yield from _excess_of_lag(group.lag, status.length, place, lag)

            if dead is not None and group.dead > dead:
                yield f"The dead letters {place} are {group.dead}, more than {dead}."

            if dead is not None and group.dead_dropped:
                yield _dropped_of(status.name, group)


def _loss_of(name: str, group: GroupStatus) -> str:
    service = printable(group.service)
    return f"{group.lost} events of {name!r} were trimmed before '{service}' got them."


def _dropped_of(name: str, group: GroupStatus) -> str:
    return (
        f"{group.dead_dropped} dead letters of '{printable(group.service)}' at {name!r} were "
        "dropped: there were more than EVENTBUS_DEAD_MAXLEN."
    )


def _excess_of_lag(lag: int | None, length: int, place: str, most: int) -> Iterator[str]:
    if lag is not None and lag > most:
        yield f"The lag {place} is {lag}, more than {most}."
    elif lag is None and length > most + 1:
        # The group has got one entry at least, or the lag would be known.
        yield (
            f"The lag {place} is not known to this server, and may be up to {length - 1}, more "
            f"than {most}."
        )


def _group_rows(status: StreamStatus) -> Iterator[tuple[str, ...]]:
    name, length = status.name, f"{status.length}"

    for group in status.groups:
        yield name, length, printable(group.service), *_numbers(group)
        # Said once: the eye finds the streams.
        name = length = ""

    if not status.groups:
        yield name, length, *("-" for _ in _GROUPS[2:])


def _numbers(group: GroupStatus) -> tuple[str, ...]:
    lag = "?" if group.lag is None else f"{group.lag}"
    read = (lag, f"{group.pending}", span(group.oldest)) if group.exists else ("-", "-", "-")
    return *read, f"{group.retries}", f"{group.dead}"


def _consumer_row(name: str, service: str, consumer: ConsumerStatus) -> tuple[str, ...]:
    return (
        printable(service),
        name,
        printable(consumer.host or consumer.name),
        "-" if consumer.pid is None else f"{consumer.pid}",
        printable(consumer.node) or "-",
        f"{consumer.pending}",
        span(consumer.idle),
    )


def _group_as_json(group: GroupStatus) -> dict[str, Any]:
    return {
        "service": group.service,
        "exists": group.exists,
        "lag": group.lag,
        "lost": group.lost,
        "pending": group.pending,
        "oldest_pending_seconds": group.oldest,
        "retries": group.retries,
        "dead": group.dead,
        "dead_dropped": group.dead_dropped,
        "consumers": [
            {
                "name": consumer.name,
                "host": consumer.host or None,
                "pid": consumer.pid,
                "node": consumer.node or None,
                "idle_seconds": consumer.idle,
                "pending": consumer.pending,
            }
            for consumer in group.consumers
        ],
    }
