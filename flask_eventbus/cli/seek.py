"""The command ``seek``."""

from __future__ import annotations

import click

from ..admin.places import Place, clock
from ..admin.seek import Move, Seek
from ..admin.streams import StreamAccess
from ..codec.entry_ids import EARLIEST, MOST, EntryId, id_text
from ..text import counted
from .arguments import read_moment, read_name
from .base import Command, Program, pass_program, service_of

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-seek"


def _read_target(ctx: click.Context, param: click.Parameter, text: str) -> Place | None:
    return None if text == "new" else read_moment(ctx, param, text)


@click.command(
    cls=Command,
    short_help="Move a service to another place in a stream.",
    epilog="""PLACE is 'new' (after the last event), 'earliest' (before the first event), the id of
    an entry (after that entry), or a time or an age (before the first event since then). A
    time without an offset is local time.

    Examples:

    \b
      flask eventbus seek user_registered --to 2h
      flask eventbus seek user_registered --to 2026-11-22T14:00
      flask eventbus seek price_changed --to new --yes
      python -m flask_eventbus --service mailer seek paid --to earliest

    Exit codes: 0 if the service is at PLACE now; 1 if it was not moved, since you answered
    no, it has no group at this stream, or Redis is not available; 2 for a wrong argument.""",
)
@click.argument("name", metavar="NAME", callback=read_name)
@click.option(
    "--to",
    "place",
    required=True,
    metavar="PLACE",
    callback=_read_target,
    help="Where the service continues.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@pass_program
def seek(program: Program, name: str, place: Place | None, yes: bool) -> None:
    """Move this service to another place in the stream of a signal.

    The command shows how many events are skipped or repeated, and asks. All workers of the
    service continue from there; they may keep running. Pending events, retries and dead letters
    stay as they are.
    """
    service = service_of(program)

    with StreamAccess(program.node.config, name=CLIENT_NAME) as access:
        seeker = Seek(access, service)
        move = seeker.plan(name, place)
        click.echo("\n".join(_lines(move)))

        if move.here == move.target:
            return

        if not yes:
            click.confirm(f"Move {service!r}?", abort=True)

        seeker.make(move)

    click.echo(f"Moved {service!r} to {_shown(move.target)}.")


def _lines(move: Move) -> list[str]:
    where = f"{move.service!r} in the stream of {move.name!r}"

    if move.here == move.target:
        return [f"{where} is at {_shown(move.here)} already."]

    return [
        f"{where}",
        f"  from  {_shown(move.here)}",
        f"  to    {_shown(move.target)}",
        _effect(move),
        *([_pending(move.pending)] if move.pending else []),
    ]


def _pending(count: int) -> str:
    return f"{_come(count)} pending: workers finish {_them(count)}."


def _effect(move: Move) -> str:
    if move.skipped:
        return f"{_come(move.skipped)} skipped: no worker will get {_them(move.skipped)}."

    if move.repeated:
        return f"{_come(move.repeated)} repeated: receivers run for {_them(move.repeated)} again."

    return "No event is skipped or repeated."


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _come(count: int) -> str:
    return f"{counted(count, 'event')} {'is' if count == 1 else 'are'}"


def _shown(found: EntryId) -> str:
    if found == EARLIEST:
        return "the beginning"

    # Seeking to a time puts the group at the last possible id of the millisecond before it.
    is_moment = found[1] == MOST
    return clock(found[0] + 1) if is_moment else f"{id_text(found)} ({clock(found[0])})"
