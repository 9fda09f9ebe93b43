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
@click.argument("name", metavar="NAME", callback=read_name)
@click.option(
    "--from",
    "first",
    required=True,
    metavar="PLACE",
    callback=read_moment,
    help="First event to replay.",
)
@click.option(
    "--to",
    "last",
    metavar="PLACE",
    callback=read_moment,
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

    with StreamAccess(node.config, name=CLIENT_NAME) as access, stop_on_signals() as stopping:
        first, last = _bounds(first, last, access.now())
        end = _end_of(access, name, last)

        try:
            work.run(access, first.first, end, stopping=stopping, rate=rate, dry=dry)
        finally:
            click.echo("\n".join(_report(work, receivers, dry=dry)))

        if stopping.is_set():
            raise click.ClickException(
                f"Stopped early, after {work.last or 'no entry'}. To continue, pass: --from "
                f"{_next(work.last) or id_text(first.first)}"
            )

    if not node.flush():
        raise click.ClickException(
            "Some events that receivers sent did not reach Redis. The log has the ids of those "
            "that are lost."
        )

    if work.failures:
        raise click.exceptions.Exit(1)


def _node_of(program: Program) -> Node:
    if not program.declares:
        raise ConfigError(
            "There are no receivers to run: replay runs them in its own process. Name the app, as "
            "in 'flask --app mailer eventbus replay', or a module of receivers with --receivers."
        )

    if not program.node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False, so no receiver would run. Set it to True to replay."
        )

    return program.node


def _receivers_of(node: Node, name: str, wanted: str | None) -> list[str]:
    """Return the names of the receivers to run.

    :raises ConfigError: no receiver has the name ``wanted``, or several have it.
    """
    known = sorted({found.name for found in Overview(node).receivers_of(Subscription(name=name))})

    if not known:
        raise ConfigError(
            f"Nothing here receives {name!r}. Connect a receiver with @bus.on({name!r}), or "
            "name its module in 'EVENTBUS_RECEIVERS'."
        )

    found = [each for each in known if wanted is None or is_called(each, [wanted])]

    if wanted is None or len(found) == 1:
        return found

    raise ConfigError(
        f"{printable(wanted)!r} is the name of {'several receivers' if found else 'no receiver'} "
        f"of {name!r}. Write one of: {', '.join(found or known)}."
    )


def _subscription_of(node: Node, name: str, service: str) -> Subscription:
    found = subscription_for(name, node.subscriptions)

    if found is not None:
        return found

    raise ConfigError(
        f"{service!r} does not subscribe to {name!r}, so its receivers never get an event of it. "
        f"Subscribe with @bus.on({name!r}), or in 'EVENTBUS_SUBSCRIBE'."
    )


def _bounds(first: Place, last: Place | None, now: int) -> tuple[Place, Place | None]:
    """Return both places, with ages counted back from ``now``, in milliseconds since 1970.

    :raises click.UsageError: ``last`` is before ``first``.
    """
    first, last = first.at(now), None if last is None else last.at(now)

    if last is not None and last.last < first.first:
        raise click.UsageError("--to is before --from. Swap them.")

    return first, last


def _end_of(access: StreamAccess, name: str, last: Place | None) -> EntryId:
    """Return the id of the last entry to replay, at most the newest one now, so that it ends.

    :raises click.ClickException: the signal has no stream.
    """
    stream = access.stream_of(name)

    if not stream:
        raise click.ClickException(
            f"There is no stream of {name!r} under this prefix: nothing was published to it yet, "
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
