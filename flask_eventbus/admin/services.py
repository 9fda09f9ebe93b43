"""Move a service in a stream, and remove or rename it: its groups, retries and dead letters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..codec.records import EntryId, entry_id, id_text
from ..errors import OperationError
from ..streams.alarms import Alarm
from ..streams.group import LONG_IDLE, RELEASED
from ..text import counted
from ..transport.pipe import SAMPLE, Command
from .status import GroupStatus, read_statuses
from .streams import PAGE, Place, StreamAccess

#: Seconds of idleness after which a consumer counts as gone; workers send a command at least
#: every 150 seconds.
GONE = 300.0

#: ``COUNT`` of each ``SCAN``.
SCAN = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A planned move of a group, and its effect on events."""

    name: str
    service: str
    here: EntryId
    target: EntryId
    #: Events that no worker will ever get.
    skipped: int
    #: Events that workers get again.
    repeated: int
    #: Events that workers have read and not acknowledged; the move leaves them as they are.
    pending: int
    #: Number of entries before the target; ``None`` if the server does not count entries.
    entries_read: int | None


def plan_move(access: StreamAccess, service: str, name: str, place: Place | None) -> Move:
    """Return the move of a service to a place in a stream, without making it.

    :param place: ``None`` for the end of the stream.
    :raises OperationError: there is no such group or place, or Redis cannot be asked.
    """
    group = access.groups_of(name).get(service)
    stream = access.stream_of(name)

    if group is None or not stream:
        raise OperationError(
            f"{service!r} has no group at the stream of {name!r}, so there is nothing to move. The "
            "service creates it when it first listens, at the place that 'start' of its "
            "subscription sets."
        )

    here, last = entry_id(group["last-delivered-id"]), entry_id(stream["last-generated-id"])
    target = last if place is None else _target(place, last, access.now())
    pages = access.pages(access.keys.stream(name), min(here, target), last, most=SAMPLE)
    ids = [found for page in pages for found, _ in page]
    behind_here, behind_target = (sum(found > each for found in ids) for each in (here, target))
    added = stream.get("entries-added")
    return Move(
        name=name,
        service=service,
        here=here,
        target=target,
        skipped=max(0, behind_here - behind_target),
        repeated=max(0, behind_target - behind_here),
        pending=group["pending"],
        entries_read=None if added is None else max(0, added - behind_target),
    )


def make_move(access: StreamAccess, move: Move) -> None:
    """Move the group, and delete its known ids, so that repeated events are not duplicates.

    A group that has passed the target meanwhile is not moved back.

    :raises OperationError: the group is gone, or Redis cannot be asked.
    """
    group = access.groups_of(move.name).get(move.service)

    if group and move.here <= move.target <= entry_id(group["last-delivered-id"]):
        return

    key = access.keys.stream(move.name)
    target: Command = ("XGROUP", "SETID", key, move.service, id_text(move.target))
    count = () if move.entries_read is None else ("ENTRIESREAD", move.entries_read)
    # Workers keep reading: events may be repeated even if the plan says none are.
    pattern = access.keys.seen(move.name, move.service, 0).removesuffix("0") + "*"
    seen = list(_scan(access, pattern))
    forget: list[Command] = [("DEL", *seen)] if seen else []
    answers = access.together([(*target, *count), *forget])

    if not answers or answers[0] is None:
        raise OperationError(
            f"The group of {move.service!r} at the stream of {move.name!r} no longer exists: "
            "nothing was moved."
        )


def _target(place: Place, last: EntryId, now: int) -> EntryId:
    place = place.at(now)
    target = place.position
    is_past = place.is_moment and target[0] < now

    if target <= last or is_past:
        return min(target, last)

    raise OperationError(
        f"{id_text(place.first)} is after the last event, {id_text(last)}: the service would get "
        "no event with a lower id. To skip all events so far, pass: --to new"
    )


def _scan(access: StreamAccess, pattern: str) -> Iterator[bytes]:
    """Yield the keys that match a pattern."""
    cursor = b"0"

    while True:
        cursor, found = access.ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN)
        yield from found

        if cursor == b"0":
            return


@dataclass(frozen=True, slots=True)
class Holding:
    """The keys of a service for one signal."""

    name: str
    #: Its group, and the numbers of its retries and dead letters.
    status: GroupStatus
    #: The keys of its retries, dead letters and known ids.
    keys: Sequence[str]

    @property
    def running(self) -> list[str]:
        """Names of the consumers that were active in the last :data:`GONE` seconds."""
        consumers = self.status.consumers
        return [
            each.name for each in consumers if each.idle_seconds < GONE and each.name != RELEASED
        ]


def find_holdings(access: StreamAccess, service: str) -> tuple[list[Holding], dict[str, Alarm]]:
    """Return what Redis has of a service, signal by signal, and the keys that cannot be read.

    Another program stores a value of another type in these keys, which no holding includes.

    :raises OperationError: Redis cannot be asked.
    """
    keys = _keys_of(access, service)
    names = sorted({*access.names(), *keys})
    statuses = read_statuses(access, {name: [service] for name in names})
    unreadable = {key: each for status in statuses for key, each in status.unreadable.items()}
    holdings = [
        Holding(status.name, group, sorted(keys.get(status.name, set()) - unreadable.keys()))
        for status in statuses
        for group in status.groups
    ]
    return holdings, unreadable


def known_services(access: StreamAccess) -> list[str]:
    """Return the services that have a group at a stream.

    :raises OperationError: Redis cannot be asked.
    """
    groups = (access.groups_of(name, foreign={}) for name in access.names())
    return sorted({service for found in groups for service in found})


def forget(access: StreamAccess, service: str, holdings: Iterable[Holding]) -> None:
    """Remove the groups, retries and dead letters of a service.

    :raises OperationError: Redis cannot be asked, or refuses.
    """
    for holding in holdings:
        commands: list[Command] = [("DEL", key) for key in holding.keys]

        if holding.status.exists:
            commands.append(("XGROUP", "DESTROY", access.keys.stream(holding.name), service))

        access.together(commands)

    access.run([("DEL", access.keys.since(service))])


def rename(access: StreamAccess, old: str, new: str, holdings: Iterable[Holding]) -> None:
    """Rename a service, in one transaction for each signal.

    :raises OperationError: Redis cannot be asked, or refuses.
    """
    for holding in holdings:
        commands = list(_move_group(access, holding, old, new))
        commands += [("RENAMENX", key, _renamed(key, old, new)) for key in holding.keys]
        access.together(commands)

    access.run([("RENAMENX", access.keys.since(old), access.keys.since(new))])


def _move_group(access: StreamAccess, holding: Holding, old: str, new: str) -> Iterator[Command]:
    """Yield the commands that move a group, with its pending entries, to a new name."""
    stream = access.keys.stream(holding.name)
    group = access.groups_of(holding.name, foreign={}).get(old)

    if group is None:
        return

    read = group.get("entries-read")
    count: Command = () if read is None else ("ENTRIESREAD", read)
    yield ("XGROUP", "CREATE", stream, new, group["last-delivered-id"].decode(), *count)
    claim: Command = ("XCLAIM", stream, new, RELEASED, 0)

    for times, ids in _pending(access, stream, old):
        yield (*claim, *ids, "IDLE", LONG_IDLE, "RETRYCOUNT", times, "FORCE", "JUSTID")

    yield ("XGROUP", "DESTROY", stream, old)


def _pending(access: StreamAccess, stream: str, service: str) -> Iterator[tuple[int, list[str]]]:
    """Yield delivery counts, each with a page of ids of pending entries that have it."""
    start = "-"

    while True:
        page = access.ask("XPENDING", stream, service, start, "+", PAGE) or []

        for times in sorted({each[3] for each in page}):
            yield times, [each[0].decode() for each in page if each[3] == times]

        if len(page) < PAGE:
            return

        start = f"({page[-1][0].decode()}"


def _keys_of(access: StreamAccess, service: str) -> dict[str, set[str]]:
    """Return the keys of a service, by signal: of retries, dead letters and known ids."""
    start = access.keys.stream("").removesuffix("}:stream")
    own = re.compile(
        rf"{re.escape(start)}([^}}]*)}}:(?:(?:retry|dead):{re.escape(service)}"
        rf"|dead:{re.escape(service)}:dropped|seen:{re.escape(service)}:(?:\d+|trimmed|tampered))"
    )
    found: dict[str, set[str]] = {}

    for raw in _scan(access, f"{start}*}}:*:{service}*"):
        key = raw.decode(errors="replace")

        if match := own.fullmatch(key):
            found.setdefault(match[1], set()).add(key)

    return found


def refuse_running(service: str, holdings: Iterable[Holding]) -> None:
    """Raise if workers of a service run: they would create its groups again.

    :raises OperationError: a worker was active in the last :data:`GONE` seconds.
    """
    running = sorted({consumer for holding in holdings for consumer in holding.running})

    if running:
        raise OperationError(
            f"{counted(len(running), 'worker')} of {service!r} showed activity in the last "
            f"{GONE / 60:.0f} minutes: {', '.join(running[:5])}. Stop the workers of the service "
            "first. A worker that was killed counts as gone after that time."
        )


def _renamed(key: str, old: str, new: str) -> str:
    head, _, tail = key.rpartition("}:")
    kind, _, rest = tail.partition(":")
    return f"{head}}}:{kind}:{new}{rest.removeprefix(old)}"
