"""The command ``status``, and ``services forget`` and ``services rename``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import click

from ..admin.overview import published, subscribed
from ..admin.server import PATIENCE
from ..admin.services import Holding, find_holdings, known_services, refuse_running
from ..admin.services import forget as forget_service
from ..admin.services import rename as rename_service
from ..admin.status import (
    ConsumerStatus,
    GroupStatus,
    StreamStatus,
    dropped_of,
    excess_of,
    loss_of,
    read_statuses,
)
from ..admin.streams import StreamAccess
from ..config import SERVICE_NAME, TIMING
from ..errors import OperationError
from ..streams.alarms import Alarm, too_many_names
from ..text import printable
from .base import (
    Command,
    Group,
    Program,
    confirm,
    json_option,
    parsed,
    pass_program,
    reader_is_gone,
    yes_option,
)
from .output import span, table, to_json

_GROUPS = ("Stream", "Events", "Service", "Lag", "Pending", "Oldest", "Retries", "Dead")
_HOLDINGS = ("Stream", "Group", "Lag", "Pending", "Retries", "Dead")
_CONSUMERS = ("Service", "Stream", "Host", "Pid", "Node", "Pending", "Idle")


def status_report(statuses: Sequence[StreamStatus]) -> Iterator[str]:
    """Yield the lines of `status`: one per service of each stream, then one per consumer."""
    rows = [row for status in statuses for row in _group_rows(status)]
    yield from table(_GROUPS, rows, names=(0, 2))

    for status in statuses:
        for alarm in (*status.unreadable.values(), *status.alarms):
            yield ""
            yield printable(str(alarm))

        for group in status.groups:
            if group.lost:
                yield ""
                yield loss_of(status.name, group)

            if group.dead_dropped:
                yield ""
                yield dropped_of(status.name, group)

    rows = [
        _consumer_row(status.name, group.service, consumer)
        for status in statuses
        for group in status.groups
        for consumer in group.consumers
    ]

    if rows:
        yield ""
        yield from table(_CONSUMERS, rows, names=(0, 1, 2, 4))


def as_json(statuses: Sequence[StreamStatus], excess: Sequence[str]) -> dict[str, Any]:
    """Return the statuses as plain values; ``None`` stands for an unknown value."""
    streams = [
        {
            **asdict(status),
            "alarms": [*map(str, status.alarms)],
            "unreadable": [*map(str, status.unreadable.values())],
        }
        for status in statuses
    ]
    return {"streams": streams, "exceeded": excess}


def _group_rows(status: StreamStatus) -> Iterator[tuple[str, ...]]:
    name, length = status.name, f"{status.length}"

    for group in status.groups:
        yield name, length, printable(group.service), *_numbers(group)
        # Show the stream once, on its first line.
        name = length = ""

    if not status.groups:
        yield name, length, *("-" for _ in _GROUPS[2:])


def _numbers(group: GroupStatus) -> tuple[str, ...]:
    kept = f"{group.retries}", f"{group.dead}"

    if not group.exists:
        return "-", "-", "-", *kept

    lag = "?" if group.lag is None else f"{group.lag}"
    return lag, f"{group.pending}", span(group.oldest_pending_seconds), *kept


def _consumer_row(name: str, service: str, consumer: ConsumerStatus) -> tuple[str, ...]:
    return (
        printable(service),
        name,
        printable(consumer.host or consumer.name),
        "-" if consumer.pid is None else f"{consumer.pid}",
        printable(consumer.node or "-"),
        f"{consumer.pending}",
        span(consumer.idle_seconds),
    )


@click.command(
    cls=Command,
    short_help="Show lag, pending events, retries and dead letters.",
    epilog="""Lag: events that no worker has read yet; '?' if Redis does not know. Pending: events
    that were read and not acknowledged. Oldest: the age of the oldest of these. Retries:
    receivers that will run again. Dead: dead letters.

    Examples:

    \b
      flask eventbus status
      flask eventbus status --all --watch
      flask eventbus status --max-lag 1000 --max-dead 0
      flask eventbus status --json | jq '.streams[].groups[].lag'
      python -m flask_eventbus --service mailer status

    Exit codes: 0 if shown, and after Ctrl-C; 1 if --max-lag or --max-dead is exceeded, or
    Redis is not available; 2 for a wrong argument.""",
)
@click.option(
    "--all",
    "of_all",
    is_flag=True,
    help="Show every stream, and every service that has a group there.",
)
@click.option("--watch", is_flag=True, help="Repeat until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3_600),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Seconds between updates with --watch.",
)
@json_option("Print one JSON object; one per line with --watch.")
@click.option(
    "--max-lag",
    type=click.IntRange(min=0),
    metavar="N",
    help="Exit with 1 if the lag of a service at a stream is larger.",
)
@click.option(
    "--max-dead",
    type=click.IntRange(min=0),
    metavar="N",
    help="Exit with 1 if a service has more dead letters of a stream.",
)
@pass_program
def status(
    program: Program,
    of_all: bool,
    watch: bool,
    interval: float,
    in_json: bool,
    max_lag: int | None,
    max_dead: int | None,
) -> None:
    """Show this service's lag, pending events, retries and dead letters, and its workers.

    There is a line for each stream that the app subscribes to or publishes. Without an app, it
    is each stream where the service has a group, retries or dead letters; without a service,
    --all applies. Nothing is changed.
    """
    report = _Report(program, of_all or not program.names_service, in_json, max_lag, max_dead)

    if watch:
        with suppress(KeyboardInterrupt):
            report.watch(interval)
    elif report.show():
        raise click.exceptions.Exit(1)


@dataclass(frozen=True, slots=True)
class _Report:
    """Reads the status of streams and prints it, once or again and again."""

    program: Program
    of_all: bool
    in_json: bool
    max_lag: int | None
    max_dead: int | None

    def show(self) -> bool:
        """Print the status; return True if a limit is exceeded.

        :raises OperationError: Redis is not available.
        """
        statuses, excess = self._read()
        found = as_json(statuses, excess)
        click.echo(to_json(found, indent=2) if self.in_json else self._as_text(statuses))

        for sentence in excess:
            click.echo(sentence, err=True)

        return bool(excess)

    def watch(self, interval: float) -> None:
        """Print the status every ``interval`` seconds, until the reader of stdout exits."""
        while not reader_is_gone():
            try:
                statuses, excess = self._read()
            except OperationError as error:
                self._print_update(str(error), is_error=True)
            else:
                warnings = [click.style(sentence, fg="red") for sentence in excess]
                text = "\n".join([self._as_text(statuses), *warnings])
                self._print_update(to_json(as_json(statuses, excess)) if self.in_json else text)

            time.sleep(interval)

    def _print_update(self, text: str, *, is_error: bool = False) -> None:
        if self.in_json:
            click.echo(text, err=is_error)
            return

        if sys.stdout.isatty():
            click.clear()

        click.echo(f"{time.strftime('%H:%M:%S')}  Press Ctrl-C to exit.\n\n{text}\n")

    def _read(self) -> tuple[list[StreamStatus], list[str]]:
        deadline = time.monotonic() + PATIENCE

        with self.program.streams("status", deadline) as access:
            names = access.names()
            flood = too_many_names(access.keys.names, len(names))
            statuses = read_statuses(access, self._services(names[: TIMING.max_names]))

        if not self.of_all and not self.program.declares:
            # Without an app, only its groups tell which streams are the service's.
            statuses = [status for status in statuses if status.groups or status.unreadable]

        excess = list(excess_of(statuses, lag=self.max_lag, dead=self.max_dead))

        if flood is not None:
            excess.append(str(flood))

        if not statuses and (self.max_lag is not None or self.max_dead is not None):
            # A misspelt name must not pass as a healthy service.
            excess.append(f"{self._as_text(statuses)} No limit could be checked.")

        return statuses, excess

    def _services(self, names: Sequence[str]) -> Mapping[str, Sequence[str] | None]:
        """Return the services to show for each signal; ``None`` stands for all."""
        node = self.program.node
        own = subscribed(node, names)

        if self.of_all:
            return dict.fromkeys(sorted({*names, *own}))

        service = [node.config.service]

        if not self.program.declares:
            return dict.fromkeys(names, service)

        both = sorted(own | published(node, names))
        return {name: service if name in own else [] for name in both}

    def _as_text(self, statuses: Sequence[StreamStatus]) -> str:
        if statuses:
            return "\n".join(status_report(statuses))

        config = self.program.node.config

        if self.of_all:
            return f"There is no stream under the prefix {config.prefix!r} yet."

        return (
            f"The service {config.service!r} has no stream under the prefix {config.prefix!r} "
            "yet. To show all services, pass --all."
        )


def _read_service(name: str) -> str:
    if SERVICE_NAME.fullmatch(name):
        return name

    raise ValueError(
        f"{name!r} is not a valid name of a service. Use letters, digits, '_', '-' and '.', at "
        "most 64."
    )


@click.group(
    cls=Group,
    short_help="Remove or rename a service that no longer runs.",
    epilog="""Examples:

    \b
      flask eventbus services forget old_mailer --dry-run
      flask eventbus services rename mailer notifier

    Exit codes: 0 if it was done; 1 if it was not, with the reason on stderr; 2 for a wrong
    argument.""",
)
def services() -> None:
    """Remove or rename a service's groups, retries and dead letters in Redis."""


@services.command(
    short_help="Remove a service's groups, retries and dead letters.",
    epilog="""Exit codes: 0 if it was removed, and with --dry-run; 1 if it was not, since you
    answered no, its workers run, Redis has nothing of it, or Redis is not available; 2 for a
    wrong argument.""",
)
@click.argument("name", metavar="NAME", callback=parsed(_read_service))
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@yes_option
@pass_program
def forget(program: Program, name: str, dry_run: bool, yes: bool) -> None:
    """Remove the service NAME from all streams, after showing what is removed and asking.

    The command deletes its groups, retries, dead letters and known ids. The streams and their
    events stay. Stop the service's workers first.
    """
    with program.streams("services") as access:
        holdings, _ = _shown(access, name)

        if dry_run:
            return

        refuse_running(name, holdings)
        confirm("Remove all of this for good?", yes)
        forget_service(access, name, holdings)

    click.echo(f"Removed {name!r} from Redis.")


@services.command(
    short_help="Move a service's groups, retries and dead letters to another name.",
    epilog="""Exit codes: 0 if it was renamed, and with --dry-run; 1 if it was not, since you
    answered no, workers of either name run, NEW has a group or dead letters already, Redis has
    nothing of OLD, or Redis is not available; 2 for a wrong argument.""",
)
@click.argument("old", metavar="OLD", callback=parsed(_read_service))
@click.argument("new", metavar="NEW", callback=parsed(_read_service))
@click.option("--dry-run", is_flag=True, help="Only show what would be moved.")
@yes_option
@pass_program
def rename(program: Program, old: str, new: str, dry_run: bool, yes: bool) -> None:
    """Rename the service OLD to NEW, after showing what is moved and asking.

    NEW continues where OLD stopped: it gets OLD's groups at the same places, its pending events,
    retries, dead letters and known ids. Stop OLD's workers first, and start NEW's workers
    afterwards.
    """
    if old == new:
        raise click.UsageError("OLD and NEW are the same name.")

    with program.streams("services") as access:
        holdings, unreadable = _shown(access, old)
        taken, others = find_holdings(access, new)

        if foreign := sorted(others.keys() - unreadable.keys()):
            # A key of OLD cannot be moved there.
            raise click.ClickException(printable(str(others[foreign[0]])))

        _refuse_both(new, holdings, taken)

        if dry_run:
            return

        refuse_running(old, holdings)
        refuse_running(new, taken)
        confirm(f"Move all of this to {new!r}?", yes)
        rename_service(access, old, new, holdings)

    click.echo(
        f"Renamed {old!r} to {new!r}. Start its workers with 'EVENTBUS_SERVICE' set to {new!r}."
    )


def _shown(access: StreamAccess, service: str) -> tuple[list[Holding], dict[str, Alarm]]:
    """Print what Redis has of a service; return it, and the keys that cannot be read.

    :raises click.ClickException: Redis has nothing of it.
    """
    holdings, unreadable = find_holdings(access, service)

    if not holdings:
        known = ", ".join(map(repr, known_services(access))) or "none"
        raise click.ClickException(
            f"Redis has nothing of {service!r}. Services with a group at a stream: {known}."
        )

    rows = [_holding_row(holding.name, holding.status) for holding in holdings]
    click.echo("\n".join(table(_HOLDINGS, rows, names=(0,))))

    for alarm in unreadable.values():
        click.echo(f"\nLeft as it is: {printable(str(alarm))}")

    return holdings, unreadable


def _holding_row(name: str, group: GroupStatus) -> tuple[str, ...]:
    lag = "?" if group.exists and group.lag is None else f"{group.lag or 0}"
    exists = "yes" if group.exists else "no"
    return name, exists, lag, f"{group.pending}", f"{group.retries}", f"{group.dead}"


def _refuse_both(new: str, old: Sequence[Holding], taken: Sequence[Holding]) -> None:
    names = sorted({holding.name for holding in old} & {holding.name for holding in taken})

    if names:
        raise click.ClickException(
            f"{new!r} has groups, retries or dead letters of {', '.join(map(repr, names))} "
            f"already, and two services cannot be merged. If {new!r} may lose them, run first: "
            f"services forget {new}"
        )
