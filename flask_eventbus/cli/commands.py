"""The commands themselves, for a program with Flask and for none: ``cli`` and ``__main__``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import click

from ..admin.overview import Overview
from ..admin.publish import Receipt, publish_one
from ..admin.server import census
from ..admin.tail import Filter, Tail
from ..admin.tail_sources import Heard
from ..bus import run_until_signal
from ..checks.doctor import check as check_node
from ..checks.findings import Finding
from ..checks.findings import error as error_finding
from ..errors import ConfigError
from ..node import Node
from .arguments import read_name, read_names, read_pairs, read_payload, values_of
from .base import Command, Program, log_to_stderr, pass_program, reader_is_gone
from .dead import dead
from .output import as_json, as_line, findings_report, live_report, routes_report
from .relay import relay
from .replay import replay
from .seek import seek
from .services import services
from .status import status

# -- run ----------------------------------------------------------------------------------


@click.command(
    cls=Command,
    short_help="Listen, and do nothing else.",
    epilog="""Examples:

    \b
      flask --app mailer eventbus run
      flask --app mailer eventbus run --concurrency 8

    Exit codes: 0 after SIGTERM or Ctrl-C, 1 if there is nothing to listen to or a
    setting is wrong, 2 for a mistake in the command. A second signal ends at once,
    with 128 and the signal's number.""",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1_000),
    metavar="N",
    help="How many receivers run at the same time; 'EVENTBUS_CONCURRENCY' unless given.",
)
@pass_program
def run(program: Program, concurrency: int | None) -> None:
    """Listen, and do nothing else, until SIGTERM or Ctrl-C.

    Then what runs gets 'EVENTBUS_GRACE' seconds to finish. Redis may be away: the
    listener comes back to it by itself.
    """
    node = program.node

    if not node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False: nothing would be heard. Set it to True to listen."
        )

    if not node.subscriptions:
        raise ConfigError(
            "There is nothing to listen to. Connect a receiver with @bus.on('user_registered'), "
            "or name its module in 'EVENTBUS_RECEIVERS'."
        )

    if concurrency is not None:
        node.config = replace(node.config, concurrency=concurrency)
        # A node that is stopped is as new, with its settings as they are now.
        node.stop()

    log_to_stderr()
    run_until_signal(node)


# -- tail ---------------------------------------------------------------------------------


@click.command(
    cls=Command,
    short_help="Show live events, one line each.",
    epilog="""Examples:

    \b
      flask eventbus tail
      flask eventbus tail user_registered 'order_*'
      flask eventbus tail --source accounts --match user_id=7
      flask eventbus tail --json price_changed | jq .data.price
      flask eventbus tail --count 1 --seconds 30 user_registered

    Exit codes: 0 when it ended as asked, by Ctrl-C too; 1 if Redis refuses, was never
    reached, or fewer events came than --count; 2 for a mistake in the command.""",
)
@click.argument("names", nargs=-1, metavar="[NAME]...", callback=read_names)
@click.option("--json", "in_json", is_flag=True, help="One JSON object per line, in full.")
@click.option(
    "--source", "sources", multiple=True, metavar="SERVICE", help="Only what SERVICE sent."
)
@click.option(
    "--match",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    callback=read_pairs,
    help="Only events whose payload has VALUE under KEY.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End after S seconds.",
)
@pass_program
def tail(
    program: Program,
    names: tuple[str, ...],
    in_json: bool,
    sources: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    count: int | None,
    seconds: float | None,
) -> None:
    """Show events as they come, one line each: time, way, name, source, id, payload.

    NAME is a signal or a pattern such as 'order_*'; all signals unless given. The way is
    'channel' or 'stream': both are heard. This is a spectator: it hears what this service
    itself publishes as well, runs no receiver, takes nothing from a stream that others
    are to get, and outlives a Redis that goes and comes back. What it has to say of
    itself, such as bytes that are no event, goes to stderr.
    """
    spectator = _spectator(program.node, names)
    wanted = Filter(sources=sources, values=pairs)
    shown = 0

    with suppress(KeyboardInterrupt):
        for heard in _until_gone(spectator.events(seconds)):
            if wanted.accepts(heard.event):
                line = as_line(heard.event)
                click.echo(as_json(heard.event, heard.entry) if in_json else line)
                shown += 1

            if shown == count:
                return

    if count is not None or not spectator.connected:
        raise click.exceptions.Exit(1)


def _spectator(node: Node, names: tuple[str, ...]) -> Tail:
    config = node.config
    return Tail(
        url=config.url,
        prefix=config.prefix,
        codec=node.declarations.codec.limited(config.max_event_bytes),
        names=names,
        tell=lambda sentence: click.echo(sentence, err=True),
    )


def _until_gone(batches: Iterator[list[Heard]]) -> Iterator[Heard]:
    """What is heard, until nobody reads stdout any more."""
    for heard in batches:
        yield from heard

        if reader_is_gone():
            raise BrokenPipeError("Nobody reads what is shown.")


# -- publish ------------------------------------------------------------------------------


@click.command(
    cls=Command,
    short_help="Publish one event.",
    epilog="""A value is what JSON makes of it where it is a number, true, false, null, a
    list or an object, and text otherwise. For the text "7", use --json.

    Examples:

    \b
      flask eventbus publish user_registered user_id=7 email=ada@example.com
      flask eventbus publish price_changed sku=A-1 price=9.5 'tags=["new"]'
      flask eventbus publish price_changed --json '{"sku": "7", "price": 9.5}'
      cat event.json | flask eventbus publish price_changed --json -
      python -m flask_eventbus publish --stream user_registered user_id=7

    Exit codes: 0 when Redis has it, whoever listens; 1 when it is not published, or that is
    not known, or too few replicas have it; 2 for a mistake in the command.""",
)
@click.argument("name", metavar="NAME", callback=read_name)
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...", callback=read_pairs)
@click.option(
    "--json",
    "payload",
    metavar="OBJECT",
    callback=read_payload,
    help="The payload as a JSON object; '-' reads it from stdin. KEY=VALUE adds to it.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Into the stream, where the app has no route that says so, or there is no app.",
)
@pass_program
def publish(
    program: Program,
    name: str,
    pairs: tuple[tuple[str, str], ...],
    payload: dict[str, Any],
    stream: bool,
) -> None:
    """Publish one event as this service, and tell its id.

    It goes the way of the app's route for NAME, over a channel if there is none. Of a channel
    it is told how many listeners got it, of a stream where in it the event is.
    """
    node = program.node

    if not node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False: nothing is published. Set it to True to publish."
        )

    receipt = publish_one(node, name, {**payload, **values_of(pairs)}, stream=stream)
    heard = _heard(receipt.listeners) if receipt.entry is None else _kept(receipt)
    click.echo(f"Published {receipt.event_id}. {heard}")


def _kept(receipt: Receipt) -> str:
    return f"It is {receipt.entry} in the stream {receipt.key!r}."


def _heard(listeners: int) -> str:
    if not listeners:
        return "Nobody listens to it now."

    return "1 listener got it." if listeners == 1 else f"{listeners} listeners got it."


# -- routes -------------------------------------------------------------------------------


@click.command(
    cls=Command,
    short_help="Show what is published and heard.",
    epilog="""Examples:

    \b
      flask eventbus routes
      flask eventbus routes --json | jq '.subscribes[].name'
      python -m flask_eventbus --url redis://localhost:6379/0 routes

    Exit codes: 0, or 1 if the app cannot be loaded or Redis cannot be asked; 2 for a
    mistake in the command.""",
)
@click.option("--json", "in_json", is_flag=True, help="One JSON object.")
@pass_program
def routes(program: Program, in_json: bool) -> None:
    """Show what this app publishes, what it hears, and its receivers.

    Nothing is asked of Redis. Without an app, it shows which channels have listeners
    now, which streams there are and whose groups read them, and which services listen.
    """
    node = program.node
    found = Overview(node).as_json() if program.declares else census(node)
    report = routes_report if program.declares else live_report
    click.echo(json.dumps(found, indent=2) if in_json else "\n".join(report(found)))


# -- check --------------------------------------------------------------------------------


@click.command(
    cls=Command,
    short_help="Find what is wrong, and what to do.",
    epilog="""Examples:

    \b
      flask eventbus check
      flask eventbus check --strict
      python -m flask_eventbus --url redis://localhost:6379/0 check

    Exit codes: 0 without errors (with --strict: without warnings too), 1 with some,
    2 for a mistake in the command.""",
)
@click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")
@click.option("--json", "in_json", is_flag=True, help="A JSON list of findings.")
@pass_program
def check(program: Program, strict: bool, in_json: bool) -> None:
    """Look this app and its Redis over: what is wrong, and what to do.

    Nothing is published, no receiver runs, and this service does not begin to listen.
    """
    findings = _findings(program)
    bad = {"error", "warning"} if strict else {"error"}

    if in_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo("\n".join(findings_report(findings)))

    if any(finding.level in bad for finding in findings):
        raise click.exceptions.Exit(1)


def _findings(program: Program) -> list[Finding]:
    try:
        node = program.node
    except ConfigError as error:
        return [error_finding(str(error), "Nothing else was looked at: correct this first.")]

    return check_node(node, program=program.declares)


COMMANDS = (run, tail, publish, routes, check, relay, status, dead, replay, seek, services)
