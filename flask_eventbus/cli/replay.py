"""The command ``replay``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from ..admin.dead_letters import is_called
from ..admin.overview import Overview
from ..admin.places import Place, clock
from ..admin.replay import Replay
from ..admin.streams import StreamAccess
from ..bus import stop_on_signals
from ..codec.entry_ids import MOST, EntryId, entry_id, id_text
from ..errors import ConfigError
from ..node import Node
from ..routing.subscriptions import Subscription, subscription_for
from ..text import counted, printable
from .arguments import read_moment, read_name
from .base import Command, Program, pass_program, service_of

#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-replay"


@click.command(
    cls=Command,
    short_help="Bring past events again.",
    epilog="""A place is the id of an entry, a time, an age, or 'earliest'. A time without an
    offset is this machine's.

    Examples:

    \b
      flask eventbus replay user_registered --from 2h --dry-run
      flask eventbus replay user_registered --from 2026-11-22T14:00 --to 1h
      flask eventbus replay price_changed --from earliest --rate 50
      flask eventbus replay order_paid --from 1d --receiver bill

    Exit codes: 0 when all of them were handled; 1 when a receiver failed, or it ended before
    the end; 2 for a mistake in the command. A second Ctrl-C ends at once, with 130.""",
)
@click.argument("name", metavar="NAME", callback=read_name)
@click.option(
    "--from",
    "first",
    required=True,
    metavar="PLACE",
    callback=read_moment,
    help="Where in the stream to begin.",
)
@click.option(
    "--to",
    "last",
    metavar="PLACE",
    callback=read_moment,
    help="Where to end; with what is there now unless given.",
)
@click.option(
    "--receiver",
    metavar="NAME",
    help="Run only this one: 'mailer.receivers.send_welcome' or 'send_welcome'.",
)
@click.option("--dry-run", "dry", is_flag=True, help="Only count what would be brought.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Events per second, at most.",
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
    """Bring past events of a stream again to this service's receivers, in order.

    They run in this process, beside what workers do: the position of the service, what is
    pending and what counts as a duplicate stay as they are, and nothing is tried again.
    'current_event.replayed' is true meanwhile. Ctrl-C ends after the event that runs.
    """
    node = _node_of(program)
    receivers = _receivers_of(node, name, receiver)
    service = service_of(program)
    subscription = _subscription_of(node, name, service)

    work = Replay(
        config=node.config,
        codec=node.codec,
        dispatcher=node.dispatcher,
        subscription=subscription,
        name=name,
        only=receivers[0] if receiver is not None else None,
    )

    with StreamAccess(node.config, name=CLIENT_NAME) as access, stop_on_signals() as told:
        first, last = _bounds(first, last, access.now())
        end = _end_of(access, name, last)

        try:
            work.run(access, first.first, end, told=told, rate=rate, dry=dry)
        finally:
            click.echo("\n".join(_report(work, receivers, dry=dry)))

        if told.is_set():
            raise click.ClickException(
                f"It was told to end, after {work.last or 'nothing'}. Go on with: --from "
                f"{_next(work.last) or id_text(first.first)}"
            )

    if not node.flush():
        raise click.ClickException(
            "Not everything that receivers sent is with Redis. What is lost is logged by id."
        )

    if work.failures:
        raise click.exceptions.Exit(1)


def _node_of(program: Program) -> Node:
    if not program.declares:
        raise ConfigError(
            "There are no receivers: replay runs them in its own process. Name the app, as in "
            "'flask --app mailer eventbus replay', or a module of receivers with --receivers."
        )

    if not program.node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False: no receiver would run. Set it to True to replay."
        )

    return program.node


def _receivers_of(node: Node, name: str, wanted: str | None) -> list[str]:
    """The names of the receivers of a signal that are to run."""
    known = sorted({found.name for found in Overview(node).receivers_of(Subscription(name=name))})

    if not known:
        raise ConfigError(
            f"Nothing here receives {name!r}. Connect a receiver with @bus.on({name!r}), or name "
            "its module in 'EVENTBUS_RECEIVERS'."
        )

    found = [each for each in known if wanted is None or is_called(each, [wanted])]

    if wanted is None or len(found) == 1:
        return found

    raise ConfigError(
        f"{printable(wanted)!r} is the name of {'several receivers' if found else 'no receiver'} "
        f"of {name!r} here. Write one of: {', '.join(found or known)}."
    )


def _subscription_of(node: Node, name: str, service: str) -> Subscription:
    found = subscription_for(name, node.subscriptions)

    if found is not None:
        return found

    raise ConfigError(
        f"{service!r} does not subscribe to {name!r}: no event of it would ever reach its "
        f"receivers. Subscribe with @bus.on({name!r}), or in 'EVENTBUS_SUBSCRIBE'."
    )


def _bounds(first: Place, last: Place | None, now: int) -> tuple[Place, Place | None]:
    """Both places, with ages as they are at the time ``now``, in milliseconds.

    :raises click.UsageError: the end lies before the beginning.
    """
    first, last = first.at(now), None if last is None else last.at(now)

    if last is not None and last.last < first.first:
        raise click.UsageError("--to lies before --from: nothing is between them.")

    return first, last


def _end_of(access: StreamAccess, name: str, last: Place | None) -> EntryId:
    """The last entry to bring: of what is there now, so that it comes to an end."""
    stream = access.stream_of(name)

    if not stream:
        raise click.ClickException(
            f"There is no stream of {name!r} at this prefix: nothing was published by stream yet, "
            "or Redis lost it."
        )

    newest = entry_id(stream["last-generated-id"])
    return newest if last is None else min(newest, last.last)


def _next(entry: str) -> str:
    if not entry:
        return ""

    milliseconds, number = entry_id(entry)
    return id_text((milliseconds, number + 1) if number < MOST else (milliseconds + 1, 0))


def _report(work: Replay, receivers: list[str], *, dry: bool) -> Iterator[str]:
    yield _sum(work, dry)

    if dry:
        yield f"Receivers: {', '.join(map(printable, receivers))}."

    for entry, reason in work.unreadable.items():
        yield f"  {entry} ({clock(entry_id(entry)[0])}) does not read: {printable(reason)}"

    for receiver, failures in sorted(work.failed.items()):
        yield f"{printable(receiver)} failed at {counted(len(failures), 'event')}:"

        for failed in failures:
            yield f"  {failed.event_id} ({failed.entry}): {printable(failed.error)}"


def _sum(work: Replay, dry: bool) -> str:
    parts = [f"{work.handled} {'would be brought' if dry else 'handled'}"]
    parts += [f"{work.failures} failed"] if work.failures else []
    parts += [f"{len(work.unreadable)} unreadable"] if work.unreadable else []
    parts += [f"{work.others} of services that are not heard"] if work.others else []
    return f"Read {counted(work.read, 'event')} of {work.name!r}: {', '.join(parts)}."
