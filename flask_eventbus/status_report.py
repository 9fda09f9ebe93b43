"""What `status` shows to people, and what of it is more than was allowed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .rendering import printable, table
from .stream_status import ConsumerStatus, GroupStatus, StreamStatus

#: The fewest characters that a name is cut to, for a table to fit a terminal.
LEAST_OF_A_NAME = 12

_GROUPS = ("Stream", "Events", "Service", "Lag", "Pending", "Oldest", "Retries", "Dead")
_CONSUMERS = ("Service", "Stream", "Host", "Pid", "Node", "Pending", "Idle")


def status_report(statuses: Sequence[StreamStatus]) -> Iterator[str]:
    """The lines of `status`: one for each service at a stream, then one for each consumer."""
    rows = [row for status in statuses for row in _group_rows(status)]
    yield from _section(_GROUPS, rows, names=(0, 2))
    rows = [
        _consumer_row(status.name, group.service, consumer)
        for status in statuses
        for group in status.groups
        for consumer in group.consumers
    ]

    if rows:
        yield ""
        yield from _section(_CONSUMERS, rows, names=(0, 1, 2, 4))


def as_json(statuses: Sequence[StreamStatus], excess: Sequence[str]) -> dict[str, Any]:
    """All of it, of plain values; what cannot be known is ``None``."""
    return {
        "streams": [
            {
                "name": status.name,
                "length": status.length,
                "groups": [_group_as_json(group) for group in status.groups],
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
        for group in status.groups:
            place = f"of '{printable(group.service)}' at {status.name!r}"

            if lag is not None and group.exists:
                yield from _excess_of_lag(group.lag, status.length, place, lag)

            if dead is not None and group.dead > dead:
                yield f"The dead letters {place} are {group.dead}, more than {dead}."


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
    read = (lag, f"{group.pending}", _span(group.oldest)) if group.exists else ("-", "-", "-")
    return *read, f"{group.retries}", f"{group.dead}"


def _consumer_row(name: str, service: str, consumer: ConsumerStatus) -> tuple[str, ...]:
    return (
        printable(service),
        name,
        printable(consumer.host or consumer.name),
        "-" if consumer.pid is None else f"{consumer.pid}",
        printable(consumer.node) or "-",
        f"{consumer.pending}",
        _span(consumer.idle),
    )


def _group_as_json(group: GroupStatus) -> dict[str, Any]:
    return {
        "service": group.service,
        "exists": group.exists,
        "lag": group.lag,
        "pending": group.pending,
        "oldest_pending_seconds": group.oldest,
        "retries": group.retries,
        "dead": group.dead,
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


def _section(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, names: Sequence[int]
) -> Iterator[str]:
    if sys.stdout.isatty():
        rows = _fitted(heads, rows, names, shutil.get_terminal_size().columns)

    heads, *rows = _aligned([heads, *rows], names)
    head, *lines = table(heads, rows)
    yield click.style(head, bold=True)
    yield from lines


def _aligned(lines: Sequence[Sequence[str]], names: Sequence[int]) -> list[list[str]]:
    """Lines whose numbers stand with their last digits one under the other."""
    widths = _widths(lines)
    return [
        [
            cell if column in names else cell.rjust(widths[column])
            for column, cell in enumerate(line)
        ]
        for line in lines
    ]


def _fitted(
    heads: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[int], most: int
) -> list[list[str]]:
    """Rows whose names are cut, the longest first, until the table fits a terminal."""
    widths = _widths([heads, *rows])

    while sum(widths) + 2 * (len(widths) - 1) > most:
        longest = max(names, key=widths.__getitem__)

        if widths[longest] <= LEAST_OF_A_NAME:
            break

        widths[longest] -= 1

    return [[_cut(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _span(seconds: float | None) -> str:
    """A time as it is said: in the largest unit of which there are two."""
    if seconds is None:
        return "-"

    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"

    return f"{seconds:.0f} s"
