"""Remove or rename a service: its groups, retries, dead letters and known ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import OperationError
from ..streams.group import LONG_IDLE, RELEASED
from ..text import counted
from ..transport.pipe import Command
from .status import GroupStatus, read_statuses
from .streams import StreamAccess

#: Seconds of idleness after which a consumer counts as gone; workers send a command at least
#: every 150 seconds.
GONE = 300.0

#: ``COUNT`` of each ``SCAN``.
SCAN = 1_000

#: Pending entries that are listed, and claimed, in one command.
PAGE = 100


@dataclass(frozen=True, slots=True)
class Holding:
    """What Redis has of a service for one signal."""

    name: str
    #: Its group, and the numbers of its retries and dead letters.
    status: GroupStatus
    #: The keys of its retries, dead letters and known ids.
    keys: Sequence[str]

    @property
    def running(self) -> list[str]:
        """Names of the consumers that were active in the last :data:`GONE` seconds."""
        consumers = self.status.consumers
        return [each.name for each in consumers if each.idle < GONE and each.name != RELEASED]


class Services:
    """Removes and renames services whose workers are stopped."""

    def __init__(self, access: StreamAccess) -> None:
        self._access = access

    def holdings(self, service: str) -> list[Holding]:
        """Return what Redis has of a service, signal by signal.

        :raises OperationError: Redis cannot be asked.
        """
        keys = self._keys_of(service)
        names = sorted({*self._access.names(), *keys})
        found = read_statuses(self._access, {name: [service] for name in names})
        return [
            Holding(status.name, group, sorted(keys.get(status.name, ())))
            for status in found
            for group in status.groups
        ]

    def known(self) -> list[str]:
        """Return the services that have a group at a stream.

        :raises OperationError: Redis cannot be asked.
        """
        groups = (self._access.groups_of(name) for name in self._access.names())
        return sorted({service for found in groups for service in found})

    def forget(self, service: str, holdings: Iterable[Holding]) -> None:
        """Remove the groups, retries and dead letters of a service.

        :raises OperationError: Redis cannot be asked, or refuses.
        """
        for holding in holdings:
            stream = self._access.keys.stream(holding.name)
            commands: list[Command] = [("DEL", key) for key in holding.keys]

            if holding.status.exists:
                commands.append(("XGROUP", "DESTROY", stream, service))

            self._access.together(commands)

        self._access.run([("DEL", self._access.keys.since(service))])

    def rename(self, old: str, new: str, holdings: Iterable[Holding]) -> None:
        """Rename a service, in one transaction for each signal.

        :raises OperationError: Redis cannot be asked, or refuses.
        """
        for holding in holdings:
            commands = list(self._move_group(holding.name, old, new))
            commands += [("RENAMENX", key, _renamed(key, old, new)) for key in holding.keys]
            self._access.together(commands)

        since = self._access.keys.since
        self._access.run([("RENAMENX", since(old), since(new))])

    def _move_group(self, name: str, old: str, new: str) -> Iterator[Command]:
        """Yield the commands that move a group, with its pending entries, to a new name."""
        stream = self._access.keys.stream(name)
        group = self._access.groups_of(name).get(old)

        if group is None:
            return

        read = group.get("entries-read")
        count: Command = () if read is None else ("ENTRIESREAD", read)
        yield ("XGROUP", "CREATE", stream, new, group["last-delivered-id"].decode(), *count)
        claim: Command = ("XCLAIM", stream, new, RELEASED, 0)

        for times, ids in self._pending(stream, old):
            yield (*claim, *ids, "IDLE", LONG_IDLE, "RETRYCOUNT", times, "FORCE", "JUSTID")

        yield ("XGROUP", "DESTROY", stream, old)

    def _pending(self, stream: str, service: str) -> Iterator[tuple[int, list[str]]]:
        """Yield delivery counts, each with a page of ids of pending entries that have it."""
        start = "-"

        while True:
            page = self._access.ask("XPENDING", stream, service, start, "+", PAGE) or []

            for times in sorted({each[3] for each in page}):
                yield times, [each[0].decode() for each in page if each[3] == times]

            if len(page) < PAGE:
                return

            start = f"({page[-1][0].decode()}"

    def _keys_of(self, service: str) -> dict[str, set[str]]:
        """Return the keys of a service, by signal: of retries, dead letters and known ids."""
        start = self._access.keys.stream("").removesuffix("}:stream")
        own = re.compile(
            rf"{re.escape(start)}([^}}]*)}}:(?:(?:retry|dead):{re.escape(service)}"
            rf"|dead:{re.escape(service)}:dropped|seen:{re.escape(service)}:(?:\d+|trimmed|tampered))"
        )
        found: dict[str, set[str]] = {}
        cursor = b"0"

        while True:
            pattern = f"{start}*}}:*:{service}*"
            cursor, keys = self._access.ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN)

            for key in (raw.decode(errors="replace") for raw in keys):
                if match := own.fullmatch(key):
                    found.setdefault(match[1], set()).add(key)

            if cursor == b"0":
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
