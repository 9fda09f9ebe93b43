"""The commands ``services forget`` and ``services rename``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from ..admin.services import Holding, Services, refuse_running
from ..config import SERVICE_NAME
from .base import Command, Group, Program, confirm, pass_program, yes_option
from .output import table

_HEADS = ("Stream", "Group", "Lag", "Pending", "Retries", "Dead")


def _read_service(ctx: click.Context, param: click.Parameter, name: str) -> str:
    if SERVICE_NAME.fullmatch(name):
        return name

    raise click.BadParameter(
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
    cls=Command,
    short_help="Remove a service's groups, retries and dead letters.",
    epilog="""Exit codes: 0 if it was removed, and with --dry-run; 1 if it was not, since you
    answered no, its workers run, Redis has nothing of it, or Redis is not available; 2 for a
    wrong argument.""",
)
@click.argument("name", metavar="NAME", callback=_read_service)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@yes_option
@pass_program
def forget(program: Program, name: str, dry_run: bool, yes: bool) -> None:
    """Remove the service NAME from all streams, after showing what is removed and asking.

    The command deletes its groups, retries, dead letters and known ids. The streams and their
    events stay. Stop the service's workers first.
    """
    with program.streams("services") as access:
        found = Services(access)
        holdings = _shown(found, name)

        if dry_run:
            return

        refuse_running(name, holdings)
        confirm("Remove all of this for good?", yes)
        found.forget(name, holdings)

    click.echo(f"Removed {name!r} from Redis.")


@services.command(
    cls=Command,
    short_help="Move a service's groups, retries and dead letters to another name.",
    epilog="""Exit codes: 0 if it was renamed, and with --dry-run; 1 if it was not, since you
    answered no, workers of either name run, NEW has a group or dead letters already, Redis has
    nothing of OLD, or Redis is not available; 2 for a wrong argument.""",
)
@click.argument("old", metavar="OLD", callback=_read_service)
@click.argument("new", metavar="NEW", callback=_read_service)
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
        found = Services(access)
        holdings = _shown(found, old)
        taken = found.holdings(new)
        _refuse_both(new, holdings, taken)

        if dry_run:
            return

        refuse_running(old, holdings)
        refuse_running(new, taken)
        confirm(f"Move all of this to {new!r}?", yes)
        found.rename(old, new, holdings)

    click.echo(
        f"Renamed {old!r} to {new!r}. Start its workers with 'EVENTBUS_SERVICE' set to {new!r}."
    )


def _shown(found: Services, service: str) -> list[Holding]:
    """Print what Redis has of a service, and return it.

    :raises click.ClickException: Redis has nothing of it.
    """
    holdings = found.holdings(service)

    if not holdings:
        known = ", ".join(map(repr, found.known())) or "none"
        raise click.ClickException(
            f"Redis has nothing of {service!r}. Services with a group at a stream: {known}."
        )

    click.echo("\n".join(table(_HEADS, list(_rows(holdings)), names=(0,))))
    return holdings


def _rows(holdings: Sequence[Holding]) -> Iterator[list[str]]:
    for holding in holdings:
        group = holding.status
        yield [
            holding.name,
            "yes" if group.exists else "no",
            "?" if group.exists and group.lag is None else str(group.lag or 0),
            str(group.pending),
            str(group.retries),
            str(group.dead),
        ]


def _refuse_both(new: str, old: Sequence[Holding], taken: Sequence[Holding]) -> None:
    names = sorted({holding.name for holding in old} & {holding.name for holding in taken})

    if names:
        raise click.ClickException(
            f"{new!r} has groups, retries or dead letters of {', '.join(map(repr, names))} "
            f"already, and two services cannot be merged. If {new!r} may lose them, run first: "
            f"services forget {new}"
        )
