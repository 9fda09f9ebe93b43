"""The commands ``replay`` and ``seek``, which begin at a place in a stream."""

from __future__ import annotations

from collections.abc import Iterator

import click

from ..admin.replay import Replay, prepare
from ..admin.services import Move, make_move, plan_move
from ..admin.streams import Place, read_place
from ..bus import stop_on_signals
from ..codec.records import EARLIEST, MAX_PART, EntryId, entry_id, id_text
from ..errors import ConfigError
from ..text import clock, counted, printable
from .base import Command, Program, confirm, name_argument, parsed, pass_program, yes_option


@click.command(
    cls=Command,
    short_help="Run receivers for past events again.",
    epilog="""PLACE is the id of an entry, a time, an age, or 'earliest'. A time without an offset
    is local time.

    Examples:

    \b
      flask eventbus replay user_registered --from 2h --dry-run
      flask eventbus replay user_registered --from 2026-11-22T14:00 --to 1h
      flask eventbus replay price_changed --from earliest --rate 50
      flask eventbus replay order_paid --from 1d --receiver bill

    Exit codes: 0 if all events were handled; 1 if a receiver failed, or the replay was
    stopped early; 2 for a wrong argument. A second Ctrl-C ends at once, with 130.""",
)
@name_argument
@click.option(
    "--from",
    "first",
    required=True,
    metavar="PLACE",
    callback=parsed(read_place),
    help="First event to replay.",
)
@click.option(
    "--to",
    "last",
    metavar="PLACE",
    callback=parsed(read_place),
    help="Last event to replay; by default the newest one when the command starts.",
)
@click.option(
    "--receiver",
    metavar="NAME",
    help="Run only this receiver: 'mailer.receivers.send_welcome' or 'send_welcome'.",
)
@click.option("--dry-run", "dry", is_flag=True, help="Count the events, and run no receiver.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Replay at most N events per second.",
)
@pass_program
def replay(
    program: Program,
    name: str,
    first: Place,
    last: Place | None,
    receiver: str | None,
    dry: bool,
    rate: float | None,
) -> None:
    """Run this service's receivers again for past events of a stream, in order.

    Receivers run in this process, and workers are not affected: the position of the service,
    its pending events and its known duplicates stay as they are. A receiver that fails is not
    retried. 'current_event.replayed' is True in receivers. Ctrl-C stops after the current event.
    """
    if not program.declares:
        raise ConfigError(
            "There are no receivers to run: replay runs them in its own process. Name the app, as "
            "in 'flask --app mailer eventbus replay', or a module of receivers with --receivers."
        )

    node = program.enabled_node("no receiver would run", "replay")
    work = prepare(node, name, receiver)

    with program.streams("replay") as access, stop_on_signals() as stopping:
        try:
            start, end = work.bounds(access, first, last)
        except ValueError as error:
            raise click.UsageError("--to is before --from. Swap them.") from error

        try:
            work.run(access, start, end, stopping=stopping, rate=rate, dry=dry)
        finally:
            click.echo("\n".join(_report(work, dry=dry)))

        if stopping.is_set():
            raise click.ClickException(
                f"Stopped early, after {work.last or 'no entry'}. To continue, pass: --from "
                f"{work.next or id_text(start)}"
            )

    if not node.flush():
        raise click.ClickException(
            "Some events that receivers sent did not reach Redis. The log has the ids of those "
            "that are lost."
        )

    if work.failures:
        raise click.exceptions.Exit(1)


def _report(work: Replay, *, dry: bool) -> Iterator[str]:
    yield _sum(work, dry)

    if dry:
        yield f"Receivers: {', '.join(map(printable, work.receivers))}."

    for entry, reason in work.unreadable.items():
        yield f"  {entry} ({clock(entry_id(entry)[0])}) cannot be decoded: {printable(reason)}"

    for receiver, failures in sorted(work.failed.items()):
        yield f"{printable(receiver)} failed at {counted(len(failures), 'event')}:"

        for failed in failures:
            yield f"  {failed.event_id} ({failed.entry}): {printable(failed.error)}"


def _sum(work: Replay, dry: bool) -> str:
    parts = [f"{work.handled} {'would be replayed' if dry else 'handled'}"]
    parts += [f"{work.failures} failed"] if work.failures else []
    parts += [f"{len(work.unreadable)} unreadable"] if work.unreadable else []
    parts += [f"{work.others} from services that no receiver listens to"] if work.others else []
    return f"Read {counted(work.read, 'event')} of {work.name!r}: {', '.join(parts)}."


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
@name_argument
@click.option(
    "--to",
    "place",
    required=True,
    metavar="PLACE",
    callback=parsed(lambda text: None if text == "new" else read_place(text)),
    help="Where the service continues.",
)
@yes_option
@pass_program
def seek(program: Program, name: str, place: Place | None, yes: bool) -> None:
    """Move this service to another place in the stream of a signal.

    The command shows how many events are skipped or repeated, and asks. All workers of the
    service continue from there; they may keep running. Pending events, retries and dead letters
    stay as they are.
    """
    service = program.service

    with program.streams("seek") as access:
        move = plan_move(access, service, name, place)
        click.echo("\n".join(_lines(move)))

        if move.here == move.target:
            return

        confirm(f"Move {service!r}?", yes)
        make_move(access, move)

    click.echo(f"Moved {service!r} to {_shown(move.target)}.")


def _lines(move: Move) -> Iterator[str]:
    where = f"{move.service!r} in the stream of {move.name!r}"

    if move.here == move.target:
        yield f"{where} is at {_shown(move.here)} already."
        return

    yield where
    yield f"  from  {_shown(move.here)}"
    yield f"  to    {_shown(move.target)}"

    if move.skipped:
        yield f"{_are(move.skipped)} skipped: no worker will get {_them(move.skipped)}."
    elif move.repeated:
        yield f"{_are(move.repeated)} repeated: receivers run for {_them(move.repeated)} again."
    else:
        yield "No event is skipped or repeated."

    if move.pending:
        yield f"{_are(move.pending)} pending: workers finish {_them(move.pending)}."


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _are(count: int) -> str:
    return f"{counted(count, 'event')} {'is' if count == 1 else 'are'}"


def _shown(found: EntryId) -> str:
    if found == EARLIEST:
        return "the beginning"

    # Seeking to a time puts the group at the last possible id of the millisecond before it.
    is_moment = found[1] == MAX_PART
    return clock(found[0] + 1) if is_moment else f"{id_text(found)} ({clock(found[0])})"
