"""The commands ``services forget`` and ``services rename``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from ..admin.services import Holding, Services, refuse_running
from ..admin.streams import StreamAccess
from ..config import SERVICE_NAME
from .base import Command, Group, Program, pass_program
from .output import fitted_table

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-services"

_HEADS = ("Stream", "Group", "Lag", "Pending", "Retries", "Dead")


def _read_service(ctx: click.Context, param: click.Parameter, name: str) -> str:
    if SERVICE_NAME.fullmatch(name):
        return name

    raise click.BadParameter(
        f"{name!r} cannot be a service's name. Use letters, digits, '_', '-' and '.', at most 64."
    )


@click.group(
    cls=Group,
    short_help="Remove or rename a service that was taken out of use.",
    epilog="""Examples:

    \b
      flask eventbus services forget old_mailer --dry-run
      flask eventbus services rename mailer notifier

    Exit codes: 0 when it is done; 1 when it is not, and it says why; 2 for a mistake in the
    command.""",
)
def services() -> None:
    """Remove what Redis keeps of a service, or give it another name."""


@services.command(
    cls=Command,
    short_help="Remove a service's groups, retries and dead letters.",
    epilog="""Exit codes: 0 when it is removed, or with --dry-run; 1 when it was not: the answer
    was no, its workers run, Redis keeps nothing of it, or Redis cannot be asked; 2 for a mistake
    in the command.""",
)
@click.argument("name", metavar="NAME", callback=_read_service)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_program
def forget(program: Program, name: str, dry_run: bool, yes: bool) -> None:
    """Remove all that Redis keeps of the service NAME in streams, after showing it and asking.

    Its groups, retries, dead letters and known ids are deleted. The streams and the events in
    them stay. Stop the service's workers first.
    """
    with StreamAccess(program.node.config, name=CLIENT_NAME) as access:
        found = Services(access)
        holdings = _shown(found, name)

        if dry_run:
            return

        refuse_running(name, holdings)

        if not yes:
            click.confirm(f"Remove all of this? {name!r} cannot get it back", abort=True)

        found.forget(name, holdings)

    click.echo(f"Redis keeps nothing of {name!r} any more.")


@services.command(
    cls=Command,
    short_help="Give a service's groups, retries and dead letters to another name.",
    epilog="""Exit codes: 0 when it is renamed, or with --dry-run; 1 when it was not: the answer
    was no, workers of either name run, the new name has a group or dead letters already, Redis
    keeps nothing of the old one, or Redis cannot be asked; 2 for a mistake in the command.""",
)
@click.argument("old", metavar="OLD", callback=_read_service)
@click.argument("new", metavar="NEW", callback=_read_service)
@click.option("--dry-run", is_flag=True, help="Only show what would be moved.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_program
def rename(program: Program, old: str, new: str, dry_run: bool, yes: bool) -> None:
    """Let the service NEW go on where OLD stopped, after showing what is moved and asking.

    NEW gets groups at the same places, the events that were pending, the retries, the dead
    letters and the known ids. Stop OLD's workers first, and start NEW's workers afterwards.
    """
    if old == new:
        raise click.UsageError("OLD and NEW are the same name.")

    with StreamAccess(program.node.config, name=CLIENT_NAME) as access:
        found = Services(access)
        holdings = _shown(found, old)
        taken = found.holdings(new)
        _refuse_both(new, holdings, taken)

        if dry_run:
            return

        refuse_running(old, holdings)
        refuse_running(new, taken)

        if not yes:
            click.confirm(f"Give all of this to {new!r}?", abort=True)

        found.rename(old, new, holdings)

    click.echo(f"{old!r} is {new!r} now. Start its workers with 'EVENTBUS_SERVICE' set to {new!r}.")


def _shown(found: Services, service: str) -> list[Holding]:
    """Show what Redis keeps of a service, and return it.

    :raises click.ClickException: it keeps nothing.
    """
    holdings = found.holdings(service)

    if not holdings:
        known = ", ".join(map(repr, found.known())) or "none"
        raise click.ClickException(
            f"Redis keeps nothing of {service!r}. Services with a group at a stream: {known}."
        )

    click.echo("\n".join(fitted_table(_HEADS, list(_rows(holdings)), names=(0,))))
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
            f"Redis keeps something of {new!r} already, for {', '.join(map(repr, names))}: "
            f"two services cannot be merged. If {new!r} may lose it, run first: services forget "
            f"{new}"
        )
