"""Move a service's consumer group to another place in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..codec.entry_ids import EntryId, entry_id, id_text
from ..errors import OperationError
from ..transport.pipe import Command
from .places import Place
from .streams import StreamAccess

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


class Seek:
    """Plans and makes the moves of one service."""

    def __init__(self, access: StreamAccess, service: str) -> None:
        self._access = access
        self._service = service

    def plan(self, name: str, place: Place | None) -> Move:
        """Return the move to a place, without making it.

        :param place: ``None`` for the end of the stream.
        :raises OperationError: there is no such group or place, or Redis cannot be asked.
        """
        group = self._access.groups_of(name).get(self._service)
        stream = self._access.stream_of(name)

        if group is None or not stream:
            raise OperationError(
                f"{self._service!r} has no group at the stream of {name!r}, so there is nothing to "
                "move. The service creates it when it first listens, at the place that 'start' of "
                "its subscription sets."
            )

        here, last = entry_id(group["last-delivered-id"]), entry_id(stream["last-generated-id"])
        target = last if place is None else _target(place, last, self._access.now())
        behind_here, behind_target = self._count(name, here, target, last)
        added = stream.get("entries-added")
        return Move(
            name=name,
            service=self._service,
            here=here,
            target=target,
            skipped=max(0, behind_here - behind_target),
            repeated=max(0, behind_target - behind_here),
            pending=group["pending"],
            entries_read=None if added is None else max(0, added - behind_target),
        )

    def make(self, move: Move) -> None:
        """Move the group, and delete its known ids, so that repeated events are not duplicates.

        A group that has passed the target meanwhile is not moved back.

        :raises OperationError: the group is gone, or Redis cannot be asked.
        """
        if move.target >= move.here and self._position(move.name) >= move.target:
            return

        key = self._access.keys.stream(move.name)
        target: Command = ("XGROUP", "SETID", key, self._service, id_text(move.target))
        count = () if move.entries_read is None else ("ENTRIESREAD", move.entries_read)
        # Workers keep reading: events may be repeated even if the plan says none are.
        seen = list(self._seen(move.name))
        forget: list[Command] = [("DEL", *seen)] if seen else []
        answers = self._access.together([(*target, *count), *forget])

        if not answers or answers[0] is None:
            raise OperationError(
                f"The group of {self._service!r} at the stream of {move.name!r} no longer exists: "
                "nothing was moved."
            )

    def _position(self, name: str) -> EntryId:
        group = self._access.groups_of(name).get(self._service)
        return (0, 0) if group is None else entry_id(group["last-delivered-id"])

    def _count(self, name: str, here: EntryId, target: EntryId, last: EntryId) -> tuple[int, int]:
        """Return the number of entries after ``here`` and after ``target``."""
        first = min(here, target)
        key = self._access.keys.stream(name)
        ids = list(self._access.ids(key, first, last))
        return sum(found > here for found in ids), sum(found > target for found in ids)

    def _seen(self, name: str) -> Iterator[bytes]:
        """Yield the keys that hold the ids of events which the service got lately."""
        pattern = self._access.keys.seen(name, self._service, 0).removesuffix("0") + "*"
        cursor = b"0"

        while True:
            cursor, found = self._access.ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN)
            yield from found

            if cursor == b"0":
                return


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
